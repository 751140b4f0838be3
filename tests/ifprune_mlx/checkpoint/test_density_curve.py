"""What a measured curve says: which density to take, and what of a stored one is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ifprune_mlx import BudgetError, Checkpoint, CheckpointError
from ifprune_mlx.checkpoint.density_curve import CurvePoint, DensityCurve
from ifprune_mlx.checkpoint.format_writer import change_section, write_manifest

CURVE = DensityCurve(
    (
        CurvePoint("activation", 0.9, 0.01, 0.005, 0.015),
        CurvePoint("activation", 0.6, 0.04, 0.02, 0.06),
        CurvePoint("activation", 0.3, 0.9, 0.7, 1.1),
        CurvePoint("static", 0.9, 0.02, 0.01, 0.03),
        CurvePoint("static", 0.6, 0.045, 0.042, 0.048),
        CurvePoint("static", 0.3, 1.5, 1.2, 1.8),
    ),
    ("0123456789abcdef", "fedcba9876543210"),
    40,
)


@pytest.mark.parametrize(
    ("tolerance", "expected"),
    [
        (0.05, (0.6, "static")),  # at 0.6 activation loses less in the mean, but its interval ends above
        (0.06, (0.6, "activation")),  # both do now, and the mean decides
        (0.02, (0.9, "activation")),
        (2.0, (0.3, "activation")),
        (0.001, (1.0, "activation")),
        (0.0, (1.0, "activation")),
    ],
)
def test_the_lowest_density_within_the_tolerance(tolerance: float, expected: tuple[float, str]) -> None:
    assert CURVE.choose(tolerance) == expected


def test_a_given_selector_is_kept_to() -> None:
    assert CURVE.choose(0.02, ["static"]) == (1.0, "static")
    assert CURVE.choose(0.03, ["static"]) == (0.9, "static")
    assert CURVE.best(0.55).selector == "activation"
    assert CURVE.best(0.2, ["static"]) == CURVE.points[-1]
    with pytest.raises(BudgetError, match="with selector random; measured: activation, static"):
        CURVE.choose(0.05, ["random"])


@pytest.mark.parametrize("tolerance", [-0.1, float("nan"), float("inf")])
def test_tolerances_that_are_none(tolerance: float) -> None:
    with pytest.raises(BudgetError, match=f"tolerance {tolerance:g} is not usable; give nats"):
        CURVE.choose(tolerance)


def test_it_comes_back_from_json() -> None:
    assert DensityCurve.from_dict(json.loads(json.dumps(CURVE.to_dict()))) == CURVE


@pytest.mark.parametrize(
    "change",
    [
        lambda curve: curve.update(points=[]),
        lambda curve: curve.update(more=1),
        lambda curve: curve.pop("tokens"),
        lambda curve: curve.update(tokens=0),
        lambda curve: curve.update(tokens=True),
        lambda curve: curve.update(prompts="ab"),
        lambda curve: curve.update(prompts=[1]),
        lambda curve: curve.update(points=[3]),
        lambda curve: curve["points"][0].pop("low"),
        lambda curve: curve["points"][0].update(low=None),
        lambda curve: curve["points"][0].update(lost=float("nan")),
        lambda curve: curve["points"][0].update(high=-1),
        lambda curve: curve["points"][0].update(density=0),
        lambda curve: curve["points"][0].update(density=1),
        lambda curve: curve["points"][0].update(density="0.5"),
        lambda curve: curve["points"][0].update(selector=["static"]),
        lambda curve: curve["points"][0].update(selector="nonesuch"),
    ],
)
def test_a_damaged_curve_is_one_line(
    tiny_checkpoint: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    config = json.loads((folder / "config.json").read_text())
    curve = CURVE.to_dict()
    change(curve)
    config["ifpruning"]["curve"] = curve
    (folder / "config.json").write_text(json.dumps(config))
    write_manifest(folder, source="test", licence=None)
    with pytest.raises(CheckpointError, match=r"config\.json: .*; (convert the source again|update ifprune-mlx)$"):
        Checkpoint.open(folder)


def test_a_changed_section_leaves_files_that_share_its_bytes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint", copy_function=os.link))
    before = Checkpoint.open(tiny_checkpoint)
    change_section(folder, replace(before.layout, density=0.6, selector="static", curve=CURVE))
    after = Checkpoint.open(folder)
    assert (after.layout.density, after.layout.selector, after.curve) == (0.6, "static", CURVE)
    assert after.verify() == []
    assert Checkpoint.open(tiny_checkpoint).curve is None
