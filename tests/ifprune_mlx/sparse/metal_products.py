"""MLX's Metal product of few tokens with packed neuron-major rows, index by index: no Mac is needed to see its faults.

Follows `QuantizedMatmul::eval_gpu`, `qvm_split_k` (host) and `affine_qvm_split_k` (kernel) of MLX's main branch of
2026-08-22, commit 846d1762, under their names where these are short.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
_plain = mx.quantized_matmul


def quantized_matmul(
    x: mx.array, w: mx.array, scales: mx.array, biases: mx.array | None = None, **settings: Any
) -> mx.array:
    """`mx.quantized_matmul`; with neuron-major rows as Metal has it. What its kernel never writes is not a number."""
    transpose = settings.pop("transpose", True)
    k = x.shape[-1]
    tokens = x.size // k  # `M`: x is contiguous and w has two dimensions, whatever the shape of x
    if transpose or tokens >= 4 or k < 1024:  # other kernels: `qmv`, `qmm`, `qvm`
        return _plain(x, w, scales, biases, transpose=transpose, **settings)
    rows = mx.dequantize(w, scales, biases, **settings).astype(mx.float32)
    found = qvm_split_k(np.array(x.astype(mx.float32)), np.array(rows))
    return mx.array(found).astype(x.dtype)


def qvm_split_k(x: Floats, rows: Floats) -> Floats:
    """x `[..., K]`, contiguous, times rows `[K, N]`: `[..., N]`. Threadgroups run in any order, here backwards."""
    K, N = rows.shape
    M = x.size // K
    out_shape = (*x.shape[:-1], N)
    x_shape = list(x.shape) if x.ndim > 1 else [1, *x.shape]
    x_strides = [int(np.prod(x_shape[axis + 1 :])) for axis in range(len(x_shape))]

    # The host's part.
    split_k = 32 if K > 8192 else 8
    split_D = (K + split_k - 1) // split_k
    final_block_size = K - (split_k - 1) * split_D
    grid_z = x.size // K // M * split_k
    x_ndim = len(x_shape)
    x_batch_ndims = x_ndim - 2 + 1
    x_shape.insert(x_ndim - 2, split_k)
    x_shape[-1] //= split_k
    x_strides.insert(x_ndim - 2, split_D)
    x_strides[x_ndim - 1] = split_D
    intermediate = np.full([*x_shape[:-1], N], np.nan, np.float32)
    y = intermediate.reshape(-1)
    x = x.reshape(-1)

    # The kernel's, once for every threadgroup; all columns of a token at once.
    for z in reversed(range(grid_z)):
        x_offset = z * x_strides[0] if x_batch_ndims == 1 else _elem_to_loc(z, x_shape, x_strides, x_batch_ndims)
        y_offset = z * N * x_shape[x_batch_ndims]
        length = final_block_size if z % split_k == split_k - 1 else split_D
        in_vec_stride = (split_k - 1) * split_D + final_block_size
        for token in range(M):
            start = x_offset + token * in_vec_stride
            partial = x[start : start + length] @ rows[z * split_D : z * split_D + length]
            y[y_offset + token * N : y_offset + (token + 1) * N] = partial

    found: Floats = intermediate.sum(axis=intermediate.ndim - 3).reshape(out_shape)
    return found


def _elem_to_loc(index: int, shape: list[int], strides: list[int], ndim: int) -> int:
    place = 0
    for axis in reversed(range(ndim)):
        place += index % shape[axis] * strides[axis]
        index //= shape[axis]
    return place
