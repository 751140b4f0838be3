"""A kernel that multiplies wrongly is noticed before it is relied on, and gone round."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from ifprune_convert.pipeline import Options
from ifprune_mlx import DataError, load
from ifprune_mlx.checkpoint.format import Quantization
from ifprune_mlx.sparse import quantized
from ifprune_mlx.train import gradients
from ifprune_mlx.train.gradients import check_kernels
from tests.tiny import write_checkpoint

PACKINGS = [Quantization(64, 4, "affine"), Quantization(32, 8, "affine"), Quantization(32, 4, "mxfp4")]
Kernel = Callable[..., mx.array]


@pytest.fixture
def other_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A device that is none of those whose kernels are known; what it computes is the CPU's."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    monkeypatch.setattr(mx, "default_device", lambda: "some GPU")
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    quantized.right.cache_clear()
    yield
    quantized.right.cache_clear()
    mx.set_default_device(before)


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
    """The trial's tolerance lets rounding pass."""
    assert quantized.right(packing, 128, mx.float32)


@pytest.mark.parametrize("breaks", [narrow, nothing])
@pytest.mark.usefixtures("other_device")
def test_a_wrong_kernel_is_gone_round(breaks: Callable[[Kernel], Kernel], monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is that of unpacked rows."""
    packing = PACKINGS[1]
    rows, x = mx.random.normal((128, 128)), mx.random.normal((1, 3, 128))
    arrays = mx.quantize(rows, **packing.to_dict())
    wanted = x @ mx.dequantize(*arrays, **packing.to_dict())
    monkeypatch.setattr(mx, "quantized_matmul", breaks(mx.quantized_matmul))
    assert not quantized.right(packing, 128, mx.float32)
    np.testing.assert_allclose(
        np.array(quantized.neuron_major_matmul(x, *arrays, packing)), np.array(wanted), rtol=1e-5
    )


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: packing.mode + str(packing.bits))
def test_the_product_is_that_of_unpacked_rows(packing: Quantization) -> None:
    """On this device, as it is used."""
    rows, x = mx.random.normal((128, 128)), mx.random.normal((2, 5, 128))
    weight, scales, *offsets = mx.quantize(rows, **packing.to_dict())
    biases = offsets[0] if offsets else None
    wanted = np.array(x @ mx.dequantize(weight, scales, biases, **packing.to_dict()))
    found = np.array(quantized.neuron_major_matmul(x, weight, scales, biases, packing))
    np.testing.assert_allclose(found, wanted, atol=1e-3 * np.abs(wanted).max())


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: packing.mode + str(packing.bits))
def test_the_gradient_of_unpacked_rows_is_that_of_packed_ones(
    packing: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernel is gone round; by the packed rows, of which nothing is kept unpacked."""
    weight, scales, *offsets = mx.quantize(mx.random.normal((128, 128)), **packing.to_dict())
    biases = offsets[0] if offsets else None
    x = mx.random.normal((2, 5, 128))

    def loss(x: mx.array) -> mx.array:
        return mx.square(quantized.neuron_major_matmul(x, weight, scales, biases, packing)).sum()

    wanted = np.array(mx.grad(loss)(x))
    monkeypatch.setattr(quantized, "right", lambda *_: False)
    np.testing.assert_allclose(np.array(mx.grad(loss)(x)), wanted, atol=1e-3 * np.abs(wanted).max())


def test_training_packed_weights_by_a_wrong_kernel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their gradients would be computed by it; float weights are trained."""
    model, _ = load(write_checkpoint(tmp_path / "packed", options=Options(quantization=PACKINGS[0])))
    plain, _ = load(write_checkpoint(tmp_path / "plain"))
    check_kernels(model)
    monkeypatch.setattr(gradients, "right", lambda *_: False)
    check_kernels(plain)
    with pytest.raises(DataError, match="4-bit weights wrongly on this GPU; install another release"):
        check_kernels(model)
