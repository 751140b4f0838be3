"""Heads: packed ones, and their files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from ifprune_mlx import PredictorError
from ifprune_mlx.checkpoint.format import Quantization
from ifprune_mlx.selection.predictor import Head
from ifprune_mlx.selection.selection import top_k
from tests.ifprune_mlx.selection.predictor_folders import WIDTHS, make_head, settings_with, wide_head


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize(("bits", "rank", "group"), [(8, 64, 64), (4, 64, 64), (8, 96, 32), (4, 128, 64)])
def test_a_quantized_head_scores_as_the_weights_that_it_stands_for(
    tmp_path: Path, bits: int, rank: int, group: int, dtype: mx.Dtype
) -> None:
    plain = wide_head(rank, layers=2)
    plain = replace(plain, second=plain.second.astype(dtype))
    plain.quantized(bits).save(tmp_path / "head.safetensors")
    packed = Head.load(tmp_path / "head.safetensors")
    assert packed.quantization == Quantization(group, bits, "affine")
    assert (packed.second.dtype, packed.layers) == (mx.uint32, 2)
    hidden = mx.random.normal((5, 64), key=mx.random.key(3))
    second = mx.dequantize(*mx.quantize(plain.second, group, bits), group, bits)
    inner = np.array(plain.first).astype(np.float64) @ np.array(hidden[-1])
    expected = np.array(second.astype(mx.float32)).astype(np.float64) @ inner + np.array(plain.second_bias)
    tolerance = 1e-5 if dtype == mx.float32 else 2e-2
    assert packed(hidden).dtype == mx.float32
    assert np.abs(np.array(packed(hidden)) - expected).max() < tolerance
    assert np.abs(np.array(packed.unpacked()(hidden)) - expected).max() < tolerance
    assert packed.unpacked().quantization is None
    assert plain.unpacked() is plain


def test_a_head_is_never_packed_anew_with_more_bits() -> None:
    head = wide_head().quantized(4)
    assert head.quantized(8) is head
    assert head.quantized(4) is head
    again = wide_head().quantized(8).quantized(4)
    assert again.quantization == Quantization(64, 4, "affine")


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.02), (4, 0.15)])
def test_how_much_quantization_changes_what_is_selected(bits: int, limit: float) -> None:
    head, shares = wide_head(128), []
    for seed in range(20):
        hidden = mx.random.normal((5, 64), key=mx.random.key(seed))
        chosen = [
            top_k(np.split(np.array(each(hidden)), [128]), (40, 32), "learned") for each in (head, head.quantized(bits))
        ]
        shares.append(1 - chosen[0].overlap(chosen[1]))
    assert np.mean(shares) < limit


@pytest.mark.parametrize(("rank", "bits"), [(16, 8), (48, 4), (64, 3), (64, 16)])
def test_a_head_that_cannot_be_packed_is_refused(rank: int, bits: int) -> None:
    with pytest.raises(PredictorError, match=f"inner layer of {rank} values cannot be packed with {bits} bits"):
        wide_head(rank).quantized(bits)


def test_a_float_head_is_written_as_earlier_releases_read_it(tmp_path: Path) -> None:
    make_head(bias=True).save(tmp_path / "head.safetensors")
    tensors, metadata = mx.load(str(tmp_path / "head.safetensors"), return_metadata=True)
    assert set(tensors) == {"head1.weight", "head1.bias", "head2.weight", "head2.bias"}
    settings = json.loads(metadata["ifprune_predictor"])
    assert set(settings) == {"format_version", "widths", "pooling", "activation", "layers"}
    assert settings["format_version"] == 1
    settings_with(layers=None)(tmp_path)  # as the first release wrote it
    assert Head.load(tmp_path / "head.safetensors").layers is None


def test_a_head_can_be_saved_and_loaded(tmp_path: Path) -> None:
    head = make_head("both", "gelu", bias=True)
    head.save(tmp_path / "head.safetensors")
    loaded = Head.load(tmp_path / "head.safetensors")
    assert (loaded.widths, loaded.pooling, loaded.activation) == (WIDTHS, "both", "gelu")
    hidden = mx.random.normal((5, 64))
    assert np.array_equal(np.array(head(hidden)), np.array(loaded(hidden)))
    assert make_head().first_bias is None
