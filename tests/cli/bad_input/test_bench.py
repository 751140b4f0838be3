"""Bad input to `ifprune bench`."""

from __future__ import annotations

import pytest

from tests.cli.bad_input.table import Bad, Check, Place, Table

TABLE = Table()
case = TABLE.case


@case
def bench_beyond_the_context(at: Place) -> Bad:
    return Bad(["bench", "--model", at.sound, "-p", "999999999"], ("context holds 512", "give fewer"))


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name: str, check: Check) -> None:
    check(name)
