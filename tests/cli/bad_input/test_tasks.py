"""Bad input to `ifprune tasks`."""

from __future__ import annotations

import pytest

from tests.cli.bad_input.table import (
    Bad,
    Check,
    Place,
    Table,
    own_data,
    task,
)
from tests.cli.process import Argument

TABLE = Table()
case = TABLE.case


@case
def removed_task_that_is_not_there(at: Place) -> Bad:
    arguments: list[Argument] = ["tasks", "--json", "--model", at.sound, "--remove", "poetry"]
    return Bad(arguments, ("no task poetry", "has none"), env=own_data(at))


@case
def removed_task_outside(at: Place) -> Bad:
    task(at)
    arguments: list[Argument] = ["tasks", "--json", "--model", at.sound, "--remove", "../x"]
    return Bad(arguments, ("'../x' cannot name a task", "use letters"), env=own_data(at))


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name: str, check: Check) -> None:
    check(name)
