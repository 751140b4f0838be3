"""Entry point of `ifprune`: it lists the commands, runs one, and turns errors into one line and an exit code.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import typer

from . import (
    atlas,
    bench,
    chat,
    convert,
    demo,
    doctor,
    evaluate,
    export,
    generate,
    info,
    logs,
    select,
    serve,
    tasks,
    train,
)
from .option_groups import Command, with_groups

app = typer.Typer(
    name="ifprune",
    help="Instruction-Following Pruning on MLX: a model reads the instruction and runs on the neurons it needs.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@app.callback(invoke_without_command=True)
def root(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    """Instruction-Following Pruning on MLX: a model reads the instruction and runs on the neurons it needs."""
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("ifprune-mlx"))
        raise typer.Exit


for command, short_help in (
    (chat.chat, "Chat with a model"),
    (generate.generate, "Answer one prompt"),
    (serve.serve, "Serve a model over HTTP"),
    (convert.convert, "Make an IFP checkpoint of a dense one"),
    (export.export, "Write a selection as a plain model"),
    (select.select, "Show or save what a prompt selects"),
    (tasks.tasks, "List or remove named tasks"),
    (info.info, "Show what a checkpoint holds"),
    (demo.demo, "Three answers, dense beside sliced"),
    (train.train, "Train a sparsity predictor"),
    (bench.bench, "Time dense against sliced"),
    (evaluate.evaluate, "Losses by kind of selection"),
    (atlas.atlas, "Draw what a selector does"),
    (doctor.doctor, "Does the selector follow the prompt?"),
):
    app.command(command.__name__, cls=Command, short_help=short_help)(with_groups(command))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the process exits with 0, 1 (it failed), 2 (wrong usage) or 130 (Ctrl-C)."""
    _open_closed_streams()
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, _interrupt)  # a closed window or a shutdown cleans up as Ctrl-C does
    code = run(sys.argv[1:] if arguments is None else list(arguments))
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        code = 1
    except OSError as exc:
        print(f"ifprune: error: the output cannot be written ({exc.strerror or exc})", file=sys.stderr)
        code = 1
    # Leave at once: everything is written, and the exit handlers of numerical libraries can hang while they wait for
    # each other's threads (seen with a preloaded OpenBLAS, docs/log.md).
    os._exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code. Errors become one line on stderr."""
    _quiet_libraries()
    try:
        logs.set_up()
        result = app(
            args=convert.with_calibrate_value(arguments or ["--help"]), prog_name="ifprune", standalone_mode=False
        )
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away; point stdout elsewhere so that the interpreter does not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as exc:
        message = _usage_message(exc)
        if message is not None:
            print(f"ifprune: {message}", file=sys.stderr)
            return 2
        message = _failure_message(exc)
        if message is None:
            raise
        logs.show_cause(exc)
        print(f"ifprune: error: {message}", file=sys.stderr)
        return 1
    if result == 130:  # typer makes this of Ctrl-C inside a command
        print("interrupted", file=sys.stderr)
    return result if isinstance(result, int) else 0


def _interrupt(signum: int, frame: FrameType | None) -> None:
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
    return f"{' '.join(str(format_message()).split())} (see `{command} --help`)"


def _failure_message(exc: Exception) -> str | None:
    """One line for what can go wrong without being a bug; None for a bug."""
    if isinstance(exc, MemoryError):
        return "out of memory; close other programs, or convert the model with -q"
    if isinstance(exc, OSError):
        where = f"{exc.filename}: " if exc.filename else ""
        return f"{where}{exc.strerror or exc}"
    from ifprune_mlx.errors import IfpruneError

    if isinstance(exc, IfpruneError):
        return " ".join(str(exc).split())
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
