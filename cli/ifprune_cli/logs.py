"""The log of the libraries below the command line, on stderr: `IFPRUNE_LOG` and `--verbose` say how much of it."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from typing import Annotated

import typer

from .console import note, one_line

VerboseOption = Annotated[
    bool,
    typer.Option("--verbose", help="Say what is done, and where an error comes from, as IFPRUNE_LOG=debug does."),
]
_LIBRARIES = ("ifprune_mlx", "ifprune_convert")
_LEVELS = ("debug", "info", "warning", "error")


def set_up() -> None:
    """Log to stderr, as much as `IFPRUNE_LOG` says; warnings if it is not set.

    Raises:
        IfpruneError: if it says no level.
    """
    level = os.environ.get("IFPRUNE_LOG", "").strip().lower() or "warning"
    known = level in _LEVELS
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("ifprune: %(levelname)s: %(message)s"))
    for name in _LIBRARIES:
        log = logging.getLogger(name)
        log.handlers = [handler]
        log.setLevel(level.upper() if known else logging.WARNING)
    if not known:
        from ifprune_mlx.errors import IfpruneError

        raise IfpruneError(f"IFPRUNE_LOG is {level!r}; set it to {', '.join(_LEVELS[:-1])} or {_LEVELS[-1]}")


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
