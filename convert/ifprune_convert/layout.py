"""From a dense FFN's weights to neuron-major rows (DESIGN.md section 3, idea 1). Pure functions on arrays.

gate and up are `[d_ffn, d_model]` already and are interleaved; down is `[d_model, d_ffn]` and is transposed. Groups of
a quantization run along the last axis, so each neuron's rows are packed on their own and taking some is exact.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from ifprune_mlx.checkpoint.format import Quantization
from ifprune_mlx.selection.selection import Scores

_CHUNK = 4096


def gate_up_rows(gate: mx.array, up: mx.array) -> mx.array:
    """`[d_ffn, ...]` twice -> `[d_ffn, 2, ...]`, gate first."""
    return mx.stack([gate, up], axis=1)


def down_rows(down: mx.array) -> mx.array:
    """`[d_model, d_ffn]` -> contiguous `[d_ffn, d_model]`."""
    return mx.contiguous(down.T)


def packed(name: str, rows: mx.array, quantization: Quantization | None) -> dict[str, mx.array]:
    """The tensors of one weight, quantized along its last axis or as it is: `name.weight`, `.scales`, `.biases`."""
    if quantization is None:
        return {f"{name}.weight": rows}
    arrays = mx.quantize(rows, group_size=quantization.group_size, bits=quantization.bits, mode=quantization.mode)
    leaves = ("weight", "scales", "biases")
    return {f"{name}.{leaf}": array for leaf, array in zip(leaves, arrays, strict=False)}


def unpacked(arrays: dict[str, mx.array], quantization: Quantization, dtype: mx.Dtype | None = None) -> mx.array:
    """The floats of a packed weight `weight`, `scales`, `biases`; of type `dtype`, which only modes other than affine,
    whose scales are bytes, need."""
    return mx.dequantize(
        arrays["weight"],
        arrays["scales"],
        arrays.get("biases"),
        group_size=quantization.group_size,
        bits=quantization.bits,
        mode=quantization.mode,
        dtype=None if quantization.has_biases else dtype,
    )


def row_norms(rows: mx.array) -> Scores:
    """Euclidean norm of every row `[n, d]`, float32 `[n]`; in chunks, so that no float32 copy of all is made."""
    return np.concatenate([np.array(mx.linalg.norm(part.astype(mx.float32), axis=1)) for part in _chunks(rows)])


def weight_prior(gate: mx.array, up: mx.array, down_norms: Scores) -> Scores:
    """Importance of every neuron from the weights alone: the product of the norms of its three rows."""
    return row_norms(gate) * row_norms(up) * down_norms


def _chunks(rows: mx.array) -> Iterator[mx.array]:
    for start in range(0, rows.shape[0], _CHUNK):
        yield rows[start : start + _CHUNK]
