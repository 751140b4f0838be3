"""Measures how much each neuron matters, from the activations of a dense forward pass.

The statistic is GRIFFIN's (arXiv 2404.01365, section 4): per token the hidden activations of an FFN are divided by
their own norm, and a neuron's importance is the root of the mean square over tokens. It is then multiplied by the norm
of the neuron's down row, since that is how far the neuron can move the output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from ifprune_mlx.sparse.ffn import SlicedProjection

if TYPE_CHECKING:
    from ifprune_mlx.selection.selection import Scores


class ImportanceRecorder:
    """Sums squared, row-normalised activations of every FFN while it is attached.

    Attributes:
        token_weights: float `[tokens]` for the forward pass under way; None counts every token as 1.
    """

    def __init__(self, leaves: Sequence[SlicedProjection]) -> None:
        self._leaves = leaves
        self._sums = [mx.zeros((leaf.slots.d_ffn,), mx.float32) for leaf in leaves]
        self._weight = 0.0
        self.token_weights: mx.array | None = None

    def _observe(self, index: int, hidden: mx.array) -> None:
        rows = hidden.reshape(-1, hidden.shape[-1]).astype(mx.float32)
        squares = rows * rows
        total, group = squares.sum(axis=-1, keepdims=True), self._leaves[index].group
        if group is not None:  # the others have the rest of the row
            total = mx.distributed.all_sum(total, group=group)
            # At once: nothing else orders this sum and those of the layers, and every rank has to do them in one order.
            mx.eval(total)
        squares = squares / mx.maximum(total, 1e-20)
        if self.token_weights is not None:
            squares = squares * self.token_weights[:, None]
        self._sums[index] = self._sums[index] + squares.sum(axis=0)
        if index == 0:
            tokens = rows.shape[0] if self.token_weights is None else float(self.token_weights.sum())
            self._weight += tokens

    def state(self) -> list[mx.array]:
        """The sums so far: evaluate them with each forward pass, or the graph of all passes stays in memory."""
        return self._sums

    @property
    def tokens(self) -> float:
        """Sum of the token weights seen."""
        return self._weight

    def importance(self, down_norms: Sequence[Scores]) -> list[Scores]:
        """Per FFN, float32 `[d_ffn]` in the source's neuron order.

        Args:
            down_norms: per FFN, the norm of every down row, float32 `[d_ffn]`, in the source's order.
        """
        result = []
        for leaf, total, norms in zip(self._leaves, self._sums, down_norms, strict=True):
            values = np.zeros(len(norms), dtype=np.float32)
            values[leaf.slots.source_ids(leaf.slots.order)] = np.sqrt(np.array(total) / max(self._weight, 1e-9))
            if leaf.group is not None:
                values = np.array(mx.distributed.all_sum(mx.array(values), group=leaf.group))
            result.append(values * norms)
        return result


@contextmanager
def recorded(leaves: Sequence[SlicedProjection]) -> Iterator[ImportanceRecorder]:
    """Attach a recorder to the down leaves of a model; all neurons must be active while it runs."""
    recorder = ImportanceRecorder(leaves)
    for index, leaf in enumerate(leaves):
        leaf.observer = lambda hidden, index=index: recorder._observe(index, hidden)
    try:
        yield recorder
    finally:
        for leaf in leaves:
            leaf.observer = None


def fuse_ranks(one: Sequence[Scores], other: Sequence[Scores], share: float) -> list[Scores]:
    """Per FFN, `share` of the rank in `one` and the rest of the rank in `other`, both scaled to 0..1 (GLASS).

    Ranks make two scores comparable whatever their units.
    """
    return [share * _ranks(a) + (1 - share) * _ranks(b) for a, b in zip(one, other, strict=True)]


def _ranks(values: Scores) -> Scores:
    ranks = np.empty(len(values), dtype=np.float32)
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values), dtype=np.float32)
    ranks /= max(len(values) - 1, 1)
    return ranks
