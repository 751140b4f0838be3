"""Intervals, differences and overlaps against plain loops, and on cases with a known answer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ifprune_mlx.eval.metrics import (
    RESAMPLES,
    Figure,
    TaskRow,
    mean_overlaps,
    paired_differences,
    resampled_means,
    summarize,
)
from tests.ifprune_mlx.reference import random_selection

A, B = (1.0, 0.0, 1.0, 1.0, 0.0, 1.0), (0.0, 0.0, 1.0, 0.0, 0.0, 1.0)
WIDTHS, KEEP = (128, 64), (40, 16)


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


def test_intervals_resample_the_same_questions_of_both_selectors() -> None:
    rows = [TaskRow("learned", "arc", "accuracy", A), TaskRow("static", "arc", "accuracy", B)]
    learned, static = summarize(rows, seed=5)
    drawn = np.random.default_rng([5, 0]).integers(0, 6, (RESAMPLES, 6))
    own = [np.mean([A[i] for i in some]) for some in drawn]
    gaps = [np.mean([A[i] - B[i] for i in some]) for some in drawn]
    assert learned.row is rows[0]
    for figure, mean, values in ((learned.figure, 4 / 6, own), (learned.minus_static, 2 / 6, gaps)):
        assert figure is not None
        assert figure.mean == pytest.approx(mean)
        assert (figure.low, figure.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))
    # Paired: what both get right does not widen the interval below 0.
    assert learned.minus_static is not None
    assert learned.minus_static.low == 0
    assert static.minus_static is None


def test_static_of_another_task_or_metric_is_no_baseline() -> None:
    rows = [
        TaskRow("learned", "arc", "accuracy", A),
        TaskRow("static", "arc", "margin", B),
        TaskRow("static", "copa", "accuracy", B),
    ]
    assert [summary.minus_static for summary in summarize(rows)] == [None] * 3


def test_one_question_has_no_interval() -> None:
    rows = [TaskRow("dense", "t", "margin", (-0.25,)), TaskRow("static", "t", "margin", (0.5,))]
    dense, _ = summarize(rows)
    assert (dense.figure, dense.minus_static) == (Figure(-0.25, None, None), Figure(-0.75, None, None))
    assert dense.to_dict() == {
        "selector": "dense",
        "task": "t",
        "metric": "margin",
        "value": -0.25,
        "n": 1,
        "low": None,
        "high": None,
        "minus_static": {"mean": -0.75, "low": None, "high": None},
        "per_question": [-0.25],
    }


def test_overlaps_equal_the_mean_over_pairs() -> None:
    chosen = {
        domain: [random_selection(WIDTHS, KEEP, 100 * index + seed) for seed in range(count)]
        for index, (domain, count) in enumerate({"a": 4, "b": 3, "c": 1}.items())
    }
    found = mean_overlaps(chosen)
    for one, other in itertools.product(chosen, repeat=2):
        pairs = [
            (x, y) for i, x in enumerate(chosen[one]) for j, y in enumerate(chosen[other]) if one != other or i != j
        ]
        layers = found.domains[one][other]
        if not pairs:
            assert layers is None
            continue
        assert layers == pytest.approx(np.mean([x.overlap_by_layer(y) for x, y in pairs], axis=0))
    inside = [found.domains[name][name] for name in ("a", "b")]
    assert found.within_by_layer == pytest.approx(np.mean(inside, axis=0))
    assert found.within == pytest.approx(np.mean(inside))
    across = [layers for one, row in found.domains.items() for other, layers in row.items() if one != other]
    assert found.across == pytest.approx(np.mean(across))
    # Beyond chance as `Selection.agreement` has it.
    x, y = chosen["a"][:2]
    assert found.agreement(x.overlap(y)) == pytest.approx(x.agreement(y))
    value = found.to_dict()
    assert value["domains"]["c"]["c"] is None
    assert len(value["within_by_layer"]) == len(value["across_by_layer"]) == 2


def test_one_domain_has_nothing_across_and_equal_selections_agree_fully() -> None:
    same = [random_selection(WIDTHS, KEEP, 1)] * 3
    found = mean_overlaps({"a": same})
    assert (found.within, found.across) == (1.0, None)
    assert (found.agreement(found.within), found.agreement(found.across)) == (1.0, None)
    everything = [random_selection(WIDTHS, WIDTHS, 1)] * 2
    assert mean_overlaps({"a": everything}).agreement(1.0) == 1.0
