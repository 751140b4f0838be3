"""Bad input to `ifprune` itself."""

from __future__ import annotations

import pytest

from tests.cli.bad_input.table import Bad, Check, Place, Table

TABLE = Table()
case = TABLE.case


@case
def unknown_command(at: Place) -> Bad:
    return Bad(["trian"], ("trian", "ifprune --help"), code=2)


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name: str, check: Check) -> None:
    check(name)
