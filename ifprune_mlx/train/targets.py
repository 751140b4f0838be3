"""What the predictor is distilled from: for every training chat, what its instruction looks like to the model's first
layers, and which neurons the dense model then used in its answer. Measured once, kept on disk.

A folder of parts: `part-00000.safetensors` with `features` float32 `[n, 2 d]` (last token, then mean over tokens) and
`importance` float16 `[n, neurons]` (all FFNs, one after the other; see `ifprune_mlx.importance`), and `targets.json`,
which says what they belong to. A run that dies goes on after its last whole part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ifprune_mlx.errors import DataError
from ifprune_mlx.files import read_safetensors_header, write_atomic
from ifprune_mlx.importance import recorded
from ifprune_mlx.model import Model
from ifprune_mlx.predictor import hidden_states
from ifprune_mlx.train.encoding import Encoded

PART = 64
"""Chats in one part."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Targets:
    """Measured chats.

    Attributes:
        features: float32 `[n, 2 d]`.
        importance: float16 `[n, neurons]`, memory-mapped where it is large.
        domains: per chat, its label.
        layers: how many first layers the features come from.
        widths: `d_ffn` of every FFN.
    """

    features: Floats
    importance: npt.NDArray[np.float16]
    domains: list[str]
    layers: int
    widths: tuple[int, ...]


def measure(
    model: Model,
    examples: Sequence[Encoded],
    folder: Path,
    layers: int,
    progress: Callable[[int, int], None] | None = None,
) -> Targets:
    """Run chats through the dense model, or go on where an earlier run for the same ones stopped.

    Args:
        examples: chats of one instruction and one answer.
        folder: where the parts are kept.
        layers: first layers that the features are read from.
        progress: called with (chats measured, chats).

    Raises:
        DataError: if the folder holds targets of other chats or of another model, or cannot be written.
    """
    widths = [spec.d_ffn for spec in model.checkpoint.layout.ffns]
    described = {
        "checkpoint": model.checkpoint.id,
        "layers": layers,
        "widths": widths,
        "domains": [chat.domain for chat in examples],
        "chats": hashlib.sha256(b"|".join(chat.tokens.tobytes() for chat in examples)).hexdigest(),
    }
    _claim(folder, described)
    model.switch(None)
    for start in range(0, len(examples), PART):
        file = folder / f"part-{start // PART:05d}.safetensors"
        if not file.is_file():
            _measure_part(model, examples[start : start + PART], file, layers)
        if progress is not None:
            progress(min(start + PART, len(examples)), len(examples))
    return load(folder)


def load(folder: Path) -> Targets:
    """Read what `measure` has finished.

    Raises:
        DataError: if the folder holds no targets, or a part is damaged.
    """
    described = _described(folder)
    if described is None:
        raise DataError(f"{folder}: holds no targets; measure them first")
    features, importance = [], []
    for file in sorted(folder.glob("part-*.safetensors")):
        read_safetensors_header(file, DataError)
        arrays = mx.load(str(file))
        assert isinstance(arrays, dict)
        features.append(np.array(arrays["features"]))
        importance.append(np.array(arrays["importance"]))
    if not features:
        raise DataError(f"{folder}: no part is finished yet; measure the targets first")
    count = sum(len(part) for part in features)
    return Targets(
        np.concatenate(features),
        np.concatenate(importance),
        list(described["domains"][:count]),
        int(described["layers"]),
        tuple(described["widths"]),
    )


def _measure_part(model: Model, chats: Sequence[Encoded], file: Path, layers: int) -> None:
    features, importance = [], []
    for chat in chats:
        prompt = mx.array(chat.tokens[None, : chat.prompt_length])
        hidden = hidden_states(model.module, prompt, layers)[0].astype(mx.float32)
        features.append(mx.concatenate([hidden[-1], hidden.mean(axis=0)]))
        with recorded(model.down_leaves) as recorder:
            recorder.token_weights = mx.array(chat.mask).astype(mx.float32)
            model(mx.array(chat.tokens[None]))
            mx.eval(recorder.state(), features[-1])
            importance.append(np.concatenate(recorder.importance(model.down_norms)).astype(np.float16))
    tensors = {"features": mx.stack(features), "importance": mx.array(np.stack(importance))}
    write_atomic(file, lambda path: mx.save_safetensors(str(path), tensors), DataError)


def _claim(folder: Path, described: dict[str, object]) -> None:
    found = _described(folder)
    if found is not None and found != described:
        raise DataError(f"{folder}: holds targets of other chats or of another model; choose another folder")
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(described)
        write_atomic(folder / "targets.json", lambda path: path.write_text(text, encoding="utf-8"), DataError)


def _described(folder: Path) -> dict | None:  # type: ignore[type-arg]
    file = folder / "targets.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
    except (OSError, ValueError):
        raise DataError(f"{file}: cannot be read; remove the folder and measure again") from None
