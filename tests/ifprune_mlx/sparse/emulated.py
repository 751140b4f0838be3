"""Our kernel, run by the emulator, beside the product of the unpacked rows."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ifprune_mlx.checkpoint.format import Quantization
from ifprune_mlx.sparse.down_kernel import THREADS, DownKernel, Product
from ifprune_mlx.sparse.kernel_text import Statements
from tests.ifprune_mlx.sparse.kernel_emulator import Emulator, rounded

FLOATS = {"float32": "float", "float16": "float16_t", "bfloat16": "bfloat16_t"}


def numpy(array: mx.array) -> np.ndarray:
    """As the emulator keeps it: bfloat16 in float32."""
    return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)


def rows_of(kernel: DownKernel, k: int, seed: int = 0) -> list[mx.array]:
    """The arrays of k random rows."""
    rows = mx.random.normal((k, kernel.width), key=mx.random.key(seed)).astype(kernel.dtype)
    return [rows] if kernel.packing is None else list(mx.quantize(rows, **kernel.packing.to_dict()))


def activations(kernel: DownKernel, k: int) -> mx.array:
    """x `[tokens, k]`."""
    return mx.random.normal((kernel.tokens, k), key=mx.random.key(1)).astype(kernel.dtype)


def unpacked_product(x: mx.array, arrays: Sequence[mx.array], packing: Quantization | None) -> np.ndarray:
    """In float64, of rows unpacked in float32; no rounding but that of the inputs."""
    weight, *rest = arrays
    if packing is not None:
        scales, biases = (array.astype(mx.float32) for array in rest)
        weight = mx.dequantize(weight, scales, biases, **packing.to_dict())
    return numpy(x).astype(np.float64) @ numpy(weight).astype(np.float64)


def emulated(kernel: DownKernel, x: mx.array, arrays: Sequence[mx.array], statements: Statements) -> np.ndarray:
    """What the statements compute, `[tokens, width]`; nobody wrote to it before."""
    named = dict(zip(kernel.inputs, [numpy(x), *map(numpy, arrays)], strict=True))
    out = rounded(np.full((kernel.tokens, kernel.width), np.nan), FLOATS[str(kernel.dtype).rpartition(".")[2]])
    arrays_ = {**named, "x_shape": np.array(x.shape, np.int32), "out": out}
    Emulator(arrays_, kernel.grid, THREADS).run(statements)
    return out


def far(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, as a share of the largest result; NaN if anything was not written."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def build_emulated(kernel: DownKernel) -> Product:
    """Stands in for `down_kernel.build` where there is no Metal."""

    def product(x: mx.array, *arrays: mx.array) -> mx.array:
        return mx.array(emulated(kernel, x, arrays, kernel.statements())).astype(kernel.dtype)

    return product
