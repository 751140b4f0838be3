"""Neuron-major rows, against plain numpy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from ifprune_convert import layout
from ifprune_convert.packing import quantization_of
from ifprune_mlx.checkpoint.format import Quantization
from ifprune_mlx.errors import SourceError

D_FFN, D_MODEL = 96, 64
MODES = [("affine", 64, 4), ("affine", 32, 8), ("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)]


@pytest.fixture
def ffn() -> tuple[mx.array, mx.array, mx.array]:
    """gate, up and down of a random FFN."""
    mx.random.seed(0)
    return (
        mx.random.normal((D_FFN, D_MODEL)),
        mx.random.normal((D_FFN, D_MODEL)),
        mx.random.normal((D_MODEL, D_FFN)),
    )


def test_gate_and_up_are_interleaved_gate_first(ffn: tuple[mx.array, mx.array, mx.array]) -> None:
    gate, up, _ = ffn
    rows = layout.gate_up_rows(gate, up)
    assert rows.shape == (D_FFN, 2, D_MODEL)
    flat = np.array(rows).reshape(2 * D_FFN, D_MODEL)
    assert np.array_equal(flat[0::2], np.array(gate))
    assert np.array_equal(flat[1::2], np.array(up))
    bias = layout.gate_up_rows(gate[:, 0], up[:, 0])
    assert np.array_equal(np.array(bias), np.stack([gate[:, 0], up[:, 0]], axis=1))


def test_down_is_transposed_into_contiguous_rows(ffn: tuple[mx.array, mx.array, mx.array]) -> None:
    down = ffn[2]
    rows = layout.down_rows(down)
    assert np.array_equal(np.array(rows), np.array(down).T)
    # Contiguous: the buffer, as numpy sees it, holds one row after the other.
    assert np.asarray(memoryview(rows)).strides == (D_MODEL * 4, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
def test_every_neuron_is_packed_on_its_own(
    ffn: tuple[mx.array, mx.array, mx.array], mode: str, group_size: int, bits: int
) -> None:
    gate, up, down = ffn
    quantization = Quantization(group_size, bits, mode)
    rows = {"gate_up": layout.gate_up_rows(gate, up), "down": layout.down_rows(down)}
    for name, array in rows.items():
        tensors = layout.packed(name, array, quantization)
        leaves = ["weight", "scales", "biases"] if mode == "affine" else ["weight", "scales"]
        assert list(tensors) == [f"{name}.{leaf}" for leaf in leaves]
        for neuron in (0, 7, D_FFN - 1):
            alone = mx.quantize(array[neuron].reshape(-1, D_MODEL), group_size=group_size, bits=bits, mode=mode)
            for leaf, expected in zip(leaves, alone, strict=True):
                found = tensors[f"{name}.{leaf}"][neuron].reshape(expected.shape)
                assert mx.array_equal(found, expected), (name, neuron, leaf)


def test_floats_stay_as_they_are(ffn: tuple[mx.array, mx.array, mx.array]) -> None:
    rows = ffn[0].astype(mx.bfloat16)
    tensors = layout.packed("down", rows, None)
    assert list(tensors) == ["down.weight"]
    assert tensors["down.weight"].dtype == mx.bfloat16
    assert mx.array_equal(tensors["down.weight"], rows)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_prior_from_the_weights(
    ffn: tuple[mx.array, mx.array, mx.array], dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "_CHUNK", 40)
    gate, up, down = (array.astype(dtype) for array in ffn)
    norms = layout.row_norms(layout.down_rows(down))
    prior = layout.weight_prior(gate, up, norms)
    plain = [np.linalg.norm(np.array(a.astype(mx.float32)).astype(np.float64), axis=1) for a in (gate, up, down.T)]
    assert norms.dtype == prior.dtype == np.float32
    assert np.allclose(norms, plain[2], rtol=1e-5)
    assert np.allclose(prior, np.prod(plain, axis=0), rtol=1e-5)


def test_parameters_of_quantization_modes() -> None:
    assert quantization_of("affine", None, None) == Quantization(64, 4, "affine")
    assert quantization_of("affine", 32, 6) == Quantization(32, 6, "affine")
    assert quantization_of("mxfp8", None, None) == Quantization(32, 8, "mxfp8")
    assert quantization_of("nvfp4", 16, 4) == Quantization(16, 4, "nvfp4")
    for mode, group_size, bits in (("affine", 16, 4), ("affine", 64, 7), ("mxfp4", 64, 4), ("nvfp4", None, 8)):
        with pytest.raises(SourceError, match=f"{mode} quantization has groups of"):
            quantization_of(mode, group_size, bits)
    with pytest.raises(SourceError, match="choose one of affine, mxfp4"):
        quantization_of("gptq", None, None)
