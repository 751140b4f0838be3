"""Logits of the tokens to be predicted, and of no others: the output layer is a fifth of a small model's work."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx import nn

from ifprune_mlx.data.tokenize import Example
from ifprune_mlx.selection.predictor import inner_model


def answer_rows(examples: Sequence[Example]) -> tuple[mx.array, mx.array, mx.array]:
    """The input and the targets of a forward pass over chats.

    Returns:
        tokens int32 `[chats, n]`, padded on the right, which a causal model's tokens before never see; the positions
        whose next token is to be predicted, int32 `[a]`, those of the second chat from n on and so forth; and those
        next tokens, `[a]`.
    """
    length = max(len(example.tokens) for example in examples) - 1
    tokens = np.zeros((len(examples), length), np.int32)
    places: list[npt.NDArray[np.intp]] = []
    wanted = []
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens) - 1] = example.tokens[:-1]
        found = np.flatnonzero(example.mask[1:])
        places.append(found + row * length)
        wanted.append(example.tokens[1:][found])
    return mx.array(tokens), mx.array(np.concatenate(places).astype(np.int32)), mx.array(np.concatenate(wanted))


def answer_logits(module: nn.Module, tokens: mx.array, rows: mx.array) -> mx.array:
    """Logits at some positions, float32 `[a, vocabulary]`; the others do not go through the output layer.

    Args:
        module: an mlx-lm model.
        tokens: int32 `[chats, n]`.
        rows: int32 `[a]`, positions, those of the second chat from n on and so forth.

    Raises:
        PredictorError: if the family does not expose its hidden states.
    """
    inner = inner_model(module)
    # The family's own class does what comes after its inner model (ties, scales, soft caps), so the rows are taken from
    # what the inner model returns, for this one call.
    family = type(inner)
    inner.__class__ = _row_picking(family)  # type: ignore[arg-type]
    object.__setattr__(inner, "_rows", rows)
    try:
        logits: mx.array = module(tokens)
    finally:
        object.__delattr__(inner, "_rows")
        inner.__class__ = family
    return logits[0].astype(mx.float32)


def log_softmax(logits: mx.array) -> mx.array:
    """Log probabilities along the last axis."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def cross_entropy(logits: mx.array, wanted: mx.array) -> mx.array:
    """The negative log likelihood of each token to be predicted, nats, float32 `[a]`.

    The exponentials over the vocabulary are taken once for the loss and its gradient; that of `log_softmax` takes them
    again.

    Args:
        logits: float32 `[a, vocabulary]`.
        wanted: int `[a]`.
    """
    losses: mx.array = _cross_entropy(logits, wanted)[0]  # type: ignore[index]
    return losses


@mx.custom_function
def _cross_entropy(logits: mx.array, wanted: mx.array) -> tuple[mx.array, mx.array]:
    """The losses, and the probabilities for the gradient."""
    probabilities = mx.softmax(logits, axis=-1)
    # Of the logits and not of the probabilities, which may round to 0.
    largest = mx.argmax(logits, axis=-1, keepdims=True)
    top, chosen = (
        mx.take_along_axis(array, places, axis=-1)[:, 0]
        for array, places in ((logits, largest), (logits, wanted[:, None]))
    )
    return top - mx.log(mx.take_along_axis(probabilities, largest, axis=-1)[:, 0]) - chosen, probabilities


@_cross_entropy.vjp
def _cross_entropy_gradient(
    primals: tuple[mx.array, mx.array], cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]
) -> tuple[mx.array, mx.array]:
    wanted, probabilities = primals[1][:, None], outputs[1]
    ones = mx.take_along_axis(probabilities, wanted, axis=-1) - 1
    gradient = mx.put_along_axis(probabilities, wanted, ones, axis=-1) * cotangents[0][:, None]
    return gradient, mx.zeros_like(primals[1])


@cache
def _row_picking(family: Any) -> type[Any]:
    class RowPicking(family):
        """The family's inner model, returning some rows only."""

        def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
            hidden: mx.array = super().__call__(*args, **kwargs)
            return mx.take(hidden.reshape(1, -1, hidden.shape[-1]), self.__dict__["_rows"], axis=1)

    return RowPicking
