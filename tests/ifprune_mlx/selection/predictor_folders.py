"""Predictor folders, and heads, for tests."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ifprune_mlx.selection.predictor import Head
from tests.tiny import write_source

WIDTHS = (128, 128)
TEXT = "Write a haiku about C++ pointers.\nBe brief, 12 words!"


def make_head(
    pooling: str = "last", activation: str = "none", bias: bool = False, widths: tuple[int, ...] = WIDTHS, d: int = 64
) -> Head:
    generator = np.random.default_rng(5)

    def draw(*shape: int) -> mx.array:
        return mx.array(generator.normal(size=shape).astype(np.float32) / math.sqrt(shape[-1]))

    inputs = d * (2 if pooling == "both" else 1)
    first, second = draw(16, inputs), draw(sum(widths), 16)
    biases = (draw(16), draw(sum(widths))) if bias else (None, None)
    return Head(first, biases[0], second, biases[1], widths, pooling, activation)


def write_predictor(folder: Path, family: str = "llama", **head: Any) -> Path:
    """A predictor folder; the backbone's norms, which mlx-lm starts at 1, are made to differ."""
    write_source(folder, family, seed=11)
    weights = mx.load(str(folder / "model.safetensors"))
    mx.eval(weights)
    mx.random.seed(12)
    for name in weights:
        if name.endswith("norm.weight"):
            weights[name] = mx.random.uniform(0.5, 1.5, weights[name].shape)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    make_head(**head).save(folder / "head.safetensors")
    return folder


def wide_head(rank: int = 64, **settings: Any) -> Head:
    generator = np.random.default_rng(6)
    first, second = generator.normal(size=(rank, 64)) / 8, generator.normal(size=(sum(WIDTHS), rank)) / 8
    bias = mx.array(generator.normal(size=sum(WIDTHS)).astype(np.float32))
    return Head(mx.array(first.astype(np.float32)), None, mx.array(second.astype(np.float32)), bias, WIDTHS, **settings)


def head_with(**changes: mx.array | None) -> Callable[[Path], None]:
    """Rewrite the head's tensors; None leaves one out."""

    def spoil(folder: Path) -> None:
        path = folder / "head.safetensors"
        tensors, metadata = mx.load(str(path), return_metadata=True)
        mx.eval(tensors)
        tensors |= {name.replace("_", "."): value for name, value in changes.items()}
        mx.save_safetensors(str(path), {n: a for n, a in tensors.items() if a is not None}, metadata)

    return spoil


def settings_with(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "head.safetensors"
        tensors, metadata = mx.load(str(path), return_metadata=True)
        mx.eval(tensors)
        settings = {k: v for k, v in (json.loads(metadata["ifprune_predictor"]) | changes).items() if v is not None}
        mx.save_safetensors(str(path), tensors, {"ifprune_predictor": json.dumps(settings)})

    return spoil
