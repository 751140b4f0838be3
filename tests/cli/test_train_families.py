"""`ifprune train` on families with recurrent layers, some of which MLX must be told to leave kernels out of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx import Instruction, load, make_selector
from tests.cli.process import run_here
from tests.family_configs import write_family


@pytest.mark.parametrize("model_type", ["recurrent_gemma", "qwen3_5", "plamo"])
def test_all_stages_train_and_what_they_make_selects(tmp_path: Path, model_type: str) -> None:
    write_family(tmp_path / "source", model_type)
    convert(open_source(tmp_path / "source"), tmp_path / "base", Options())
    command = ["train", "--model", tmp_path / "base"]
    for domain in ("code", "maths"):
        rows = [{"prompt": f"{domain} question {i}", "completion": f"{domain} {i}"} for i in range(30)]
        (tmp_path / f"{domain}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        command += ["--data", f"{domain}={tmp_path / domain}.jsonl"]
    measured = tmp_path / "measured"
    for stage in ("calibrate", "distill"):
        done = run_here(*command, "--stage", stage, "--layers", "1", "--rank", "8", "--output", measured)
        assert done.returncode == 0, done.stderr
    small = ["--iters", "2", "--batch-size", "2", "--lora-rank", "4", "--eval-prompts", "2"]
    for kind in ("lora", "full"):
        out = tmp_path / kind
        options = ["--stage", "sft", "--predictor", measured / "predictor", "--fine-tune-type", kind, *small]
        done = run_here(*command, *options, "--head-learning-rate", "1e-2", "--output", out)
        assert done.returncode == 0, done.stderr
    adapter = ["--adapter", out / "adapters" / "learned"]
    done = run_here(
        *("convert", "--model", tmp_path / "source", "--mlx-path", tmp_path / "ifp"),
        *("--predictor", out / "predictor", *adapter),
    )
    assert done.returncode == 0, done.stderr
    model, _ = load(tmp_path / "ifp")
    selector = make_selector(model)
    assert selector.name == "learned"
    assert selector.select(Instruction("code question", ()), model.keep(0.5)).selection.hash
