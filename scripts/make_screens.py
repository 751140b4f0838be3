"""Prints what a terminal shows while a command is used, as text for the documentation.

python -m scripts.make_screens --out docs/guide/screens.md

The commands run in a pseudo-terminal, and the keys are pressed when the command waits for them; pyte (a terminal
emulator, of the `dev` extra) says what a person would see. Linux and macOS only. Takes the embedded model.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import select
import struct
import sys
import termios
import time
from dataclasses import dataclass
from pathlib import Path

import pyte

ROWS, LONGEST = 100, 300.0
"""Lines of the terminal, and the seconds after which a command that shows nothing new is given up."""
PROMPT = b"\x1b[?2004h"
"""What the chat's line editor writes when it waits for a message."""


@dataclass(frozen=True)
class Scene:
    """A title, what it shows, a command, and the messages that are typed."""

    title: str
    text: str
    command: tuple[str, ...]
    keys: tuple[str, ...]
    columns: int = 80


SCENES = (
    Scene(
        "An answer and another topic",
        "A chat follows topics: where the topic changes, so do the neurons, and the footer says by how much.",
        ("chat", "-m", "90"),
        ("Write a Python function that adds two numbers.", "How do I bake bread?"),
    ),
    Scene(
        "Staying with the first message",
        "Under policy `first` the first message selects. The chat says once when a message would select otherwise.",
        ("chat", "-m", "40", "--policy", "first"),
        ("Write a Python function that adds two numbers.", "How do I bake bread?"),
    ),
    Scene(
        "Narrow, and below the model's own density",
        "Lines end between words.",
        ("chat", "-m", "60", "--density", "0.5"),
        ("What is the sea?", "/policy", "/density"),
        40,
    ),
)


def screen(scene: Scene) -> str:
    """Run a scene; the lines of its last screen."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(TERM="xterm-256color", PROMPT_TOOLKIT_NO_CPR="1")
        for name in ("COLUMNS", "LINES"):
            os.environ.pop(name, None)
        os.execv(sys.executable, [sys.executable, "-m", "ifprune_cli.main", *scene.command])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, scene.columns, 0, 0))
    shown = pyte.Screen(scene.columns, ROWS)
    stream, seen, deadline = pyte.ByteStream(shown), b"", time.monotonic() + LONGEST
    keys = [f"{message}\r" for message in scene.keys]
    while True:
        ready, _, _ = select.select([terminal], [], [], max(deadline - time.monotonic(), 0))
        if not ready:
            raise SystemExit(f"{scene.title}: nothing came any more\n" + "\n".join(shown.display))
        data = os.read(terminal, 1 << 16)
        stream.feed(data)
        seen, deadline = (seen + data)[-100_000:], time.monotonic() + LONGEST
        if PROMPT in seen:
            if not keys:
                break
            seen = b""
            os.write(terminal, keys.pop(0).encode())
    lines = [line.rstrip() for line in shown.display]
    os.write(terminal, b"\x04")
    os.close(terminal)
    os.waitpid(child, 0)
    return "\n".join(lines).rstrip().removesuffix(">").rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    parts = [
        "# Terminal screens",
        "Made by `python -m scripts.make_screens` in a pseudo-terminal, on Linux; the machine was busy.",
    ]
    for scene in SCENES:
        command = " ".join(("ifprune", *scene.command))
        parts += [f"## {scene.title}", f"{scene.text} The terminal has {scene.columns} columns."]
        parts.append(f"```text\n$ {command}\n{screen(scene)}\n```")
        print(scene.title, file=sys.stderr)
    out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
