"""MLX arrays written in place, through their own buffers, where this device lets MLX see it.

A scatter makes MLX copy the whole array unless it can be donated; a write through the buffer touches the rows alone
(docs/performance.md has the ratio). Nothing that is still to be computed may depend on what is written: callers
synchronize first.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ifprune_mlx.checkpoint.raw_array import Raw, from_raw, raw
from ifprune_mlx.slow_paths import SCATTER, note_slow_path

Movable = mx.array | Raw
"""Rows that can be moved: the buffer where MLX sees what is written to it, else the array."""

# Devices may allocate small and large arrays differently.
_PROBED_ELEMENTS = (1 << 10, 1 << 23)
_CHUNK_BYTES = 1 << 21


@cache
def shared() -> bool:
    """Whether MLX sees what is written to `raw`, on the default device: tried out once, small and large."""
    if mx.default_device() != mx.Device(mx.cpu) and mx.cuda.is_available():
        # A write from outside moves whole arrays across.
        note_slow_path(SCATTER, "the GPU has memory of its own, so a switch copies rows through MLX")
        return False
    seen = all(_seen(size, dtype) for size in _PROBED_ELEMENTS for dtype in (mx.float32, mx.bfloat16, mx.uint32))
    if not seen:
        note_slow_path(SCATTER, "MLX does not see what is written to its buffers here, so a switch copies whole arrays")
    return seen


def _seen(size: int, dtype: mx.Dtype) -> bool:
    array = mx.zeros((size // 4, 4), dtype)
    mx.eval(array)
    mx.synchronize()
    written = raw(array)
    if not written.flags.writeable:
        return False
    one = raw(mx.ones((1,), dtype))[0]
    written[[0, -1]] = one
    # A computation, not a copy back, which might read the same host memory.
    return bool((array.astype(mx.float32).sum() == 8).item())


def movable(array: mx.array) -> Movable:
    """A computed array's rows in the form that the functions below take; changes to them are changes to the array."""
    return raw(array) if shared() else array


def exchange_rows(rows: Movable, one: npt.NDArray[np.int32], other: npt.NDArray[np.int32]) -> None:
    """Exchange rows `one[i]` and `other[i]`; no row may occur twice."""
    if isinstance(rows, mx.array):
        copy_rows(rows, np.concatenate([one, other]), np.concatenate([other, one]))
        return
    step = max(_CHUNK_BYTES * len(rows) // max(rows.nbytes, 1), 1)
    for start in range(0, len(one), step):
        first, second = one[start : start + step], other[start : start + step]
        kept = rows[first]
        rows[first] = rows[second]
        rows[second] = kept


def copy_rows(rows: Movable, target: npt.NDArray[np.int32], origin: npt.NDArray[np.int32]) -> None:
    """Copy rows `origin[i]` to `target[i]`, all read before any is written."""
    if isinstance(rows, mx.array):
        rows[mx.array(target)] = mx.take(rows, mx.array(origin), axis=0)
        mx.eval(rows)
    else:
        rows[target] = rows[origin]


def write_rows(rows: Movable, target: npt.NDArray[np.int32], values: Raw) -> None:
    """Write `values[i]`, as `raw` shows rows, to row `target[i]`."""
    if isinstance(rows, mx.array):
        rows[mx.array(target)] = from_raw(values, rows.dtype)
        mx.eval(rows)
    else:
        rows[target] = values
