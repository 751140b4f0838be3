"""The measured curve against plain masked models, and how it gets into a checkpoint."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ifprune_mlx import BudgetError, Checkpoint, CheckpointError, DataError, Model
from ifprune_mlx.data.tokenize import Example
from ifprune_mlx.eval.density_curve import LEAST_PROMPTS, dense_losses, measure_curve, set_curve
from ifprune_mlx.selection.selection import top_k
from tests.ifprune_mlx.checkpoint.test_density_curve import CURVE
from tests.ifprune_mlx.eval.test_losses import example, plain_loss
from tests.ifprune_mlx.reference import open_model


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Iterator[Model]:
    model = open_model(tiny_checkpoint)
    yield model
    model.close()


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return [example(f"prompt {i}", 4 + i % 3, 6 + i % 4, i) for i in range(10)]


def test_a_point_is_the_mean_difference_to_plain_models(
    tiny_checkpoint: Path, model: Model, examples: list[Example]
) -> None:
    curve = measure_curve(model, examples, densities=(0.5, 0.25))
    assert [(point.selector, point.density) for point in curve.points] == [
        ("activation", 0.5),
        ("activation", 0.25),
        ("static", 0.5),
        ("static", 0.25),
    ]
    assert curve.prompts == tuple(item.key for item in examples)
    assert curve.tokens == sum(int(item.mask.sum()) for item in examples)
    for point in curve.points[2:]:
        selection = top_k(model.prior, model.keep(point.density), "static")
        pairs = [(plain_loss(tiny_checkpoint, item, chosen)) for item in examples for chosen in (selection, None)]
        lost = np.array(pairs[::2]) - np.array(pairs[1::2])
        assert abs(point.lost - lost.mean()) < 1e-5
        # The interval is that of the differences, which is much narrower than that of the losses.
        drawn = np.random.default_rng(5).integers(0, len(lost), (10_000, len(lost)))
        low, high = np.quantile(lost[drawn].mean(axis=1), [0.025, 0.975])
        assert abs(point.low - low) < 0.1 * (high - low)
        assert abs(point.high - high) < 0.1 * (high - low)


def test_what_is_measured_is_what_a_density_runs(model: Model, examples: list[Example]) -> None:
    # 0.5 and 0.51 keep the same 64 of 128 neurons, and 0.99 keeps all.
    curve = measure_curve(model, examples, selectors=["static"], densities=(0.5, 0.99, 0.25, 0.51))
    assert curve.densities == (0.51, 0.25)
    assert [set(model.keep(density)) for density in curve.densities] == [{64}, {32}]
    density, _ = curve.choose(100)
    assert all(k % 8 == 0 for k in model.keep(density))
    with pytest.raises(BudgetError, match="no density leaves a neuron out"):
        measure_curve(model, examples, densities=(1.0,))
    with pytest.raises(BudgetError, match="density 2 is not usable"):
        measure_curve(model, examples, densities=(2,))


def test_another_models_losses_to_compare_with(model: Model, examples: list[Example]) -> None:
    own = dense_losses(model, examples)
    plain = measure_curve(model, examples, selectors=["static"], densities=(0.5,)).points[0]
    raised = measure_curve(
        model, examples, selectors=["static"], densities=(0.5,), dense=[loss - 0.25 for loss in own]
    ).points[0]
    assert abs(raised.lost - plain.lost - 0.25) < 1e-9
    assert abs(raised.high - plain.high - 0.25) < 1e-9


def test_its_time_is_bounded_by_fewer_prompts(model: Model, examples: list[Example]) -> None:
    notes: list[str] = []
    calls: list[tuple[int, int]] = []
    curve = measure_curve(
        model,
        examples,
        densities=(0.5,),
        seconds=0,
        note=notes.append,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert curve.prompts == tuple(item.key for item in examples[:LEAST_PROMPTS])
    assert len(notes) == 1
    assert "1 densities lose, on 8 held-out prompts with activation, static: about" in notes[0]
    done, totals = [at for at, _ in calls], {total for _, total in calls}
    assert done == sorted(done)
    assert totals == {done[-1]}
    assert len(measure_curve(model, examples, densities=(0.5,), seconds=600).prompts) == len(examples)
    with pytest.raises(DataError, match="7 held-out prompts; measuring densities needs 8"):
        measure_curve(model, examples[:7])


# Storing it.


def test_set_curve_changes_the_config_and_nothing_else(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    (folder / "README.md").write_text("my card")
    before = {file.name: file.stat().st_ino for file in folder.iterdir()}
    found = set_curve(folder, CURVE, 0.6, "static")
    assert (found.layout.density, found.layout.selector, found.curve) == (0.6, "static", CURVE)
    assert found.verify() == []
    assert (folder / "README.md").read_text() == "my card"
    after = {file.name: file.stat().st_ino for file in folder.iterdir()}
    assert {name for name in before if after[name] != before[name]} <= {"config.json", "manifest.json"}
    assert after.keys() == before.keys()
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]
    with pytest.raises(CheckpointError, match="has no trained predictor, so learned cannot be"):
        set_curve(folder, CURVE, 0.6, "learned")
    with pytest.raises(CheckpointError, match=r"density 1\.5 is not usable"):
        set_curve(folder, CURVE, 1.5, "static")
    assert Checkpoint.open(folder).layout == found.layout
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


_KILLED = """
import os, sys
from pathlib import Path
from ifprune_mlx.eval.density_curve import set_curve
from tests.ifprune_mlx.checkpoint.test_density_curve import CURVE
rename, calls = Path.rename, []
def killing(self, target):
    calls.append(target)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), 9)
    return rename(self, target)
Path.rename = killing
set_curve(sys.argv[1], CURVE, 0.6, "static")
"""


@pytest.mark.parametrize("at", [1, 2, 3])
def test_killed_at_a_rename_it_leaves_the_old(tiny_checkpoint: Path, tmp_path: Path, at: int) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    done = subprocess.run([sys.executable, "-c", _KILLED, str(folder), str(at)], check=False)
    assert done.returncode == -9
    assert Checkpoint.open(folder).curve is None
    assert Checkpoint.open(folder).verify() == []
    assert set_curve(folder, CURVE, 0.6, "static").curve == CURVE
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]
