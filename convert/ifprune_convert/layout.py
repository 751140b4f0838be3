"""From a dense FFN's weights to neuron-major rows. Pure functions on arrays.

gate and up are `[d_ffn, d_model]` already and are interleaved; down is `[d_model, d_ffn]` and is transposed. Groups of
a quantization run along the last axis, so each neuron's rows are packed on their own and taking some is exact.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import mlx.core as mx
import numpy as np

from ifprune_mlx.checkpoint.format import Quantization
from ifprune_mlx.checkpoint.neuron_layout import PARTS, record_stride
from ifprune_mlx.selection.selection import Scores

DTYPE_NAMES = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.uint8: "U8",
    mx.int32: "I32",
}
"""How safetensors names the element types of a neurons file."""
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
    return {f"{name}.{part}": array for part, array in zip(quantization.parts, arrays, strict=True)}


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


def as_records(tensors: Mapping[str, mx.array]) -> tuple[mx.array, dict[str, str]]:
    """All rows of a neuron side by side.

    Args:
        tensors: by name, a row or several per neuron along axis 0.

    Returns:
        uint8 `[d_ffn, stride]`, not computed, and the metadata that describe a record.
    """
    parts: dict[str, dict[str, object]] = {}
    columns, offset = [], 0
    # Of larger elements first, so that each begins at a multiple of its own size.
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.size, name)):
        array = tensors[name]
        rows = mx.view(mx.contiguous(array).reshape(len(array), -1), mx.uint8)
        parts[name] = {"dtype": DTYPE_NAMES[array.dtype], "shape": list(array.shape[1:]), "offset": offset}
        columns.append(rows)
        offset += rows.shape[1]
    padding = record_stride(offset) - offset
    columns.append(mx.zeros((columns[0].shape[0], padding), mx.uint8))
    return mx.concatenate(columns, axis=1), {PARTS: json.dumps(parts)}


def row_norms(rows: mx.array) -> Scores:
    """Euclidean norm of every row `[n, d]`, float32 `[n]`; in chunks, so that no float32 copy of all is made."""
    return np.concatenate([np.array(mx.linalg.norm(part.astype(mx.float32), axis=1)) for part in _chunks(rows)])


def weight_prior(gate: mx.array, up: mx.array, down_norms: Scores) -> Scores:
    """Importance of every neuron from the weights alone: the product of the norms of its three rows."""
    return row_norms(gate) * row_norms(up) * down_norms


def _chunks(rows: mx.array) -> Iterator[mx.array]:
    for start in range(0, rows.shape[0], _CHUNK):
        yield rows[start : start + _CHUNK]
