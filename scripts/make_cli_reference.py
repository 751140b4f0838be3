"""Makes docs/cli.md, the reference of the command line, from the commands themselves.

python scripts/make_cli_reference.py

A test compares the file with what this makes. Neither the terminal's width nor its colours change the result.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import typer

from ifprune_cli.commands import app
from ifprune_cli.option_groups import panels

TARGET = Path(__file__).parent.parent / "docs" / "cli.md"
_KINDS = {"INT": "int|integer", "FLOAT": "float", "TEXT": "str|text"}
_HEAD = """<!-- Made by scripts/make_cli_reference.py; change the commands, not this file. -->

# Commands

A result goes to stdout; progress, notes and figures go to stderr. Every error is one line. The exit code is 0, 1 if
something failed, 2 if the usage was wrong, and 130 after Ctrl-C. `ifprune COMMAND --help` prints what stands here.
"""


def reference() -> str:
    """The whole page, as Markdown."""
    root = typer.main.get_command(app)
    top = root.make_context("ifprune", [], resilient_parsing=True)
    names = root.list_commands(top)
    commands = [(name, root.get_command(top, name)) for name in names]
    lines = [_HEAD, "| command | what it does |", "|---|---|"]
    lines += [f"| [`ifprune {name}`](#{name}) | {_text(command.short_help)} |" for name, command in commands]
    lines += ["", *_options(root, top), *_examples(root)]
    for name, command in commands:
        context = command.make_context(name, [], parent=top, resilient_parsing=True)
        paragraphs = (command.help or "").split("\n\n")
        lines += ["", f"## {name}", "", *(f"{_text(text)}\n" for text in paragraphs)]
        lines += [f"Usage: `ifprune {name} {' '.join(command.collect_usage_pieces(context))}`", ""]
        lines += _options(command, context)
        lines += _examples(command)
    return "\n".join(lines) + "\n"


def _options(command: typer.main.click.Command, context: typer.Context) -> Iterator[str]:
    """A table of a command's options under their headings: names with what they take, and help with defaults."""
    for number, (heading, records) in enumerate(panels(command, context).items()):
        yield f"| **{heading}** | |" if number else f"| {heading} | |"
        if not number:
            yield "|---|---|"
        for names, text in records:
            yield f"| `{_names(names)}` | {_text(text)} |"


def _examples(command: typer.main.click.Command) -> list[str]:
    """What `--help` ends with."""
    return ["", "Examples:", "", "```text", *command.epilog.splitlines(), "```"] if command.epilog else []


def _names(record: str) -> str:
    """An option's names with what it takes, which typer's releases spell in different ways."""
    for kind, spellings in _KINDS.items():
        record = re.sub(rf" (?:{spellings})(?: range)?$", f" {kind}", re.sub("[<>]", "", record), flags=re.IGNORECASE)
    record = re.sub(r" (?:list)?\[(\w+(?:\|\w+)+)\]$", r" \1", record)
    return record.replace("|", "\\|")  # a pipe ends a table's cell, also within code


def _text(text: str | None) -> str:
    """Help in one line of a table, with nothing in it that Markdown takes for markup; `code` stays code."""
    plain = (text or "").replace("\\[", "[")  # some releases of typer escape it for rich
    parts = re.split(r"(`[^`]*`)", " ".join(plain.split()))
    escaped = [part if part.startswith("`") else re.sub(r"([\\*_<>\[\]#])", r"\\\1", part) for part in parts]
    return "".join(escaped).replace("|", "\\|")


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
