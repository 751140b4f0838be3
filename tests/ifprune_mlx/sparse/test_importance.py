"""Importance against plain numpy on captured activations, in the source's neuron order whatever lies where."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx_lm.models.cache import make_prompt_cache

from ifprune_mlx import Model
from ifprune_mlx.sparse.importance import fuse_ranks, recorded
from tests.ifprune_mlx.reference import open_model, random_selection, source_model

TOKENS = [1, 40, 300, 7, 7, 99, 250, 3, 18, 120, 64, 201]


class Capture(nn.Module):
    """A down projection that remembers what it was given."""

    def __init__(self, down: nn.Module, seen: list[np.ndarray]) -> None:
        super().__init__()
        self.down = down
        self._seen = seen

    def __call__(self, x: mx.array) -> mx.array:
        self._seen.append(np.array(x)[0].astype(np.float64))
        return self.down(x)


def captured(folder: Path, tokens: list[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Per layer of the stock model: hidden activations [tokens, d_ffn], and the norm of every down column."""
    dense = source_model(folder)
    hidden: list[np.ndarray] = []
    norms = []
    for layer in dense.model.layers:
        norms.append(np.linalg.norm(np.array(layer.mlp.down_proj.weight).astype(np.float64), axis=0))
        layer.mlp.down_proj = Capture(layer.mlp.down_proj, hidden)
    mx.eval(dense(mx.array([tokens])))
    return hidden, norms


def reference(hidden: np.ndarray, norms: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """GRIFFIN's statistic, times the norm of the down row."""
    total = np.zeros(hidden.shape[1])
    for row, weight in zip(hidden, weights, strict=True):
        total += weight * (row / np.linalg.norm(row)) ** 2
    return np.sqrt(total / weights.sum()) * norms


@pytest.fixture
def model(tiny_checkpoint: Path) -> Model:
    return open_model(tiny_checkpoint)


def measure(model: Model, tokens: list[int], weights: np.ndarray | None = None, step: int = 64) -> list[np.ndarray]:
    cache: Any = make_prompt_cache(model.module)
    with recorded(model.down_leaves) as recorder:
        for start in range(0, len(tokens), step):
            if weights is not None:
                recorder.token_weights = mx.array(weights[start : start + step].astype(np.float32))
            model(mx.array([tokens[start : start + step]]), cache=cache)
            mx.eval(recorder.state())
        assert recorder.tokens == pytest.approx(len(tokens) if weights is None else weights.sum())
        return recorder.importance(model.down_norms)


def assert_equals_reference(found: list[np.ndarray], folder: Path, weights: np.ndarray) -> None:
    for ours, hidden, norms in zip(found, *captured(folder, TOKENS), strict=True):
        expected = reference(hidden, norms, weights)
        assert ours.dtype == np.float32
        assert np.abs(ours - expected).max() < 1e-5 * expected.max()
        assert expected.max() > 3 * expected.min()


def test_importance_equals_plain_numpy_on_captured_activations(model: Model, tiny_checkpoint: Path) -> None:
    assert_equals_reference(measure(model, TOKENS), tiny_checkpoint, np.ones(len(TOKENS)))


def test_neurons_are_named_as_in_the_source_after_switches(model: Model, tiny_checkpoint: Path) -> None:
    for seed in range(5):
        model.switch(random_selection((128, 128), (40, 64), seed))
    model.switch(None)
    assert model.slots[0].order.tolist() != list(range(128))
    assert_equals_reference(measure(model, TOKENS), tiny_checkpoint, np.ones(len(TOKENS)))


@pytest.mark.parametrize("step", [1, 5, 12])
def test_token_weights_count_each_token_as_much_as_they_say(model: Model, tiny_checkpoint: Path, step: int) -> None:
    weights = np.array([0, 0, 0, 1, 2, 0.5, 1, 1, 0, 3, 1, 1])
    assert_equals_reference(measure(model, TOKENS, weights, step), tiny_checkpoint, weights)


def test_pieces_of_a_prefill_add_up(model: Model, tiny_checkpoint: Path) -> None:
    assert_equals_reference(measure(model, TOKENS, step=5), tiny_checkpoint, np.ones(len(TOKENS)))


def test_down_norms_are_those_of_the_source(model: Model, tiny_checkpoint: Path) -> None:
    _, norms = captured(tiny_checkpoint, TOKENS)
    for ours, theirs in zip(model.down_norms, norms, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_observers_are_gone_afterwards_also_after_an_error(model: Model) -> None:
    with recorded(model.down_leaves):
        assert all(leaf.observer is not None for leaf in model.down_leaves)
    assert all(leaf.observer is None for leaf in model.down_leaves)
    with suppress(ZeroDivisionError), recorded(model.down_leaves):
        raise ZeroDivisionError
    assert all(leaf.observer is None for leaf in model.down_leaves)


def test_an_all_zero_activation_is_no_division_by_zero(model: Model) -> None:
    with recorded(model.down_leaves) as recorder:
        for leaf in model.down_leaves:
            assert leaf.observer is not None
            leaf.observer(mx.zeros((1, 3, 128)))
        found = recorder.importance(model.down_norms)
    assert all(np.array_equal(values, np.zeros(128)) for values in found)


def test_fused_ranks_mix_two_orders_whatever_their_units() -> None:
    one = [np.array([30.0, 10.0, 20.0], np.float32)]
    other = [np.array([0.1, 0.3, 0.2], np.float32)]
    assert fuse_ranks(one, other, 1.0)[0].tolist() == [1.0, 0.0, 0.5]
    assert fuse_ranks(one, other, 0.0)[0].tolist() == [0.0, 1.0, 0.5]
    assert fuse_ranks(one, other, 0.75)[0].tolist() == [0.75, 0.25, 0.5]
    assert fuse_ranks([np.array([5.0], np.float32)], [np.array([5.0], np.float32)], 0.5)[0].tolist() == [0.0]
