"""The paired bootstrap against a plain loop, and on cases with a known answer."""

from __future__ import annotations

import numpy as np
import pytest

from ifprune_mlx.eval.bootstrap import RESAMPLES, paired_differences, resampled_means


def test_means_equal_a_plain_loop_over_the_same_draws() -> None:
    values = np.random.default_rng(3).normal(size=(23, 4))
    found = resampled_means(values, (5, 1), 700)
    drawn = np.random.default_rng([5, 1]).integers(0, 23, (700, 23))
    expected = np.array([[values[row, column].mean() for column in range(4)] for row in drawn])
    assert found.shape == (700, 4)
    assert np.allclose(found, expected, rtol=0, atol=1e-12)


def test_a_difference_is_taken_prompt_by_prompt() -> None:
    # Prompts differ by far more than the selectors do, which an unpaired comparison could not see through.
    hard = np.random.default_rng(0).normal(3, 10, size=40)
    noise = np.random.default_rng(1).normal(0, 0.1, size=40)
    (found,) = paired_differences({"code": {"a": list(hard - 0.5 + noise), "b": list(hard)}})
    gaps = noise - 0.5
    assert (found.a, found.b, found.domain) == ("a", "b", "code")
    assert found.mean == pytest.approx(gaps.mean())
    # The normal approximation of the same interval.
    spread = 1.96 * gaps.std() / np.sqrt(40)
    assert found.low == pytest.approx(gaps.mean() - spread, abs=0.005)
    assert found.high == pytest.approx(gaps.mean() + spread, abs=0.005)


def test_a_constant_difference_has_no_width() -> None:
    base = [1.0, 2.0, 4.0, 8.0]
    found = paired_differences({"x": {"a": [value + 0.25 for value in base], "b": base, "c": base}})
    assert [(d.a, d.b, d.mean, d.low, d.high) for d in found] == [
        ("a", "b", 0.25, 0.25, 0.25),
        ("a", "c", 0.25, 0.25, 0.25),
        ("b", "c", 0.0, 0.0, 0.0),
    ]


def test_all_domains_count_the_same_whatever_their_size() -> None:
    few = {"a": [0.0, 2.0], "b": [0.0, 0.0]}
    many = {"a": [3.0] * 50, "b": [0.0] * 50}
    found = {difference.domain: difference for difference in paired_differences({"few": few, "many": many}, seed=4)}
    assert list(found) == ["few", "many", "all"]
    assert (found["few"].mean, found["many"].mean, found["all"].mean) == (1.0, 3.0, 2.0)
    # Two prompts give the means 0, 1 or 2, the quantiles of which are the ends.
    assert (found["few"].low, found["few"].high) == (0.0, 2.0)
    assert (found["all"].low, found["all"].high) == (1.5, 2.5)


def test_a_single_prompt_has_no_interval() -> None:
    one, two = {"a": [1.0], "b": [2.0]}, {"a": [1.0, 2.0], "b": [2.0, 2.0]}
    assert paired_differences({"one": one}) == []
    assert [found.domain for found in paired_differences({"one": one, "two": two})] == ["two"]


def test_the_seed_fixes_everything() -> None:
    data = {"x": {"a": list(np.random.default_rng(0).normal(size=9)), "b": [0.0] * 9}}
    assert paired_differences(data, seed=2) == paired_differences(data, seed=2)
    assert paired_differences(data, seed=2)[0].low != paired_differences(data, seed=3)[0].low
    assert RESAMPLES == 10_000
