"""Writes the neurons file of one FFN, with its data on the borders of memory pages.

The runtime reads single neurons from it, and a row that crosses a page more than it has to costs
a page more from the disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import mlx.core as mx

from ifprune_mlx.checkpoint.neuron_layout import PARTS, record_stride
from ifprune_mlx.checkpoint.raw_array import raw

_PAGE_BYTES = 1 << 14  # of Apple silicon; Linux mostly has a quarter of it
_NAMES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32", mx.uint8: "U8", mx.int32: "I32"}


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
        parts[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape[1:]), "offset": offset}
        columns.append(rows)
        offset += rows.shape[1]
    padding = record_stride(offset) - offset
    columns.append(mx.zeros((columns[0].shape[0], padding), mx.uint8))
    return mx.concatenate(columns, axis=1), {PARTS: json.dumps(parts)}


def write_neurons(
    file: Path, tensors: Mapping[str, mx.array], metadata: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write a safetensors file whose header is padded, with spaces as the format allows, to a page.

    Raises:
        OSError: if it cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "mlx", **metadata}}
    # The largest first: their sizes are multiples of a page, so that they all begin on one.
    ordered = sorted(tensors, key=lambda name: -tensors[name].nbytes)
    offset = 0
    for name in ordered:
        array = tensors[name]
        end = offset + array.nbytes
        header[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _PAGE_BYTES)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            array = mx.contiguous(tensors[name])
            mx.eval(array)
            out.write(raw(array).tobytes())
