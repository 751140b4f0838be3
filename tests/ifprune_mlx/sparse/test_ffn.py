"""Sliced leaves of one FFN, biases included, compute what the masked dense FFN does (docs/architecture.md)."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from ifprune_mlx.selection.selection import Ids
from ifprune_mlx.sparse.ffn import SlicedProjection
from ifprune_mlx.sparse.slots import FFNSlots
from tests.ifprune_mlx.reference import MaskedDown

D_MODEL, D_FFN, K = 1024, 2048, 1024
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


def sliced(ffn: nn.Module, kept: Ids) -> list[SlicedProjection]:
    """The leaves gate, up and down over the kept neurons."""
    rows = {"gate.weight": ffn.gate.weight, "up.weight": ffn.up.weight, "down.weight": mx.contiguous(ffn.down.weight.T)}
    rows |= {"gate.bias": ffn.gate.bias, "up.bias": ffn.up.bias}
    slots = FFNSlots({name: mx.array(array) for name, array in rows.items()}, ffn.down.bias)
    slots.apply(plan := slots.plan(kept))
    slots.activate(plan.k)
    return [SlicedProjection(slots, kind, None) for kind in ("gate", "up", "down")]


@pytest.mark.parametrize("shape", [(1, 1), (), (1,), (3, 1), (1, 5)], ids=str)
def test_sliced_leaves_equal_the_masked_dense_ffn(ffn: nn.Module, kept: Ids, shape: tuple[int, ...]) -> None:
    gate, up, down = sliced(ffn, kept)
    x = 32 * drawn(*shape, D_MODEL, seed=2)
    mask = np.zeros(D_FFN, np.float32)
    mask[kept] = 1

    found = down(nn.silu(gate(x)) * up(x))
    expected = MaskedDown(ffn.down, mx.array(mask))(nn.silu(ffn.gate(x)) * ffn.up(x))

    assert found.shape == expected.shape
    assert farthest(found, expected) < TOLERANCE
    assert farthest(expected, ffn.down(nn.silu(ffn.gate(x)) * ffn.up(x))) > 100 * TOLERANCE


@pytest.mark.parametrize("kind", ["gate", "down"])
def test_one_token_by_a_prefix_equals_float64(ffn: nn.Module, kept: Ids, kind: str) -> None:
    leaf = sliced(ffn, kept)[0 if kind == "gate" else 2]
    x = drawn(1, 1, D_MODEL if kind == "gate" else K, seed=4)
    weight, bias = (np.asarray(array).astype(np.float64) for array in (ffn[kind].weight, ffn[kind].bias))
    expected = np.asarray(x) @ (weight[kept].T if kind == "gate" else weight[:, kept].T)
    expected += bias[kept] if kind == "gate" else bias

    # Slot order is not the order of ids, in which the gate's outputs are compared; down sums over the slots.
    order = np.argsort(leaf.slots.order[:K])
    found = leaf(x)[..., mx.array(order)] if kind == "gate" else leaf(x[..., mx.array(np.argsort(order))])
    assert found.shape == expected.shape
    assert np.abs(np.asarray(found) - expected).max() < TOLERANCE


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_keeps_its_type(dtype: mx.Dtype) -> None:
    weight, x = drawn(K, D_MODEL, seed=7).astype(dtype), drawn(1, 1, D_MODEL, seed=8).astype(dtype)
    slots = FFNSlots({"gate.weight": weight, "down.weight": weight})

    assert SlicedProjection(slots, "gate", None)(x).dtype == dtype
    assert SlicedProjection(slots, "down", None)(drawn(1, 1, K, seed=9).astype(dtype)).dtype == dtype
