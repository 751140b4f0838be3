"""Reads neuron rows from an IFP checkpoint: all rows of an FFN, or those that a switch needs."""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ifprune_mlx.checkpoint.format import Checkpoint
from ifprune_mlx.checkpoint.neuron_layout import RECORDS, Part, Strip
from ifprune_mlx.checkpoint.raw_array import Raw, from_raw, raw, raw_dtype
from ifprune_mlx.checkpoint.safetensors_io import TensorInfo, load_arrays
from ifprune_mlx.errors import CheckpointError, reason_of

if TYPE_CHECKING:
    from ifprune_mlx.selection.selection import Ids

Rows = dict[str, mx.array]
"""Per-neuron arrays by name, `gate|up|down` + `.weight|.scales|.biases|.bias`; axis 0 is the neuron everywhere."""

_FLOATS = (mx.float32, mx.float16, mx.bfloat16)
_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32, "U8": mx.uint8}
# Extra pages, as a share of those that wanted rows lie on, that may be read to merge ranges; every range costs a disk
# access. None are where the pages have more than this for a byte that is wanted.
_WASTE, _MOST_READ = 0.15, 1.3
# Larger gaps are not read: an SSD reads about this much in the time of one access.
_GAP_BYTES = 1 << 16
# Of larger ranges, several readers read a part each.
_PART_BYTES = 1 << 20
READERS = 24
"""Reads that are under way at once (`scripts/measure_readers.py`). The system gets no advice on what will be read:
beside so many readers it makes no clear difference on Linux, and on macOS it is said to cost more than it saves."""
_F_RDAHEAD = 45  # of macOS's fcntl; Python names it from 3.13 on


