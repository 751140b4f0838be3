"""Records real commands in a pseudo-terminal and writes them as an animated SVG, which browsers and GitHub play.

python -m scripts.make_cast --out docs/images/demo.svg [--speed 3] [--columns 88] [--rows 26] "ifprune demo" ...

What the commands print is shown as it came, `--speed` times as fast; waits longer than `--longest-wait` seconds are cut
to that. The picture is a dark window, so it can be read on a light page and on a dark one. Programs that show no
animation, and printers, show the last screen. Linux and macOS only; nothing but Python is needed.
"""

from __future__ import annotations

import argparse
import codecs
import fcntl
import os
import pty
import re
import select
import shlex
import struct
import sys
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

CELL, LINE, MARGIN, TITLE = 8.4, 19, 16, 30
"""Width and height of a character, the space around the text, and the height of the window's title; in pixels."""
TICK = 0.1
"""Seconds of the shortest change that is drawn."""
HOLD = 5.0
"""Seconds for which the last screen stays."""
COMMANDS, FIGURES = ("$ ", "> "), ("[", "  dense: ", "  sliced: ")
"""How lines begin that are drawn in green, and in grey."""
CONTROL = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|\x1b\][^\x07]*\x07|\x1b[()].|\x1b.")


@dataclass
class Screen:
    """What is written on a terminal of a given width that keeps every line: as much of VT100 as our commands use."""

    columns: int
    lines: list[str] = field(default_factory=lambda: [""])
    row: int = 0
    column: int = 0

    def feed(self, text: str) -> None:
        """Write text with its control sequences."""
        start = 0
        for match in CONTROL.finditer(text):
            self._write(text[start : match.start()])
            self._control(match[1] or "", match[2] or "")
            start = match.end()
        self._write(text[start:])

    def _write(self, text: str) -> None:
        for char in text:
            if char == "\n":
                self._go_to(self.row + 1)
            elif char == "\r":
                self.column = 0
            elif char == "\b":
                self.column = max(self.column - 1, 0)
            elif char.isprintable():
                if self.column == self.columns:
                    self._go_to(self.row + 1)
                    self.column = 0
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + char + line[self.column + 1 :]
                self.column += 1

    def _control(self, numbers: str, kind: str) -> None:
        count = int(numbers) if numbers.isdigit() else 0
        line = self.lines[self.row]
        if kind == "A":
            self.row = max(self.row - max(count, 1), 0)
        elif kind == "B":
            self._go_to(self.row + max(count, 1))
        elif kind in "CD" and kind:
            self.column = min(max(self.column + max(count, 1) * (1 if kind == "C" else -1), 0), self.columns)
        elif kind == "G":
            self.column = max(count - 1, 0)
        elif kind == "K":
            self.lines[self.row] = {0: line[: self.column], 1: " " * self.column + line[self.column :]}.get(count, "")
        elif kind == "J":
            self.lines[self.row] = line[: self.column]
            del self.lines[self.row + 1 :]

    def _go_to(self, row: int) -> None:
        self.lines += [""] * (row + 1 - len(self.lines))
        self.row = row


@dataclass
class Piece:
    """Some characters of one line, and when they are seen: ticks from `start` to before `end`, None for the end."""

    row: int
    column: int
    text: str
    start: int
    end: int | None = None


