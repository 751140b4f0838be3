"""Bad input to `ifprune select`."""

from __future__ import annotations

import os

import pytest

from tests.cli.bad_input.table import Bad, Check, Place, Table, own_data, selection, task
from tests.cli.process import full_disk

TABLE = Table()
case = TABLE.case


# Budgets and options.


@case
def density_2(at: Place) -> Bad:
    return Bad(at.select("--density", "2"), ("density 2", "above 0 and at most 1"))


# Prompts.


@case
def prompt_longer_than_the_context_for_select(at: Place) -> Bad:
    words = ("the prompt has", "context holds 512", "shorten")
    return Bad([*at.select(), "--prompt", "word " * 200, "--save-to", at / "s.safetensors"], words)


# Outputs.


@case
def full_disk_for_a_selection(at: Place) -> Bad:
    file = at / "s.safetensors"
    return Bad(at.select("--save-to", file), (str(file), "cannot be written", "free space"), prelude=full_disk(100))


@case
def selection_below_a_file(at: Place) -> Bad:
    (at / "out").write_text("a file")
    file = at / "out" / "s.safetensors"
    return Bad(at.select("--save-to", file), (str(file), "cannot be written", "write elsewhere"))


@case
def selection_with_another_suffix(at: Place) -> Bad:
    return Bad(at.select("--save-to", at / "s.json"), (str(at / "s.json"), "ends in .safetensors"))


# Selections.


@case
def comparison_with_another_model(at: Place) -> Bad:
    file = selection(at, 64, 64)
    return Bad(at.select("--compare", file), (str(file), "another model", "ifprune select"))


# Named tasks.


@case
def task_name_that_is_not_utf8(at: Place) -> Bad:
    return Bad(at.select("--save", b"caf\xe9"), ("cannot name a task", "use letters"))


@case
def task_saved_outside(at: Place) -> Bad:
    words = ("'../../poetry' cannot name a task", "use letters")
    return Bad(at.select("--save", "../../poetry"), words, env=own_data(at))


@case
def task_with_a_hidden_name(at: Place) -> Bad:
    return Bad(
        at.select("--save", ".poetry"), ("'.poetry' cannot name a task", "beginning with a dot"), env=own_data(at)
    )


@case
def task_with_a_long_name(at: Place) -> Bad:
    return Bad(at.select("--save", "x" * 65), ("cannot name a task", "at most 64"), env=own_data(at))


@case
def data_folder_below_a_file(at: Place) -> Bad:
    (at / "data").write_text("a file")
    return Bad(at.select("--save", "poetry"), (str(at / "data"), "cannot be made", "IFPRUNE_DATA"), env=own_data(at))


@case
def data_folder_that_is_read_only(at: Place) -> Bad:
    where = "/proc/ifprune" if os.path.isdir("/proc") else "/dev/null"  # noqa: PTH112
    return Bad(at.select("--save", "poetry"), (where, "cannot be made", "IFPRUNE_DATA"), env={"IFPRUNE_DATA": where})


@case
def full_disk_for_a_task(at: Place) -> Bad:
    file = task(at)
    words = ("task poetry", str(file), "cannot be written", "free space")
    return Bad(at.select("--save", "poetry"), words, env=own_data(at), prelude=full_disk(100))


@case
def empty_prompt_to_compare_with(at: Place) -> Bad:
    return Bad(at.select("--with-prompt", " "), ("the prompt is empty", "write something"))


@case
def prompt_to_compare_with_that_is_not_utf8(at: Place) -> Bad:
    return Bad(at.select("--with-prompt", b"caf\xe9"), ("--with-prompt is not UTF-8", "--with-prompt -"))


@case
def prompt_to_compare_with_beyond_the_context(at: Place) -> Bad:
    words = ("the prompt has", "context holds 512", "shorten")
    return Bad(at.select("--with-prompt", "word " * 200, "--save", "poetry"), words, env=own_data(at))


@case
def task_saved_without_a_name(at: Place) -> Bad:
    return Bad(at.select("--save", ""), ("'' cannot name a task", "use letters"), env=own_data(at))


@case
def task_named_by_two_dots(at: Place) -> Bad:
    return Bad(at.select("--save", ".."), ("'..' cannot name a task", "beginning with a dot"), env=own_data(at))


@case
def task_named_with_a_backslash(at: Place) -> Bad:
    return Bad(at.select("--save", "..\\poetry"), ("cannot name a task", "use letters"), env=own_data(at))


@case
def task_named_in_letters_that_look_alike(at: Place) -> Bad:
    words = ("cannot name a task", "use letters")
    return Bad(at.select("--save", "poetr\u0443\u202e\u2215"), words, env=own_data(at))


@case
def task_with_a_name_of_a_hundred_thousand_letters(at: Place) -> Bad:
    return Bad(at.select("--save", "x" * 100_000), ("xxx...' cannot name a task", "at most 64"), env=own_data(at))


@case
def task_saved_where_a_folder_lies(at: Place) -> Bad:
    file = task(at)
    file.unlink()
    file.mkdir()
    return Bad(at.select("--save", "poetry"), ("task poetry", str(file), "cannot be written"), env=own_data(at))


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name: str, check: Check) -> None:
    check(name)
