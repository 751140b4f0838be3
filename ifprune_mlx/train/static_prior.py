"""Priors: how much answers need each neuron on average. The static arm ranks neurons by one.

The static arm must know all that can be known without the instruction. A distilled head carries such a prior as its
last bias. A head that went on learning from the loss has moved away from it; its mean score over the training
instructions is then the better fixed choice by far (docs/log.md, 2026-11-28).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from ifprune_mlx.checkpoint.atomic_write import write_atomic
from ifprune_mlx.checkpoint.safetensors_io import load_arrays, read_safetensors_header
from ifprune_mlx.data.dataloader import shuffled
from ifprune_mlx.data.tokenize import Example
from ifprune_mlx.errors import DataError, IfpruneError
from ifprune_mlx.model import Model
from ifprune_mlx.selection.predictor import SparsityPredictor
from ifprune_mlx.selection.selection import Scores
from ifprune_mlx.train.attribution import Targets, log_importance

INSTRUCTIONS = 256
"""Most instructions that the mean is taken over, of all domains together; at least eight of each. Each is read by
itself, and the mean of so many is off by a sixteenth of what they differ by."""
_LARGEST = 80.0


def static_prior(
    model: Model,
    predictor: SparsityPredictor | None,
    examples: Mapping[str, Sequence[Example]],
    earlier: Sequence[Path] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Scores]:
    """The predictor's mean score over training instructions, every domain counting the same; without a predictor, the
    checkpoint's prior. So the learned and the static arm differ only in what depends on the instruction.

    Args:
        model: must be dense, and as it was loaded.
        examples: the training examples by domain.
        earlier: folders of runs. The first that holds a prior gives it: this run's own, or the one that it begins with,
            whose adapters were healed on that prior.
        progress: called with (instructions read, instructions to read).

    Returns:
        Per FFN, float32 `[d_ffn]`, above 0. All processes get the first one's.

    Raises:
        DataError: if an earlier prior is damaged.
        PredictorError: if the scores are not numbers.
    """
    group = mx.distributed.init()
    widths = [spec.d_ffn for spec in model.checkpoint.layout.ffns]
    flat = np.zeros(sum(widths), np.float32)
    failure: IfpruneError | None = None
    if group.rank() == 0:
        try:
            flat = np.concatenate(_local_prior(model, predictor, examples, earlier, progress)).astype(np.float32)
        except IfpruneError as exc:
            failure = exc
    if group.size() > 1:
        # Without this the others would wait for ever, or end in a lost connection.
        failed = mx.distributed.all_sum(mx.array(int(failure is not None)), group=group).item()
        if failed and failure is None:
            raise DataError("the first process of this run has ended with an error; see what it says")
        # Summed with the others' zeros, since two machines may round differently and a run must be the same on all.
        flat = np.array(mx.distributed.all_sum(mx.array(flat), group=group))
    if failure is not None:
        raise failure
    return list(np.split(flat, np.cumsum(widths)[:-1]))


def priors(targets: Targets) -> dict[str, list[Scores]]:
    """Geometric means of measured importance by domain; in that of `all` every domain counts the same.

    Returns:
        By domain, and under `all`: per FFN, float32 `[d_ffn]`.
    """
    labels = np.array(targets.domains)
    by_domain: dict[str, list[Scores]] = {domain: [] for domain in sorted(set(targets.domains))}
    overall: list[Scores] = []
    for logs in log_importance(targets):
        means = [logs[labels == domain].mean(axis=0) for domain in by_domain]
        for found, mean in zip(by_domain.values(), means, strict=True):
            found.append(np.exp(mean).astype(np.float32))
        overall.append(np.exp(np.mean(means, axis=0)).astype(np.float32))
    return {**by_domain, "all": overall}


def save_prior(file: Path, prior: Sequence[Scores]) -> None:
    """Write a prior as `ifprune convert --prior` takes it: `prior.N` float32 `[d_ffn]` per FFN."""
    arrays = {f"prior.{index}": mx.array(scores.astype(np.float32)) for index, scores in enumerate(prior)}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, lambda path: mx.save_safetensors(str(path), arrays), DataError)


def load_prior(file: Path, widths: Sequence[int]) -> list[Scores]:
    """Read what `save_prior` wrote.

    Args:
        widths: `d_ffn` of every FFN of the model.

    Raises:
        DataError: if the file is damaged, or of a model with other widths.
    """
    read_safetensors_header(file, DataError)
    arrays = load_arrays(file)
    names = [f"prior.{index}" for index in range(len(arrays))]
    if not arrays or any(name not in arrays or arrays[name].ndim != 1 for name in names):
        raise DataError(f"{file}: does not hold the priors of a model's FFNs; give the file that training wrote")
    if [arrays[name].size for name in names] != list(widths):
        raise DataError(f"{file}: is the prior of a model with FFNs of other widths; give the run of this model")
    return [np.array(arrays[name].astype(mx.float32)) for name in names]


def _local_prior(
    model: Model,
    predictor: SparsityPredictor | None,
    examples: Mapping[str, Sequence[Example]],
    earlier: Sequence[Path],
    progress: Callable[[int, int], None],
) -> list[Scores]:
    """`static_prior` on one process."""
    widths = [spec.d_ffn for spec in model.checkpoint.layout.ffns]
    for file in (folder / "prior.safetensors" for folder in earlier):
        if file.is_file():
            return load_prior(file, widths)
    if predictor is None:
        return list(model.prior)
    mean = _mean_scores(predictor, examples, progress)
    return list(np.split(positive(mean), np.cumsum(widths)[:-1]))


def positive(scores: Scores) -> Scores:
    """Scores of all neurons as a prior holds them, above 0: their exponentials.

    Scores without a unit may be large; their order is what counts, and float32 keeps it within these bounds.
    """
    found: Scores = np.exp(scores * min(1.0, _LARGEST / float(np.abs(scores).max(initial=1.0))))
    return found


def _mean_scores(
    predictor: SparsityPredictor, examples: Mapping[str, Sequence[Example]], progress: Callable[[int, int], None]
) -> Scores:
    """The predictor's mean score of every neuron, float32 `[neurons]`, over a sample of each domain's instructions."""
    most = max(INSTRUCTIONS // len(examples), 8)
    counts = {name: min(len(items), most) for name, items in examples.items()}
    done, means = 0, []
    for name, count in counts.items():
        total = np.zeros(sum(predictor.head.widths))
        for index in shuffled(len(examples[name]), f"static/{name}")[:count]:
            total += np.concatenate(predictor.scores(examples[name][int(index)].instruction))
            done += 1
            progress(done, sum(counts.values()))
        means.append(total / count)
    mean: Scores = np.mean(means, axis=0).astype(np.float32)
    return mean