def read_rows(checkpoint: Checkpoint, index: int, dtype: mx.Dtype | None = None) -> tuple[Rows, mx.array | None]:
    """All rows of FFN `index`, evaluated, and the bias of its down projection.

    Args:
        dtype: float type to cast float arrays to; None keeps the file's.

    Returns:
        Rows `[d_ffn, ...]` in the source's neuron order, and the down bias `[d_model]` or None.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    file = checkpoint.neurons_file(index)
    back = None if checkpoint.layout.order is None else mx.array(read_positions(checkpoint, index))
    try:
        arrays = load_arrays(file, CheckpointError)
        down_bias = arrays.pop("down.bias", None)
        rows: Rows = {}
        for strip in checkpoint.strips(index):
            whole = arrays.pop(RECORDS if RECORDS in arrays else strip.parts[0].name)
            for part in strip.parts:
                for name, array in _rows_of(whole, part, back):
                    rows[name] = _cast(array, dtype)
                    del array
                    mx.eval(rows[name])
            del whole
        if down_bias is not None:
            down_bias = _cast(down_bias, dtype)
            mx.eval(down_bias)
        checkpoint.check_unchanged(file)
    except RuntimeError as exc:
        raise unreadable(file, exc) from exc
    return rows, down_bias


def read_positions(checkpoint: Checkpoint, index: int) -> npt.NDArray[np.int32]:
    """The row of each neuron of FFN `index` in its file, int32 `[d_ffn]`.

    Raises:
        CheckpointError: if the file's order names a neuron twice.
    """
    file, d_ffn = checkpoint.neurons_file(index), checkpoint.widths[index]
    if checkpoint.layout.order is None:
        return np.arange(d_ffn, dtype=np.int32)
    order = _read_tensor(file, checkpoint.headers[file.name].tensors["order"], np.int32)
    positions = np.full(d_ffn, -1, np.int32)
    places = np.flatnonzero((order >= 0) & (order < d_ffn))
    positions[order[places]] = places
    if (positions < 0).any():
        raise CheckpointError(f"{file}: its order of neurons is damaged; copy or convert the checkpoint again")
    return positions


class RowReader:
    """Reads some neurons of one FFN, in few ranges of its file.

    Args:
        share: int32, sorted, the only neurons that it reads, which it numbers from 0; None for all.

    Attributes:
        down_bias: bias of the down projection `[d_model]`, or None.
        position: the row of each neuron in the file, int32 `[d_ffn]`.

    Raises:
        CheckpointError: if the file cannot be read, or was written to since the checkpoint was opened.
    """

    _descriptor = -1

    def __init__(
        self, checkpoint: Checkpoint, index: int, dtype: mx.Dtype | None = None, share: Ids | None = None
    ) -> None:
        self._file = checkpoint.neurons_file(index)
        self._dtype = dtype
        # The file stays open: if the checkpoint is replaced, the new file has other neurons at the same places.
        self._descriptor = _open(self._file)
        self._checkpoint = checkpoint
        tensors = checkpoint.headers[self._file.name].tensors
        self._strips = checkpoint.strips(index)
        position = read_positions(checkpoint, index)
        self.position = position if share is None else position[share]
        self.down_bias: mx.array | None = None
        if (info := tensors.get("down.bias")) is not None:
            stored = _DTYPES[info.dtype]
            self.down_bias = _cast(from_raw(_read_tensor(self._file, info, raw_dtype(stored)), stored), dtype)
            mx.eval(self.down_bias)
        checkpoint.check_unchanged(self._file, self._descriptor)

    def empty(self, slots: int) -> Rows:
        """Evaluated arrays for `slots` neurons, with the names and types of `read_rows`."""
        rows: Rows = {}
        for part in (part for strip in self._strips for part in strip.parts):
            dtype = self._memory_dtype(part)
            shape = (slots, *(part.shape if part.name.startswith("down.") else part.shape[1:]))
            for memory_name in _memory_names(part.name):
                # Not zeros of a broadcast: the array must have a buffer of its own.
                rows[memory_name] = mx.contiguous(mx.zeros(shape, dtype))
        mx.eval(list(rows.values()))
        return rows

    def read(self, neurons: Ids) -> dict[str, Raw]:
        """The rows of these neurons by array name, in the form of `ifprune_mlx.checkpoint.raw_array.raw`.

        Args:
            neurons: int32 `[n]`, in the source's numbering, each once.

        Raises:
            CheckpointError: if the file cannot be read, or was written to since the checkpoint was opened.
        """
        places = self.position[neurons]
        at = np.argsort(places, kind="stable")
        found: dict[str, Raw] = {}
        try:
            for strip, block in zip(self._strips, self._records(places[at]), strict=True):
                for part in strip.parts:
                    values = self._as_memory(block, at, part)
                    if part.name.startswith("down."):
                        found[part.name] = values
                    else:
                        gate, up = _memory_names(part.name)
                        found |= {gate: values[:, 0], up: values[:, 1]}
            # Afterwards, so that no write during it goes unnoticed.
            self._checkpoint.check_unchanged(self._file, self._descriptor)
        except OSError as exc:
            raise unreadable(self._file, exc) from exc
        return found

    def read_all(self) -> Rows:
        """All neurons' rows, evaluated, in order; see `read`."""
        types = {name: rows.dtype for name, rows in self.empty(0).items()}
        found = self.read(np.arange(len(self.position), dtype=np.int32))
        # MLX's array of a view with gaps would take the memory of the gaps as well.
        rows = {name: from_raw(np.ascontiguousarray(values), types[name]) for name, values in found.items()}
        mx.eval(list(rows.values()))
        return rows

    def close(self) -> None:
        """Close the file; nothing can be read afterwards."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()

    def _records(self, places: npt.NDArray[np.int32]) -> list[npt.NDArray[np.uint8]]:
        """Every strip's bytes at sorted places, `[n, stride]` each; what lies behind a record is not read."""
        blocks = [np.empty((len(places), strip.stride), np.uint8) for strip in self._strips]
        spans = [
            (strip, block, *span)
            for strip, block in zip(self._strips, blocks, strict=True)
            for span in _spans(places, strip)
        ]

        def read(reader: int) -> None:
            for strip, rows, start, stop, first, end in spans[reader::READERS]:
                whole = end - first == stop - start
                block = rows[start:stop] if whole else np.empty((end - first, strip.stride), np.uint8)
                size = (end - first - 1) * strip.stride + strip.used
                self._pread(memoryview(block.data).cast("B")[:size], strip.start + first * strip.stride)
                if not whole:
                    rows[start:stop] = block[places[start:stop] - first]

        if len(spans) == 1:
            read(0)
            return blocks
        reads = [_readers().submit(read, reader) for reader in range(min(READERS, len(spans)))]
        wait(reads)  # all of them, before an error may have the file closed
        for each in reads:
            each.result()
        return blocks

    def _pread(self, buffer: memoryview, offset: int) -> None:
        while len(buffer):
            count = os.preadv(self._descriptor, [buffer], offset)
            if not count:
                raise OSError(f"it ends at byte {offset}")
            buffer, offset = buffer[count:], offset + count

    def _memory_dtype(self, part: Part) -> mx.Dtype:
        dtype = _DTYPES[part.dtype]
        return self._dtype if self._dtype is not None and dtype in _FLOATS else dtype

    def _as_memory(self, block: npt.NDArray[np.uint8], at: npt.NDArray[np.intp], part: Part) -> Raw:
        """One part of a strip's bytes, `[n, *part.shape]`; row *i* of `block` becomes row `at[i]`."""
        dtype = _DTYPES[part.dtype]
        cut = np.empty((len(block), part.nbytes), np.uint8)
        cut[at] = block[:, part.offset : part.offset + part.nbytes]
        values: Raw = cut.view(raw_dtype(dtype)).reshape(len(block), *part.shape)
        if self._memory_dtype(part) == dtype:
            return values
        cast = from_raw(values, dtype).astype(self._memory_dtype(part))
        mx.eval(cast)
        return raw(cast)


