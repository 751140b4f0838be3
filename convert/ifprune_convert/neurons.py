"""Writes the neurons file of one FFN, with its data on the borders of memory pages.

The runtime reads single neurons from it (`ifprune_mlx.store`), and a row that crosses a page more than it has to costs
a page more from the disk. Knows names and arrays, not what they mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from ifprune_mlx.buffers import raw

_PAGE_BYTES = 1 << 14  # of Apple silicon; Linux mostly has a quarter of it
_NAMES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32", mx.uint8: "U8", mx.int32: "I32"}


def write_neurons(file: Path, tensors: Mapping[str, mx.array]) -> None:
    """Write a safetensors file whose header is padded, with spaces as the format allows, to a page.

    Raises:
        OSError: if it cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
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
