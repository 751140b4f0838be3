"""`ifprune select`, `info` and `demo` on the tiny checkpoint; and every command's `--help`."""

from __future__ import annotations

import shlex
import shutil
import time
from pathlib import Path

import mlx.core as mx
import pytest
import typer
from typer.testing import CliRunner

from ifprune_cli.commands import app
from ifprune_cli.convert import with_calibrate_value
from ifprune_cli.demo import PROMPTS
from ifprune_mlx import Checkpoint, Selection, TaskStore
from tests.cli.process import run, run_here
from tests.cli.test_evaluate import xml_texts
from tests.cli.test_generate import KEYS as GENERATE_KEYS
from tests.cli.test_generate import answer, succeed

COMMANDS = sorted(command.name for command in app.registered_commands if command.name)


# select


def test_select_json_and_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file, other = tmp_path / "s.safetensors", tmp_path / "other.safetensors"
    base = ("select", "--model", tiny_checkpoint, "--density", "0.5", "--json", "--prompt")
    succeed(*base, "write a poem", "--save-to", other)
    done = succeed(*base, "2 + 2", "--save-to", file, "--compare", other, "--compare", file.with_name(other.name))
    assert done.stdout.count("\n") == 1
    value = answer(done)
    assert value.keys() >= {"selection", "selector", "density", "k", "overlap_with", "select_s"}
    assert (value["selector"], value["density"], value["k"]) == ("activation", 0.5, [64, 64])
    assert value["select_s"] > 0
    assert value["overlap_with"].keys() == {"static", str(other)}
    saved, against = Selection.load(file), Selection.load(other)
    assert saved.hash == value["selection"]
    assert value["overlap_with"][str(other)] == saved.overlap(against)
    # The file as scripts read it.
    arrays, metadata = mx.load(str(file), return_metadata=True)  # type: ignore[misc]
    assert {name: (array.dtype, array.shape) for name, array in arrays.items()} == {
        f"layers.{index}": (mx.int32, (64,)) for index in range(2)
    }
    assert (metadata["density"], metadata["selector"]) == ("0.5", "activation")
    assert metadata["hash"] == value["selection"]
    # Nothing but the file was written.
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["other.safetensors", "s.safetensors"]