def merged_ranges(
    places: npt.NDArray[np.int32], strip: Strip, page: int = mmap.PAGESIZE
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Merge sorted places into few ranges: where no page lies between, and over the smallest other gaps, within the
    limit on extra bytes.

    Args:
        page: bytes that the system reads at least.

    Returns:
        The start and the stop of each range, as indices into `places`.
    """
    if not len(places):
        return np.empty(0, np.intp), np.empty(0, np.intp)
    begins = strip.start + places.astype(np.int64) * strip.stride
    first, last = begins // page, (begins + strip.used - 1) // page
    steps = first[1:] - last[:-1]  # 0 on the same page
    gaps = np.maximum(steps - 1, 0) * page
    needed = int((last - first + 1).sum() - (steps == 0).sum()) * page
    extra = min(_WASTE * needed, max(_MOST_READ * strip.nbytes * len(places) - needed, 0.0))
    by_size = np.argsort(gaps, kind="stable")
    closed = np.zeros(len(gaps), dtype=bool)
    closed[by_size] = (np.cumsum(gaps[by_size]) <= extra) & (gaps[by_size] <= _GAP_BYTES)
    borders = np.flatnonzero(~closed) + 1
    return np.concatenate([[0], borders]).astype(np.intp), np.concatenate([borders, [len(places)]]).astype(np.intp)


def _spans(places: npt.NDArray[np.int32], strip: Strip) -> Iterator[tuple[int, int, int, int]]:
    """What one read takes: start and stop in `places`, and the first row of the file and the one behind the last."""
    most = max(_PART_BYTES // strip.stride, 1)
    for low, high in zip(*merged_ranges(places, strip), strict=True):
        for start in range(low, high, most):
            stop = min(start + most, int(high))
            yield start, stop, int(places[start]), int(places[stop - 1]) + 1


@cache
def _readers() -> ThreadPoolExecutor:
    """The threads that read, for all layers of all models."""
    return ThreadPoolExecutor(READERS, "ifprune-disk")


def _memory_names(name: str) -> tuple[str, ...]:
    kind, _, leaf = name.partition(".")
    return (name,) if kind == "down" else (f"gate.{leaf}", f"up.{leaf}")


def _rows_of(whole: mx.array, part: Part, back: mx.array | None) -> Iterator[tuple[str, mx.array]]:
    """The arrays of one part, one at a time.

    Args:
        whole: all records `[d_ffn, stride]`, or a tensor, which is its only part.
        back: the row of each neuron, int32 `[d_ffn]`; None for rows in the source's order.
    """
    names = _memory_names(part.name)
    tensor = whole.dtype == _DTYPES[part.dtype] and whole.shape[1:] == part.shape
    for index, name in enumerate(names):
        if tensor:
            rows = whole if len(names) == 1 else whole[:, index]
        else:
            width = part.nbytes // len(names)
            start = part.offset + index * width
            rows = whole[:, start : start + width]
        rows = mx.contiguous(rows if back is None else mx.take(rows, back, axis=0))
        if not tensor:
            shape = part.shape if len(names) == 1 else part.shape[1:]
            rows = mx.view(rows, _DTYPES[part.dtype]).reshape(len(whole), *shape)
        yield name, rows


def _open(file: Path) -> int:
    descriptor = -1
    try:
        descriptor = os.open(file, os.O_RDONLY)
        # Turn off read-ahead beyond the ranges.
        if sys.platform == "darwin":
            fcntl.fcntl(descriptor, _F_RDAHEAD, 0)
        elif hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    except OSError as exc:
        if descriptor >= 0:
            os.close(descriptor)
        raise unreadable(file, exc) from exc
    return descriptor


def _read_tensor(file: Path, info: TensorInfo, dtype: npt.DTypeLike) -> Raw:
    """The values of one small tensor, flat."""
    try:
        return np.fromfile(file, dtype, math.prod(info.shape), offset=info.start)
    except OSError as exc:
        raise unreadable(file, exc) from exc


def unreadable(file: Path, exc: BaseException) -> CheckpointError:
    """The error for a file that has become unreadable since the checkpoint was opened."""
    return CheckpointError(f"{file}: cannot be read ({reason_of(exc)}); copy or convert the checkpoint again")


def _cast(array: mx.array, dtype: mx.Dtype | None) -> mx.array:
    return array.astype(dtype) if dtype is not None and array.dtype in _FLOATS else array
