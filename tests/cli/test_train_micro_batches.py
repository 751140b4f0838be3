"""`ifprune train --micro-batch-size` in one process and in two: the same losses, at the same densities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.process import run_here
from tests.cli.test_train_distributed import LAUNCH, launch

pytestmark = pytest.mark.skipif(not LAUNCH.is_file(), reason="mlx.launch is not installed beside this Python")


def losses(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["arms"]["static"] for line in lines if "arms" in line]


def test_micro_batches_of_two_processes_train_as_single_chats_of_one(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Chats of 60 lengths, of which each process pads its own; every row of the batch has a density of its own."""
    rows = [{"prompt": f"question {i}", "completion": "no " * (1 + 7 * i % 60)} for i in range(60)]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    command = ["train", "--stage", "sft", "--model", tiny_checkpoint, "--data", f"chats={tmp_path}/chats.jsonl"]
    command += ["--selector", "static", "--densities", "0.2-0.9", "--lora-rank", "4", "--learning-rate", "1e-2"]
    command += ["--iters", "4", "--batch-size", "12", "--warmup", "0", "--eval-prompts", "0"]
    assert run_here(*command, "--output", tmp_path / "one").returncode == 0
    done = launch([*command, "--output", tmp_path / "two", "--micro-batch-size", "4"], tmp_path)
    assert done.returncode == 0, done.stderr
    found, wanted = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert len(found) == len(wanted) == 4
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours["chats"] == pytest.approx(theirs["chats"], rel=1e-4)
