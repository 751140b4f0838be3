"""A kernel that multiplies wrongly is noticed before it is relied on, and gone round."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np
import pytest

from ifprune_mlx import packed
from ifprune_mlx.checkpoint import Quantization

PACKINGS = [Quantization(64, 4, "affine"), Quantization(32, 8, "affine"), Quantization(32, 4, "mxfp4")]
Kernel = Callable[..., mx.array]


@pytest.fixture
def other_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A device that is none of those whose kernels are known; what it computes is the CPU's."""
    monkeypatch.setattr(mx, "default_device", lambda: "some GPU")
    packed.sound.cache_clear()
    yield
    packed.sound.cache_clear()


def narrow(kernel: Kernel) -> Kernel:
    """Leaves out the last columns, as MLX issue 4250 has it, for one token only."""

    def wrong(x: mx.array, *args: object, **kwargs: object) -> mx.array:
        y = kernel(x, *args, **kwargs)
        return mx.where(mx.arange(y.shape[-1]) < y.shape[-1] - 32, y, 0) if len(x) == 1 else y

    return wrong


def nothing(kernel: Kernel) -> Kernel:
    """Gives no numbers."""
    return lambda *args, **kwargs: kernel(*args, **kwargs) * mx.nan


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: packing.mode + str(packing.bits))
@pytest.mark.usefixtures("other_device")
def test_a_right_kernel_is_used(packing: Quantization) -> None:
    """The trial's tolerance lets rounding pass, of half floats too."""
    assert packed.sound(packing, 128, mx.float32)
    assert packed.sound(packing, 128, mx.bfloat16)


@pytest.mark.parametrize("breaks", [narrow, nothing])
@pytest.mark.usefixtures("other_device")
def test_a_wrong_kernel_is_gone_round(breaks: Callable[[Kernel], Kernel], monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is that of unpacked rows."""
    packing = PACKINGS[1]
    rows, x = mx.random.normal((128, 128)), mx.random.normal((1, 3, 128))
    arrays = mx.quantize(rows, **packing.to_dict())
    wanted = x @ mx.dequantize(*arrays, **packing.to_dict())
    monkeypatch.setattr(mx, "quantized_matmul", breaks(mx.quantized_matmul))
    assert not packed.sound(packing, 128, mx.float32)
    np.testing.assert_allclose(np.array(packed.neuron_major_matmul(x, *arrays, packing)), np.array(wanted), rtol=1e-5)


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: packing.mode + str(packing.bits))
def test_the_product_is_that_of_unpacked_rows(packing: Quantization) -> None:
    """On this device, as it is used."""
    rows, x = mx.random.normal((128, 128)), mx.random.normal((2, 5, 128))
    weight, scales, *offsets = mx.quantize(rows, **packing.to_dict())
    biases = offsets[0] if offsets else None
    wanted = np.array(x @ mx.dequantize(weight, scales, biases, **packing.to_dict()))
    found = np.array(packed.neuron_major_matmul(x, weight, scales, biases, packing))
    np.testing.assert_allclose(found, wanted, atol=1e-3 * np.abs(wanted).max())
