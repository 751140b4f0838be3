"""Short paired runs on the tiny model: data for them, the command line, and what they write."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ifprune_mlx.checkpoint.safetensors_io import read_safetensors_header

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "its", "dog", "ran", "to", "some", "big", "red", "house")
Command = list[str | Path]


def write(file: Path, rows: Sequence[dict[str, Any]]) -> str:
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return f"{file.stem}={file}"


def chats(domain: str, count: int) -> list[dict[str, Any]]:
    answer = "return x" if domain == "code" else "1 + 1"
    return [{"prompt": f"{domain} question {i}", "completion": answer} for i in range(count)]


def texts(domain: str, count: int) -> list[dict[str, Any]]:
    generator = random.Random(domain)
    return [{"text": f"{domain} {i} " + " ".join(generator.choices(WORDS, k=25))} for i in range(count)]


def command(stage: str, model: Path, output: Path, data: Sequence[str], *options: str | Path) -> Command:
    small = ["--iters", "7", "--batch-size", "2", "--max-seq-length", "64", "--lora-rank", "4", "--warmup", "2"]
    rates = ["--learning-rate", "1e-2", "--head-learning-rate", "1e-2", "--densities", "0.25,0.4-0.8", "--seed", "3"]
    often = ["--eval-prompts", "2", "--steps-per-eval", "3", "--held-out", "0.4", "--steps-per-report", "2"]
    return ["train", "--stage", stage, "--model", model, "--output", output, *data, *small, *rates, *often, *options]


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def settings(folder: Path) -> dict[str, Any]:
    """What the run in a folder did, from its state."""
    metadata = read_safetensors_header(folder / "state.safetensors").metadata
    found: dict[str, Any] = json.loads(metadata["run"])
    return found
