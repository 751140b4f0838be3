"""Configs for tests of one part of training, to which data and output do not matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ifprune_mlx.train import TrainConfig


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(**{"output": Path("unused"), "data": {"a": Path("unused.jsonl")}, **settings})
