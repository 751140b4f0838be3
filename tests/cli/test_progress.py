"""The live line of a terminal: it moves by itself, and leaves nothing behind."""

from __future__ import annotations

import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest

from ifprune_cli import logs
from ifprune_cli.console import note, progress
from ifprune_cli.loading import load_model
from ifprune_mlx import Checkpoint


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


def test_what_libraries_warn_of_has_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they log without having said where to; neither tells a place in the code."""
    monkeypatch.setattr(logging, "lastResort", None)
    monkeypatch.setattr(logging.getLogger("a_library"), "propagate", False)  # pytest listens above
    with patch("sys.stderr", Terminal()) as terminal, warnings.catch_warnings():
        warnings.simplefilter("always")
        logs.set_up()
        with progress("load", "B"):
            warnings.warn("something \x1b[31m is odd\nIn detail: much", RuntimeWarning, stacklevel=1)
            assert terminal.written.endswith("\r\x1b[Kifprune: warning: something \\x1b[31m is odd\n")
            logging.getLogger("a_library").warning("another thing")
            assert "\na_library: warning: another thing\n" in terminal.written.replace("\r\x1b[K", "")
        assert ".py" not in terminal.written
        monkeypatch.setenv("IFPRUNE_LOG", "error")
        logs.set_up()
        warnings.warn("unwanted", stacklevel=1)
        assert "unwanted" not in terminal.written
    monkeypatch.delenv("IFPRUNE_LOG")
    logs.set_up()


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


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_the_time_left_is_not_that_of_the_first_piece(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The first of 1000 pieces comes after 29 s, since the source was opened before; a piece takes 0.02 s.
    clock = Clock()
    monkeypatch.setattr("ifprune_cli.console.time", clock)
    with progress("convert", "weights") as update:
        clock.now += 29
        update(1, 1000)
        clock.now += 0.2
        update(11, 1000)
        assert capsys.readouterr().err == ""  # too early to tell
        clock.now += 1.8
        update(101, 1000)
        assert capsys.readouterr().err == "convert: 10 % (50 weights/s, 18 s left)\n"


def test_what_was_there_already_is_no_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr("ifprune_cli.console.time", clock)
    with progress("download", "B") as update:
        update(900, 1000)
        clock.now += 10
        update(910, 1000)
    assert capsys.readouterr().err == "download: 91 % (1.0 B/s, 90 s left)\n"


def test_loading_counts_bytes_of_all_weights(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, int, int]] = []

    @contextmanager
    def display(label: str, unit: str) -> Iterator[Callable[[int, int], None]]:
        yield lambda done, total: shown.append((unit, done, total))

    monkeypatch.setattr("ifprune_cli.loading.progress", display)
    model, _ = load_model(str(tiny_checkpoint), None, False)
    model.close()
    checkpoint = Checkpoint.open(tiny_checkpoint)
    ffn, whole = checkpoint.ffn_bytes(0), checkpoint.weight_bytes
    assert shown == [("B", ffn, whole), ("B", 2 * ffn, whole)]
    assert 2 * ffn < whole
