"""Soft top-k, which training differentiates, and its hard limit, which the runtime uses.

CoDA's entropy-regularised soft top-k (arXiv 2304.04947; the paper's mask, arXiv 2501.02086): of all lambda in [0, 1]^n
with sum k, the one that maximises `s.lambda - eps * sum(lambda log lambda)`. Its optimality conditions say

    lambda_i = min(1, exp((s_i - tau) / eps)),    tau such that the sum is k,

which is also where CoDA's coordinate descent comes to rest, with tau = -a: b = -relu(s + a) makes s + a + b equal to
min(s + a, 0), and the update of a makes the sum k. So one scalar a row is all there is to find, and it is found
exactly. Let e_i = exp((s_i - p) / eps) for any pivot p, x = exp((tau - p) / eps), and S_m the sum of all e but the m
largest. No choice is below the minimum, so sum_i min(e_i, x) = min_m (S_m + m x), which equals k x where

    x = min over m < k of S_m / (k - m).

That is one sort and one cumulative sum. Coordinate descent takes the more steps the smaller eps is, and where it is
stopped the sum is not k: of 1536 normal scores with k = 416 and eps = 0.03 it is 212 after CoDA's 30 steps, and within
1e-3 of k after 403. Nor does the gradient need a rule of its own: while the m saturated entries (lambda = 1) stay the
same, lambda is (k - m) times a softmax over the others, which MLX differentiates, and where they change lambda is
continuous.

The pivot is the k-th largest score. It lies within eps * log n of tau, so that float32 is precise where lambda is
decided, whatever the size of the scores; a larger e may overflow, since it belongs to a saturated entry.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import mlx.core as mx

_BLOCK = 16


def soft_top_k(scores: mx.array, k: int | mx.array, epsilon: float | mx.array) -> mx.array:
    """Soft top-k along the last axis, exact to float32 rounding; ties share equally (all equal: k / n each).

    Where the k-th score stands many epsilons above the next this is hard top-k; scores tied across that border share
    what is left there, however small epsilon is. Entries at 1 have gradient 0; for k = n that is all of them.

    Args:
        scores: `[..., n]` of any float type. Up to n - k may be minus infinity, which is never chosen, and fewer than
            k plus infinity, which always is. NaN gives NaN in its row.
        k: from 1 to n; an int array, broadcast over the leading axes, gives each row its own.
        epsilon: above 0, in the unit of the scores; an array where it changes under `mx.compile`.

    Returns:
        float32 `[..., n]`, entries in [0, 1], with sum k (within 1e-3 for k up to 10^4; float32 holds no more).

    Raises:
        ValueError: if k or epsilon, given as plain numbers, are out of range.
    """
    if not isinstance(epsilon, mx.array) and not 1e-30 <= epsilon < math.inf:
        raise ValueError(f"epsilon must be at least 1e-30 and finite, not {epsilon}")
    scores, counts, ordered, pivot = _rows(scores, k)
    n = scores.shape[-1]
    e = mx.exp((ordered - pivot) / epsilon)
    # S_m, summed upwards from the smallest, stands at the largest entry that it holds; there `left` is k - m.
    left = mx.arange(1, n + 1) - (n - counts)
    x = mx.min(mx.where(left > 0, mx.cumsum(e, axis=-1) / mx.maximum(left, 1), math.inf), axis=-1, keepdims=True)
    # x >= 1 but for rounding; held to that, it never saturates the k-th entry or those below, so m < k.
    threshold = mx.stop_gradient(mx.log(mx.maximum(x, 1)))
    u = (scores - pivot) / epsilon
    saturated = u > threshold
    m = saturated.sum(axis=-1, keepdims=True)
    # Minus infinity before `exp`, not zero after it: an exp that overflows has no gradient that 0 could cancel.
    e = mx.exp(mx.where(saturated, -math.inf, u))
    free = e * ((counts - m) / _sum(e))
    # Also where it rounds to 1 or above, as for k = n, there is nothing to gain from a higher score.
    return mx.where(saturated | (free >= 1), 1, free)


def hard_top_k(scores: mx.array, k: int | mx.array) -> mx.array:
    """1 for the k largest entries along the last axis, 0 for the rest; of equal scores the lower index wins.

    Keeps the same neurons as `selection.top_k`. Has no gradient.

    Args:
        scores: float `[..., n]`, without NaN.
        k: from 1 to n; an int array, broadcast over the leading axes, gives each row its own.

    Returns:
        float32 `[..., n]`, exactly k ones a row.

    Raises:
        ValueError: if k, given as an int, is out of range.
    """
    rows = _rows(scores, k)
    # By value and not by `argsort`, whose order among equals MLX does not promise on every backend.
    above, level = rows.scores > rows.pivot, rows.scores == rows.pivot
    wanted = rows.counts - above.sum(axis=-1, keepdims=True)
    return (above | (level & (mx.cumsum(level.astype(mx.int32), axis=-1) <= wanted))).astype(mx.float32)


class _Rows(NamedTuple):
    """What both limits need, from one sort; `counts` (k, int32) and `pivot` (the k-th largest) are `[..., 1]`."""

    scores: mx.array
    counts: mx.array
    ordered: mx.array
    pivot: mx.array


def _rows(scores: mx.array, k: int | mx.array) -> _Rows:
    n = scores.shape[-1]
    if not isinstance(k, mx.array):
        if not 1 <= k <= n:
            raise ValueError(f"k must be from 1 to {n}, the number of entries, not {k}")
        k = mx.array(k)
    scores = scores.astype(mx.float32)
    counts = mx.broadcast_to(k.astype(mx.int32), scores.shape[:-1])[..., None]
    ordered = mx.sort(mx.stop_gradient(scores), axis=-1)
    return _Rows(scores, counts, ordered, mx.take_along_axis(ordered, n - counts, axis=-1))


def _sum(values: mx.array) -> mx.array:
    """Sum over the last axis, which stays with length 1, as a tree of short sums.

    One running float32 sum over 10^4 entries is off by up to 5e-6 of itself, and lambda's sum would miss k by as much.
    """
    while values.shape[-1] > 1:
        padding = -values.shape[-1] % _BLOCK
        if padding:
            values = mx.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, padding)])
        values = values.reshape(*values.shape[:-1], -1, _BLOCK).sum(axis=-1)
    return values
