"""`ifprune generate` on the tiny checkpoint."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.sample_utils import make_logits_processors

from ifprune_mlx import Model, generate
from tests.cli.process import run, run_here
from tests.tiny_predictor import write_predictor

KEYS = {
    "text", "finish_reason", "prompt_tokens", "completion_tokens", "selector", "selection", "density", "overlap",
    "active_parameters", "total_parameters", "select_s", "switch_s", "prefill_s", "decode_s", "tokens_per_s",
    "peak_memory",
}  # fmt: skip
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(tiny_checkpoint: Path) -> Command:
    """Runs `ifprune generate` on the tiny checkpoint; it must end well."""

    def call(*arguments: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
        return succeed("generate", "--model", tiny_checkpoint, "--max-tokens", "8", *arguments, stdin=stdin)

    return call


def succeed(*arguments: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
    """Run a command line within this process, which must end well."""
    done = run_here(*arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr
    return done


def answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON object on the last line of stdout."""
    value = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(value, dict)
    return value


def test_json_has_the_agreed_keys(command: Command, tiny: tuple[Model, Any]) -> None:
    done = command("--prompt", "hello", "--json")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
    value = answer(done)
    assert value.keys() >= KEYS
    model, tokenizer = tiny
    messages = [{"role": "user", "content": "hello"}]
    assert value["text"] == generate(model, tokenizer, messages, max_tokens=8)
    assert (value["finish_reason"], value["completion_tokens"]) in {("length", 8), ("stop", value["completion_tokens"])}
    assert value["selector"] == "activation"
    assert value["density"] == 0.875
    assert value["overlap"] is None
    assert len(value["selection"]) == 16
    assert value["active_parameters"] < value["total_parameters"] == model.total_parameters
    for key in ("select_s", "switch_s", "prefill_s", "decode_s", "tokens_per_s", "peak_memory"):
        assert isinstance(value[key], (int, float))
        assert value[key] >= 0


def test_a_process_answers_the_same(command: Command, tiny_checkpoint: Path, tmp_path: Path) -> None:
    here = answer(command("--prompt", "naïve 東京", "--json"))
    arguments = ("generate", "--model", tiny_checkpoint, "--max-tokens", "8", "--prompt", "-", "--json")
    there = run(*arguments, cache=tmp_path, stdin="naïve 東京".encode())
    assert (there.returncode, there.stderr) == (0, "")
    assert {key: answer(there)[key] for key in ("text", "selection")} == {
        key: here[key] for key in ("text", "selection")
    }


def test_plain_output_is_the_answer_alone(command: Command) -> None:
    text = answer(command("--prompt", "hello", "--json"))["text"]
    done = command("--prompt", "hello")
    assert done.stdout == f"{text}\n"
    what, times, rest = done.stderr.splitlines()
    assert what.startswith("[activation ")
    assert "density 0.88 | " in what
    assert "8 tokens" in times
    assert "cut off by --max-tokens" in rest


def test_the_prompt_may_come_from_stdin(command: Command) -> None:
    given = answer(command("--prompt", "naïve 東京", "--json"))
    piped = answer(command("--prompt", "-", "--json", stdin="naïve 東京".encode()))
    for key in ("text", "selection", "prompt_tokens"):
        assert piped[key] == given[key]


def test_dense_and_without_template(command: Command) -> None:
    value = answer(command("--prompt", "hello", "--dense", "--ignore-chat-template", "--json"))
    assert (value["selector"], value["selection"], value["density"]) == ("dense", None, 1.0)
    assert value["active_parameters"] == value["total_parameters"]
    assert value["prompt_tokens"] == len("hello")


def test_budgets_are_kept(command: Command) -> None:
    total = answer(command("--prompt", "hello", "--dense", "--json"))["total_parameters"]
    value = answer(command("--prompt", "hello", "--active-params", "70K", "--memory", "1GB", "--json"))
    assert value["active_parameters"] <= 70_000 < total
    half = answer(command("--prompt", "hello", "--density", "0.5", "--selector", "static", "--json"))
    assert (half["density"], half["selector"]) == (0.5, "static")


def test_a_budget_of_memory_that_asks_for_a_low_density_says_so(command: Command) -> None:
    low = command("--prompt", "hello", "--selector", "static", "--memory", "250KB").stderr
    words = "density 0.31, which is what --memory leaves room for, is far below this checkpoint's own, 0.88"
    assert low.splitlines()[0] == f"{words}: answers may fall apart"
    assert "far below" not in command("--prompt", "hello", "--selector", "static", "--memory", "350KB").stderr
    assert "far below" not in command("--prompt", "hello", "--selector", "static", "--density", "0.3").stderr


def test_sampling_is_repeatable_by_its_seed(command: Command) -> None:
    options = ("--prompt", "hello", "--temp", "1.5", "--top-k", "50", "--json", "--seed")
    one, same, other = (answer(command(*options, seed))["text"] for seed in ("1", "1", "2"))
    assert one == same != other


def test_a_repetition_penalty(command: Command, tiny: tuple[Model, Any]) -> None:
    """mlx-lm's, over the last 64 tokens; none unless it is asked for."""
    options = ("--prompt", "hello", "-m", "40", "--json")
    plain, off, on = (
        answer(command(*options, *more))["text"]
        for more in ((), ("--repetition-penalty", "1"), ("--repetition-penalty", "1.5"))
    )
    processors = make_logits_processors(repetition_penalty=1.5, repetition_context_size=64)
    wanted = generate(*tiny, [{"role": "user", "content": "hello"}], max_tokens=40, logits_processors=processors)
    assert (plain, on) == (off, wanted)
    assert on != plain
    done = run_here("generate", "--model", tiny[0].checkpoint.path, *options, "--repetition-penalty", "0")
    assert (done.returncode, done.stdout) == (1, "")
    assert "--repetition-penalty 0.0: give a number from 0.01 to 100, such as 1.1" in done.stderr


def test_a_saved_selection_is_used_as_it_is(command: Command, tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    arguments = ["select", "--model", tiny_checkpoint, "--prompt", "poetry", "--density", "0.25", "--save-to", file]
    saved = succeed(*arguments, "--json")
    value = answer(command("--prompt", "hello", "--selection", file, "--json"))
    assert value["selection"] == answer(saved)["selection"]
    assert value["density"] == 0.25


def test_the_predictor_is_the_default_where_there_is_one(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = tiny_checkpoint.with_name(f"source-of-{tiny_checkpoint.name}")
    predictor = write_predictor(tmp_path / "predictor")
    out = tmp_path / "out"
    succeed("convert", "--model", source, "--mlx-path", out, "--predictor", predictor)
    base = ("generate", "--model", out, "--max-tokens", "3", "--json", "--prompt")
    one, other = (answer(succeed(*base, text)) for text in ("hello", "write a sonnet"))
    assert one["selector"] == other["selector"] == "learned"
    assert one["selection"] != other["selection"]


def test_an_answer_that_a_json_schema_allows(command: Command, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    said = answer(
        command("--prompt", "hello", "--json-schema", tmp_path / "schema.json", "--max-tokens", "99", "--json")
    )
    assert said["finish_reason"] == "stop"
    assert isinstance(json.loads(said["text"])["sure"], bool)


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "not valid JSON"), ("[]", "object"), ('{"type": "strin"}', "Invalid type"), (None, "cannot be read")],
)
def test_json_schemas_that_cannot_be_used(
    content: str | None, reason: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "schema.json"
    if content is not None:
        file.write_text(content)
    done = run_here("generate", "--model", tiny_checkpoint, "--prompt", "hello", "--json-schema", file)
    assert done.returncode == 1
    assert reason in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
