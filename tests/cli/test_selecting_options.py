"""`--select-window` and `--selection-cache`, in every command that has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ifprune_convert.pipeline import Options
from ifprune_mlx import SparsityPredictor
from tests.cli.process import run_here
from tests.tiny import write_checkpoint
from tests.tiny_predictor import write_predictor

COMMANDS: dict[str, list[str]] = {
    "generate": ["generate", "--prompt", "ab" * 60, "--max-tokens", "2", "--json"],
    "select": ["select", "--prompt", "ab" * 60, "--json"],
    "demo": ["demo", "--max-tokens", "2", "--json"],
    "chat": ["chat", "--max-tokens", "2"],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a predictor."""
    folder = tmp_path_factory.mktemp("selecting")
    return write_checkpoint(folder / "c", options=Options(predictor=write_predictor(folder / "predictor")))


def succeed(*arguments: str | Path) -> str:
    done = run_here(*arguments, stdin=b"ab" * 60 + b"\n")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_the_window_reaches_the_predictor(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    seen: list[int] = []
    tokens = SparsityPredictor.tokens

    def counted(self: SparsityPredictor, text: str) -> list[int]:
        seen.append(len(tokens(self, text)))
        return tokens(self, text)

    monkeypatch.setattr(SparsityPredictor, "tokens", counted)
    succeed(*COMMANDS[name], "--model", checkpoint, "--select-window", "50")
    assert set(seen) == {50}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_of_selections_is_used_by_the_next_process(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def chosen(text: str) -> Any:
        value = json.loads(text) if name != "chat" else text
        if name == "demo":
            return [(one["sliced"]["selection"], one["sliced"]["text"]) for one in value["answers"]]
        return value if name == "chat" else (value["selection"], value.get("text"))

    arguments = (*COMMANDS[name], "--model", checkpoint, "--selection-cache", tmp_path / "selections")
    first = chosen(succeed(*arguments))
    assert len(list((tmp_path / "selections").iterdir())) == (3 if name == "demo" else 1)

    def unwanted(self: SparsityPredictor, text: str) -> None:
        raise AssertionError("the predictor ran")

    monkeypatch.setattr(SparsityPredictor, "scores", unwanted)
    assert chosen(succeed(*arguments)) == first


def test_what_cannot_be_used_is_refused_in_one_line(checkpoint: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for model, options, words in (
        (tiny_checkpoint, ["--select-window", "50"], "has no predictor; leave the option out"),
        (checkpoint, ["--select-window", "5"], "reads 5 tokens, and its chat template alone has 19"),
        (checkpoint, ["--selection-cache", tmp_path / "file"], f"{tmp_path / 'file'}: cannot be a cache of selections"),
    ):
        done = run_here(*COMMANDS["select"], "--model", model, *options)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("ifprune: error: ")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
