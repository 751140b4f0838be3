"""Intervals of task figures, against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest

from ifprune_mlx.eval.bootstrap import RESAMPLES
from ifprune_mlx.eval.metrics import Figure, TaskRow, summarize

A, B = (1.0, 0.0, 1.0, 1.0, 0.0, 1.0), (0.0, 0.0, 1.0, 0.0, 0.0, 1.0)


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
