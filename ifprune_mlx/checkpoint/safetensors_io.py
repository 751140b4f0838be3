"""Safetensors files: the header, read and checked before any tensor is, and the tensors."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ifprune_mlx.errors import IfpruneError, reason_of

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Of one element, by the name that the safetensors format gives its type."""
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a safetensors header: element type, shape, and its byte range in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a safetensors file says it holds."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_safetensors_header(path: Path, error: type[IfpruneError] = IfpruneError) -> SafetensorsHeader:
    """Read and check a safetensors header without touching tensor data.

    Checks that the header is JSON, that every tensor's byte range fits its shape and type, and that the file is
    exactly as long as the ranges say, so a truncated file is found before a tensor is read from it.

    Raises:
        IfpruneError: (or the given subclass) naming the file and the defect.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise error(f"{path}: not a safetensors file, or cut off within its header; copy or download it again")
            raw: Any = json.loads(file.read(length))
    except OSError as exc:
        raise error(f"{path}: cannot be read ({reason_of(exc)})") from None
    except (ValueError, RecursionError):
        raise error(f"{path}: the safetensors header is not valid JSON; copy or download the file again") from None
    base = 8 + length
    tensors: dict[str, TensorInfo] = {}
    try:
        metadata = {str(key): str(value) for key, value in (raw.pop("__metadata__", None) or {}).items()}
        for name, entry in raw.items():
            start, end = (int(offset) for offset in entry["data_offsets"])
            tensors[name] = TensorInfo(entry["dtype"], tuple(int(n) for n in entry["shape"]), base + start, base + end)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        raise error(f"{path}: the safetensors header is malformed; copy or download the file again") from None
    for name, info in tensors.items():
        if info.dtype not in DTYPE_BYTES:
            raise error(f"{path}: tensor {name} has the unsupported type {info.dtype}")
        if info.end - info.start != math.prod(info.shape) * DTYPE_BYTES[info.dtype] or info.start < base:
            raise error(f"{path}: tensor {name} has a byte range that does not fit its shape; the file is damaged")
    expected = max((info.end for info in tensors.values()), default=base)
    if size != expected:
        word = "cut short" if size < expected else "longer than its header says"
        raise error(f"{path}: {word} ({size} bytes, {expected} expected); copy or download it again")
    return SafetensorsHeader(tensors, metadata)


def load_arrays(path: Path) -> dict[str, mx.array]:
    """All tensors of a safetensors file, lazily.

    Raises:
        IfpruneError: if MLX, whose reader takes less than Python's, cannot read the header.
    """
    try:
        arrays = mx.load(str(path))
    except RuntimeError as exc:
        raise IfpruneError(f"{path}: MLX cannot read it ({reason_of(exc)}); copy or download it again") from exc
    assert isinstance(arrays, dict)
    return arrays
