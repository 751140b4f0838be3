"""What commands print: results on stdout; progress, notes and figures on stderr.

On a terminal, progress is one live line that moves from the first moment; in a pipe, it is a plain line now and then.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ifprune_mlx import Stats

# Seconds: work that ends sooner shows no figures; how often the line is renewed on a terminal, and in a pipe at first:
# there each pause is twice the one before, up to the last number, so that a day of training does not fill a log.
_PATIENCE, _LIVE, _PLAIN, _LONGEST_PLAIN = 0.5, 0.1, 5.0, 60.0
_BAR = 20
_TABLE_WIDTH = 80
_UNITS = {"download": "B", "convert": "weights", "calibrate": "tokens", "measure": "tokens", "order": "chats"}


# What a terminal obeys instead of showing it, what changes the order in which a line is read, and half surrogates,
# which no encoding holds. Tabs and line feeds stay.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_LONGEST_LINE = 600


def printable(text: str) -> str:
    """Text of any origin as it may go to a terminal: control characters become escapes, such as \\x1b."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: object) -> str:
    """Text on one printable line of bounded length; of a longer one, the middle is left out."""
    line = printable(" ".join(str(text).split()))
    if len(line) <= _LONGEST_LINE:
        return line
    half = _LONGEST_LINE // 2
    return f"{line[:half]} ... {line[-half:]}"


def note(text: str, *, dim: bool = False) -> None:
    """A line for the person at the terminal, on stderr; `dim` where that terminal has colours.

    A terminal breaks it between words, and begins the next line under the last column of a table.
    """
    text = printable(text)
    if sys.stderr.isatty():
        text = "\n".join(_wrapped(line, shutil.get_terminal_size().columns) for line in text.split("\n"))
    if dim and sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
        text = f"\x1b[2m{text}\x1b[0m"
    with _live_line.hidden():
        print(text, file=sys.stderr, flush=True)


def _wrapped(line: str, width: int) -> str:
    column = re.match(r" *(\S.*\S {2,})?", line)
    indent = " " * len(column[0]) if column is not None and 2 * len(column[0]) < width else ""
    wrap = partial(textwrap.wrap, break_long_words=False, break_on_hyphens=False)
    return "\n".join(wrap(line, width, subsequent_indent=indent)) if len(line) > width else line


def show(text: object = "", end: str = "\n") -> None:
    """A result, on stdout."""
    with _live_line.hidden():
        print(printable(str(text)), end=end, flush=True)


def show_answer(text: str, *, dim: bool = False) -> None:
    """A piece of a model's answer, on stdout: a pipe gets it as it is, a terminal without control characters."""
    text = without_controls(text) if sys.stdout.isatty() else text
    draw(f"\x1b[2m{text}\x1b[0m" if dim and text else text)


def without_controls(text: str) -> str:
    """Text of any origin without what a terminal obeys."""
    return _UNPRINTABLE.sub("", text)


def draw(text: str) -> None:
    """Text to stdout as it is, with what a terminal obeys."""
    with _live_line.hidden():
        sys.stdout.write(text)
        sys.stdout.flush()


def result_json(value: Mapping[str, Any]) -> None:
    """One JSON object on one line, the last thing on stdout."""
    plain = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    line = json.dumps(value, ensure_ascii=not plain)
    # JSON itself escapes but the first 32 of them.
    print(_UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", line), flush=True)


class _LiveLine:
    """The last line of a terminal while something is worked on. A thread turns its spinner, whatever the work does.

    Jobs may lie within each other; the innermost that has a text is shown. Whatever else is written takes the line
    away first.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._jobs: list[str | None] = []
        self._turning = self._drawn = False
        self._turns = 0

    def begin(self, text: str) -> int:
        """Show a job; returns its number."""
        with self._lock:
            self._jobs.append(text)
            self._show(text)
            if not self._turning:
                self._turning = True
                threading.Thread(target=self._turn, daemon=True).start()
            return len(self._jobs) - 1

    def change(self, job: int, text: str | None) -> None:
        """What to show of a job from now on; None shows nothing."""
        with self._lock:
            self._jobs[job] = text
            if text is None:
                self._erase()

    def end(self, job: int) -> None:
        """Take a job away, and all within it."""
        with self._lock:
            del self._jobs[job:]
            self._erase()

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Nothing is drawn meanwhile."""
        with self._lock:
            self._erase()
            yield

    def _turn(self) -> None:
        while True:
            time.sleep(_LIVE)
            with self._lock:
                self._turning = bool(self._jobs)
                if not self._turning:
                    return
                with suppress(OSError):  # the terminal has gone; what is said next finds out
                    self._show(next((text for text in reversed(self._jobs) if text is not None), None))

    def _show(self, text: str | None) -> None:
        if text is None:
            return
        utf8 = (sys.stderr.encoding or "").lower().replace("-", "") == "utf8"
        frames = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏" if utf8 else "|/-\\"
        self._turns += 1
        line = f"{frames[self._turns % len(frames)]} {text}"[: shutil.get_terminal_size().columns - 1]
        print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)
        self._drawn = True

    def _erase(self) -> None:
        if self._drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        self._drawn = False


_live_line = _LiveLine()


