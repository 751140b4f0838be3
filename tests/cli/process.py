"""Runs `ifprune`: as a real process, as a user does, or within this one, which is twenty times quicker."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest

from ifprune_cli.main import run as run_command_line

ROOT = Path(__file__).parents[2]
Argument = str | bytes | Path

# A run of the tests in the background ignores SIGINT, and its children would with it: they get Python's handler back.
_PROGRAM = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); {}; "
    "runpy.run_module('ifprune_cli.main', run_name='__main__', alter_sys=True)"
)


def full_disk(size: int) -> str:
    """A prelude after which no file can grow beyond `size` bytes (RLIMIT_FSIZE): as on a full disk, writing fails."""
    if not hasattr(resource, "RLIMIT_FSIZE"):
        pytest.skip("this system cannot limit the size of files")
    # Set within the process, since `preexec_fn` is unsafe beside threads.
    return f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"


def slow_conversion(seconds: float) -> str:
    """A prelude that makes a conversion wait before every weight that it packs, so that it can be caught in the act."""
    return (
        "import time; from ifprune_convert import layout; packed = layout.packed; "
        f"layout.packed = lambda *given: (time.sleep({seconds}), packed(*given))[1]"
    )


def environment(cache: Path, **changes: str) -> dict[str, str]:
    """The environment of a process that imports this working tree, writes no bytecode and reaches no network."""
    folders = [str(ROOT / name) for name in (".", "convert", "cli")]
    packages = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
    fixed = {
        "PYTHONPATH": packages,
        "PYTHONDONTWRITEBYTECODE": "1",
        "IFPRUNE_CACHE": str(cache),
        "IFPRUNE_DATA": str(cache / "data"),
        "HF_HUB_OFFLINE": "1",
        "PIP_NO_INDEX": "1",
    }
    return {**os.environ, **fixed, **changes}


def start(
    arguments: Sequence[Argument],
    cache: Path,
    *,
    env: Mapping[str, str] | None = None,
    prelude: str | None = None,
    options: Sequence[str] = (),
) -> subprocess.Popen[bytes]:
    """Start the command line with pipes for stdin, stdout and stderr.

    Args:
        cache: its IFPRUNE_CACHE; its IFPRUNE_DATA lies within.
        env: changes to the environment.
        prelude: Python statements that the process runs first.
        options: for the interpreter.
    """
    program = ["-m", "ifprune_cli.main"] if prelude is None else ["-c", _PROGRAM.format(prelude)]
    return subprocess.Popen(
        [sys.executable, *options, *program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(cache, **(env or {})),
    )


def run(
    *arguments: Argument,
    cache: Path,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    prelude: str | None = None,
    options: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end; stdout and stderr come back as text."""
    with start(arguments, cache, env=env, prelude=prelude, options=options) as process:
        out, err = process.communicate(stdin, timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out.decode(), err.decode())


def run_here(
    *arguments: str | Path, stdin: bytes = b"", env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command line within this process; what is asked and answered is as with `run`.

    Args:
        env: changes to the environment, of variables that are read when they are needed.
    """
    out, err, given = io.StringIO(), io.StringIO(), io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    texts = [str(argument) for argument in arguments]
    with redirect_stdout(out), redirect_stderr(err), patch("sys.stdin", given), patch.dict(os.environ, env or {}):
        code = run_command_line(texts)
    return subprocess.CompletedProcess(texts, code, out.getvalue(), err.getvalue())
