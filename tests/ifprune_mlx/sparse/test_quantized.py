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
from tests.ifprune_mlx.sparse import metal_products
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


@pytest.mark.parametrize("neurons", [1000, 2048, 8224])
@pytest.mark.parametrize("tokens", [1, 2, 3, 8])
@pytest.mark.usefixtures("other_device")
def test_a_kernel_that_is_wrong_for_one_shape_is_noticed(
    tokens: int, neurons: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: Kernel = mx.quantized_matmul

    def wrong(x: mx.array, *args: object, **kwargs: object) -> mx.array:
        y = plain(x, *args, **kwargs)
        return 2 * y if x.size == tokens * neurons else y

    monkeypatch.setattr(mx, "quantized_matmul", wrong)
    assert not quantized.right(PACKINGS[0], 128, mx.float32)


@pytest.mark.usefixtures("other_device")
def test_metals_kernel_passes_since_it_gets_rows_of_two_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "quantized_matmul", metal_products.quantized_matmul)
    assert quantized.right(PACKINGS[0], 128, mx.float32)


@pytest.mark.parametrize(("width", "tried"), [(64, 192), (576, 192), (640, 128), (2048, 128), (4096, 128), (160, 160)])
@pytest.mark.usefixtures("other_device")
def test_the_trial_takes_few_columns(width: int, tried: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as are left over after whole tiles, and a tile."""
    widths: list[int] = []
    plain: Kernel = mx.quantized_matmul

    def watched(x: mx.array, *args: object, **kwargs: object) -> mx.array:
        y = plain(x, *args, **kwargs)
        widths.append(y.shape[-1])
        return y

    monkeypatch.setattr(mx, "quantized_matmul", watched)
    assert quantized.right(PACKINGS[1], width, mx.float32)
    assert set(widths) == {tried}
    assert tried % 64 == width % 64


@pytest.mark.parametrize("dtype", [None, mx.float16])
@pytest.mark.usefixtures("other_device")
def test_the_trial_is_made_at_load_and_leaves_no_trace(
    tmp_path: Path, dtype: mx.Dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first answer makes none, and MLX's peak is that of a load without it."""
    folder = write_checkpoint(tmp_path / "checkpoint", options=Options(quantization=PACKINGS[0]))

    def peak_of_load() -> int:
        mx.clear_cache()
        mx.reset_peak_memory()
        model, _ = load(folder, dtype=dtype)
        peak = mx.get_peak_memory()
        monkeypatch.setattr(quantized, "_error", lambda *_: pytest.fail("tried out again"))
        mx.eval(model(mx.array([[1, 2, 3]])))
        model.close()
        return peak

    tried: list[tuple[object, ...]] = []
    plain = quantized._error
    monkeypatch.setattr(quantized, "_PROBED_NEURONS", (1000, 1024, 1088))
    monkeypatch.setattr(quantized, "_error", lambda *given: tried.append(given) or plain(*given))
    first = peak_of_load()
    assert [given[:3] for given in tried] == [(PACKINGS[0], 192, dtype or mx.float32)] * 3
    assert first < 1.5 * peak_of_load()  # which finds the trial's result; a trial takes 50 times as much


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
