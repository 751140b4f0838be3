"""What commands print: results on stdout; progress, notes and figures on stderr.

On a terminal progress is a live bar with rate and ETA; piped, it is a plain line now and then.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ifprune_mlx import Stats

_PLAIN_INTERVAL = 5.0


def note(text: str) -> None:
    """A line for the person at the terminal, on stderr."""
    print(text, file=sys.stderr, flush=True)


def result_json(value: Mapping[str, Any]) -> None:
    """One JSON object on one line, the last thing on stdout."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


@contextmanager
def progress(label: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress display; yields a function that takes (done, total).

    Nothing is shown for work that ends within half a second.
    """
    shown = _Bar(label, unit) if sys.stderr.isatty() else _Lines(label, unit)
    try:
        yield shown.update
    finally:
        shown.close()


class _Bar:
    def __init__(self, label: str, unit: str) -> None:
        self._label, self._unit = label, unit
        self._start = time.monotonic()
        self._progress: Any = None

    def update(self, done: int, total: int) -> None:
        if self._progress is None:
            if time.monotonic() - self._start < 0.5 or done >= total:
                return
            self._begin(total)
        elapsed = max(time.monotonic() - self._start, 1e-6)
        self._progress.update(self._task, completed=done, total=total, rate=f"{_count(done / elapsed)} {self._unit}/s")
        if done >= total:
            # The answer follows a prefill: nothing may be drawn any more. Other work begins another bar.
            self.close()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = None
        self._start = time.monotonic()

    def _begin(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}% {task.fields[rate]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,  # an answer would go through the bar's console, to stderr
        )
        self._task = self._progress.add_task(self._label, total=total, rate="")
        self._progress.start()


class _Lines:
    def __init__(self, label: str, unit: str) -> None:
        self._label, self._unit = label, unit
        self._start = self._last = time.monotonic()

    def update(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last < _PLAIN_INTERVAL or not done:
            return
        self._last = now
        rate = done / (now - self._start)
        left = (total - done) / rate if rate else 0
        note(f"{self._label}: {100 * done / max(total, 1):.0f} % ({_count(rate)} {self._unit}/s, {left:.0f} s left)")

    def close(self) -> None:
        """Plain lines need no closing."""


def _count(value: float) -> str:
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.1f}{suffix}"
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def parameters(count: int) -> str:
    """A parameter count in the field's usual form: 111M, 3.02B."""
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def gigabytes(count: int) -> str:
    """A number of bytes: 0.27 GB, 18.4 GB."""
    return f"{count / 1e9:.3g} GB"


def shortened(text: str, width: int) -> str:
    """One line of at most `width` characters."""
    indent = text[: len(text) - len(text.lstrip())]
    line = indent + " ".join(text.split())
    printable = "".join(char if char.isprintable() else "?" for char in line)
    return printable if len(printable) <= width else printable[: max(width - 3, 1)] + "..."


def footer(stats: Stats) -> str:
    """One answer's figures in one line of a terminal: what selected which neurons, and where the time went."""
    what = "dense" if stats.selection is None else f"{stats.selector} {stats.density:.2f} {stats.selection[:6]}"
    active = f"{_whole(stats.active_parameters)}/{_whole(stats.total_parameters)}"
    before = stats.select_s + stats.switch_s + stats.prefill_s
    speed = f"{stats.completion_tokens} tokens at {stats.tokens_per_s:.1f}/s"
    return f"[{what} | {active} | first token {before:.2f} s | {speed}]"


def report(stats: Stats) -> str:
    """One answer's figures in full, a line each for what was active, what it took, and what it compares with."""
    what = "dense" if stats.selection is None else f"{stats.selector} {stats.selection}, density {stats.density:.2f}"
    cut = " | cut off by --max-tokens" if stats.finish_reason == "length" else ""
    before = "first selection" if stats.overlap is None else f"overlap with the one before {100 * stats.overlap:.0f} %"
    return (
        f"[{what} | {parameters(stats.active_parameters)} of {parameters(stats.total_parameters)} active]\n"
        f"[select {stats.select_s:.2f} + switch {stats.switch_s:.2f} + prefill {stats.prefill_s:.2f} "
        f"+ decode {stats.decode_s:.2f} s | {stats.completion_tokens} tokens, {stats.tokens_per_s:.1f} tok/s]\n"
        f"[{before} | peak memory {stats.peak_memory / 1e9:.2f} GB{cut}]"
    )


def _whole(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"
