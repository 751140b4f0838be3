"""`ifprune chat`, or another command, on a pseudo-terminal, and what a person sees there."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from pathlib import Path

import pyte

from tests.cli.process import environment

# A terminal is asked to bracket what is pasted while there is a prompt.
PROMPT, PROMPT_LEFT = rb"\x1b\[\?2004h", rb"\x1b\[\?2004l"
# The spinner is taken away before an answer begins.
ANSWER = rb".*?\r\x1b\[K"
# Makes the pseudo-terminal on stdin the process's own, so that Ctrl-C on it becomes a signal. A run of the tests in the
# background ignores that signal, or a thread of it blocks it, and its children would with it: they get Python's back.
ON_TERMINAL = (
    "import fcntl, runpy, signal, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "signal.signal(signal.SIGINT, signal.default_int_handler); "
    "signal.pthread_sigmask(signal.SIG_UNBLOCK, {{signal.SIGINT}}); {}; "
    "runpy.run_module('ifprune_cli.main', run_name='__main__', alter_sys=True)"
)


class Terminal:
    """A command on a pseudo-terminal.

    Args:
        checkpoint: of the model.
        cache: its IFPRUNE_CACHE.
        options: of the command.
        columns: the terminal's width.
        prelude: Python statements that the process runs first.
        command: which one, if not chat.
        env: changes to its environment.

    Attributes:
        screen: what a person sees; of the lines that have left it, `history.top` holds the last.
    """

    def __init__(
        self,
        checkpoint: Path,
        cache: Path,
        *options: str,
        columns: int = 200,
        prelude: str = "pass",
        command: str = "chat",
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        self._seen = b""
        self.screen = pyte.HistoryScreen(columns, 50, history=1000)
        self._stream = pyte.ByteStream(self.screen)
        surroundings = environment(cache, TERM="xterm", PROMPT_TOOLKIT_NO_CPR="1", **(env or {}))
        for name in ("COLUMNS", "LINES"):  # of the tests' own terminal
            surroundings.pop(name, None)
        self._process = subprocess.Popen(
            [sys.executable, "-c", ON_TERMINAL.format(prelude), command, "--model", str(checkpoint), *options],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=surroundings,
            start_new_session=True,
        )
        os.close(slave)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)

    def send(self, keys: str) -> None:
        """Press keys."""
        os.write(self._master, keys.encode())

    def expect(self, pattern: bytes) -> None:
        """Wait until the pattern shows, and take what was shown up to its end."""
        deadline = time.monotonic() + 60
        while (match := re.search(pattern, self._seen, re.DOTALL)) is None:
            ready, _, _ = select.select([self._master], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"{pattern!r} never came; seen: {self._seen[-2000:]!r}"
            data = os.read(self._master, 65536)
            self._seen += data
            self._stream.feed(data)
        assert b"Traceback" not in self._seen, self._seen[self._seen.find(b"Traceback") :][-3000:].decode()
        self._seen = self._seen[match.end() :]

    def stop_an_answer(self, keys: str) -> None:
        """Enter a message at the prompt, and press Ctrl-C once its answer has begun."""
        self.expect(PROMPT)
        self.send(f"{keys}\r")
        self.expect(PROMPT_LEFT + ANSWER + b".{20}")
        self.send("\x03")
        self.expect(rb"\] stopped")

    @property
    def lines(self) -> list[str]:
        """The screen's lines, from the top to the last that is not empty."""
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip().split("\n")

    def leave(self, keys: str = "\x04") -> int:
        """Ctrl-D, and the exit code."""
        self.expect(PROMPT)
        self.send(keys)
        return self.wait()

    def wait(self) -> int:
        """Wait until the chat has ended; its exit code."""
        return self._process.wait(timeout=60)