def test_select_plain_output_is_the_hash(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    done = succeed("select", "--model", tiny_checkpoint, "--prompt", "x", "--selector", "static", "--save-to", file)
    assert done.stdout == f"{Selection.load(file).hash}\n"
    assert "overlap with static: 100.0 %" in done.stderr
    assert f"ifprune generate --selection {file}" in done.stderr


def test_select_compares_with_prompts_tasks_and_files(tiny_checkpoint: Path, tmp_path: Path) -> None:
    base = ("select", "--model", tiny_checkpoint, "--density", "0.25", "--json", "--prompt")
    files = {name: tmp_path / f"{name}.safetensors" for name in ("poem", "sum", "random")}
    succeed(*base, "write a poem", "--save-to", files["poem"], "--save", "poetry")
    succeed(*base, "2 + 2", "--save-to", files["sum"])
    succeed(*base, "x", "--selector", "random", "--density", "0.5", "--save-to", files["random"], "--save", "static")
    poem, total, other = (Selection.load(file) for file in files.values())
    prompts = ("--with-prompt", "write a poem", "--with-prompt", "2 + 2", "--with-prompt", "poetry")
    value = answer(succeed(*base, "2 + 2", *prompts, "--compare", files["random"], "--layers"))
    assert value["selection"] == total.hash
    # A name that two have is the first one's; the other is called by its kind as well.
    names = ["static", "poetry", "task static", str(files["random"]), "write a poem", "2 + 2", "prompt poetry"]
    found, layers = value["overlap_with"], value["overlap_by_layer"]
    assert list(found) == list(layers) == names
    assert found["poetry"] == found["write a poem"] == total.overlap(poem) < 1
    assert found["task static"] == found[str(files["random"])] == total.overlap(other)
    assert found["2 + 2"] == 1
    assert layers["poetry"] == total.overlap_by_layer(poem)
    assert "overlap_by_layer" not in answer(succeed(*base, "2 + 2"))


def test_select_prints_overlaps_by_layer(tiny_checkpoint: Path) -> None:
    long = "tell me\nall about " + 30 * "rivers "
    base = ("select", "--model", tiny_checkpoint, "--density", "0.25", "--prompt", "2 + 2")
    options = ("--with-prompt", long, "--with-prompt", "write a poem")
    layers = answer(succeed(*base, *options, "--layers", "--json"))["overlap_by_layer"]
    done = succeed(*base, *options, "--layers")
    hash_, head, *rows = done.stdout.splitlines()
    assert len(hash_) == 16
    assert head == " FFN  neurons     kept    static tell me all about rivers ... write a poem"
    shares = zip(layers["static"], layers[long], layers["write a poem"], strict=True)
    assert [row.split() for row in rows] == [
        [str(index), "128", "32", *(f"{share:.3f}" for share in of_layer)] for index, of_layer in enumerate(shares)
    ]
    assert {len(row) for row in rows} == {len(head)}
    notes = done.stderr.splitlines()
    assert [line.partition(": ")[0] for line in notes[1:]] == [
        "overlap with static",
        f"overlap with {' '.join(long.split())[:57]}...",
        "overlap with write a poem",
    ]


def test_select_draws_the_difference_to_static_or_to_another_prompt(tiny_checkpoint: Path, tmp_path: Path) -> None:
    base = ("select", "--model", tiny_checkpoint, "--density", "0.25", "--prompt", "2 + 2", "--plot")
    plots = {name: tmp_path / f"{name}.svg" for name in ("static", "prompt", "file", "several")}
    file = tmp_path / "poem.safetensors"
    succeed("select", "--model", tiny_checkpoint, "--prompt", "write a poem", "--save-to", file)
    succeed(*base, plots["static"])
    succeed(*base, plots["prompt"], "--with-prompt", "write a poem")
    succeed(*base, plots["file"], "--compare", file)
    succeed(*base, plots["several"], "--with-prompt", "write a poem", "--compare", file)
    found = {name: xml_texts(plot) for name, plot in plots.items()}
    assert {'"2 + 2" against static', "static only", "this prompt only", "both"} <= set(found["static"])
    assert {'"2 + 2" against "write a poem"', "the other only"} <= set(found["prompt"])
    assert "the other only" in found["file"]
    assert "share of the row's neurons that the column keeps, too" in found["several"]


def test_select_saves_a_task(tiny_checkpoint: Path) -> None:
    base = ("select", "--model", tiny_checkpoint, "--prompt")
    done = succeed(*base, "write a poem", "--density", "0.5", "--save", "poetry")
    assert "saved as task poetry; use it with: ifprune generate --task poetry" in done.stderr
    store = TaskStore(Checkpoint.open(tiny_checkpoint))
    assert done.stdout == f"{store.load('poetry').hash}\n"
    # Saved again, it is compared with what it was.
    done = succeed(*base, "2 + 2", "--density", "0.5", "--save", "poetry", "--json")
    assert 0 < answer(done)["overlap_with"]["poetry"] < 1
    assert store.load("poetry").hash == answer(done)["selection"]


# info


def test_info_json(tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = succeed("info", "--model", tiny_checkpoint, "--json")
    assert done.stdout.count("\n") == 1
    value = answer(done)
    keys = {"format_version", "model_type", "parameters", "ffn_parameters", "density", "selectors", "tasks", "fits"}
    assert value.keys() >= keys
    checkpoint = Checkpoint.open(tiny_checkpoint)
    assert (value["format_version"], value["model_type"], value["density"]) == (1, "llama", 0.9)
    assert value["parameters"] == checkpoint.parameters
    assert value["ffn_parameters"] == 2 * 3 * 64 * 128
    assert value["selectors"] == ["activation", "static", "random"]
    assert value["tasks"] == []
    assert value["fits"]
    for fit in value["fits"]:
        assert fit["residency"] in ("ram", "ssd")
        assert 0 < fit["density"] <= 1
        assert fit["resident"] > 0


def test_info_verify(tiny_checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    done = succeed("info", "--model", copy, "--verify")
    assert "every file is as it was written" in done.stdout
    assert "selectors    activation (default): all neurons read the prompt" in done.stdout
    file = copy / "neurons-00001-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    damaged = run_here("info", "--model", copy, "--verify")
    assert (damaged.returncode, damaged.stdout) == (1, "")
    assert file.name in damaged.stderr
    # Only --verify reads every byte.
    succeed("info", "--model", copy)


# demo


def test_demo_answers_three_instructions(tiny_checkpoint: Path) -> None:
    done = succeed("demo", "--model", tiny_checkpoint, "--max-tokens", "4", "--json")
    value = answer(done)
    answers = value["answers"]
    assert [(item["domain"], item["prompt"]) for item in answers] == list(PROMPTS)
    for item in answers:
        assert item["dense"].keys() >= GENERATE_KEYS
        assert item["sliced"].keys() >= GENERATE_KEYS
        assert (item["dense"]["selector"], item["dense"]["density"]) == ("dense", 1.0)
        assert item["sliced"]["active_parameters"] < item["dense"]["active_parameters"] == value["total_parameters"]
        assert item["sliced"]["active_parameters"] == value["active_parameters"]
    assert answers[0]["sliced"]["overlap"] is None
    assert all(0 < item["sliced"]["overlap"] <= 1 for item in answers[1:])
    for kind in ("dense", "sliced"):
        seconds = sum(item[kind]["decode_s"] for item in answers)
        tokens = sum(item[kind]["completion_tokens"] - 1 for item in answers)
        assert value[f"{kind}_tokens_per_s"] == pytest.approx(tokens / seconds)
    assert value["tokens_per_s_ratio"] == pytest.approx(value["sliced_tokens_per_s"] / value["dense_tokens_per_s"])


def test_demo_in_plain_words(tiny_checkpoint: Path) -> None:
    done = succeed("demo", "--model", tiny_checkpoint, "--max-tokens", "4")
    for _, prompt in PROMPTS:
        assert f"> {prompt}\n" in done.stdout
    lines = done.stdout.splitlines()
    assert [line for line in lines if line in ("dense:", "sliced:")] == ["dense:", "sliced:"] * len(PROMPTS)
    figures = [line for line in lines if line.startswith("[") and "parameters active" in line]
    assert len(figures) == 2 * len(PROMPTS)
    assert all("selected in " in line for line in figures[1::2])
    assert all("4 tokens at " in line and line.endswith(", cut off by --max-tokens]") for line in figures)
    assert "of its neurons were selected before" in figures[3]
    last = lines[-1]
    assert last.startswith("Here: ")
    assert "times the tokens/s" in last
    assert "parameters active" in last
    assert "1.70 GB instead of 5.17 GB" in last


# help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"ifprune {command}" in result.output or f"root {command}" in result.output
    assert "--help" in result.output


@pytest.mark.parametrize("command", ["", "chat", "generate", "convert", "adapt", "serve", "bench", "train"])
def test_help_ends_with_examples_that_are_accepted(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("stage: sft\n")
    done = run_here(*filter(None, [command]), "--help")
    assert done.returncode == 0
    _, _, text = done.stdout.partition("\nExamples:\n")
    root = typer.main.get_command(app)
    assert isinstance(root, typer.core.TyperGroup)
    assert 1 <= len(text.splitlines()) <= 3
    for line in text.splitlines():
        assert line.startswith(f"  ifprune {command}")
        assert len(line) <= 80
        words, _, _ = line.partition(" < ")
        name, *arguments = with_calibrate_value(shlex.split(words)[1:])
        found = root.get_command(root.make_context("ifprune", [], resilient_parsing=True), name)
        assert found is not None, line
        found.make_context(name, arguments)  # parses and checks; runs nothing


def test_help_is_instant_and_imports_nothing_heavy(tmp_path: Path) -> None:
    best = 9.9
    for _ in range(3):
        start = time.perf_counter()
        done = run("--help", cache=tmp_path)
        best = min(best, time.perf_counter() - start)
        assert done.returncode == 0
    assert all(f" {command} " in done.stdout for command in COMMANDS)
    assert best < 1.0  # well under half a second on a machine that does nothing else
    imported = run("--help", cache=tmp_path, options=("-X", "importtime")).stderr
    modules = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in imported.splitlines()}
    assert "typer" in modules
    assert not modules & {"mlx", "mlx_lm", "transformers", "numpy", "tokenizers", "huggingface_hub", "rich"}


def test_version(tmp_path: Path) -> None:
    from importlib.metadata import version

    assert succeed("--version").stdout == f"{version('ifprune-mlx')}\n"
