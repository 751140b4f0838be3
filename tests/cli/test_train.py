"""`ifprune train` on the tiny model: out comes a predictor that `convert --predictor` takes; bad input is one line."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from ifprune_mlx import Instruction, load, make_selector
from ifprune_mlx.selection.predictor import Head
from ifprune_mlx.selection.selection import top_k
from tests.cli.process import run_here
from tests.tiny import write_source


@pytest.fixture
def chats(tmp_path: Path) -> list[str]:
    """Two domains of 30 chats each, as --data options."""
    options = []
    for domain in ("code", "maths"):
        rows = [
            {"prompt": f"{domain} question {i}", "completion": "return x" if domain == "code" else f"{i} + {i}"}
            for i in range(30)
        ]
        file = tmp_path / f"{domain}.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows))
        options += ["--data", f"{domain}={file}"]
    return options


def test_distil_convert_and_select(tiny_checkpoint: Path, tmp_path: Path, chats: list[str]) -> None:
    out = tmp_path / "out"
    command = ["train", "--model", tiny_checkpoint, *chats, "--output", out, "--layers", "1", "--rank", "8", "--json"]
    done = run_here(*command)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["stage"] == "distill"
    assert 20 < result["chats"] <= 60  # some prompts are held out
    assert json.loads((out / "metrics.jsonl").read_text())["explained"] == result["explained"]
    again = json.loads(run_here(*command).stdout.splitlines()[-1])
    assert again["explained"] == result["explained"]  # from the kept targets
    together = [*command[:-3], "--json", "--micro-batch-size", "7", "--rank", "8", "--output", tmp_path / "together"]
    found = json.loads(run_here(*together).stdout.splitlines()[-1])
    assert found["explained"] == pytest.approx(result["explained"], abs=1e-3)
    source = tiny_checkpoint.with_name(f"source-of-{tiny_checkpoint.name}")
    done = run_here("convert", "--model", source, "--mlx-path", tmp_path / "ifp", "--predictor", result["path"])
    assert done.returncode == 0, done.stderr
    model, _ = load(tmp_path / "ifp")
    selector = make_selector(model)
    assert selector.name == "learned"
    hashes = {selector.select(Instruction(t, ()), model.keep(0.25)).selection.hash for t in ("code question", "2 + 2")}
    assert len(hashes) == 2


def test_a_predictor_with_a_backbone_of_its_own(tiny_checkpoint: Path, tmp_path: Path, chats: list[str]) -> None:
    """Distilled, converted and selected with, it selects what the fitted head says of that backbone's hidden states.
    Another pooling measures nothing anew; another backbone is refused."""
    small, out = write_source(tmp_path / "small", "qwen2", seed=7, hidden_size=32), tmp_path / "out"
    command = ["train", "--model", tiny_checkpoint, *chats, "--output", out, "--rank", "8", "--json", "--backbone"]
    done = run_here(*command, small, "--pooling", "last")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    source = tiny_checkpoint.with_name(f"source-of-{tiny_checkpoint.name}")
    done = run_here("convert", "--model", source, "--mlx-path", tmp_path / "ifp", "--predictor", result["path"])
    assert done.returncode == 0, done.stderr
    head = Head.load(out / "predictor" / "head.safetensors")
    assert (head.layers, head.pooling, head.first.shape) == (None, "last", (8, 32))
    backbone, tokenizer = mlx_lm.load(str(small))
    model, _ = load(tmp_path / "ifp")
    for text in ("code question 3", "What is 2 + 2?"):
        done = run_here("select", "--model", tmp_path / "ifp", "--prompt", text, "--density", "0.25", "--json")
        assert done.returncode == 0, done.stderr
        tokens = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        scores = np.array(head(backbone.model(mx.array([tokens]))[0]))
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["selector"] == "learned"
        assert found["selection"] == top_k(np.split(scores, [128]), model.keep(0.25), "learned").hash

    parts = {file: file.stat().st_mtime_ns for file in (out / "targets").iterdir()}
    done = run_here(*command, small, "--pooling", "mean")
    assert done.returncode == 0, done.stderr
    assert parts == {file: file.stat().st_mtime_ns for file in (out / "targets").iterdir()}
    assert Head.load(out / "predictor" / "head.safetensors").pooling == "mean"
    assert [json.loads(line)["pooling"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [
        "last",
        "mean",
    ]
    done = run_here(*command, write_source(tmp_path / "other", "qwen2", seed=8, hidden_size=32))
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ifprune: error: ")]
    assert "targets: holds targets of other chats or of another model or backbone" in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--layers", "3"], "--layers 3: the model has 2"),
        (["--backbone", "nowhere"], "nowhere: has no config.json; give an mlx-lm model folder with its tokenizer"),
        (["--data", "nothing"], "expected NAME=FILE"),
        (["--data", "code=again.jsonl"], "'code' is given twice"),
        (["--data", "other=missing.jsonl"], "missing.jsonl"),
        (["--limit", "5"], "too few to distil"),
    ],
)
def test_bad_input_is_one_line(
    tiny_checkpoint: Path, tmp_path: Path, chats: list[str], changes: list[str], words: str
) -> None:
    done = run_here(
        "train", "--model", tiny_checkpoint, *chats, "--output", tmp_path / "out", "--layers", "1", *changes
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ifprune: error: ")]
    assert words in line
    assert done.stdout == ""
    assert not (tmp_path / "out" / "predictor").exists()
