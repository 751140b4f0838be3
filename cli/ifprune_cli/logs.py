"""What the libraries below the command line log and warn of, each on a line of its own on stderr: `IFPRUNE_LOG` and
`--verbose` say how much of it.
"""

from __future__ import annotations

import logging
import os
import traceback
import warnings
from contextlib import suppress
from typing import Annotated, TextIO

import typer

from .console import note, one_line

VerboseOption = Annotated[
    bool,
    typer.Option("--verbose", help="Say what is done, and where an error comes from, as IFPRUNE_LOG=debug does."),
]
_WARNINGS = "py.warnings"  # as logging calls the warnings of Python
_LIBRARIES = ("ifprune_mlx", "ifprune_convert", _WARNINGS)
_LEVELS = ("debug", "info", "warning", "error")


def set_up() -> None:
    """Log to stderr, as much as `IFPRUNE_LOG` says; warnings if it is not set.

    Raises:
        IfpruneError: if it says no level.
    """
    level = os.environ.get("IFPRUNE_LOG", "").strip().lower() or "warning"
    known = level in _LEVELS
    handler = _Notes()
    handler.setFormatter(_OneLine("ifprune: %(levelname)s: %(message)s"))
    for name in _LIBRARIES:
        log = logging.getLogger(name)
        log.handlers = [handler]
        log.setLevel(level.upper() if known else logging.WARNING)
    others = _Notes(logging.WARNING)
    others.setFormatter(_OneLine("%(name)s: %(levelname)s: %(message)s"))
    logging.lastResort = others  # of libraries that have no handlers
    warnings.showwarning = _warn
    if not known:
        from ifprune_mlx.errors import IfpruneError

        raise IfpruneError(f"IFPRUNE_LOG is {level!r}; set it to {', '.join(_LEVELS[:-1])} or {_LEVELS[-1]}")


class _Notes(logging.Handler):
    """Writes as all notes are written: the live line goes out of the way."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # the terminal has gone; what is said next finds out
            note(self.format(record))


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning of Python in its first line, without the place in the code, which is nothing to a user."""
    text = str(message).strip() or category.__name__
    logging.getLogger(_WARNINGS).warning("%s", text.splitlines()[0])


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        record.levelname = record.levelname.lower()
        return one_line(super().format(record))


def be_verbose() -> None:
    """Log everything."""
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.DEBUG)


def show_cause(exc: BaseException) -> None:
    """Print where an error comes from, with all its causes, if everything is logged."""
    if logging.getLogger(_LIBRARIES[0]).isEnabledFor(logging.DEBUG):
        note("".join(traceback.format_exception(exc)).rstrip())
