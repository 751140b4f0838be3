"""Logits of chosen positions are those of the whole forward pass, and the model is left as it was."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from ifprune_mlx.data.tokenize import Example
from ifprune_mlx.selection.predictor import inner_model
from ifprune_mlx.train.loss import answer_logits, answer_rows, cross_entropy, log_softmax
from tests.tiny import CONFIGS, make_model

TOKENS = np.array([5, 17, 200, 31, 8, 90, 3, 255, 41, 7], np.int32)
ROWS = mx.array([1, 4, 5, 8])


def sharpened(family: str) -> Any:
    """A tiny model whose logits are large enough for gemma2's caps to bend them."""
    model = make_model(CONFIGS[family])
    embedding = model.model.embed_tokens
    embedding.weight = embedding.weight * 20
    return model


@pytest.mark.parametrize("family", CONFIGS)
def test_they_are_rows_of_the_full_logits(family: str) -> None:
    """Every family: what comes after the inner model (ties, biases, soft caps) is the family's own."""
    model = sharpened(family)
    full = np.array(model(mx.array(TOKENS[None]))[0])
    picked = answer_logits(model, mx.array(TOKENS[None]), ROWS)
    assert picked.dtype == mx.float32
    assert picked.shape == (4, full.shape[-1])
    np.testing.assert_allclose(np.array(picked), full[np.array(ROWS)], rtol=1e-5, atol=1e-5)


def test_soft_caps_are_at_work() -> None:
    """The gemma2 case above would fail without its cap: some logits lie where tanh bends them."""
    logits = np.abs(np.array(answer_logits(sharpened("gemma2"), mx.array(TOKENS[None]), ROWS)))
    assert 10 < logits.max() <= 30


@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_are_those_of_the_full_logits(family: str) -> None:
    """Inside `value_and_grad` the rows have the gradients that they have in a whole forward pass."""
    model = make_model(CONFIGS[family])
    tokens = mx.array(TOKENS[None])

    def picked(layer: nn.Module) -> mx.array:
        return log_softmax(answer_logits(model, tokens, ROWS))[:, 3].sum()

    def full(layer: nn.Module) -> mx.array:
        return log_softmax(mx.take(model(tokens)[0], ROWS, axis=0))[:, 3].sum()

    layer = model.layers[0]
    (a, ours), (b, theirs) = (nn.value_and_grad(layer, loss)(layer) for loss in (picked, full))
    np.testing.assert_allclose(float(a), float(b), rtol=1e-5)
    for name in ("gate_proj", "down_proj"):
        wanted = np.array(theirs["mlp"][name]["weight"])
        assert np.abs(wanted).max() > 1e-4
        np.testing.assert_allclose(np.array(ours["mlp"][name]["weight"]), wanted, rtol=1e-4, atol=1e-6)


def test_the_inner_model_keeps_its_class() -> None:
    """After a call the inner model is the family's own again, with nothing left behind, and runs as before."""
    model = make_model(CONFIGS["llama"])
    inner = inner_model(model)
    family, before = type(inner), set(vars(inner))
    full = np.array(model(mx.array(TOKENS[None])))
    answer_logits(model, mx.array(TOKENS[None]), ROWS)
    assert type(inner) is family
    assert set(vars(inner)) == before
    np.testing.assert_array_equal(np.array(model(mx.array(TOKENS[None]))), full)


def test_the_inner_model_keeps_its_class_after_an_exception() -> None:
    """Whatever the forward pass raises, the class comes back; the next call works."""
    model = make_model(CONFIGS["llama"])
    inner = inner_model(model)
    family, before = type(inner), set(vars(inner))

    class Broken(nn.Module):
        def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
            raise RuntimeError("broken layer")

    last = inner.layers[-1].mlp
    inner.layers[-1].mlp = Broken()
    with pytest.raises(RuntimeError, match="broken layer"):
        answer_logits(model, mx.array(TOKENS[None]), ROWS)
    assert type(inner) is family
    assert set(vars(inner)) == before
    inner.layers[-1].mlp = last
    assert answer_logits(model, mx.array(TOKENS[None]), ROWS).shape[0] == 4


def test_answer_rows_are_the_positions_before_the_answer() -> None:
    """Token i is predicted at position i - 1; the last token is not read."""
    mask = np.array([False] * 4 + [True] * 3 + [False] + [True] * 2)
    example = Example(TOKENS, mask, 8, "x", "d", "k")
    tokens, rows, wanted = answer_rows([example])
    assert tokens.tolist() == [TOKENS[:-1].tolist()]
    assert rows.tolist() == [3, 4, 5, 7, 8]
    assert wanted.tolist() == TOKENS[mask].tolist()


def test_log_softmax_is_a_distribution() -> None:
    """As NumPy computes it in float64, for logits far apart too."""
    logits = np.array([[0.0, 1.0, -2.0], [90.0, -90.0, 0.0]])
    shifted = logits - logits.max(axis=-1, keepdims=True)
    wanted = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(np.array(log_softmax(mx.array(logits.astype(np.float32)))), wanted, atol=1e-5)


def test_cross_entropy_and_its_gradient_equal_those_of_float64() -> None:
    """Also where the wanted token's probability is below the least float32."""
    random = np.random.default_rng(0)
    logits = (30 * random.normal(size=(5, 300))).astype(np.float32)
    logits[1, 7] -= 400
    wanted = np.array([3, 7, 299, int(logits[3].argmax()), 0])
    weights = random.uniform(0.5, 2, 5).astype(np.float32)

    def loss(given: mx.array) -> mx.array:
        return (cross_entropy(given, mx.array(wanted)) * mx.array(weights)).sum()

    found = cross_entropy(mx.array(logits), mx.array(wanted))
    gradient = mx.grad(loss)(mx.array(logits))
    exact = logits.astype(np.float64)
    shifted = exact - exact.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(np.array(found), -logs[np.arange(5), wanted], rtol=1e-6, atol=1e-5)
    assert -logs[1, 7] > 200
    ones = np.eye(300)[wanted]
    np.testing.assert_allclose(np.array(gradient), (np.exp(logs) - ones) * weights[:, None], atol=1e-6)
