"""The short campaign: half a minute of damaged files and requests, the same ones every time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.__main__ import main
from tests.fuzz.mutations import MOST, PARTS, damaged_lines


@pytest.mark.slow
def test_half_a_minute_of_fuzzing_finds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seconds", "30", "--seed", "0", "--keep", str(tmp_path / "found")]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("part", PARTS)
def test_bombs_have_a_bounded_size(part: bytes) -> None:
    drawn = iter([0, part, MOST])
    assert MOST - len(part) < len(damaged_lines(lambda _: next(drawn), b"")) <= MOST
