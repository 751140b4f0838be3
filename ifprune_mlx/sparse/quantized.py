"""Activations times packed rows, by MLX's own kernel where it is right and fast, else by unpacking the rows first.

Our down projection multiplies by neuron-major rows, an orientation (`transpose=False`) that mlx-lm's models use for
gradients only. Some releases of MLX compute it wrongly on Metal (ml-explore/mlx issues 4201 and 4250: garbage, or
columns that are never written), so it is tried out once for every packing and width before it is relied on.
"""

from __future__ import annotations

from functools import cache
from typing import cast

import mlx.core as mx

from ifprune_mlx.checkpoint.format import Quantization
from ifprune_mlx.slow_paths import UNPACKED, note_slow_path

# Metal has kernels for few neurons, for sums split in 8 and in 32, for one token and for several.
_PROBED_NEURONS, _PROBED_TOKENS = (1000, 2048, 8224), (1, 8)
_TOLERANCE = 0.1


def neuron_major_matmul(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array | None, packing: Quantization
) -> mx.array:
    """`x @ rows`, for x `[..., k]` and packed rows of k neurons, whose values are `[k, d_model]`; `[..., d_model]`."""
    settings = packing.to_dict()
    # On CUDA unpacking is faster, for one token too (docs/performance.md).
    on_cuda = mx.default_device() != mx.Device(mx.cpu) and mx.cuda.is_available()
    if not on_cuda and right(packing, scales.shape[-1] * packing.group_size, x.dtype):
        return mx.quantized_matmul(x, weight, scales, biases, transpose=False, **settings)

    # Its gradient needs the packed rows alone: MLX's own would keep the unpacked ones of every layer.
    @mx.custom_function
    def product(x: mx.array) -> mx.array:
        return x @ mx.dequantize(weight, scales, biases, **settings).astype(x.dtype)

    @product.vjp
    def _(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:
        return mx.quantized_matmul(cotangent, weight, scales, biases, transpose=True, **settings)

    return cast("mx.array", product(x))


@cache
def right(packing: Quantization, width: int, dtype: mx.Dtype) -> bool:
    """Whether this device's kernels multiply by neuron-major rows of that width as by unpacked ones: tried out once.

    MLX's CPU needs no trial.
    """
    if mx.default_device() == mx.Device(mx.cpu):
        return True
    settings = packing.to_dict()
    for neurons in _PROBED_NEURONS:
        rows = mx.random.normal((neurons, width), key=mx.random.key(0)).astype(dtype)
        weight, scales, *offsets = mx.quantize(rows, **settings)
        biases = offsets[0] if offsets else None
        unpacked = mx.dequantize(weight, scales, biases, **settings).astype(mx.float32)
        for tokens in _PROBED_TOKENS:
            x = mx.random.normal((tokens, neurons), key=mx.random.key(tokens)).astype(dtype)
            wanted = x.astype(mx.float32) @ unpacked
            found = mx.quantized_matmul(x, weight, scales, biases, transpose=False, **settings).astype(mx.float32)
            far = float(mx.abs(found - wanted).max())
            if not far <= _TOLERANCE * float(mx.abs(wanted).max()):  # also if it is not a number
                note_slow_path(UNPACKED, f"MLX's kernel on this device is wrong for rows of {width} in {dtype}")
                return False
    return True
