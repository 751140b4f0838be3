"""Priors of a data set: how much its answers need each neuron on average, over all of it and by domain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from ifprune_mlx.checkpoint.atomic_write import write_atomic
from ifprune_mlx.checkpoint.safetensors_io import read_safetensors_header
from ifprune_mlx.errors import DataError
from ifprune_mlx.selection.selection import Scores
from ifprune_mlx.train.attribution import Targets, log_importance


def priors(targets: Targets) -> dict[str, list[Scores]]:
    """Geometric means of measured importance, every domain counting the same in that of `all`.

    Returns:
        By domain, and under `all`: per FFN, float32 `[d_ffn]`.
    """
    logs = log_importance(targets.importance, targets.widths)
    labels = np.array(targets.domains)
    means = {domain: logs[labels == domain].mean(axis=0) for domain in sorted(set(targets.domains))}
    means["all"] = np.mean(list(means.values()), axis=0)
    bounds = np.cumsum(targets.widths)[:-1]
    return {name: list(np.split(np.exp(mean).astype(np.float32), bounds)) for name, mean in means.items()}


def save_prior(file: Path, prior: Sequence[Scores]) -> None:
    """Write a prior as `ifprune convert --prior` takes it: `prior.N` float32 `[d_ffn]` per FFN."""
    arrays = {f"prior.{index}": mx.array(scores.astype(np.float32)) for index, scores in enumerate(prior)}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, lambda path: mx.save_safetensors(str(path), arrays), DataError)


def load_prior(file: Path) -> list[Scores]:
    """Read what `save_prior` wrote.

    Raises:
        DataError: if the file is damaged.
    """
    read_safetensors_header(file, DataError)
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    names = [f"prior.{index}" for index in range(len(arrays))]
    if not arrays or any(name not in arrays or arrays[name].ndim != 1 for name in names):
        raise DataError(f"{file}: does not hold the priors of a model's FFNs; give the file that training wrote")
    return [np.array(arrays[name].astype(mx.float32)) for name in names]
