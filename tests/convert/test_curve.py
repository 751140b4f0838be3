"""Conversion with chats ends with what each density loses, on chats that the prior was not measured on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ifprune_convert.calibrate import hold_out, measure_prior
from ifprune_convert.pipeline import DEFAULT_DENSITY, Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx import BudgetError, load
from ifprune_mlx.data.dataset import Record
from tests.tiny import write_checkpoint, write_source
from tests.tiny_predictor import write_predictor

CHATS = [
    Record(({"role": "user", "content": f"Count {i}."}, {"role": "assistant", "content": f"{i}, {i * i}, {i * 7}."}))
    for i in range(60)
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("curve") / "source")


def test_prompts_are_held_out_by_themselves() -> None:
    fitted, held_out = hold_out([*CHATS, *CHATS[:5]])
    assert {chat.key for chat in fitted}.isdisjoint(chat.key for chat in held_out)
    assert {chat.key for chat in (*fitted, *held_out)} == {chat.key for chat in CHATS}
    assert 8 <= len(held_out) == len({chat.key for chat in held_out}) <= 20
    assert held_out == hold_out(CHATS[::-1])[1]
    assert hold_out(CHATS[:20]) == (CHATS[:20], [])


def test_the_curve_and_the_defaults_that_follow_from_it(source: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    calls: list[tuple[str, int, int]] = []
    options = Options(calibration=CHATS, tolerance=0.02)
    done = convert(open_source(source), tmp_path / "out", options, lambda *call: calls.append(call), notes.append)
    checkpoint, (fitted, held_out) = done.checkpoint, hold_out(CHATS)
    assert checkpoint.curve is not None
    assert checkpoint.curve.prompts == tuple(chat.key for chat in held_out)
    assert checkpoint.curve.selectors == ("activation", "static")
    assert (checkpoint.layout.density, checkpoint.layout.selector) == checkpoint.curve.choose(0.02)
    assert checkpoint.verify() == []
    assert [line for line in notes if "about" in line and "held-out prompts with activation, static" in line]
    measured = [(at, total) for stage, at, total in calls if stage == "measure"]
    assert measured[-1][0] == measured[-1][1]
    # What was held out has no part in the prior.
    model, _ = load(checkpoint.path)
    expected = measure_prior(model, checkpoint.path, fitted, lambda done, total: None)
    assert all(np.allclose(a, b, rtol=1e-5) for a, b in zip(model.prior, expected, strict=True))
    # The default is one that runs as it was measured.
    assert {k % 8 for k in model.keep()} == {0}
    model.close()


def test_a_given_density_stays(source: Path, tmp_path: Path) -> None:
    checkpoint = convert(open_source(source), tmp_path / "out", Options(calibration=CHATS, density=0.5)).checkpoint
    assert checkpoint.curve is not None
    assert (checkpoint.layout.density, checkpoint.layout.selector) == (0.5, checkpoint.curve.best(0.5).selector)


def test_a_predictor_is_measured_too_and_is_no_default_by_being_there(tmp_path: Path) -> None:
    predictor = write_predictor(tmp_path / "predictor")
    options = Options(calibration=CHATS, predictor=predictor, order=CHATS[:3])
    folder = write_checkpoint(tmp_path / "out", options=options)
    model, _ = load(folder)
    checkpoint = model.checkpoint
    model.close()
    assert checkpoint.curve is not None
    assert checkpoint.curve.selectors == ("learned", "activation", "static")
    assert checkpoint.layout.order == "frequency"
    assert (checkpoint.layout.density, checkpoint.layout.selector) == checkpoint.curve.choose(0.05)


def test_with_too_few_chats_it_says_so_and_keeps_the_density_of_before(source: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    done = convert(open_source(source), tmp_path / "out", Options(calibration=CHATS[:20]), note=notes.append)
    assert (done.checkpoint.curve, done.checkpoint.layout.density) == (None, DEFAULT_DENSITY)
    assert notes == [
        "what each density loses was not measured (of the chats a fifth is held out, and that has to be 8; give more); "
        "the default density is 0.9"
    ]


def test_a_tolerance_that_is_none_is_refused_before_any_work(source: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="tolerance nan is not usable"):
        convert(open_source(source), tmp_path / "out", Options(calibration=CHATS, tolerance=float("nan")))
    assert list(tmp_path.iterdir()) == []
