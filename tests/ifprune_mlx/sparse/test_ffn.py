"""One token's products in panels are those of the masked dense FFN (DESIGN.md section 3, idea 5)."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from ifprune_mlx.selection.selection import Ids
from ifprune_mlx.sparse.ffn import MaskedDown, SlicedProjection, multiply, multiply_in_panels, panel_rows
from ifprune_mlx.sparse.slots import FFNSlots

D_MODEL, D_FFN, K = 1024, 2048, 1024  # the active prefix is four panels
TOLERANCE = 1e-5


def farthest(one: mx.array, other: mx.array) -> float:
    return float(np.abs(np.asarray(one) - np.asarray(other)).max())


def drawn(*shape: int, seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32) / np.sqrt(shape[-1]))


@pytest.fixture(scope="module")
def ffn() -> nn.Module:
    module = nn.Module()
    module.gate, module.up = nn.Linear(D_MODEL, D_FFN), nn.Linear(D_MODEL, D_FFN)
    module.down = nn.Linear(D_FFN, D_MODEL)
    return module


@pytest.fixture(scope="module")
def kept() -> Ids:
    return np.sort(np.random.default_rng(1).permutation(D_FFN)[:K]).astype(np.int32)


@pytest.mark.parametrize("shape", [(1, 1), (), (1,), (3, 1), (1, 5)], ids=str)
def test_sliced_leaves_equal_the_masked_dense_ffn(ffn: nn.Module, kept: Ids, shape: tuple[int, ...]) -> None:
    rows = {"gate.weight": ffn.gate.weight, "up.weight": ffn.up.weight, "down.weight": mx.contiguous(ffn.down.weight.T)}
    rows |= {"gate.bias": ffn.gate.bias, "up.bias": ffn.up.bias}
    slots = FFNSlots({name: mx.array(array) for name, array in rows.items()}, ffn.down.bias)
    slots.apply(plan := slots.plan(kept))
    slots.k = plan.k
    gate, up, down = (SlicedProjection(slots, kind, None) for kind in ("gate", "up", "down"))
    x = 32 * drawn(*shape, D_MODEL, seed=2)
    mask = np.zeros(D_FFN, np.float32)
    mask[kept] = 1

    found = down(nn.silu(gate(x)) * up(x))
    expected = MaskedDown(ffn.down, mx.array(mask))(nn.silu(ffn.gate(x)) * ffn.up(x))

    assert panel_rows(K, D_MODEL) < K
    assert found.shape == expected.shape
    assert farthest(found, expected) < TOLERANCE
    assert farthest(expected, ffn.down(nn.silu(ffn.gate(x)) * ffn.up(x))) > 100 * TOLERANCE


@pytest.mark.parametrize("rows", [1, 32, 96, 192])
@pytest.mark.parametrize("inwards", [True, False])
def test_panels_of_a_prefix_equal_float64(inwards: bool, rows: int) -> None:
    weight, k = drawn(256, 96, seed=3), 192
    x = drawn(1, 1, 96 if inwards else k, seed=4)

    found = multiply_in_panels(x, weight[:k], inwards, rows)

    exact = np.asarray(weight)[:k].astype(np.float64)
    expected = np.asarray(x).astype(np.float64) @ (exact.T if inwards else exact)
    assert found.shape == expected.shape
    assert np.abs(np.asarray(found) - expected).max() < TOLERANCE


@pytest.mark.parametrize("inwards", [True, False])
def test_gradients_of_panels_are_those_of_the_whole(inwards: bool) -> None:
    weight = drawn(192, 96, seed=5)
    x = drawn(1, 1, 96 if inwards else 192, seed=6)

    found = mx.grad(lambda x: mx.square(multiply_in_panels(x, weight, inwards, 48)).sum())(x)
    expected = mx.grad(lambda x: mx.square(x @ (weight.T if inwards else weight)).sum())(x)

    assert farthest(found, expected) < TOLERANCE


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_keeps_its_type(dtype: mx.Dtype) -> None:
    weight, x = drawn(K, D_MODEL, seed=7).astype(dtype), drawn(1, 1, D_MODEL, seed=8).astype(dtype)

    assert multiply(x, weight, inwards=True).dtype == dtype


@pytest.mark.parametrize(
    ("k", "d_model", "rows"),
    [(6656, 2048, 128), (24576, 2048, 128), (3840, 4096, 64), (768, 576, 768), (1536, 576, 1536), (8002, 2048, 8002)],
)
def test_panels_divide_the_active_neurons(k: int, d_model: int, rows: int) -> None:
    assert panel_rows(k, d_model) == rows
