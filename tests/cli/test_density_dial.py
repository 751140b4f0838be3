"""`--density auto`, `--tolerance`, and what `info` and a density far below say of a measured curve."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ifprune_mlx import Checkpoint, load, make_selector
from ifprune_mlx.checkpoint.density_curve import CurvePoint
from ifprune_mlx.eval.density_curve import set_curve
from tests.cli.process import run_here
from tests.cli.test_generate import answer, succeed
from tests.ifprune_mlx.checkpoint.test_density_curve import CURVE
from tests.tiny import write_checkpoint
from tests.tiny_predictor import write_predictor

SHORT = ("--prompt", "hello", "--max-tokens", "2")


@pytest.fixture(scope="module")
def measured(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a curve, and the defaults that follow from it: 0.6, static."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("measured") / "checkpoint"))
    return set_curve(folder, CURVE, *CURVE.choose(0.05)).path


@pytest.mark.parametrize(
    ("options", "selector", "keep"),
    [
        ((), "static", 80),  # 0.6 of 128 neurons, in blocks of 8
        (("--density", "auto"), "static", 80),
        (("--tolerance", "0.06"), "activation", 80),
        (("--density", "auto", "--tolerance", "2"), "activation", 40),
        (("--tolerance", "0.02", "--selector", "static"), "static", 128),
        (("--tolerance", "0.02"), "activation", 112),
    ],
)
def test_the_curve_chooses_density_and_selector(
    measured: Path, options: tuple[str, ...], selector: str, keep: int
) -> None:
    done = succeed("generate", "--model", measured, *options, *SHORT, "--json")
    value = answer(done)
    assert (value["selector"], value["density"]) == (selector, keep / 128)
    assert done.stderr == ""


def test_with_residency_ssd_no_selector_that_needs_all_neurons(measured: Path) -> None:
    done = succeed("generate", "--model", measured, "--tolerance", "0.03", "--residency", "ssd", *SHORT, "--json")
    assert (answer(done)["selector"], answer(done)["density"]) == ("static", 112 / 128)


@pytest.mark.parametrize("command", ["select", "export"])
def test_other_commands_read_it_too(measured: Path, tmp_path: Path, command: str) -> None:
    more = ("--mlx-path", tmp_path / "out") if command == "export" else ()
    done = succeed(command, "--model", measured, "--prompt", "hello", "--density", "auto", *more)
    assert "static" in done.stderr


@pytest.mark.parametrize(
    ("options", "words", "code"),
    [
        (("--tolerance", "nan"), ("tolerance nan is not usable", "give nats"), 1),
        (("--tolerance", "-1"), ("tolerance -1 is not usable",), 1),
        (("--tolerance", "0.1", "--density", "0.5"), ("--tolerance and --density exclude",), 1),
        (("--tolerance", "0.1", "--active-params", "90K"), ("--tolerance and --active-params exclude",), 1),
        (("--density", "auto", "--active-params", "90K"), ("--density", "--active-params", "give one of them"), 1),
        (("--tolerance", "0.1", "--dense"), ("--dense and --tolerance exclude",), 1),
        (("--density", "auto", "--selector", "random"), ("with selector random", "measured: activation, static"), 1),
        (("--density", "automatic"), ("--density", "valid number, nor auto", "--help"), 2),
    ],
)
def test_what_is_refused(measured: Path, options: tuple[str, ...], words: tuple[str, ...], code: int) -> None:
    done = run_here("generate", "--model", measured, *options, *SHORT)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1)
    assert all(word in done.stderr for word in words), done.stderr


def test_without_a_curve_it_says_how_to_get_one(tiny_checkpoint: Path) -> None:
    done = run_here("generate", "--model", tiny_checkpoint, "--density", "auto", *SHORT)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "was not measured; give --density as a number, or convert the source again with --calibrate" in done.stderr


def test_a_density_far_below_is_said_once_with_its_cost(measured: Path, tiny_checkpoint: Path) -> None:
    done = succeed("generate", "--model", measured, "--density", "0.25", *SHORT, "--json")
    assert done.stderr == (
        "density 0.25 is far below this checkpoint's own, 0.62: with selector static, density 0.3 lost 1.50 nats per "
        "answer token (95 %: 1.20 to 1.80)\n"
    )
    for model, density in ((measured, "0.5"), (tiny_checkpoint, "0.25")):
        assert succeed("generate", "--model", model, "--density", density, *SHORT, "--json").stderr == ""


def test_info_shows_the_curve_in_80_columns(measured: Path) -> None:
    value = answer(succeed("info", "--model", measured, "--json"))
    assert value["curve"] == CURVE.to_dict()
    assert (value["density"], value["default_selector"]) == (0.6, "static")
    assert [row["density"] for row in value["dial"]] == [1.0, 0.9, 0.6, 0.3]
    dense, _, own, _ = value["dial"]
    assert (dense["lost"], dense["speedup"], dense["active_parameters"]) == (0, 1, value["parameters"])
    assert (own["selector"], own["lost"], own["high"]) == ("static", 0.045, 0.048)
    assert own["speedup"] == dense["bytes_per_token"] / own["bytes_per_token"] > 1
    shown = succeed("info", "--model", measured).stdout
    table = shown[shown.index("  density  active") :].splitlines()
    assert all(len(line) <= 80 for line in table)
    assert "0.045 (0.042 to 0.048)  static" in table[3]
    assert "0.010 (0.005 to 0.015)  activation" in table[2]
    assert table[3].startswith("* 0.6 ")
    assert "on 2 held-out prompts" in " ".join(" ".join(table[5:]).split())


def test_info_without_a_curve(tiny_checkpoint: Path) -> None:
    value = answer(succeed("info", "--model", tiny_checkpoint, "--json"))
    assert value["curve"] is None
    assert [row["lost"] for row in value["dial"]] == [0, None, None, None, None]
    shown = succeed("info", "--model", tiny_checkpoint).stdout
    assert "loss     not measured; `ifprune adapt`" in shown
    assert "selector\n" not in shown  # nor are there columns for it
    assert all(len(line) <= 80 for line in shown[shown.index("  density  active") :].splitlines())


def test_the_default_selector_is_the_better_one_even_beside_a_predictor(tmp_path: Path) -> None:
    from ifprune_convert.pipeline import Options

    folder = write_checkpoint(tmp_path / "out", options=Options(predictor=write_predictor(tmp_path / "predictor")))
    points = (*CURVE.points, CurvePoint("learned", 0.9, 2.0, 1.0, 3.0))
    set_curve(folder, replace(CURVE, points=points), 0.6, "static")
    model, _ = load(folder)
    assert make_selector(model).name == "static"
    model.close()
    assert "static (default): " in succeed("info", "--model", folder).stdout
    assert Checkpoint.open(folder).has_predictor
