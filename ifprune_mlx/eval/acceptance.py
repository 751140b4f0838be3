"""Acceptance: how many of the tokens that a pruned model drafts the same model with all its neurons would accept.

That is what speculative decoding with this draft would keep. For one token it is the sum over the vocabulary of the
smaller of the two probabilities.
"""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx

Target = list[mx.array] | None
"""Probabilities of all neurons, float32 `[m, vocabulary]`, for the parts of an answer in turn; None: not measured."""


def target_of(logits: Iterable[mx.array]) -> Target:
    """What drafts are judged by, from the logits of all neurons."""
    return [mx.softmax(rows, axis=-1) for rows in logits]


def acceptance(draft: mx.array, target: mx.array) -> mx.array:
    """Probability that a token drawn from `draft` is accepted, float32 `[m]`: the sum of the smaller probabilities.

    Args:
        draft: logits `[m, vocabulary]`.
        target: the judge's probabilities, of the same shape.
    """
    return mx.minimum(mx.softmax(draft, axis=-1), target).sum(axis=-1)
