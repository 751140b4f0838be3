"""The live line of a terminal: it moves by itself, and leaves nothing behind."""

from __future__ import annotations

import io
import time
from unittest.mock import patch

import pytest

from ifprune_cli.console import note, progress


class Terminal(io.TextIOWrapper):
    """A terminal that keeps what was written."""

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)

    def isatty(self) -> bool:
        return True

    @property
    def written(self) -> str:
        return self.buffer.getvalue().decode(self.encoding)  # type: ignore[attr-defined, no-any-return]


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")


def test_it_is_there_at_once_moves_and_goes() -> None:
    with patch("sys.stderr", Terminal()) as terminal:
        with progress("load", "FFNs"):
            assert terminal.written.endswith(" load\x1b[K")
            time.sleep(0.35)
            assert len(set(terminal.written.split("\r"))) > 2
        assert terminal.written.endswith("\r\x1b[K")
        ended = terminal.written
        time.sleep(0.25)
        assert terminal.written == ended


def test_notes_and_jobs_within_jobs() -> None:
    with patch("sys.stderr", Terminal()) as terminal:
        with progress("outer", "B"):
            with progress("inner", "B") as update:
                assert " inner" in terminal.written.split("\r")[-1]
                note("something happens")
                assert terminal.written.endswith("\r\x1b[Ksomething happens\n")
                update(5, 5)
            time.sleep(0.25)
            assert " outer" in terminal.written.split("\r")[-1]
        assert terminal.written.endswith("\r\x1b[K")


def test_other_terminals() -> None:
    with patch("sys.stderr", Terminal("ascii")) as terminal, progress("load", "B"):
        assert terminal.written == "\r/ load\x1b[K" or terminal.written[1] in "|/-\\"
    with patch("sys.stderr", Terminal()) as terminal, patch.dict("os.environ", TERM="dumb"), progress("load", "B"):
        assert terminal.written == ""


def test_notes_wrap_between_words_under_their_last_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    with patch("sys.stderr", Terminal()) as terminal:
        note("  /select [TEXT]  select anew: by the next message")
        note("all the words of a sentence that is longer\nshort")
    assert terminal.written.split("\n") == [
        "  /select [TEXT]  select anew: by the",
        "                  next message",
        "all the words of a sentence that is",
        "longer",
        "short",
        "",
    ]
