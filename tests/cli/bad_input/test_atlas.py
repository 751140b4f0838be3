"""Bad input to `ifprune atlas`, and to the charts of `ifprune select` and `ifprune evaluate`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cli.bad_input.table import Bad, Check, Place, Table
from tests.cli.process import Argument, full_disk

TABLE = Table()
case = TABLE.case


def atlas(at: Place, *more: Argument) -> list[Argument]:
    """The command on two prompts, without the time of answers."""
    file = at / "code.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"sort {i}", "completion": "done"}) + "\n" for i in range(2)))
    fixed = ["--model", at.sound, "--data", f"code={file}", "--timed", "0", "--out", at / "out"]
    return ["atlas", "--json", *fixed, *more]


def quality(at: Place, value: Any) -> list[Argument]:
    """The command with an evaluation that holds `value`."""
    (at / "quality.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return atlas(at, "--evaluation", at / "quality.json")


@case
def no_folder(at: Place) -> Bad:
    return Bad(["atlas", "--model", at.sound, "--data", "x=x.jsonl"], ("--out", "--help"), code=2)


@case
def data_that_is_missing(at: Place) -> Bad:
    words = (str(at / "none.jsonl"), "cannot be read")
    return Bad(atlas(at, "--data", f"maths={at / 'none.jsonl'}"), words)


@case
def a_domain_twice(at: Place) -> Bad:
    return Bad(atlas(at, "--data", f"code={at / 'code.jsonl'}"), ("domain 'code' is given twice", "one file"))


@case
def data_of_plain_text(at: Place) -> Bad:
    (at / "text.jsonl").write_text('{"text": "once upon a time"}\n')
    return Bad(atlas(at, "--data", f"x={at / 'text.jsonl'}"), ("plain text", "'x'"))


@case
def no_prompts_wanted(at: Place) -> Bad:
    return Bad(atlas(at, "--limit", "0"), ("--limit", "--help"), code=2)


@case
def fewer_timed_than_none(at: Place) -> Bad:
    return Bad(atlas(at, "--timed", "-1"), ("--timed", "--help"), code=2)


@case
def density_above_1(at: Place) -> Bad:
    return Bad(atlas(at, "--density", "2"), ("density 2", "above 0 and at most 1"))


@case
def learned_without_a_predictor(at: Place) -> Bad:
    return Bad(atlas(at, "--selector", "learned"), ("no trained predictor", "--selector activation"))


@case
def no_such_model(at: Place) -> Bad:
    return Bad([*atlas(at), "--model", at / "none"], (str(at / "none"), "give a model: its folder"))


# Where the charts go.


@case
def folder_that_is_a_file(at: Place) -> Bad:
    (at / "file").write_text("a file")
    return Bad(atlas(at, "--out", at / "file"), (f"--out {at / 'file'}", "is no folder", "another one"))


@case
def folder_below_a_file(at: Place) -> Bad:
    (at / "file").write_text("a file")
    where = at / "file" / "deep" / "er"
    return Bad(atlas(at, "--out", where), (f"--out {where}", f"{at / 'file'} is no folder"))


@case
def folder_that_leads_nowhere(at: Place) -> Bad:
    (at / "link").symlink_to(at / "none")
    return Bad(atlas(at, "--out", at / "link"), (f"--out {at / 'link'}", "is no folder"))


@case
def full_disk_for_charts(at: Place) -> Bad:
    (at / "out").mkdir()
    words = (str(at / "out" / "atlas-overlap.png"), "cannot be written", "free space")
    # matplotlib's list of fonts cannot be written either, which it says in lines of its own.
    return Bad(atlas(at), words, prelude=full_disk(100))


# What was evaluated.


@case
def evaluation_that_is_missing(at: Place) -> Bad:
    return Bad(atlas(at, "--evaluation", at / "none.json"), (str(at / "none.json"), "cannot be read"))


@case
def evaluation_that_is_no_json(at: Place) -> Bad:
    return Bad(quality(at, "density 0.5"), (str(at / "quality.json"), "not JSON", "ifprune evaluate"))


@case
def evaluation_of_one_density(at: Place) -> Bad:
    return Bad(quality(at, {"density": 0.5, "rows": []}), (str(at / "quality.json"), "evaluate --densities"))


@case
def evaluation_of_something_else(at: Place) -> Bad:
    return Bad(
        quality(at, {"curve": 3, "total_parameters": 1}), (str(at / "quality.json"), "not what `ifprune evaluate")
    )


@case
def evaluation_of_tasks_only(at: Place) -> Bad:
    value = {"total_parameters": 9, "curve": [{"active_parameters": 3, "rows": []}]}
    return Bad(quality(at, value), (str(at / "quality.json"), "needs losses", "--data"))


# The charts of other commands.


@case
def selection_drawn_as_pdf(at: Place) -> Bad:
    return Bad(at.select("--plot", at / "x.pdf"), (f"--plot {at / 'x.pdf'}", "PNG or SVG", ".png or .svg"))


@case
def selection_drawn_without_a_suffix(at: Place) -> Bad:
    return Bad(at.select("--plot", at / "x"), (f"--plot {at / 'x'}", ".png or .svg"))


@case
def selection_drawn_in_no_folder(at: Place) -> Bad:
    return Bad(at.select("--plot", at / "none" / "x.png"), ("--plot", "no such folder", "make it first"))


@case
def selection_drawn_over_a_folder(at: Place) -> Bad:
    (at / "x.png").mkdir()
    return Bad(at.select("--plot", at / "x.png"), (str(at / "x.png"), "cannot be written"))


@case
def full_disk_for_a_drawing(at: Place) -> Bad:
    return Bad(at.select("--plot", at / "x.svg"), ("x.svg", "cannot be written", "free space"), prelude=full_disk(100))


@case
def evaluation_of_dense_drawn(at: Place) -> Bad:
    atlas(at)
    data = ["--data", f"code={at / 'code.jsonl'}", "--selectors", "dense"]
    arguments = ["evaluate", "--model", at.sound, *data, "--plot", at / "x.svg"]
    return Bad(arguments, ("--plot", "depends on the density", "--selectors"))


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name: str, check: Check) -> None:
    check(name)
