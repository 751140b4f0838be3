"""How the rows of neurons lie in a neurons file: as tensors, or as one record per neuron.

Tensors (`gate_up.weight` `[d_ffn, 2, row]`, `down.weight` `[d_ffn, row]`, ...) are what any tool can read. Records, a
tensor `neurons` of bytes `[d_ffn, stride]` with the parts of a record described in the file's metadata, keep all rows
of a neuron together: a switch in `ssd` residency then reads one place of the disk per neuron instead of two to six,
and the disk reads whole pages.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from ifprune_mlx.checkpoint.safetensors_io import DTYPE_BYTES, SafetensorsHeader
from ifprune_mlx.errors import CheckpointError

RECORDS = "neurons"
"""The tensor that holds records."""
PARTS = "record"
"""The metadata that describes one: a JSON object of part name -> `{"dtype", "shape", "offset"}`."""
PAGE_SIZES = (1 << 12, 1 << 14)
"""What files are read by: Linux's pages and those of Apple silicon. A checkpoint may be made on either and read on the
other."""
NOT_ROWS = ("order", "down.bias")
"""The tensors of a neurons file that do not hold a row per neuron."""
FLOATS = ("F32", "F16", "BF16")
READABLE = (*FLOATS, "U32", "U8")
"""The element types of rows."""
MOST_PADDING = 4 / 3
"""Bytes that a record takes at most for one that it has: so three quarters of a page may have one to themselves."""


@dataclass(frozen=True)
class Part:
    """One array's rows of one neuron.

    Attributes:
        name: as of the tensors: `gate_up` or `down`, and `.weight`, `.scales`, `.biases` or `.bias`.
        dtype: element type, by its safetensors name.
        shape: of one neuron's rows: `(2, row)` or `(row,)`.
        offset: of its first byte, from where the neuron begins.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of one neuron's rows."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Strip:
    """A range of the file in which one neuron follows another.

    Attributes:
        start: byte where the first begins.
        stride: bytes from one neuron to the next.
        parts: what is there of each.
    """

    start: int
    stride: int
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of one neuron without padding."""
        return sum(part.nbytes for part in self.parts)

    @property
    def used(self) -> int:
        """Bytes from where a neuron begins to the end of its last part; what follows is padding."""
        return max(part.offset + part.nbytes for part in self.parts)


def strips_of(header: SafetensorsHeader, d_ffn: int, where: Path) -> tuple[Strip, ...]:
    """All rows of a neurons file.

    Raises:
        CheckpointError: if its records are not described, or not as they are.
    """
    records = header.tensors.get(RECORDS)
    if records is None:
        tensors = ((name, info) for name, info in header.tensors.items() if name not in NOT_ROWS)
        return tuple(
            Strip(info.start, (info.end - info.start) // d_ffn, (Part(name, info.dtype, info.shape[1:]),))
            for name, info in tensors
        )
    parts: list[Part] = []
    try:
        for name, entry in json.loads(header.metadata[PARTS]).items():
            if not all(type(n) is int and n >= 0 for n in (*entry["shape"], entry["offset"])):
                raise ValueError("a number is no size")
            parts.append(Part(name, entry["dtype"], tuple(entry["shape"]), entry["offset"]))
        inside = all(part.offset + part.nbytes <= records.shape[1] for part in parts)
        if not inside or records.dtype != "U8" or records.shape != (d_ffn, records.shape[1]):
            raise ValueError("a part lies beyond its record")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError) as exc:
        raise CheckpointError(
            f"{where}: its records are not as its header describes them; copy or convert the checkpoint again"
        ) from exc
    return (Strip(records.start, records.shape[1], tuple(parts)),)


def record_stride(nbytes: int) -> int:
    """Bytes from one record to the next: the fewest, up to a third more than it has, at which reading a record reads as
    little as it can, on Linux and on Apple silicon together; a multiple of 16."""
    choices = range(-(-nbytes // 16) * 16, int(MOST_PADDING * nbytes) + 1, 16)

    def read_bytes(stride: int) -> float:
        return sum(page * _pages(nbytes, stride, page) for page in PAGE_SIZES)

    return min(choices, key=read_bytes, default=nbytes)


def _pages(nbytes: int, stride: int, page: int) -> float:
    """On how many pages a record lies, on average over records."""
    count = page // math.gcd(stride, page)
    starts = (index * stride % page for index in range(count))
    return sum((start + nbytes - 1) // page + 1 for start in starts) / count
