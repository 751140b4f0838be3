"""Logits of the tokens to be predicted and of no others: the output layer is a fifth of a small model."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx import nn

from ifprune_mlx.evaluate import Example
from ifprune_mlx.predictor import inner_model


def answer_rows(example: Example) -> tuple[mx.array, mx.array, mx.array]:
    """What a forward pass over a chat needs.

    Returns:
        tokens int32 `[1, n - 1]`, the positions whose next token is to be predicted int32 `[a]`, those tokens `[a]`.
    """
    places: npt.NDArray[np.intp] = np.flatnonzero(example.mask[1:])
    tokens = example.tokens
    return mx.array(tokens[None, :-1]), mx.array(places.astype(np.int32)), mx.array(tokens[1:][places])


def answer_logits(module: nn.Module, tokens: mx.array, rows: mx.array) -> mx.array:
    """Logits at some positions, float32 `[a, vocabulary]`; the rest never goes through the output layer.

    Args:
        module: an mlx-lm model.
        tokens: int32 `[1, n]`.
        rows: int32 `[a]`, positions.

    Raises:
        PredictorError: if the family does not expose its hidden states.
    """
    inner = inner_model(module)
    # The family's own class does what comes after its inner model (ties, scales, soft caps), so the rows are taken from
    # what the inner model returns, for this one call.
    family = type(inner)
    inner.__class__ = _picking(family)  # type: ignore[arg-type]
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


@cache
def _picking(family: Any) -> type[Any]:
    class Picking(family):
        """The family's inner model, giving some rows only."""

        def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
            hidden: mx.array = super().__call__(*args, **kwargs)
            return mx.take(hidden, self.__dict__["_rows"], axis=1)

    return Picking
