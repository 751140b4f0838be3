"""What several tests of paired runs train on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from ifprune_mlx.selection.predictor import Head
from tests.cli.train_paired.runs import chats, texts, write


@pytest.fixture
def data(tmp_path: Path) -> dict[str, list[str]]:
    """Two domains of 30 chats, and of 20 texts, as --data options, by stage."""
    rows: dict[str, Callable[[str, int], list[dict[str, Any]]]] = {"sft": chats, "pretrain": texts}
    options: dict[str, list[str]] = {}
    for stage, make in rows.items():
        (tmp_path / stage).mkdir()
        for domain in ("code", "maths"):
            given = write(tmp_path / stage / f"{domain}.jsonl", make(domain, 30 if stage == "sft" else 20))
            options.setdefault(stage, []).extend(("--data", given))
    return options


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A predictor folder: a head on the model's first layer."""
    folder = tmp_path_factory.mktemp("predictor")
    mx.random.seed(11)
    arrays = [mx.random.normal(shape) for shape in ((8, 128), (8,), (256, 8), (256,))]
    Head(*arrays, (128, 128), "both", layers=1).save(folder / "head.safetensors")
    return folder
