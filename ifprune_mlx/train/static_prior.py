"""What the static arm ranks neurons by.

The opponent of a predictor must know all that can be known without the instruction. A head that was distilled carries
such a prior as its last bias, but a head that went on learning from the loss has moved away from it; what it says on
average over the training instructions is then the better fixed choice by far (docs/log.md, 2026-11-28).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from ifprune_mlx.data.dataloader import shuffled
from ifprune_mlx.data.tokenize import Encoded
from ifprune_mlx.errors import DataError, IfpruneError
from ifprune_mlx.model import Model
from ifprune_mlx.selection.predictor import SparsityPredictor
from ifprune_mlx.selection.selection import Scores
from ifprune_mlx.train.priors import load_prior

INSTRUCTIONS = 128
"""Of each domain, that the mean is taken over."""
_LARGEST = 80.0


def static_prior(
    model: Model,
    predictor: SparsityPredictor | None,
    examples: Mapping[str, Sequence[Encoded]],
    earlier: Sequence[Path] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Scores]:
    """What the predictor says to no instruction in particular: its scores' mean over training instructions, every
    domain counting the same, so that the arms differ in what depends on the instruction alone. Without a predictor,
    the checkpoint's prior.

    Args:
        model: must be dense, and as it was loaded.
        examples: by domain, what is trained on.
        earlier: folders of runs, the first that holds a prior gives it: this run's own, or the one that it begins with,
            whose adapters were healed on that prior.
        progress: is told of instructions read, and of how many.

    Returns:
        Per FFN, float32 `[d_ffn]`, above 0; of the first process, on all of them.

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
            flat = np.concatenate(_of_first(model, predictor, examples, earlier, progress)).astype(np.float32)
        except IfpruneError as exc:
            failure = exc
    if group.size() > 1:
        # The others would wait for ever, or end in a lost connection.
        failed = mx.distributed.all_sum(mx.array(int(failure is not None)), group=group).item()
        if failed and failure is None:
            raise DataError("the first process of this run has ended with an error; see what it says")
        # Summed with the others' zeros, since two machines may round differently and a run must be the same on all.
        flat = np.array(mx.distributed.all_sum(mx.array(flat), group=group))
    if failure is not None:
        raise failure
    return list(np.split(flat, np.cumsum(widths)[:-1]))


def _of_first(
    model: Model,
    predictor: SparsityPredictor | None,
    examples: Mapping[str, Sequence[Encoded]],
    earlier: Sequence[Path],
    progress: Callable[[int, int], None],
) -> list[Scores]:
    """What the first process says."""
    widths = [spec.d_ffn for spec in model.checkpoint.layout.ffns]
    for file in (folder / "prior.safetensors" for folder in earlier):
        if file.is_file():
            found = load_prior(file)
            if [len(scores) for scores in found] != widths:
                raise DataError(
                    f"{file}: is the prior of a model with FFNs of other widths; give the run of this model"
                )
            return found
    if predictor is None:
        return list(model.prior)
    mean = _mean_scores(predictor, examples, progress)
    # Scores without a unit may be large; their order is what counts, and float32 keeps it within these bounds.
    flat = np.exp(mean * min(1.0, _LARGEST / float(np.abs(mean).max(initial=1.0))))
    return list(np.split(flat, np.cumsum(widths)[:-1]))


def _mean_scores(
    predictor: SparsityPredictor, examples: Mapping[str, Sequence[Encoded]], progress: Callable[[int, int], None]
) -> Scores:
    """float32 `[neurons]`."""
    counts = {name: min(len(items), INSTRUCTIONS) for name, items in examples.items()}
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
