"""Distils a predictor's head in closed form: a reduced-rank ridge regression from the features of the instruction to
the log importance of every neuron for the answer (`ifprune_mlx.train.attribution`).

    score = mean log importance  +  head2 (head1 (features - their mean))

The first part is a prior. The second depends on the instruction, as far as the regularisation lets it: without a signal
in the data, the predictor is the static selector.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ifprune_mlx.errors import DataError
from ifprune_mlx.selection.predictor import Head
from ifprune_mlx.train.attribution import Floats, Targets, log_importance

Rows = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Fit:
    """A distilled head, and how well it predicts chats that it was not fitted on.

    Attributes:
        head: for `ifprune_mlx.selection.predictor`.
        penalty: the ridge penalty chosen, as a share of the features' mean variance.
        explained: share of the held-out variance of log importance about its mean that is predicted, by penalty tried.
    """

    head: Head
    penalty: float
    explained: dict[float, float]


def distill(
    targets: Targets,
    *,
    rank: int = 128,
    pooling: str = "both",
    penalties: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0),
    held_out: float = 0.15,
    seed: int = 0,
) -> Fit:
    """Fit a head to measured chats.

    The penalty is the one of `penalties` that predicts held-out chats best; the head is then fitted on all of them.

    Args:
        rank: width of the inner layer (the paper's is 128).
        pooling: of `ifprune_mlx.selection.predictor.POOLINGS`: what of the features the head reads.
        held_out: share of the chats that choose the penalty.

    Raises:
        DataError: if there are too few chats to hold any out.
    """
    count = len(targets.features)
    if count < 20:
        raise DataError(f"{count} chats are too few to distil from; measure at least 20, better a thousand")
    order = np.random.default_rng(seed).permutation(count)
    valid, train = np.split(order, [max(int(held_out * count), 1)])
    width = targets.features.shape[1] // 2
    x = {"last": targets.features[:, :width], "mean": targets.features[:, width:], "both": targets.features}[pooling]
    problem = _RidgeProblem(x, targets, train)
    explained = {penalty: problem.fit(penalty, rank).explained(x, targets, valid) for penalty in penalties}
    penalty = max(explained, key=lambda candidate: explained[candidate])
    ridge = _RidgeProblem(x, targets, np.arange(count)).fit(penalty, rank)
    return Fit(_head(ridge, x, pooling, targets), penalty, explained)


class _RidgeProblem:
    """Regression of log importance y `[n, neurons]` on features x `[n, features]`, over some of the chats.

    y is never held as a whole, but made FFN by FFN from the half-precision targets. All penalties share the singular
    value decomposition of the features, z = U S V', in whose basis a ridge is diagonal, and y's Gram matrix in U. So
    nothing is larger than chats or features, whichever are fewer, by the other.
    """

    def __init__(self, x: Floats, targets: Targets, rows: Rows) -> None:
        self._targets, self._rows = targets, rows
        self.x_mean = x[rows].mean(axis=0)
        self.x_scale = x[rows].std(axis=0) + 1e-6
        z = ((x[rows] - self.x_mean) / self.x_scale).astype(np.float64)
        self._u, self._s, self._v = np.linalg.svd(z, full_matrices=False)
        gram = np.zeros((len(rows), len(rows)))
        means = []
        for y in log_importance(targets, rows):
            means.append(y.mean(axis=0))
            centred = y - means[-1]
            gram += centred @ centred.T
        self._gram = self._u.T @ gram @ self._u
        self.y_mean = np.concatenate(means)

    def fit(self, penalty: float, rank: int) -> _Ridge:
        """The best fit of that rank under a penalty, given as a share of the features' mean variance."""
        size = np.sqrt(self._s**2 + penalty * len(self._rows))  # of the normal matrix's square root
        shrink = self._s / size
        # Right singular vectors of the whitened fit `shrink U' y`, through its small side.
        values, vectors = np.linalg.eigh(shrink[:, None] * self._gram * shrink)
        top = vectors[:, np.argsort(values)[::-1][: min(rank, len(values))]]
        towards = (self._u @ (shrink[:, None] * top)).T.astype(np.float32)  # [r, n]
        scale = np.zeros((len(towards), 1))
        parts = []
        start = 0
        for y in log_importance(self._targets, self._rows):
            parts.append(towards @ (y - self.y_mean[start : start + y.shape[1]]))
            start += y.shape[1]
            scale += (parts[-1].astype(np.float64) ** 2).sum(axis=1, keepdims=True)
        scale = np.maximum(np.sqrt(scale), 1e-12)
        v = (np.concatenate(parts, axis=1) / scale).T.astype(np.float32)
        w = (self._v.T @ (top / size[:, None]) * scale.T).T.astype(np.float32)
        missing = min(rank, w.shape[1]) - len(w)  # where chats are fewer, the rest of the inner layer says nothing
        w, v = np.pad(w, ((0, missing), (0, 0))), np.pad(v, ((0, 0), (0, missing)))
        return _Ridge(self.x_mean, self.x_scale, self.y_mean, w, v)


@dataclass(frozen=True)
class _Ridge:
    """`y ~ y_mean + V (W standardised(x))`: V orthonormal `[neurons, r]`, W `[r, features]`."""

    x_mean: Floats
    x_scale: Floats
    y_mean: Floats
    w: Floats
    v: Floats

    def inner(self, x: Floats) -> Floats:
        """`W standardised(x)`, float32 `[n, r]`."""
        found: Floats = ((x - self.x_mean) / self.x_scale) @ self.w.T
        return found

    def explained(self, x: Floats, targets: Targets, rows: Rows) -> float:
        """Share of the variance about the mean that is predicted, over some chats."""
        inner = self.inner(x[rows])
        total = left = 0.0
        start = 0
        for y in log_importance(targets, rows):
            part = slice(start, start + y.shape[1])
            start = part.stop
            centred = y - self.y_mean[part]
            total += float((centred**2).sum())
            left += float(((centred - inner @ self.v[part].T) ** 2).sum())
        return 1 - left / max(total, 1e-12)


def _head(ridge: _Ridge, x: Floats, pooling: str, targets: Targets) -> Head:
    """Fold the standardisation into the first layer and the prior into the last bias.

    The two layers are scaled so that the inner values are about 1: an optimizer like Adam, whose steps have the same
    size everywhere, then moves both layers alike.
    """
    size = max(float(np.sqrt((ridge.inner(x) ** 2).mean())), 1e-12)
    first = ridge.w / ridge.x_scale / size
    return Head(
        first=mx.array(first),
        first_bias=mx.array(-(first @ ridge.x_mean)),
        second=mx.array(ridge.v * size),
        second_bias=mx.array(ridge.y_mean),
        widths=targets.widths,
        pooling=pooling,
        layers=targets.layers,
    )
