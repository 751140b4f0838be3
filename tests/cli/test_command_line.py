"""The command line as people use it: a prompt without an option, words before a hash, tables that fit a terminal."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ifprune_cli.commands import app
from ifprune_cli.console import table
from ifprune_mlx import Selection
from tests.cli.process import run_here
from tests.cli.test_generate import answer, succeed


def test_the_prompt_needs_no_option(tiny_checkpoint: Path) -> None:
    """Also - for stdin; both ways at once, or none, are wrong usage."""
    how = ("generate", "--model", tiny_checkpoint, "--max-tokens", "4", "--json")
    said = answer(succeed(*how, "--prompt", "hello"))["text"]
    assert answer(succeed(*how, "hello"))["text"] == said
    assert answer(succeed(*how, "-", stdin=b"hello"))["text"] == said
    select = ("select", "--model", tiny_checkpoint, "--json")
    assert answer(succeed(*select, "hello"))["selection"] == answer(succeed(*select, "-p", "hello"))["selection"]
    both = run_here(*how, "hello", "--prompt", "hello")
    assert (both.returncode, both.stdout) == (1, "")
    assert "PROMPT and --prompt exclude each other" in both.stderr
    for command in ("generate", "select"):
        none = run_here(command, "--model", tiny_checkpoint)
        assert (none.returncode, none.stdout) == (2, "")
        assert "PROMPT: give it in quotes, or - for stdin" in none.stderr
        assert none.stderr.count("\n") == 1


def test_export_takes_a_task(tiny_checkpoint: Path, tmp_path: Path) -> None:
    succeed("select", "--model", tiny_checkpoint, "write a poem", "--density", "0.5", "--save", "export-poetry")
    how = ("export", "--model", tiny_checkpoint, "--mlx-path", tmp_path / "out", "--json")
    file = tmp_path / "s.safetensors"
    succeed("select", "--model", tiny_checkpoint, "write a poem", "--density", "0.5", "--save-to", file)
    assert answer(succeed(*how, "--task", "export-poetry"))["selection"] == Selection.load(file).hash
    for more in (["--prompt", "x"], ["--selection", file], ["--density", "0.5"]):
        done = run_here(*how, "--overwrite", "--task", "export-poetry", *more)
        assert (done.returncode, "exclude each other" in done.stderr) == (1, True)
    done = run_here(*how, "--overwrite", "--task", "nothing")
    assert (done.returncode, "no task nothing" in done.stderr) == (1, True)


def test_select_says_words_first(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """On a terminal one sees what was selected before its hash; a pipe gets the hash alone."""
    from tests.cli.process import run

    # Both streams on one pipe, in order.
    prelude = "import os; os.dup2(1, 2)"
    done = run("select", "--model", tiny_checkpoint, "hello", cache=tmp_path, prelude=prelude)
    *words, last = done.stdout.splitlines()
    assert re.fullmatch("[0-9a-f]{16}", last)
    assert words[0].startswith("activation, density 0.875: ")


def test_messages_as_plain_text_wherever_chats_are_read() -> None:
    runner = CliRunner()
    for command in ("chat", "generate", "serve", "select", "export", "demo", "evaluate", "doctor", "atlas", "train"):
        assert "--ignore-chat-template" in runner.invoke(app, [command, "--help"]).output, command


def test_what_plain_text_changes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Losses and selections are those of the text without the template."""
    file = tmp_path / "x.jsonl"
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = ("evaluate", "--model", tiny_checkpoint, "--data", f"x={file}", "--selectors", "dense", "--json", "-")
    with_template, plain = (answer(succeed(*how, *more))["rows"][0] for more in ([], ["--ignore-chat-template"]))
    assert with_template["nll"] != plain["nll"]
    select = ("select", "--model", tiny_checkpoint, "hello", "--density", "0.25", "--json")
    assert answer(succeed(*select))["selection"] != answer(succeed(*select, "--ignore-chat-template"))["selection"]


def test_help_stands_in_groups() -> None:
    said = CliRunner().invoke(app, ["--help"]).output
    headings = [line.rstrip(":") for line in said.splitlines() if re.fullmatch(r"[A-Z][a-z ]+:", line)]
    assert headings == ["Options", "Use a model", "Make a model", "Look at what is selected", "Measure", "Examples"]
    assert "Commands:" not in said
    for command in app.registered_commands:
        assert re.search(rf"^  {command.name} +\S", said, re.MULTILINE), command.name
    assert max(map(len, said.splitlines())) <= 80


def test_a_table_that_is_too_wide_goes_on_below() -> None:
    lines = table(["", "a", "b"], [[f"{'name':>30}", "1", "2"] for _ in range(3)], 10)
    assert max(map(len, lines)) <= 80
    assert [line.split() for line in lines] == [
        ["name", "name"],
        ["a", "1", "1"],
        ["b", "2", "2"],
        ["name"],
        ["a", "1"],
        ["b", "2"],
    ]


@pytest.mark.parametrize("count", [1, 8])
def test_tables_fit_80_columns(tiny_checkpoint: Path, tmp_path: Path, count: int) -> None:
    """evaluate with many domains, select --layers with long prompts, tasks with long names."""
    data = []
    for domain in range(count):
        file = tmp_path / f"{domain}.jsonl"
        rows = [{"prompt": f"question {i}", "completion": "yes"} for i in range(3)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data += ["--data", f"a-domain-of-some-length-{domain}={file}"]
    chosen = ["--selectors", "dense,static,activation,mismatched,random"]
    evaluated = succeed("evaluate", "--model", tiny_checkpoint, *data, *chosen).stdout
    assert all(f"domain-of-some-length-{domain}" in evaluated for domain in range(count))
    prompts = [part for number in range(count) for part in ("--with-prompt", f"{number} tell me all about rivers")]
    layers = succeed("select", "--model", tiny_checkpoint, "x", *prompts, "--layers", "--save", "t" * 60).stdout
    listed = succeed("tasks", "--model", tiny_checkpoint).stdout
    for line in f"{evaluated}{layers}{listed}".splitlines():
        assert len(line) <= 80, line
