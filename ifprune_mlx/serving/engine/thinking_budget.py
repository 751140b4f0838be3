"""Ends a model's thoughts after a number of tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ifprune_mlx.serving.engine.request import ThinkingBudget


class ThinkingLimit:
    """Closes the thoughts of one answer that have come to their budget; a logits processor, called for each token."""

    def __init__(self, budget: ThinkingBudget) -> None:
        self._budget = budget
        self._said: list[mx.array] = []
        self._first = True
        self._forced: deque[int] | None = None  # known once the budget is reached

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Allow only the next token of the closing, if it is time.

        Args:
            tokens: `[n]`, at first of the prompt, then with the token that was chosen last.
            logits: `[1, vocabulary]`.
        """
        if self._forced is None:
            if not self._first:
                self._said.append(tokens[-1:])  # not evaluated before the budget is reached
            self._first = False
            if len(self._said) < self._budget.tokens:
                return logits
            said = np.array(mx.concatenate(self._said)).tolist()
            thinks = _holds(said, self._budget.start) and not _holds(said, self._budget.end)
            self._forced = deque(self._budget.closing if thinks else ())
            self._said = []
        if not self._forced:
            return logits
        return mx.where(mx.arange(logits.shape[-1]) == self._forced.popleft(), logits, -mx.inf)


def _holds(tokens: Sequence[int], part: Sequence[int]) -> bool:
    return any(tuple(tokens[at : at + len(part)]) == tuple(part) for at in range(len(tokens) - len(part) + 1))
