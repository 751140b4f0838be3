"""What a checkpoint loses at each density, by selector, as its config stores it."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from typing import Any

from ifprune_mlx.errors import BudgetError

TOLERANCE = 0.05
"""Nats per answer token that a checkpoint's default density may lose, unless another tolerance is given."""


@dataclass(frozen=True)
class CurvePoint:
    """One selector at one density.

    Attributes:
        density: as `checkpoint.budget.resolve_keep` takes it.
        lost: loss beyond dense, nats per answer token; mean over prompts.
        low, high: its 95 % interval, paired with dense prompt by prompt.
    """

    selector: str
    density: float
    lost: float
    low: float
    high: float


@dataclass(frozen=True)
class DensityCurve:
    """Losses beyond dense on held-out prompts, the same for all points.

    Attributes:
        points: every selector at every density below 1. At 1 nothing is lost, by definition.
        prompts: keys of the prompts (`data.dataset.Record.key`).
        tokens: answer tokens of all prompts.
    """

    points: tuple[CurvePoint, ...]
    prompts: tuple[str, ...]
    tokens: int

    @property
    def selectors(self) -> tuple[str, ...]:
        """Their names, in order."""
        return tuple(dict.fromkeys(point.selector for point in self.points))

    @property
    def densities(self) -> tuple[float, ...]:
        """The measured densities, the highest first."""
        return tuple(sorted({point.density for point in self.points}, reverse=True))

    def best(self, density: float, selectors: Collection[str] | None = None) -> CurvePoint:
        """The selector that loses least in the mean at the measured density that is nearest to `density`.

        Args:
            selectors: those to choose from; None is all.

        Raises:
            BudgetError: if none of them was measured.
        """
        points = self._of(selectors)
        nearest = min((point.density for point in points), key=lambda measured: abs(measured - density))
        return min((point for point in points if point.density == nearest), key=lambda point: point.lost)

    def choose(self, tolerance: float, selectors: Collection[str] | None = None) -> tuple[float, str]:
        """The lowest density that loses at most `tolerance`, and the selector that does; 1 where none does.

        The interval's upper end decides, not the mean. The lowest of many points is picked, and by its mean it would
        often be a lucky one. So few prompts give a careful answer, and more prompts a bolder one. Of two selectors at
        the same density it is the one that loses less in the mean.

        Args:
            tolerance: nats per answer token, at least 0.
            selectors: those to choose from; None is all.

        Raises:
            BudgetError: if the tolerance is no such number, or none of the selectors was measured.
        """
        check_tolerance(tolerance)
        points = self._of(selectors)
        kept = [point for point in points if point.high <= tolerance]
        if not kept:
            return 1.0, self.best(1.0, selectors).selector
        least = min(kept, key=lambda point: (point.density, point.lost))
        return least.density, least.selector

    def _of(self, selectors: Collection[str] | None) -> list[CurvePoint]:
        points = [point for point in self.points if selectors is None or point.selector in selectors]
        if not points:
            raise BudgetError(
                f"no density was measured with selector {' or '.join(selectors or ())}; "
                f"measured: {', '.join(self.selectors)}"
            )
        return points

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        points = [asdict(point) for point in self.points]
        return {"prompts": list(self.prompts), "tokens": self.tokens, "points": points}

    @classmethod
    def from_dict(cls, value: Any) -> DensityCurve:
        """What `to_dict` gave.

        Raises:
            ValueError: if it is anything else.
        """
        names = [field.name for field in fields(CurvePoint)]
        if not isinstance(value, dict) or sorted(value) != ["points", "prompts", "tokens"]:
            raise ValueError("a curve has points, prompts and tokens")
        prompts, tokens, points = value["prompts"], value["tokens"], value["points"]
        if not isinstance(prompts, list) or not all(isinstance(key, str) for key in prompts):
            raise ValueError("prompts of a curve are texts")
        if type(tokens) is not int or tokens < 1 or not isinstance(points, list) or not points:
            raise ValueError("a curve has points, and answer tokens")
        for point in points:
            if not isinstance(point, dict) or sorted(point) != sorted(names) or not isinstance(point["selector"], str):
                raise ValueError(f"a point of a curve has {', '.join(names)}")
            numbers = [point[name] for name in names[1:]]
            if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
                raise ValueError("a point of a curve is of finite numbers")
            if not (0 < point["density"] < 1 and point["low"] <= point["high"]):
                raise ValueError("a point of a curve has a density below 1 and an interval")
        return cls(tuple(CurvePoint(**point) for point in points), tuple(prompts), tokens)


def check_tolerance(tolerance: float) -> None:
    """Raise BudgetError unless it is a number of nats, 0 or above."""
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise BudgetError(f"tolerance {tolerance:g} is not usable; give nats per answer token, such as {TOLERANCE:g}")
