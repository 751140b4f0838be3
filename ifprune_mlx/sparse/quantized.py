"""Activations times packed rows, by MLX's own kernel where it is right and fast, else by unpacking the rows first.

Our down projection multiplies by neuron-major rows, an orientation (`transpose=False`) that mlx-lm's models use for
gradients only. Some releases of MLX compute it wrongly on Metal (ml-explore/mlx issues 4201 and 4250: garbage, or
columns that are never written), so it is tried out for every packing and width when a model is loaded. And Metal's
kernel for 1024 neurons and more mixes up the sequences of a batch of 2 or 3 where they are `[sequences, 1, k]`. Rows
of two dimensions it multiplies rightly, so every product of this orientation gets these, those of gradients as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import cast

import mlx.core as mx

from ifprune_mlx.checkpoint.format import Checkpoint, Quantization
from ifprune_mlx.slow_paths import UNPACKED, note_slow_path

# Metal has kernels for few neurons, for sums split in 8 and in 32, for up to three rows and for more.
_SPLIT = 1024, 8192
_PROBED_NEURONS = (1000, 2048, 8224)
_PROBED_TOKENS = ((1,), (8,), (1, 1), (2, 1), (3, 1), (8, 1))
# Kernels differ by the columns that are left over, not by how many whole tiles there are.
_TILE = 128
_TOLERANCE = 0.1
FLOATS = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


def by_rows(product: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
    """What `product` gives for x `[..., n]` as rows of two dimensions: `[..., m]`. Views, no copies."""
    if x.ndim == 2:
        return product(x)
    return product(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def split(neurons: int) -> int:
    """Which of Metal's kernels multiplies few tokens by that many neuron-major rows: the parts that it sums apart."""
    few, many = _SPLIT
    return 1 if neurons < few else 8 if neurons <= many else 32


def neuron_major_matmul(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array | None, packing: Quantization
) -> mx.array:
    """`x @ rows`, for x `[..., k]` and packed rows of k neurons, whose values are `[k, d_model]`; `[..., d_model]`."""
    settings = packing.to_dict()
    if not _on_cuda() and right(packing, scales.shape[-1] * packing.group_size, x.dtype):
        return by_rows(lambda x: mx.quantized_matmul(x, weight, scales, biases, transpose=False, **settings), x)

    # Its gradient needs the packed rows alone: MLX's own would keep the unpacked ones of every layer.
    @mx.custom_function
    def product(x: mx.array) -> mx.array:
        return x @ mx.dequantize(weight, scales, biases, **settings).astype(x.dtype)

    @product.vjp
    def _(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:
        return mx.quantized_matmul(cotangent, weight, scales, biases, transpose=True, **settings)

    return cast("mx.array", product(x))


def try_products(checkpoint: Checkpoint, dtype: mx.Dtype | None) -> None:
    """Try out the products with a checkpoint's down rows, so that its first answer need not.

    Args:
        dtype: float type that its weights are cast to; None keeps the file's.
    """
    packing = checkpoint.layout.down
    if packing is None or _on_cuda():
        return
    files = [header for name, header in checkpoint.headers.items() if name.startswith("model-")]
    stored = {info.dtype for header in files for info in header.tensors.values()}
    for each in [FLOATS[name] for name in sorted(stored & FLOATS.keys())] if dtype is None else [dtype]:
        for width in {spec.d_model for spec in checkpoint.layout.ffns}:
            right(packing, width, each)


def _on_cuda() -> bool:
    """Where unpacking is faster, for one token too (docs/performance.md)."""
    return mx.default_device() != mx.Device(mx.cpu) and mx.cuda.is_available()


@cache
def right(packing: Quantization, width: int, dtype: mx.Dtype) -> bool:
    """Whether this device's kernels multiply by neuron-major rows of that width as by unpacked ones: tried out once.

    MLX's CPU needs no trial. Elsewhere the trial takes a few megabytes, which MLX's peak does not show afterwards.
    """
    if mx.default_device() == mx.Device(mx.cpu):
        return True
    peak = mx.get_peak_memory()
    far = max(_error(packing, _TILE + width % _TILE, dtype, neurons) for neurons in _PROBED_NEURONS)
    if mx.get_peak_memory() > peak:
        mx.clear_cache()
        mx.reset_peak_memory()
    if far > _TOLERANCE:
        note_slow_path(UNPACKED, f"MLX's kernel on this device is wrong for rows of {width} in {dtype}")
    return far <= _TOLERANCE


def _error(packing: Quantization, width: int, dtype: mx.Dtype, neurons: int) -> float:
    """The largest error of the kernel's product, as a share of the largest value; infinity if one is no number."""
    settings = packing.to_dict()
    rows = mx.random.normal((neurons, width), key=mx.random.key(0)).astype(dtype)
    weight, scales, *offsets = mx.quantize(rows, **settings)
    biases = offsets[0] if offsets else None
    unpacked = mx.dequantize(weight, scales, biases, **settings).astype(mx.float32)
    errors = []
    for tokens in _PROBED_TOKENS:
        x = mx.random.normal((*tokens, neurons), key=mx.random.key(len(tokens))).astype(dtype)
        wanted = x.astype(mx.float32) @ unpacked
        found = by_rows(lambda x: mx.quantized_matmul(x, weight, scales, biases, transpose=False, **settings), x)
        far = mx.abs(found.astype(mx.float32) - wanted) / mx.abs(wanted).max()
        errors.append(mx.where(mx.isnan(far), mx.inf, far).max())
    return float(mx.stack(errors).max())
