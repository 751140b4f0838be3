"""Figures of tasks: one selector's accuracy and the like, with paired-bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ifprune_mlx.eval.bootstrap import resampled_means

BASELINE = "static"


@dataclass(frozen=True)
class Figure:
    """A mean over questions.

    Attributes:
        low, high: the 95 % interval (percentiles of the resampled means); None for a single question.
    """

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class TaskRow:
    """One selector on one task, by one metric; higher is better but for `cut_off`.

    Attributes:
        metric: `accuracy` (share of the questions), `margin` (nats per token, of multiple choice: see
            `ifprune_mlx.eval.multiple_choice`) or `cut_off` (share of the answers that ended at the token limit).
        per_question: one value a question; the rows of a task have the same questions in the same order.
    """

    selector: str
    task: str
    metric: str
    per_question: tuple[float, ...]

    @property
    def value(self) -> float:
        """Mean over questions."""
        return float(np.mean(self.per_question))


@dataclass(frozen=True)
class Summary:
    """A row with its intervals.

    Attributes:
        minus_static: the difference to the static selector, question by question; None if that was not measured.
    """

    row: TaskRow
    figure: Figure
    minus_static: Figure | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON (DESIGN.md section 11, and more)."""
        difference = self.minus_static
        return {
            "selector": self.row.selector,
            "task": self.row.task,
            "metric": self.row.metric,
            "value": self.figure.mean,
            "n": len(self.row.per_question),
            "low": self.figure.low,
            "high": self.figure.high,
            "minus_static": None if difference is None else vars(difference).copy(),
            "per_question": list(self.row.per_question),
        }


def summarize(rows: Sequence[TaskRow], *, seed: int = 0) -> list[Summary]:
    """Every row with its intervals, in the order given.

    Questions are what is resampled, the same ones for every selector of a task, since a hard question is hard for all.

    Args:
        seed: of the bootstrap, at least 0.
    """
    tasks = list(dict.fromkeys(row.task for row in rows))
    result = []
    for row in rows:
        drawing = (seed, tasks.index(row.task))
        static = next(
            (r for r in rows if (r.selector, r.task, r.metric) == (BASELINE, row.task, row.metric)),
            None,
        )
        values = np.array(row.per_question, np.float64)
        difference = None
        if static is not None and row.selector != BASELINE:
            difference = _figure(values - np.array(static.per_question, np.float64), drawing)
        result.append(Summary(row, _figure(values, drawing), difference))
    return result


def _figure(values: npt.NDArray[np.float64], seed: Sequence[int]) -> Figure:
    mean = float(values.mean())
    if len(values) < 2:
        return Figure(mean, None, None)
    low, high = np.quantile(resampled_means(values[:, None], seed)[:, 0], [0.025, 0.975])
    return Figure(mean, float(low), float(high))
