"""MLX arrays as NumPy sees their buffers."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Raw = npt.NDArray[Any]
"""An array's buffer as NumPy sees it; bfloat16, which NumPy has not got, as uint16."""

# A table, since computing an array on a GPU to look at it would wait for all that the GPU has to do.
_DTYPES: dict[mx.Dtype, npt.DTypeLike] = {
    mx.float32: np.float32,
    mx.float16: np.float16,
    mx.bfloat16: np.uint16,
    mx.uint32: np.uint32,
    mx.uint8: np.uint8,
}


def raw(array: mx.array) -> Raw:
    """The buffer of a computed, row-contiguous array; writing to it writes the array where `shared()` says so."""
    if array.dtype == mx.bfloat16:  # by no operation of MLX's, which would wait for all that a GPU has to do
        return np.frombuffer(array, np.uint16).reshape(array.shape)  # type: ignore[call-overload, no-any-return]
    return np.array(array, copy=False)


def raw_dtype(dtype: mx.Dtype) -> npt.DTypeLike:
    """What `raw` shows for an array of this type."""
    return _DTYPES[dtype]


def from_raw(values: Raw, dtype: mx.Dtype) -> mx.array:
    """An array of the given type from what `raw` would show of it."""
    array = mx.array(values)
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array
