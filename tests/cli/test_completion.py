"""Shell completion: the scripts that a shell loads, and what it is offered."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer

from ifprune_cli.commands import app
from ifprune_cli.completion import task_names
from ifprune_mlx import Checkpoint, Selection, TaskStore
from tests.cli.process import environment

COMMANDS = {"chat", "generate", "convert", "export", "select", "tasks", "info", "demo", "train", "bench", "evaluate"}
# What bash itself does at a press of Tab: it sets COMP_WORDS, COMP_CWORD, and calls the function that was registered.
PRESS = """
eval "$(ifprune --show-completion)"
while read -r -a COMP_WORDS; do
  COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
  [ "${COMP_WORDS[$COMP_CWORD]}" = _ ] && COMP_WORDS[$COMP_CWORD]=""
  _ifprune_completion ifprune
  echo "${COMPREPLY[@]}"
done
complete -p ifprune
"""


@pytest.fixture
def path(tmp_path: Path) -> dict[str, str]:
    """An environment where `ifprune` is this working tree's."""
    program = tmp_path / "bin" / "ifprune"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ifprune_cli.main "$@"\n')
    program.chmod(0o755)
    return environment(tmp_path, PATH=f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def tab(path: dict[str, str], *lines: str) -> list[list[str]]:
    """What bash offers for the last word of every line; `_` stands for a word that is yet to be begun."""
    typed = "".join(f"{line}\n" for line in lines).encode()
    done = subprocess.run(
        ["bash", "--norc", "-c", PRESS], env=path, input=typed, capture_output=True, check=True, timeout=60
    )
    *offered, registered = done.stdout.decode().splitlines()
    assert registered == "complete -o default -F _ifprune_completion ifprune"
    return [line.split() for line in offered]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_in_bash(path: dict[str, str]) -> None:
    commands, one, selectors, option, files = tab(
        path,
        "ifprune _",
        "ifprune ge",
        "ifprune generate --selector _",
        "ifprune chat --pol",
        "ifprune generate --model _",
    )
    assert set(commands) >= COMMANDS
    assert one == ["generate"]
    assert selectors == ["learned", "activation", "static", "random"]
    assert option == ["--policy"]
    # Files, such as those of --model, are bash's own to complete: nothing is offered in their place.
    assert files == []


@pytest.mark.parametrize(
    ("shell", "asked"),
    [
        ("zsh", {"_TYPER_COMPLETE_ARGS": "ifprune generate --selector st"}),
        (
            "fish",
            {"_TYPER_COMPLETE_ARGS": "ifprune generate --selector st", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
        ),
    ],
)
def test_in_other_shells(path: dict[str, str], shell: str, asked: dict[str, str]) -> None:
    def said(**changes: str) -> str:
        done = subprocess.run(["ifprune"], env=path | changes, capture_output=True, check=True, timeout=60)
        return done.stdout.decode()

    script = said(_IFPRUNE_COMPLETE=f"source_{shell}")
    assert "ifprune" in script
    assert f"complete_{shell}" in script
    assert "static" in said(_IFPRUNE_COMPLETE=f"complete_{shell}", **asked)


def test_task_names(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IFPRUNE_DATA", str(tmp_path / "data"))
    command = typer.main.get_command(app)
    context = typer.Context(command)
    assert task_names(context, "") == []
    checkpoint = Checkpoint.open(tiny_checkpoint)
    widths = tuple(spec.d_ffn for spec in checkpoint.layout.ffns)
    selection = Selection(tuple(np.arange(16, dtype=np.int32) for _ in widths), widths, "test")
    store = TaskStore(checkpoint)
    for name in ("sql", "summary"):
        store.save(name, selection)
    assert task_names(context, "s") == ["sql", "summary"]
    context.params = {"model": str(tiny_checkpoint)}
    assert task_names(context, "su") == ["summary"]
    context.params = {"model": str(tmp_path)}  # no checkpoint: nothing to offer, nothing said
    assert task_names(context, "") == []