@contextmanager
def progress(label: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress display; yields a function that takes (done, total), which may be called for one job after another.

    The rate is that since a job's first call: what was done by then may have taken long for another reason, such as
    opening the source, or no time at all, such as the part of a file that was there already.
    """
    live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    job = _live_line.begin(label) if live else -1
    last = time.monotonic()
    began: tuple[float, int] | None = None
    pause = _LIVE if live else _PLAIN

    def update(done: int, total: int) -> None:
        nonlocal last, began, pause
        now = time.monotonic()
        if done >= total:
            last, began = now, None
            if live:
                _live_line.change(job, None)  # what follows, such as an answer, begins on an empty line
            return
        if began is None:
            began = now, done
        elapsed, since = now - began[0], done - began[1]
        if elapsed < _PATIENCE or now - last < pause or since <= 0:
            return
        last, rate = now, since / elapsed
        figures = f"{100 * done / total:.0f} % ({_count(rate)} {unit}/s, {duration((total - done) / rate)} left)"
        if live:
            _live_line.change(job, f"{label} [{'#' * (_BAR * done // total):<{_BAR}}] {figures}")
        else:
            note(f"{label}: {figures}")
            pause = min(2 * pause, _LONGEST_PLAIN)

    try:
        yield update
    finally:
        if live:
            _live_line.end(job)


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """Progress of a conversion; yields a function that takes (stage, done, total), as `ifprune_convert` reports."""
    with ExitStack() as shown:
        bars = {"convert": shown.enter_context(progress("convert", _UNITS["convert"]))}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = shown.enter_context(progress(stage, _UNITS[stage]))
            bars[stage](done, total)

        yield report


def _count(value: float) -> str:
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.1f}{suffix}"
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 0.1 else f"{value:.2g}"


@contextmanager
def interrupt_seen(text: str | None) -> Iterator[None]:
    """Say this the moment that Ctrl-C is pressed: Python hears of it only when the work in C++ that it waits for ends.

    Does nothing without a text, or where the signals are another's.
    """
    if text is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    heard, tell = os.pipe()
    os.set_blocking(tell, False)
    before = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)

    def wait() -> None:
        while number := os.read(heard, 1):
            if number[0] == signal.SIGINT:
                note(text)
                return

    listener = threading.Thread(target=wait, daemon=True)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(tell)
        listener.join()
        os.close(heard)


def duration(seconds: float) -> str:
    """A time in a unit that suits it: 95 s, 12 min, 2.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def parameters(count: int) -> str:
    """A parameter count in the field's usual form: 111.2M, 3.02B."""
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def gigabytes(count: int) -> str:
    """A number of bytes: 0.27 GB, 18.4 GB."""
    return f"{count / 1e9:.3g} GB"


def size(count: int) -> str:
    """A number of bytes in the unit that suits it, in at most eight characters: 0.3 MB, 538 MB, 18.40 GB."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB" if count < 1e11 else f"{count / 1e9:.0f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 1e7 else f"{count / 1e6:.1f} MB"


def kernel_lines(kernels: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Which kernel computes what, and why: a line for the numbers of tokens that have the same answer."""
    alike: dict[str, list[str]] = {}
    for tokens, choice in kernels.items():
        name = "MLX's kernel" if choice["kernel"] == "mlx" else "our kernel"
        alike.setdefault(f"{name} ({choice['reason']})", []).append(tokens)
    return [f"{' to '.join(dict.fromkeys((n[0], n[-1])))} tokens: {line}" for line, n in alike.items()]


def table(labels: Sequence[str], columns: Sequence[Sequence[str]], label_width: int = 0) -> list[str]:
    """Lines of a table that fit 80 columns: what has no room beside the labels follows in further blocks of lines.

    Args:
        labels: the first column, from its heading on.
        columns: the others, likewise; their cells are aligned to the right.
        label_width: the first column's, at least.
    """
    left = max(label_width, *map(len, labels))
    blocks: list[list[str]] = []
    for column in columns:
        width = max(map(len, column))
        if not blocks or len(blocks[-1][0]) + 1 + width > _TABLE_WIDTH:
            blocks.append([f"{label:<{left}}" for label in labels])
        blocks[-1] = [f"{line} {cell:>{width}}" for line, cell in zip(blocks[-1], column, strict=True)]
    return [line.rstrip() for block in blocks for line in block]


def shortened(text: str, width: int) -> str:
    """One line of at most `width` characters."""
    indent = text[: len(text) - len(text.lstrip())]
    line = indent + " ".join(text.split())
    printable = "".join(char if char.isprintable() else "?" for char in line)
    return printable if len(printable) <= width else printable[: max(width - 3, 1)] + "..."


def footer(stats: Stats, more: str = "") -> str:
    """One answer's figures in one line: what selected which neurons, and where the time went; and what else is told."""
    what = "dense" if stats.selection is None else f"{stats.selector} {stats.density:.2f} {stats.selection[:6]}"
    active = f"{parameters(stats.active_parameters)}/{parameters(stats.total_parameters)}"
    before = stats.select_s + stats.switch_s + stats.prefill_s
    speed = f"{stats.completion_tokens} tokens at {stats.tokens_per_s:.1f}/s"
    return " | ".join(part for part in (f"[{what}", active, f"first token {before:.2f} s", speed, more) if part) + "]"


def report(stats: Stats) -> str:
    """One answer's figures in full, in three lines: what was active, what it took, and what it compares with."""
    what = "dense" if stats.selection is None else f"{stats.selector} {stats.selection}, density {stats.density:.2f}"
    cut = " | cut off by --max-tokens" if stats.finish_reason == "length" else ""
    before = "first selection" if stats.overlap is None else f"overlap with the one before {100 * stats.overlap:.0f} %"
    return (
        f"[{what} | {parameters(stats.active_parameters)} of {parameters(stats.total_parameters)} active]\n"
        f"[select {stats.select_s:.2f} + switch {stats.switch_s:.2f} + prefill {stats.prefill_s:.2f} "
        f"+ decode {stats.decode_s:.2f} s | {stats.completion_tokens} tokens, {stats.tokens_per_s:.1f} tok/s]\n"
        f"[{before} | peak memory {stats.peak_memory / 1e9:.2f} GB{cut}]"
    )
