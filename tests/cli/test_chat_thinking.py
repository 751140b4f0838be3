"""Thoughts on a terminal and in a pipe, and variables of the chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.process import run_here
from tests.cli.terminal import PROMPT, Terminal
from tests.ifprune_mlx.serving.http.scripted import FAMILIES, write_templated

OFF = '{"enable_thinking": false}'


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose chat template begins its thoughts; its random weights never end them."""
    return write_templated(tmp_path_factory.mktemp("opened") / "checkpoint", *FAMILIES["opened"])


def test_thoughts_are_dim_on_a_terminal(opened: Path, tmp_path: Path) -> None:
    with Terminal(opened, tmp_path / "cache", "-m", "8") as terminal:
        terminal.expect(PROMPT)
        terminal.send("Hello\r")
        terminal.expect(rb"\x1b\[2m[^\x1b\[]+\x1b\[0m")
        assert terminal.leave() == 0


def test_thoughts_are_marked_in_a_pipe(opened: Path) -> None:
    done = run_here("chat", "--model", opened, "-m", "8", stdin=b"Hello")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("<think>\n")


@pytest.mark.parametrize("option", ["--chat-template-config", "--chat-template-args"])
def test_a_switch_of_the_template(tmp_path: Path, option: str) -> None:
    checkpoint = write_templated(tmp_path / "checkpoint", *FAMILIES["thinking"])
    lengths = []
    for given in ([], [option, '{"enable_thinking": true}'], [option, OFF]):
        done = run_here("generate", "--model", checkpoint, "-m", "4", "-p", "Hello", "--json", *given)
        assert done.returncode == 0, done.stderr
        lengths.append(json.loads(done.stdout)["prompt_tokens"])
    assert lengths[0] == lengths[1] == lengths[2] - len("\n\n\n\n") - 2  # the marks are tokens
    done = run_here("chat", "--model", checkpoint, "-m", "4", option, OFF, stdin=b"Hello\n/stats")
    assert (
        f"context     {lengths[2] + 3} tokens" in done.stderr or f"context     {lengths[2] + 4} tokens" in done.stderr
    )


@pytest.mark.parametrize("text", ["{", "[]", "1", '"x"', "enable_thinking=false", '{"tokenize": true}', "[" * 100_000])
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_what_is_no_object_is_refused(opened: Path, command: str, text: str) -> None:
    prompt = ["-p", "Hello"] if command == "generate" else []
    done = run_here(command, "--model", opened, *prompt, "--chat-template-config", text, stdin=b"")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "--chat-template-config" in done.stderr
