"""Options of `generate` and `chat` that once did nothing, ended in a traceback, or gave noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from tests.cli.process import run_here
from tests.family_configs import write_family
from tests.tiny import write_checkpoint

SLIDING = {"model_type": "gemma3_text", "sliding_window": 8, "sliding_window_pattern": 2, "head_dim": 32}


def said(checkpoint: Path, *options: str) -> str:
    done = run_here("generate", "--model", checkpoint, "-m", "12", "--prompt", "hello", "--json", *options)
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["text"])


@pytest.mark.parametrize(
    "options", [("--temp", "1e-40"), ("--temp", "5e-324"), ("--temp", "1", "--top-p", "1e-300")], ids=str
)
def test_values_too_small_to_compute_with_are_greedy(tiny_checkpoint: Path, options: tuple[str, ...]) -> None:
    assert said(tiny_checkpoint, *options) == said(tiny_checkpoint)


@pytest.mark.parametrize("options", [("--temp", "inf"), ("--temp", "nan"), ("--top-p", "0")], ids=str)
def test_values_out_of_range_are_one_line(tiny_checkpoint: Path, options: tuple[str, ...]) -> None:
    done = run_here("generate", "--model", tiny_checkpoint, "--prompt", "hello", *options)
    assert done.returncode == 1
    assert done.stderr.startswith("ifprune: error: sampling options out of range")


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which every other layer has a sliding window."""
    return write_checkpoint(tmp_path_factory.mktemp("sliding") / "checkpoint", "gemma2", **SLIDING)


def test_the_kv_cache_is_quantized_where_some_layers_slide(sliding: Path) -> None:
    options = ("--kv-bits", "8", "--kv-group-size", "32")
    assert said(sliding, *options)
    done = run_here("chat", "--model", sliding, "-m", "4", *options, stdin=b"hello\nagain")
    assert (done.returncode, done.stderr.count("tokens at")) == (0, 2)


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--kv-bits", "8", "--kv-group-size", "64"), "cannot be quantized in groups of 64"),
        (("--kv-bits", "8", "--max-kv-size", "16"), "--kv-bits and --max-kv-size exclude each other"),
    ],
)
def test_what_cannot_be_quantized_is_one_line(sliding: Path, command: str, options: Any, words: str) -> None:
    given = ("--prompt", "hello") if command == "generate" else ()
    done = run_here(command, "--model", sliding, "-m", "4", *options, *given, stdin=b"hello")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("ifprune: error: ")
    assert words in line


def test_a_bound_that_cannot_be_had_is_one_line(tmp_path: Path) -> None:
    write_family(tmp_path / "source", "falcon_h1")
    convert(open_source(tmp_path / "source"), tmp_path / "checkpoint", Options())
    for given in (("generate", "--prompt", "hello"), ("chat",)):
        done = run_here(*given, "--model", tmp_path / "checkpoint", "-m", "4", "--max-kv-size", "16", stdin=b"hello")
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert "max_kv_size 16: this model's caches (CacheList) cannot be bounded" in line


def test_a_bound_holds_in_a_chat(tiny_checkpoint: Path) -> None:
    done = run_here("chat", "--model", tiny_checkpoint, "-m", "4", "--max-kv-size", "16", stdin=b"hello\nagain\n/stats")
    assert done.returncode == 0, done.stderr


def test_a_saved_chat_brings_its_selector_and_switching_and_options_go_before_them(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def chat(*options: str, stdin: str) -> str:
        done = run_here("chat", "--model", tiny_checkpoint, "-m", "4", *options, stdin=stdin.encode())
        assert done.returncode == 0, done.stderr
        return done.stderr

    first, second = tmp_path / "first.json", tmp_path / "second.json"
    chat("--policy", "turn", "--selector", "static", "--on-switch", "keep", stdin=f"hello\n/save {first}")
    told = chat("--load", str(first), stdin=f"again\n/stats\n/save {second}")
    assert "static" in told
    assert "policy      turn, keep on a switch" in told
    told = chat("--load", str(first), "--selector", "random", "--on-switch", "reprefill", stdin="again\n/stats")
    assert "random" in told
    assert "policy      turn, reprefill on a switch" in told
    kept = [
        {name: json.loads(file.read_text())[name] for name in ("selector", "on_switch")} for file in (first, second)
    ]
    assert kept == [{"selector": "static", "on_switch": "keep"}] * 2
    told = chat(stdin=f"/load {first}\n/stats")
    assert "keep on a switch" in told
