"""Distils a predictor head in closed form: a reduced-rank ridge regression from what the instruction looks like to the
log importance of every neuron in the answer (`ifprune_mlx.train.targets`).

    score = mean log importance  +  head2 (head1 (features - their mean))

The first part is a prior, the second moves away from it by what the instruction says, and only as far as the
regularisation lets it: with no signal the predictor *is* the static selector. Knows arrays, no model.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ifprune_mlx.errors import DataError
from ifprune_mlx.predictor import Head
from ifprune_mlx.train.targets import Floats, Targets, log_importance

_CHUNK = 4096


@dataclass(frozen=True)
class Fit:
    """A distilled head, and how well it predicts chats that it was not fitted on.

    Attributes:
        head: for `ifprune_mlx.predictor`.
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
        pooling: of `ifprune_mlx.predictor.POOLINGS`: what of the features the head reads.
        held_out: share of the chats that choose the penalty.

    Raises:
        DataError: if there are too few chats to hold any out.
    """
    count = len(targets.features)
    if count < 20:
        raise DataError(f"{count} chats are too few to distil from; measure at least 20, better a thousand")
    y = log_importance(targets.importance, targets.widths)
    order = np.random.default_rng(seed).permutation(count)
    valid, train = np.split(order, [max(int(held_out * count), 1)])
    width = targets.features.shape[1] // 2
    x = {"last": targets.features[:, :width], "mean": targets.features[:, width:], "both": targets.features}[pooling]
    explained = _explained(x, y, train, valid, rank, penalties)
    penalty = max(explained, key=lambda candidate: explained[candidate])
    head = _head(_Ridge(x, y, penalty, rank), x, pooling, targets)
    return Fit(head, penalty, explained)


class _Ridge:
    """`y ~ mean(y) + V (W standardised(x))`, V orthonormal `[neurons, r]`: the best such fit of rank r."""

    def __init__(self, x: Floats, y: Floats, penalty: float, rank: int) -> None:
        self.x_mean = x.mean(axis=0)
        self.x_scale = x.std(axis=0) + 1e-6
        self.y_mean = y.mean(axis=0)
        z = (x - self.x_mean) / self.x_scale
        # In the dual the largest matrix is [n, n] or [features, features], never neurons squared.
        gram = z.T @ z + np.float32(penalty * len(z)) * np.eye(z.shape[1], dtype=np.float32)
        factor = np.linalg.cholesky(gram.astype(np.float64))
        cross = np.concatenate(
            [z.T @ (y[:, i : i + _CHUNK] - self.y_mean[i : i + _CHUNK]) for i in range(0, y.shape[1], _CHUNK)], axis=1
        )
        whitened = np.linalg.solve(factor, cross.astype(np.float64))  # [features, neurons]
        # Right singular vectors of the fit, through the small side.
        values, vectors = np.linalg.eigh(whitened @ whitened.T)
        top = vectors[:, np.argsort(values)[::-1][: min(rank, len(values))]]
        projected = top.T @ whitened  # [r, neurons]
        scale = np.maximum(np.linalg.norm(projected, axis=1, keepdims=True), 1e-12)
        self.v = (projected / scale).T.astype(np.float32)
        self.w = (np.linalg.solve(factor.T, top) * scale.T).T.astype(np.float32)  # [r, features]

    def predict(self, x: Floats) -> Floats:
        """The part of y that depends on x, float32 `[n, neurons]`."""
        delta: Floats = ((x - self.x_mean) / self.x_scale) @ self.w.T @ self.v.T
        return delta


def _explained(
    x: Floats,
    y: Floats,
    train: npt.NDArray[np.intp],
    valid: npt.NDArray[np.intp],
    rank: int,
    penalties: tuple[float, ...],
) -> dict[float, float]:
    result = {}
    for penalty in penalties:
        ridge = _Ridge(x[train], y[train], penalty, rank)
        residual = y[valid] - ridge.y_mean
        total = float((residual**2).sum())
        residual -= ridge.predict(x[valid])
        result[penalty] = 1 - float((residual**2).sum()) / max(total, 1e-12)
    return result


def _head(ridge: _Ridge, x: Floats, pooling: str, targets: Targets) -> Head:
    """Fold the standardisation into the first layer and the prior into the last bias.

    The two layers are scaled so that the inner values are about 1: an optimizer like Adam, whose steps have the same
    size everywhere, then moves both layers alike.
    """
    inner = ((x - ridge.x_mean) / ridge.x_scale) @ ridge.w.T
    size = max(float(np.sqrt((inner**2).mean())), 1e-12)
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