def output(command: list[str], columns: int, rows: int) -> Iterator[tuple[float, str]]:
    """Run a command in a pseudo-terminal: what it writes, and the seconds since it began."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(TERM="xterm-256color", COLUMNS=str(columns), LINES=str(rows))
        if command[0] == "ifprune":
            command = [sys.executable, "-m", "ifprune_cli.main", *command[1:]]
        os.execvp(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    decoder, began, last = codecs.getincrementaldecoder("utf-8")("replace"), time.monotonic(), ""
    while True:
        select.select([terminal], [], [])
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:  # how Linux says that the child closed it
            data = b""
        if not data:
            break
        last = decoder.decode(data)
        yield time.monotonic() - began, last
    os.close(terminal)
    if status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise SystemExit(f"{shlex.join(command)}: exit code {status}\n{last}")


def record(
    commands: list[str], columns: int, rows: int, speed: float, longest: float
) -> tuple[list[Piece], int, list[tuple[int, int]]]:
    """Run the commands one after the other.

    Returns:
        Every piece of text; the ticks of the whole; (tick, number of lines) for each moment at which it grows.
    """
    screen, clock = Screen(columns), 0.0
    pieces: list[Piece] = []
    shown: dict[int, str] = {}
    heights = [(0, 1)]

    def look() -> None:
        tick = round(clock / TICK)
        for row in range(max(len(screen.lines), len(shown))):
            new = screen.lines[row] if row < len(screen.lines) else ""
            old = shown.get(row, "")
            if new == old:
                continue
            if not new.startswith(old):
                for piece in pieces:
                    if piece.row == row and piece.end is None:
                        piece.end = tick
                old = ""
            if added := new[len(old) :]:
                pieces.append(Piece(row, len(old), added, tick))
            shown[row] = new
        if heights[-1][1] < len(screen.lines):
            heights.append((tick, len(screen.lines)))

    for command in commands:
        screen.feed(("\r\n" if screen.lines != [""] else "") + "$ ")
        for start in range(0, len(command), 4):
            screen.feed(command[start : start + 4])
            clock += TICK
            look()
        clock += 0.4
        screen.feed("\r\n")
        before = seen = 0.0
        for seconds, text in output(shlex.split(command), columns, rows):
            clock += min(seconds - before, longest) / speed
            before = seconds
            screen.feed(text)
            if clock - seen >= TICK:
                look()
                seen = clock
        look()
        print(f"{command}: {before:.1f} s", file=sys.stderr)
    return [piece for piece in pieces if piece.end != piece.start], round((clock + HOLD) / TICK), heights


def svg(pieces: list[Piece], ticks: int, heights: list[tuple[int, int]], columns: int, rows: int, title: str) -> str:
    """The animated picture. Every piece is a text that is hidden until its time; the page of text moves up."""
    width, height = round(columns * CELL) + 2 * MARGIN, rows * LINE + 2 * MARGIN + TITLE
    seconds = f"{ticks * TICK:.1f}s"

    def at(tick: int) -> str:
        return f"{min(tick / ticks, 1):.4f}".rstrip("0").rstrip(".")

    def animated(attribute: str, values: list[tuple[int, str]]) -> str:
        moments, states = [at(tick) for tick, _ in values], [state for _, state in values]
        kind = (
            'Transform attributeName="transform" type="translate"'
            if attribute == "transform"
            else (f' attributeName="{attribute}"')
        )
        return (
            f'<animate{kind} calcMode="discrete" dur="{seconds}" repeatCount="indefinite" '
            f'values="{";".join(states)}" keyTimes="{";".join(moments)}"/>'
        )

    def style(piece: Piece) -> str:
        line = next((one.text for one in pieces if one.row == piece.row and one.column == 0), piece.text)
        return " class='c'" if line.startswith(COMMANDS) else " class='d'" if line.startswith(FIGURES) else ""

    scrolls = [(0, 0)]
    for tick, lines in heights:
        offset = -max(lines - rows, 0) * LINE
        if offset != scrolls[-1][1]:
            scrolls = [one for one in scrolls if one[0] != tick or tick == 0] + [(tick, offset)]
    body = []
    for piece in pieces:
        if not piece.text.strip():
            continue
        states = [(0, "hidden"), (piece.start, "visible")] if piece.start else [(0, "visible")]
        last = ""
        if piece.end is not None:
            states.append((piece.end, "hidden"))
            last = ' visibility="hidden"'  # where nothing is animated
        x, y = round(piece.column * CELL, 1), (piece.row + 1) * LINE - 5
        body.append(
            f'<text x="{x:g}" y="{y}" textLength="{len(piece.text) * CELL:.1f}"{style(piece)}{last}>'
            f"{escape(piece.text, quote=False)}{animated('visibility', states)}</text>"
        )
    moves = animated("transform", [(tick, f"0 {offset}") for tick, offset in scrolls])
    dots = "".join(
        f'<circle cx="{MARGIN + 6 + 20 * n}" cy="{TITLE // 2 + 3}" r="6" fill="{colour}"/>'
        for n, colour in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    )
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">
<title>{escape(title)}</title>
<style>
text {{ font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace; white-space: pre;
  fill: #e6e6e6 }}
.c {{ fill: #7ee787; font-weight: bold }} .d {{ fill: #8b949e }} .t {{ fill: #8b949e; text-anchor: middle }}
</style>
<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="10" fill="#0d1117" stroke="#484f58"/>
{dots}
<text x="{width / 2:g}" y="{TITLE // 2 + 8}" class="t">{escape(title)}</text>
<clipPath id="window"><rect width="{width - 2 * MARGIN}" height="{rows * LINE}"/></clipPath>
<g transform="translate({MARGIN} {MARGIN + TITLE - 6})" clip-path="url(#window)" xml:space="preserve">
<g transform="translate(0 {scrolls[-1][1]})">{moves}
{chr(10).join(body)}
</g></g></svg>
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="+", help="each in quotes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--title", default="")
    parser.add_argument("--columns", type=int, default=88)
    parser.add_argument("--rows", type=int, default=26)
    parser.add_argument("--speed", type=float, default=1.0)
    parser.add_argument("--longest-wait", type=float, default=2.0)
    args = parser.parse_args()
    pieces, ticks, heights = record(args.commands, args.columns, args.rows, args.speed, args.longest_wait)
    rows = min(args.rows, heights[-1][1])
    args.out.write_text(svg(pieces, ticks, heights, args.columns, rows, args.title), encoding="utf-8")
    print(f"{args.out}: {args.out.stat().st_size} bytes, {ticks * TICK:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
