"""Soft top-k against a float64 coordinate descent run to convergence, its gradient against finite differences."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from ifprune_mlx.selection.selection import top_k
from ifprune_mlx.sparse.soft_topk import hard_top_k, soft_top_k

Vector = npt.NDArray[np.float64]


def descended(s: Vector, k: int, epsilon: float) -> Vector:
    """CoDA's coordinate descent as the paper states it, one row, until it stands still."""
    b, last = np.zeros_like(s), np.full_like(s, -1)
    for _ in range(200_000):
        z = (s + b) / epsilon
        a = epsilon * (math.log(k) - (np.logaddexp.reduce(z)))
        b = -np.maximum(s + a, 0)
        now = np.exp((s + a + b) / epsilon)
        if np.abs(now - last).max() < 1e-15:
            break
        last = now
    return now


def bisected(s: Vector, k: int, epsilon: float) -> Vector:
    """min(1, exp((s - tau) / epsilon)), tau by bisection, one row: quick where coordinate descent is not."""
    low, high = s.min() - 1, s.max() + epsilon * math.log(len(s)) + 1
    for _ in range(200):
        tau = (low + high) / 2
        total = np.exp(np.minimum((s - tau) / epsilon, 0)).sum()
        low, high = (tau, high) if total > k else (low, tau)
    return np.exp(np.minimum((s - tau) / epsilon, 0))


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> npt.NDArray[np.float32]:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def straight_through(s: mx.array, k: Any, epsilon: Any) -> mx.array:
    """As training may mask: hard forward, soft backward."""
    soft = soft_top_k(s, k, epsilon)
    return hard_top_k(s, k) + (soft - mx.stop_gradient(soft))


def as_float64(x: mx.array) -> Vector:
    return np.array(x).astype(np.float64)


@pytest.mark.parametrize("epsilon", [4.0, 1.0, 0.3, 0.1])
@pytest.mark.parametrize("k", [1, 3, 11, 23])
def test_agrees_with_coordinate_descent_run_to_convergence(k: int, epsilon: float) -> None:
    s = random(24, seed=k)
    expected = descended(s.astype(np.float64), k, epsilon)
    assert expected.sum() == pytest.approx(k, abs=1e-6)  # the reference did converge
    assert np.abs(as_float64(soft_top_k(mx.array(s), k, epsilon)) - expected).max() < 1e-6
    # The claim that the module stands on: at rest, coordinate descent is the capped exponential.
    assert np.abs(bisected(s.astype(np.float64), k, epsilon) - expected).max() < 1e-6


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("relative", [1e-6, 1e-2, 0.3, 10.0, 1e4])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 1), (7, 7), (130, 129), (1536, 416)])
def test_sum_and_bounds_at_every_scale(n: int, k: int, relative: float, scale: float) -> None:
    s = random(3, n, seed=n, scale=scale)
    epsilon = relative * scale
    result = as_float64(soft_top_k(mx.array(s), k, epsilon))
    assert np.all((result >= 0) & (result <= 1))
    assert np.abs(result.sum(axis=-1) - k).max() < 1e-3
    expected = np.stack([bisected(row.astype(np.float64), k, epsilon) for row in s])
    assert np.abs(result - expected).max() < 2e-5


def test_the_sum_holds_at_the_width_of_a_9b_model() -> None:
    result = as_float64(soft_top_k(mx.array(random(4, 24576)), 6656, 0.3))
    assert np.abs(result.sum(axis=-1) - 6656).max() < 1e-3
    assert result.max() == 1


def test_scores_far_from_zero_lose_nothing_but_their_own_precision() -> None:
    s = random(64)
    shifted = (s + np.float32(1e4)).astype(np.float32)
    expected = bisected(shifted.astype(np.float64), 20, 0.05)
    assert np.abs(as_float64(soft_top_k(mx.array(shifted), 20, 0.05)) - expected).max() < 1e-6
    # One outlier must not cost the others their precision.
    s[5] = 1e4
    expected = bisected(s.astype(np.float64), 20, 0.01)
    assert np.abs(as_float64(soft_top_k(mx.array(s), 20, 0.01)) - expected).max() < 1e-5


