"""The header of a GGUF file: metadata and the place of every tensor.

It is walked here and not by the `gguf` package's own reader, which loops without end on a damaged array length and maps
the file into memory; the package supplies the tensor types.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from ifprune_mlx.checkpoint.regular_file import open_regular
from ifprune_mlx.errors import SourceError, reason_of

AGAIN = "download or copy the file again"
ORIGINAL = "convert from the original safetensors folder"

# The struct code of each scalar metadata type, by its number in the file; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
# Far above any real file; they keep a damaged length from claiming gigabytes.
_MAX_STRING_BYTES = 1 << 24
_MAX_ARRAY_ITEMS = 10_000_000  # of all arrays together
_MAX_ENTRIES = 1 << 16  # tensors, and values


@dataclass(frozen=True)
class Tensor:
    """One entry of the header: name, type, shape with rows first, and the byte range in the file."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    size: int


class _Cursor:
    """Reads the header's values in order, and never beyond the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._items = 0
        self.offset = 0

    def _advance(self, size: int) -> int:
        start = self.offset
        if size > len(self._data) - start:
            raise SourceError(f"{self._path}: cut off or damaged in the GGUF header at byte {start}; {AGAIN}")
        self.offset += size
        return start

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        layout = f"<{count}{code}"
        return struct.unpack_from(layout, self._data, self._advance(struct.calcsize(layout)))

    def integer(self, code: str) -> int:
        return int(self.numbers(code, 1)[0])

    def count(self, what: str) -> int:
        """A number of entries."""
        count = self.integer("Q")
        if count > _MAX_ENTRIES:
            raise self.damaged(f"{count} {what}")
        return count

    def padding(self, end: int) -> bytes:
        """What lies from here to `end` and is not zero: nothing, in a sound file."""
        return self._data[self.offset : end].strip(b"\0")

    def text(self) -> str:
        length = self.integer("Q")
        if length > _MAX_STRING_BYTES:
            raise self.damaged(f"a text of {length} bytes")
        start = self._advance(length)
        try:
            return self._data[start : self.offset].decode()
        except UnicodeDecodeError as exc:
            raise self.damaged("a text that is not UTF-8") from exc

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _FLOAT32:
            # The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06.
            return float(str(np.float32(self.numbers("f", 1)[0])))
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind], 1)[0]
        if kind != _ARRAY:
            raise self.damaged(f"a value of the unknown type {kind}")
        kind, count = self.integer("I"), self.integer("Q")
        self._items += count
        if self._items > _MAX_ARRAY_ITEMS:
            raise self.damaged(f"an array of {count} items")
        if kind == _STRING:
            return [self.text() for _ in range(count)]
        if kind not in _SCALARS:
            raise self.damaged(f"an array of the type {kind}")
        return list(self.numbers(_SCALARS[kind], count))

    def damaged(self, what: str) -> SourceError:
        return SourceError(f"{self._path}: the GGUF header has {what} before byte {self.offset}; {AGAIN}")


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata and the tensors of a GGUF file, every byte range checked against its length."""
    try:
        size = path.stat().st_size
        if size == 0:
            raise SourceError(f"{path}: is empty; {AGAIN}")
        with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse_header(path, _Cursor(path, data), size)
    except OSError as exc:
        raise SourceError(f"{path}: cannot be read ({reason_of(exc)})") from exc


def _parse_header(path: Path, cursor: _Cursor, size: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if size < 4 or cursor.integer("I") != int.from_bytes(b"GGUF", "little"):
        raise SourceError(f"{path}: is not a GGUF file, whatever its name says; {AGAIN}")
    version = cursor.integer("I")
    if version not in (2, 3):
        # A small number in the upper half is version 3 as a big-endian machine writes it.
        what = "is big-endian" if version and version & 0xFFFF == 0 else f"has GGUF version {version}"
        raise SourceError(f"{path}: {what}, and this reader knows little-endian versions 2 and 3; {ORIGINAL}")
    tensor_count, value_count = cursor.count("tensors"), cursor.count("values")
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.text()
        if key in metadata:
            raise cursor.damaged(f"{key!r} twice")
        metadata[key] = cursor.value(cursor.integer("I"))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise cursor.damaged(f"the alignment {alignment!r}")

    entries: list[tuple[str, GGMLQuantizationType, tuple[int, ...], int, int]] = []
    expected_offset = 0
    for _ in range(tensor_count):
        name = cursor.text()
        dimensions = cursor.integer("I")
        if not 1 <= dimensions <= 4:
            raise cursor.damaged(f"a tensor {name!r} of {dimensions} dimensions")
        shape = tuple(int(length) for length in reversed(cursor.numbers("Q", dimensions)))
        number, offset = cursor.integer("I"), cursor.integer("Q")
        try:
            kind = GGMLQuantizationType(number)
            block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as exc:
            raise SourceError(
                f"{path}: tensor {name} has type number {number}, which this reader does not know; {ORIGINAL}"
            ) from exc
        # Tensors follow each other without gaps; a file that says otherwise is damaged, and llama.cpp refuses it too.
        if min(shape) < 1 or shape[-1] % block or offset != expected_offset:
            raise cursor.damaged(f"a tensor {name!r} whose shape or place does not fit its type or its neighbours")
        length = math.prod(shape) // block * block_bytes
        entries.append((name, kind, shape, offset, length))
        expected_offset += _round_up(length, alignment)

    base = _round_up(cursor.offset, alignment)
    if cursor.padding(base):
        raise cursor.damaged("more tensors than it counts")
    tensors = {name: Tensor(name, kind, shape, base + start, n) for name, kind, shape, start, n in entries}
    if len(tensors) != len(entries):
        raise cursor.damaged("a tensor twice")
    end = max((tensor.start + tensor.size for tensor in tensors.values()), default=base)
    if end > size:
        raise SourceError(f"{path}: cut short ({size} bytes, {end} expected); {AGAIN}")
    return metadata, tensors


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class Metadata:
    """The file's metadata, each value read with the type that it must have."""

    path: Path
    values: dict[str, Any]

    def optional(self, key: str, kind: type) -> Any:
        """The value of a key, or None without one; a whole number will do for a float, but a bool for neither."""
        value = self.values.get(key)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if value is None or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
            return value
        raise SourceError(f"{self.path}: metadata {key} is not of type {kind.__name__}; {ORIGINAL}")

    def required(self, key: str, kind: type) -> Any:
        value = self.optional(key, kind)
        if value is None:
            raise SourceError(f"{self.path}: lacks the metadata {key}; {ORIGINAL}")
        if kind in (int, float) and not (value > 0 and math.isfinite(value)):
            raise SourceError(f"{self.path}: metadata {key} is {value}; {ORIGINAL}")
        return value
