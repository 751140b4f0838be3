"""A sliced model computes what the masked dense one does (docs/architecture.md), float and quantized."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ifprune_convert.packing import quantization_of
from ifprune_convert.pipeline import Options
from ifprune_mlx.checkpoint.budget import keep_count
from ifprune_mlx.checkpoint.format import Checkpoint
from ifprune_mlx.model import load_checkpoint
from ifprune_mlx.selection.selection import Selection
from tests.ifprune_mlx.reference import (
    TOLERANCE,
    dequantized_model,
    logits,
    mask_ffns,
    open_model,
    random_selection,
    source_model,
)
from tests.tiny import CONFIGS, write_checkpoint

DENSITIES = (0.125, 0.27, 0.5, 1.0)
PROMPT = [1, 40, 300, 7, 7, 99, 250, 3, 18, 120, 64, 201]
STEPS = [77, 5, 310]
# (mode, group size, bits); a d_model of 64 divides into groups of all these sizes.
PACKINGS = [("affine", 64, 4), ("affine", 64, 8), ("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)]
# Rows of 96 weights: no multiple of 64 or 128.
ODD_WIDTH = {"hidden_size": 96, "num_attention_heads": 4, "head_dim": 24}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {family: write_checkpoint(folder / family, family) for family in CONFIGS}


def selection_at(density: float, d_ffn: int = 128, layers: int = 2) -> Selection:
    keep = [keep_count(density, d_ffn)] * layers
    return random_selection([d_ffn] * layers, keep, seed=int(1000 * density))


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("family", CONFIGS)
def test_sliced_logits_equal_those_of_the_masked_stock_model(
    checkpoints: dict[str, Path], family: str, density: float
) -> None:
    selection = selection_at(density)
    model = open_model(checkpoints[family])
    dense = source_model(checkpoints[family])
    plain = logits(dense, PROMPT, STEPS)
    expected = logits(mask_ffns(dense, selection), PROMPT, STEPS)

    model.switch(selection)
    found = logits(model, PROMPT, STEPS)

    assert np.abs(found - expected).max() < TOLERANCE
    # The comparison means something only where the mask changes the output by far more than the tolerance.
    assert density == 1 or np.abs(plain - expected).max() > 100 * TOLERANCE


@pytest.mark.parametrize("family", CONFIGS)
def test_all_neurons_equal_stock_mlx_lm(checkpoints: dict[str, Path], family: str) -> None:
    model = open_model(checkpoints[family])
    expected = logits(source_model(checkpoints[family]), PROMPT, STEPS)

    assert np.abs(logits(model, PROMPT, STEPS) - expected).max() < TOLERANCE
    model.switch(selection_at(0.27))
    model.switch(selection_at(1.0))  # every neuron, in whatever slots the first switch left them
    assert np.abs(logits(model, PROMPT, STEPS) - expected).max() < TOLERANCE
    model.switch(selection_at(0.5))
    model.switch(None)
    assert np.abs(logits(model, PROMPT, STEPS) - expected).max() < TOLERANCE


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: f"{packing[0]}-{packing[2]}")
@pytest.mark.parametrize("family", ["llama", "llama-bias", "llama-untied", "qwen3", "gemma2"])
def test_quantized_sliced_logits_equal_those_of_the_dequantized_masked_model(
    tmp_path: Path, family: str, packing: tuple[str, int, int]
) -> None:
    # The reference multiplies by the very numbers that the packed tensors stand for, in float32, so quantization costs
    # nothing here and the tolerance is that of float models.
    mode, group_size, bits = packing
    options = Options(quantization=quantization_of(mode, group_size, bits))
    folder = write_checkpoint(tmp_path / "checkpoint", family, options)
    model = open_model(folder)
    unpacked = logits(dequantized_model(folder), PROMPT, STEPS)
    assert np.abs(logits(model, PROMPT, STEPS) - unpacked).max() < TOLERANCE

    for density in DENSITIES:
        selection = selection_at(density)
        model.switch(selection)
        expected = logits(mask_ffns(dequantized_model(folder), selection), PROMPT, STEPS)
        assert np.abs(logits(model, PROMPT, STEPS) - expected).max() < TOLERANCE
        assert density == 1 or np.abs(unpacked - expected).max() > 100 * TOLERANCE


def test_quantization_loses_what_it_should_and_no_more(tmp_path: Path) -> None:
    # Guards the reference itself: what the packed tensors stand for must be near the source's weights.
    folder = write_checkpoint(tmp_path / "checkpoint", options=Options(quantization=quantization_of("affine", 32, 8)))
    source, unpacked = source_model(folder), dequantized_model(folder)
    for ours, theirs in zip(unpacked.model.layers, source.model.layers, strict=True):
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            assert np.abs(np.array(ours.mlp[leaf].weight - theirs.mlp[leaf].weight)).max() < 1e-3


@pytest.mark.parametrize("packing", [None, ("affine", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)], ids=str)
@pytest.mark.parametrize("d_ffn", [128, 200])
def test_widths_that_are_no_multiple_of_128_are_exact(
    tmp_path: Path, packing: tuple[str, int, int] | None, d_ffn: int
) -> None:
    options = Options(quantization=quantization_of(*packing) if packing else None)
    folder = write_checkpoint(tmp_path / "checkpoint", "llama", options, intermediate_size=d_ffn, **ODD_WIDTH)
    model = open_model(folder)
    for density in DENSITIES:
        selection = selection_at(density, d_ffn)
        model.switch(selection)
        dense = dequantized_model(folder) if packing else source_model(folder)
        expected = logits(mask_ffns(dense, selection), PROMPT, STEPS)
        assert np.abs(logits(model, PROMPT, STEPS) - expected).max() < TOLERANCE


def test_a_different_number_of_neurons_in_each_layer_is_exact(checkpoints: dict[str, Path]) -> None:
    model = open_model(checkpoints["llama"])
    selection = random_selection([128, 128], [3, 101], seed=5)  # no multiples of 8 either
    model.switch(selection)
    expected = logits(mask_ffns(source_model(checkpoints["llama"]), selection), PROMPT, STEPS)
    assert np.abs(logits(model, PROMPT, STEPS) - expected).max() < TOLERANCE


@pytest.mark.parametrize("residency", ["ram", "ssd"])
def test_saved_selections_of_other_multiples_stay_usable(tmp_path: Path, residency: str) -> None:
    """Earlier releases rounded *k* to multiples of 32 in FFNs narrower than 4096."""
    folder = write_checkpoint(tmp_path / "checkpoint", intermediate_size=640)
    keep_then, keep_now = 5 * 32, keep_count(0.25, 640)
    assert keep_now % 64 == 0
    random_selection([640, 640], [keep_then] * 2, seed=4).save(tmp_path / "saved.safetensors")
    model = load_checkpoint(Checkpoint.open(folder), residency=residency)
    saved = Selection.load(tmp_path / "saved.safetensors")
    for selection in (random_selection([640, 640], [keep_now] * 2, seed=5), saved):
        model.switch(selection)
        expected = logits(mask_ffns(source_model(folder), selection), PROMPT, STEPS)
        assert np.abs(logits(model, PROMPT, STEPS) - expected).max() < TOLERANCE
    assert model.selection is not None
    assert model.selection.keep == (keep_then, keep_then)