def test_approaches_hard_top_k() -> None:
    s = mx.array(np.random.default_rng(1).permutation(200).astype(np.float32) / 10)[None]
    hard = hard_top_k(s, 60)
    gaps = [float(mx.abs(soft_top_k(s, 60, epsilon) - hard).max()) for epsilon in (4, 1, 0.1, 0.02, 0.005, 1e-6, 1e-30)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.3
    assert gaps[-3] < 1e-6
    assert gaps[-1] == 0


def test_equal_scores_share_equally() -> None:
    for value in (0.0, -3.5, 1e4, 1e-6):
        for epsilon in (1.0, 1e-6):
            result = as_float64(soft_top_k(mx.full((2, 1536), value), 416, epsilon))
            assert np.abs(result - 416 / 1536).max() < 1e-7
    # All equal, the gradient is that of a softmax: k / n / eps * (1 - 1 / n) on the diagonal.
    gradient = mx.grad(lambda s: soft_top_k(s, 2, 0.5)[0])(mx.zeros((8,)))
    assert np.allclose(np.array(gradient), 0.25 / 0.5 * (np.eye(8)[0] - 1 / 8), atol=1e-6)


def test_ties_across_the_border_share_what_is_left() -> None:
    s = mx.array([5.0, 1, 1, 1, 1, -4, -4])
    result = as_float64(soft_top_k(s, 3, 0.01))
    assert np.allclose(result, [1, 0.5, 0.5, 0.5, 0.5, 0, 0], atol=1e-6)


@pytest.mark.parametrize("epsilon", [1.0, 0.3])
@pytest.mark.parametrize("k", [1, 4, 11])
def test_gradient_against_finite_differences(k: int, epsilon: float) -> None:
    s, weight = random(12, seed=k), random(12, seed=99)
    h = 1e-5
    differences = [
        (weight * (bisected(s + h * row, k, epsilon) - bisected(s - h * row, k, epsilon))).sum() / (2 * h)
        for row in np.eye(12)
    ]
    for function in (soft_top_k, straight_through):
        gradient = mx.grad(lambda x, function=function: (function(x, k, epsilon) * mx.array(weight)).sum())(mx.array(s))
        assert np.abs(np.array(gradient) - differences).max() < 1e-4 * max(1, np.abs(differences).max())
    assert np.abs(differences).max() > 1e-3


def test_the_gradient_for_epsilon_against_finite_differences() -> None:
    s, weight, h = random(12), random(12, seed=99), 1e-5
    gradient = mx.grad(lambda e: (soft_top_k(mx.array(s), 4, e) * mx.array(weight)).sum())(mx.array(0.4))
    s64 = s.astype(np.float64)
    expected = (weight * (bisected(s64, 4, 0.4 + h) - bisected(s64, 4, 0.4 - h))).sum() / (2 * h)
    assert float(gradient) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("epsilon", [1e-30, 1e-6, 1.0, 1e6])
def test_gradients_are_finite_at_every_epsilon_and_none_flows_where_all_are_kept(epsilon: float) -> None:
    s = mx.array(random(3, 40, scale=100))
    for k in (1, 17, 39, 40):
        gradient = mx.grad(lambda x, k=k: (soft_top_k(x, k, epsilon) * x).sum())(s)
        assert mx.all(mx.isfinite(gradient))
    assert mx.array_equal(mx.grad(lambda x: (soft_top_k(x, 40, epsilon) ** 2).sum())(s), mx.zeros_like(s))
    equal = mx.zeros((40,))
    assert mx.array_equal(mx.grad(lambda x: soft_top_k(x, 40, epsilon)[3])(equal), equal)


def test_infinite_scores_are_always_or_never_kept() -> None:
    inf = math.inf
    s = mx.array([1, 2, inf, -inf, 3])
    result = soft_top_k(s, 2, 0.5)
    assert result[2] == 1
    assert result[3] == 0
    assert np.allclose(np.array(result)[[0, 1, 4]], bisected(np.array([1.0, 2, 3]), 1, 0.5), atol=1e-6)
    gradient = mx.grad(lambda x: (soft_top_k(x, 2, 0.5) * mx.arange(5)).sum())(s)
    assert mx.all(mx.isfinite(gradient))
    assert mx.isnan(soft_top_k(mx.array([1, 2, math.nan]), 1, 0.5)).any()


def test_hard_top_k_is_that_of_the_runtime() -> None:
    rng = np.random.default_rng(3)
    s = rng.integers(0, 6, (20, 64)).astype(np.float32)  # ties everywhere
    s[0] = 0
    for k in (1, 20, 63, 64):
        ours = np.array(hard_top_k(mx.array(s), k))
        theirs = top_k(list(s), [k] * 20, "static")
        assert [list(np.flatnonzero(row)) for row in ours] == [list(ids) for ids in theirs.ids]
        assert set(np.unique(ours)) <= {0, 1}


def test_batches_agree_with_rows_alone() -> None:
    s = mx.array(random(2, 3, 5, 33))
    for function in (soft_top_k, straight_through):
        together = function(s, 9, 0.2)
        assert together.shape == s.shape
        flat = s.reshape(-1, 33)
        alone = mx.stack([function(flat[row], 9, 0.2) for row in range(30)])
        assert mx.allclose(together.reshape(-1, 33), alone, atol=1e-6)


def test_compiled_is_as_it_is_uncompiled() -> None:
    # The straight-through form runs both limits; on the CPU, compiling takes a second and more each.
    def plain(s: mx.array, epsilon: mx.array) -> mx.array:
        return (straight_through(s, 9, epsilon) * s).sum()

    s, step = mx.array(random(4, 33)), mx.compile(mx.value_and_grad(plain))
    for epsilon in (0.2, 0.05):  # an array: annealed without being compiled anew
        value, gradient = step(s, mx.array(epsilon))
        expected, expected_gradient = mx.value_and_grad(plain)(s, mx.array(epsilon))
        assert mx.allclose(value, expected, rtol=1e-5)
        assert mx.allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


def test_every_row_may_have_its_own_k() -> None:
    s, k = mx.array(random(2, 4, 50)), mx.array([[10, 25, 50, 1], [7, 49, 2, 13]])
    for function in (soft_top_k, straight_through):
        together = function(s, k, 0.1)
        for row in range(2):
            for column in range(4):
                alone = function(s[row, column], int(k[row, column]), 0.1)
                assert mx.allclose(together[row, column], alone, atol=1e-6)
    # One k for each of a batch, for all its layers.
    assert mx.allclose(hard_top_k(s, mx.array([[5], [9]])).sum(axis=-1), mx.array([[5] * 4, [9] * 4]))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_float32_inside_whatever_comes_in(dtype: mx.Dtype) -> None:
    s = mx.array(random(2, 512)).astype(dtype)
    for function in (soft_top_k, straight_through):
        result = function(s, 128, 0.1)
        assert result.dtype == mx.float32
        assert mx.allclose(result, function(s.astype(mx.float32), 128, 0.1))
        assert mx.grad(lambda x, function=function: (function(x, 128, 0.1) ** 2).sum())(s).dtype == dtype
    assert hard_top_k(s, 128).dtype == mx.float32


def test_straight_through_is_hard_forward_and_soft_backward() -> None:
    s, weight = mx.array(random(3, 40)), mx.array(random(3, 40, seed=5))
    straight, back = mx.value_and_grad(lambda x: (straight_through(x, 10, 0.5) * weight).sum())(s)
    assert mx.array_equal(straight_through(s, 10, 0.5), hard_top_k(s, 10))
    assert mx.allclose(straight, (hard_top_k(s, 10) * weight).sum())
    assert mx.allclose(back, mx.grad(lambda x: (soft_top_k(x, 10, 0.5) * weight).sum())(s))
    assert float(mx.abs(back).max()) > 0.01
    assert not mx.any(mx.grad(lambda x: (hard_top_k(x, 10) * weight).sum())(s))


def test_numbers_out_of_range_are_refused() -> None:
    s = mx.zeros((8,))
    for k in (0, 9, -1):
        with pytest.raises(ValueError, match="k must be from 1 to 8"):
            soft_top_k(s, k, 1.0)
        with pytest.raises(ValueError, match="k must be from 1 to 8"):
            hard_top_k(s, k)
    for epsilon in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="epsilon must be"):
            soft_top_k(s, 3, epsilon)
