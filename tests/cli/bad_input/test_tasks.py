"""Bad input to `ifprune tasks`."""

from __future__ import annotations

import pytest

from ifprune_mlx.checkpoint.format_writer import write_manifest
from tests.cli.bad_input.table import Bad, Check, Place, Table, own_data, task
from tests.cli.process import Argument

TABLE = Table()
case = TABLE.case


def tasks(model: Argument, *more: Argument) -> list[Argument]:
    return ["tasks", "--json", "--model", model, *more]


@case
def removed_task_that_is_not_there(at: Place) -> Bad:
    return Bad(tasks(at.sound, "--remove", "poetry"), ("no task poetry", "has none"), env=own_data(at))


@case
def removed_task_outside(at: Place) -> Bad:
    task(at)
    return Bad(tasks(at.sound, "--remove", "../x"), ("'../x' cannot name a task", "use letters"), env=own_data(at))


@case
def tasks_of_a_plain_model(at: Place) -> Bad:
    return Bad(tasks(at.source), ("config.json", "no ifpruning section", "ifprune convert"))


@case
def removed_task_without_a_name(at: Place) -> Bad:
    return Bad(tasks(at.sound, "--remove", ""), ("'' cannot name a task", "use letters"), env=own_data(at))


@case
def removed_task_that_came_with_the_checkpoint(at: Place) -> Bad:
    folder = at.checkpoint()
    (folder / "tasks").mkdir()
    file = task(at).rename(folder / "tasks" / "poetry.safetensors")
    write_manifest(folder, source="test", licence=None)
    return Bad(tasks(folder, "--remove", "poetry"), ("task poetry", str(file), "stays"), env=own_data(at))


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name: str, check: Check) -> None:
    check(name)
