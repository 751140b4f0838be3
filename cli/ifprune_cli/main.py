"""Entry point of `ifprune`: it runs the command line, and turns errors into one line and an exit code.

The commands are imported where Ctrl-C is caught, so this file imports nothing that takes time, and nothing that a
Python too old could not read.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from .machine_check import problem
from .ranks import leave

_stopped = False  # whether Ctrl-C or another signal has asked to stop


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the process exits with 0, 1 (it failed), 2 (wrong usage) or 130 (Ctrl-C)."""
    _open_closed_streams()
    if (reason := problem()) is not None:
        sys.exit(f"ifprune: {reason}")
    endings = [signal.SIGTERM, signal.SIGHUP]  # a closed window or a shutdown cleans up as Ctrl-C does
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        endings.append(signal.SIGINT)
    try:
        for ending in endings:
            signal.signal(ending, _interrupt)
        code = run(sys.argv[1:] if arguments is None else list(arguments))
    except KeyboardInterrupt:  # once more, while the first one was told
        code = 130
    for ending in endings:
        signal.signal(ending, signal.SIG_IGN)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        code = 1
    except OSError as exc:
        _tell(f"error: the output cannot be written ({exc.strerror or exc})")
        code = 1
    # Leave at once: everything is written, and the exit handlers of numerical libraries can hang while they wait for
    # each other's threads (seen with a preloaded OpenBLAS, docs/log.md).
    os._exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code. Errors become one line on stderr."""
    _quiet_libraries()
    try:
        from . import logs
        from .commands import app
        from .convert import with_calibrate_value

        logs.set_up()
        given = with_calibrate_value(arguments or ["--help"])
        result = app(args=given, prog_name="ifprune", standalone_mode=False)
        code = result if isinstance(result, int) else 0
        if code == 0:
            leave(None)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # The reader of our output went away; point stdout elsewhere so that the interpreter does not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as exc:
        if not _stopped:
            leave(exc)
            return _explain(exc)
        code = 130  # a module that Ctrl-C stopped while it was imported says that it failed
    if code == 130:  # typer makes this of Ctrl-C inside a command
        print("interrupted", file=sys.stderr)
    return code


def _explain(exc: Exception) -> int:
    """Print one line about what went wrong and return the exit code; raise it again if it is a bug."""
    if (message := _usage_message(exc)) is not None:
        _tell(message)
        return 2
    if (message := _failure_message(exc)) is None:
        raise exc
    from .logs import show_cause

    show_cause(exc)
    _tell(f"error: {message}")
    return 1


def _tell(message: str) -> None:
    from .console import note, one_line

    note(f"ifprune: {one_line(message)}")


def _interrupt(signum: int, frame: FrameType | None) -> None:
    global _stopped  # noqa: PLW0603
    _stopped = True
    raise KeyboardInterrupt


def _open_closed_streams() -> None:
    """Give closed standard streams the null device, or the next file that is opened becomes one of them."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def _usage_message(exc: Exception) -> str | None:
    """One line for typer's usage errors, which typer would print as three or as a box."""
    format_message = getattr(exc, "format_message", None)
    if format_message is None:
        return None
    context = getattr(exc, "ctx", None)
    command = context.command_path if context is not None else "ifprune"
    return f"{format_message()} (see `{command} --help`)"


def _failure_message(exc: Exception) -> str | None:
    """One line for what can go wrong without being a bug; None for a bug."""
    if isinstance(exc, MemoryError):
        return "out of memory; close other programs, or convert the model with -q"
    if isinstance(exc, OSError):
        where = f"{exc.filename}: " if exc.filename else ""
        return f"{where}{exc.strerror or exc}"
    from ifprune_mlx.errors import IfpruneError

    if isinstance(exc, IfpruneError):
        return str(exc)
    if isinstance(exc, RuntimeError) and "alloc" in str(exc).lower():
        return f"out of memory ({str(exc).splitlines()[0]}); close other programs, or convert the model with -q"
    return None


def _quiet_libraries() -> None:
    """Keep other libraries' chatter out of our output."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # each try of a download that fails; the last is our own error


if __name__ == "__main__":
    main()
