"""Activations times packed rows, by MLX's own kernel where it is right and fast, else by unpacking the rows first.

Our down projection multiplies by neuron-major rows, an orientation (`transpose=False`) that mlx-lm's models never use.
Some releases of MLX compute it wrongly on Metal (ml-explore/mlx issues 4201 and 4250: garbage, or columns that are
never written), so it is tried out once for every kind of packing and width before it is relied on. Knows arrays alone.
"""

from __future__ import annotations

from functools import cache

import mlx.core as mx

from .checkpoint import Quantization

# As many rows as make MLX split the sum over neurons between threadgroups; it has other kernels for one token and few.
_PROBED_NEURONS, _PROBED_TOKENS = 2048, (1, 8, 40)
_TOLERANCE = 0.1


def neuron_major_matmul(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array | None, packing: Quantization
) -> mx.array:
    """`x @ rows`, for x `[..., k]` and packed rows of k neurons, whose values are `[k, d_model]`; `[..., d_model]`."""
    settings = packing.to_dict()
    if sound(packing, scales.shape[-1] * packing.group_size, x.dtype):
        return mx.quantized_matmul(x, weight, scales, biases, transpose=False, **settings)
    return x @ mx.dequantize(weight, scales, biases, **settings).astype(x.dtype)


@cache
def sound(packing: Quantization, width: int, dtype: mx.Dtype) -> bool:
    """Whether to use this device's kernel for neuron-major rows of that width: tried out once against unpacked rows.

    Not on CUDA, where unpacking is faster, for one token too (docs/performance.md); MLX's CPU needs no trial.
    """
    if mx.default_device() == mx.Device(mx.cpu):
        return True
    if mx.cuda.is_available():
        return False
    settings = packing.to_dict()
    rows = mx.random.normal((_PROBED_NEURONS, width), key=mx.random.key(0)).astype(dtype)
    weight, scales, *offsets = mx.quantize(rows, **settings)
    biases = offsets[0] if offsets else None
    unpacked = mx.dequantize(weight, scales, biases, **settings).astype(mx.float32)
    for tokens in _PROBED_TOKENS:
        x = mx.random.normal((tokens, _PROBED_NEURONS), key=mx.random.key(tokens)).astype(dtype)
        wanted = x.astype(mx.float32) @ unpacked
        found = mx.quantized_matmul(x, weight, scales, biases, transpose=False, **settings).astype(mx.float32)
        if not float(mx.abs(found - wanted).max()) <= _TOLERANCE * float(mx.abs(wanted).max()):  # also if not a number
            return False
    return True
