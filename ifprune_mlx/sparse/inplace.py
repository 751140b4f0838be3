"""MLX arrays written in place, through their own buffers, where this device lets MLX see it.

A scatter makes MLX copy the whole array unless it can be donated; a write through the buffer touches the rows alone
(docs/performance.md has the ratio). Nothing that is still to be computed may depend on what is written: callers
synchronize first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ifprune_mlx.checkpoint.raw_array import Raw, from_raw, raw
from ifprune_mlx.slow_paths import SCATTER, note_slow_path

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


def exchange_rows(array: mx.array, one: npt.NDArray[np.int32], other: npt.NDArray[np.int32]) -> mx.array:
    """Exchange rows `one[i]` and `other[i]`; no row may occur twice.

    Returns:
        The array to use from now on: the same one, written in place, or a scatter's result.
    """
    if not shared():
        return copy_rows(array, np.concatenate([one, other]), np.concatenate([other, one]))
    rows = raw(array)
    step = max(_CHUNK_BYTES * len(rows) // max(rows.nbytes, 1), 1)
    for start in range(0, len(one), step):
        first, second = one[start : start + step], other[start : start + step]
        kept = rows[first]
        rows[first] = rows[second]
        rows[second] = kept
    return array


def copy_rows(array: mx.array, target: npt.NDArray[np.int32], origin: npt.NDArray[np.int32]) -> mx.array:
    """Copy rows `origin[i]` to `target[i]`, all read before any is written. Returns the array to use from now on."""
    if not shared():
        return _scattered(array, target, lambda: mx.take(array, mx.array(origin), axis=0))
    rows = raw(array)
    rows[target] = rows[origin]
    return array


def write_rows(array: mx.array, target: npt.NDArray[np.int32], values: Raw) -> mx.array:
    """Write `values[i]`, as `raw` shows rows, to row `target[i]`. Returns the array to use from now on."""
    if not shared():
        return _scattered(array, target, lambda: from_raw(values, array.dtype))
    raw(array)[target] = values
    return array


def _scattered(array: mx.array, target: npt.NDArray[np.int32], values: Callable[[], mx.array]) -> mx.array:
    array[mx.array(target)] = values()
    mx.eval(array)
    return array
