"""Bad input to `ifprune bench`."""

from __future__ import annotations

import pytest

from tests.cli.bad_input.table import Bad, Check, Place, Table

TABLE = Table()
case = TABLE.case


@case
def bench_beyond_the_context(at: Place) -> Bad:
    return Bad(["bench", "--model", at.sound, "-p", "999999999"], ("context holds 512", "give fewer"))


@case
def a_shape_there_is_not(at: Place) -> Bad:
    return Bad(["bench", "--shape", "paper-7b"], ("shape paper-7b", "none of paper-6b"))


@case
def a_shape_and_a_model(at: Place) -> Bad:
    return Bad(["bench", "--shape", "paper-9b", "--model", at.sound], ("--shape and --model", "give one of them"))


@case
def layers_of_a_model(at: Place) -> Bad:
    return Bad(["bench", "--model", at.sound, "--layers", "1"], ("--layers", "are for --shape"))


@case
def more_layers_than_there_are(at: Place) -> Bad:
    return Bad(["bench", "--shape", "paper-9b", "--layers", "99"], ("99 layers", "give 1 to 56"))


@case
def a_plot_of_no_known_kind(at: Place) -> Bad:
    return Bad(["bench", "--model", at.sound, "--plot", "rates.txt"], ("rates.txt", ".png or .svg"))


@case
def no_folder_to_work_in(at: Place) -> Bad:
    return Bad(["bench", "--model", at.sound, "--work", at.folder / "none"], ("--work", "no such folder"))


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name: str, check: Check) -> None:
    check(name)
