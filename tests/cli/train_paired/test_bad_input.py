"""Bad input to a paired run is one line, and nothing that was trained is lost."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from ifprune_mlx.checkpoint.safetensors_io import load_arrays
from tests.cli.process import run_here
from tests.cli.train_paired.runs import command, metrics


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        (["--densities", "half"], 1, "--densities half: expected numbers or ranges"),
        (["--densities", ""], 1, "expected numbers or ranges"),
        (["--densities", "0"], 1, "density 0 to 0: give numbers above 0 and at most 1"),
        (["--densities", "0.5,1.5"], 1, "density 1.5 to 1.5"),
        (["--densities", "0.8-0.2"], 1, "the lower first"),
        (["--densities", "nan"], 1, "above 0 and at most 1"),
        (["--weight", "code"], 1, "--weight code: expected NAME=X"),
        (["--weight", "code=much"], 1, "expected NAME=X"),
        (["--weight", "other=2"], 1, "there is no --data other=FILE"),
        (["--weight", "code=0"], 1, "give a number above 0"),
        (["--weight", "code=nan"], 1, "give a number above 0"),
        (["--selector", "static", "--selector", "static"], 1, "arms static, static: give each of"),
        (["--selector", "random"], 2, "'random'"),
        (["--selector", "learned"], 1, "give --predictor FOLDER"),
        (["--selector", "learned", "--predictor", "nowhere"], 1, "nowhere/head.safetensors"),
        (["--start", "nowhere"], 1, "nowhere/adapters/static/adapters.safetensors"),
        (["--eval-prompts", "1"], 1, "give 0, or 2 and more"),
        (["--epsilon", "0"], 1, "an epsilon above 0"),
        (["--teacher", "1.5"], 2, "--teacher"),
        (["--iters", "0"], 2, "--iters"),
        (["--learning-rate", "-1"], 2, "--learning-rate"),
        (["--max-seq-length", "16"], 1, "the answer begins after 16 tokens"),
        (["--data", "other=missing.jsonl"], 1, "missing.jsonl"),
        (["--model", "missing-model"], 1, "missing-model"),
    ],
)
def test_bad_input_is_one_line(
    tiny_checkpoint: Path, tmp_path: Path, data: dict[str, list[str]], changes: list[str], code: int, words: str
) -> None:
    """Whatever is wrong with a paired run ends it before its first step, in one line."""
    arms = [] if "--selector" in changes else ["--selector", "static"]
    given = command("sft", tiny_checkpoint, tmp_path / "out", data["sft"], *arms, *changes)
    done = run_here(*given)
    assert done.returncode == code, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ifprune: ")]
    assert words in line
    assert done.stdout == ""
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("stage", "of", "words"), [("pretrain", "sft", "give text"), ("sft", "pretrain", "give messages, or prompt")]
)
def test_data_of_the_other_stage_is_one_line(
    tiny_checkpoint: Path, tmp_path: Path, data: dict[str, list[str]], stage: str, of: str, words: str
) -> None:
    """Chats in pretrain, texts in sft: the domain and what is needed are named."""
    done = run_here(*command(stage, tiny_checkpoint, tmp_path / "out", data[of], "--selector", "static"))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert words in line
    assert "'code'" in line


def test_no_data_is_one_line(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Nothing to train on."""
    done = run_here(*command("sft", tiny_checkpoint, tmp_path / "out", []))
    assert done.returncode == 1
    assert "give --data NAME=FILE.jsonl" in done.stderr


def test_the_head_does_not_learn_into_its_own_beginning(
    tiny_checkpoint: Path, tmp_path: Path, data: dict[str, list[str]], predictor: Path
) -> None:
    """`--predictor OUTPUT/predictor` would be overwritten, so that the run could not be gone on with."""
    out = tmp_path / "out"
    (out / "predictor").mkdir(parents=True)
    (out / "predictor" / "head.safetensors").write_bytes((predictor / "head.safetensors").read_bytes())
    done = run_here(*command("sft", tiny_checkpoint, out, data["sft"], "--predictor", out / "predictor"))
    assert done.returncode == 1
    assert "give another --output" in done.stderr


def test_a_run_that_goes_wild_keeps_its_last_state(
    tiny_checkpoint: Path, tmp_path: Path, data: dict[str, list[str]]
) -> None:
    """A learning rate that makes the loss NaN ends the run in one line, before NaN is saved."""
    wild = ["--selector", "static", "--learning-rate", "1e30", "--save-every", "1", "--eval-prompts", "0"]
    done = run_here(*command("sft", tiny_checkpoint, tmp_path / "out", data["sft"], *wild))
    assert done.returncode == 1
    assert "the gradient of arm static is not a number; lower the learning rate" in done.stderr
    arrays = load_arrays(tmp_path / "out" / "adapters" / "static" / "adapters.safetensors")
    assert all(bool(mx.all(mx.isfinite(array))) for array in arrays.values())


def test_another_run_in_the_folder_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, data: dict[str, list[str]]
) -> None:
    """What differs is named; nothing is lost."""
    given = command("sft", tiny_checkpoint, tmp_path / "out", data["sft"], "--selector", "static")
    assert run_here(*given).returncode == 0
    before = metrics(tmp_path / "out")
    done = run_here(*given, "--iters", "8", "--lora-rank", "2")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ifprune: ")]
    assert "holds a run with another iterations, rank" in line or "another rank, iterations" in line
    assert metrics(tmp_path / "out") == before
