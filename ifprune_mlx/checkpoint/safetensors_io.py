"""Safetensors files: the header, read and checked before any tensor is, and the tensors."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ifprune_mlx.checkpoint.regular_file import open_regular
from ifprune_mlx.errors import IfpruneError, reason_of

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Of one element, by the name that the safetensors format gives its type."""
# Far above any real file; they keep what a header can say from taking minutes.
_MAX_HEADER_BYTES = 1 << 25
_MAX_TENSORS = 1 << 16
# MLX counts the items of a dimension in 32 bits.
_MAX_WIDTH = 2**31 - 1


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a safetensors header: element type, shape, and its byte range in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a safetensors file says it holds.

    Attributes:
        tensors: by name.
        metadata: as it stands there.
        stamp: tells this file from one that was written over it or put in its place; see `stamp_of`.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    stamp: tuple[int, ...]


def stamp_of(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is replaced, or written to in place: its inode, size and time of change."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def read_safetensors_header(path: Path, error: type[IfpruneError] = IfpruneError) -> SafetensorsHeader:
    """Read and check a safetensors header without touching tensor data.

    Checks that the header is JSON, that every tensor's byte range fits its shape and type, and that the file is
    exactly as long as the ranges say, so a truncated file is found before a tensor is read from it.

    Raises:
        IfpruneError: (or the given subclass) naming the file and the defect.
    """
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            size = status.st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise error(f"{path}: not a safetensors file, or cut off within its header; copy or download it again")
            raw: Any = json.loads(file.read(length))
    except OSError as exc:
        raise error(f"{path}: cannot be read ({reason_of(exc)})") from exc
    except (ValueError, RecursionError) as exc:
        raise error(f"{path}: the safetensors header is not valid JSON; copy or download the file again") from exc
    if isinstance(raw, dict) and len(raw) > _MAX_TENSORS:
        raise error(f"{path}: names {len(raw)} tensors, more than any model's file; it is damaged, or made to do harm")
    base = 8 + length
    tensors: dict[str, TensorInfo] = {}
    try:
        metadata = {str(key): str(value) for key, value in (raw.pop("__metadata__", None) or {}).items()}
        for name, entry in raw.items():
            name.encode()  # a lone surrogate could not be printed
            start, end = entry["data_offsets"]
            numbers = (*entry["shape"], start, end)
            if type(entry["dtype"]) is not str or not all(type(n) is int and n >= 0 for n in numbers):
                raise TypeError(name)
            tensors[name] = TensorInfo(entry["dtype"], tuple(entry["shape"]), base + start, base + end)
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise error(f"{path}: the safetensors header is malformed; copy or download the file again") from exc
    for name, info in tensors.items():
        if info.dtype not in DTYPE_BYTES:
            raise error(f"{path}: tensor {name} has the unsupported type {info.dtype}")
        if max(info.shape, default=0) > _MAX_WIDTH:
            raise error(f"{path}: tensor {name} has shape {list(info.shape)}, too large for MLX; the file is damaged")
        if info.end - info.start != math.prod(info.shape) * DTYPE_BYTES[info.dtype] or info.start < base:
            raise error(f"{path}: tensor {name} has a byte range that does not fit its shape; the file is damaged")
    expected = max((info.end for info in tensors.values()), default=base)
    if size != expected:
        word = "cut short" if size < expected else "longer than its header says"
        raise error(f"{path}: {word} ({size} bytes, {expected} expected); copy or download it again")
    return SafetensorsHeader(tensors, metadata, stamp_of(status))


def load_arrays(path: Path, error: type[IfpruneError] = IfpruneError) -> dict[str, mx.array]:
    """All tensors of a safetensors file, lazily.

    Raises:
        IfpruneError: (or the given subclass) if MLX, whose reader takes less than Python's, cannot read the header.
    """
    try:
        arrays = mx.load(str(path))
    except RuntimeError as exc:
        raise error(f"{path}: MLX cannot read it ({reason_of(exc)}); copy or download it again") from exc
    assert isinstance(arrays, dict)
    return arrays
