"""The child process that uses damaged inputs, within limits of time and memory."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ifprune_mlx.bench.process_memory import most_resident

SECONDS, BYTES = 20, 2_000_000_000
_STARTED = "started"


def child(connection: Connection, corpus: Path, scratch: Path) -> None:
    """Use the inputs that come through the connection; answer what went wrong with each, or nothing."""
    os.setsid()  # so that all that it starts can be ended with it
    sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    _limit("RLIMIT_CORE", 0)
    os.environ["HF_HUB_OFFLINE"] = "1"
    from tests.fuzz.targets import Bench, run_target

    bench = Bench(corpus, scratch)
    with suppress(OSError):
        # What is mapped is more than what is used; what is used is measured below.
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        _limit("RLIMIT_AS", mapped + 3 * BYTES)
    connection.send(_STARTED)
    while (case := connection.recv()) is not None:
        wrong = ""
        try:
            run_target(bench, *case)
        except BaseException as exc:
            wrong = "".join(traceback.format_exception(exc))
        if not wrong and _peak() > BYTES:
            wrong = f"peak memory of {_peak() / 1e9:.1f} GB"
        connection.send((wrong, _peak()))
    bench.close()


def _limit(name: str, value: int) -> None:
    """Limit this process, on systems that have such a limit."""
    if hasattr(resource, name):
        resource.setrlimit(getattr(resource, name), (value, value))


def _peak() -> int:
    """Bytes. On Linux `ru_maxrss` begins with what the parent had."""
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    return most_resident()


class Worker:
    """A child process, started again after it was ended."""

    def __init__(self, corpus: Path, scratch: Path) -> None:
        self._given = corpus, scratch
        self._process: Any = None

    def run(self, target: str, folder: Path, variant: int) -> str:
        """Use one input; returns what went wrong."""
        if self._process is None:
            self._start()
        self._connection.send((target, folder, variant))
        try:
            if not self._connection.poll(SECONDS):
                self.end(kill=True)
                return f"hangs: not done after {SECONDS} s"
            wrong, peak = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            code = self._process.exitcode
            self.end(kill=True)
            return f"the process ended with {code if code is None or code >= 0 else signal.Signals(-code).name}"
        if peak > BYTES // 2:  # the peak of the next must be its own
            self.end()
        return str(wrong)

    def end(self, *, kill: bool = False) -> None:
        """End the process and all that it started."""
        if self._process is None:
            return
        if not kill:
            with suppress(OSError):
                self._connection.send(None)
                self._process.join(30)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.join()
        self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=child, args=(theirs, *self._given))
        self._process.start()
        theirs.close()
        if self._connection.recv() != _STARTED:
            raise RuntimeError("the child process did not start")
