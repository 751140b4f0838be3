"""A tiny sparsity predictor with random weights."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from ifprune_mlx.selection.predictor import Head
from tests.tiny import CONFIGS, write_source


def write_predictor(folder: Path, widths: tuple[int, ...] = (128, 128), *, poison: bool = False) -> Path:
    """A predictor folder for FFNs of these widths; `poison` puts a NaN into its head."""
    write_source(folder, "qwen2", seed=7)
    mx.random.seed(8)
    second = mx.random.normal((sum(widths), 16))
    if poison:
        second[3, 5] = float("nan")
    Head(mx.random.normal((16, CONFIGS["qwen2"]["hidden_size"])), None, second, None, widths).save(
        folder / "head.safetensors"
    )
    return folder
