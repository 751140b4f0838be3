"""What an adapter does to one tensor, computed in float32, a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx

# Rows are fused, and looked through, in pieces of about this many weights, so that temporary copies stay small.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class LowRank:
    """`weight + scale * left @ right`; with `magnitude`, each row of that is then brought to this norm (DoRA).

    Attributes:
        left, right: `[rows, r]` and `[r, columns]` for a weight `[rows, columns]`, of any float type.
        magnitude: `[rows]`, or None.
        base: `[rows, columns]` to take in place of the model's weight, or None.
    """

    left: mx.array
    right: mx.array
    scale: float
    magnitude: mx.array | None = None
    base: mx.array | None = None

    def fused(self, weight: mx.array, dtype: mx.Dtype) -> mx.array:
        """Computed in float32, `[rows, columns]` of type `dtype`."""
        weight = weight if self.base is None else self.base
        result = mx.zeros(weight.shape, dtype)
        mx.eval(result)
        right = self.right.astype(mx.float32)
        for rows in _pieces(weight):
            delta = self.left[rows].astype(mx.float32) @ right
            piece = weight[rows].astype(mx.float32) + self.scale * delta
            if self.magnitude is not None:
                # A row of zeros stays one, whatever its magnitude.
                norms = mx.maximum(mx.linalg.norm(piece, axis=1), 1e-30)
                piece = (self.magnitude[rows].astype(mx.float32) / norms)[:, None] * piece
            result[rows] = piece.astype(dtype)
            # Evaluated at every step, the buffer is the only one and MLX writes into it; else each step would copy it.
            mx.eval(result)
        return result


@dataclass(frozen=True)
class Offset:
    """`bias + scale * vector`.

    Attributes:
        vector: `[n]`, like the bias, of any float type.
        base: `[n]` to take in place of the model's bias, or None.
    """

    vector: mx.array
    scale: float
    base: mx.array | None = None

    def fused(self, weight: mx.array, dtype: mx.Dtype) -> mx.array:
        """Computed in float32, `[n]` of type `dtype`."""
        weight = weight if self.base is None else self.base
        return (weight.astype(mx.float32) + self.scale * self.vector.astype(mx.float32)).astype(dtype)


@dataclass(frozen=True)
class Replacement:
    """A whole tensor in place of the model's."""

    tensor: mx.array

    def fused(self, weight: mx.array, dtype: mx.Dtype) -> mx.array:
        """The new tensor, of type `dtype`; `weight` does not matter."""
        return self.tensor.astype(dtype)


Update = LowRank | Offset | Replacement


def all_finite(array: mx.array) -> bool:
    """Whether there is no NaN or infinity in an array, which is evaluated."""
    mx.eval(array)
    flat = array.reshape(-1)
    return all(bool(mx.all(mx.isfinite(flat[piece]))) for piece in _pieces(flat))


def _pieces(array: mx.array) -> Iterator[slice]:
    """The rows of an array, a few at a time."""
    step = max(_CHUNK // math.prod(array.shape[1:]), 1)
    return (slice(start, start + step) for start in range(0, array.shape[0], step))
