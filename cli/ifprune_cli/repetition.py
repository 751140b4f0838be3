"""Answers that repeat themselves: a penalty that makes it rarer, and a look-out for the ones that do so anyway."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ifprune_mlx import Session

# mlx-lm's penalty as it is used where none is asked for, and how many of the last tokens it counts.
PENALTY, _CONTEXT = 1.1, 64
# A loop is a run of at most so many tokens that came at least so many times and filled at least so many tokens.
_LONGEST_RUN, _TIMES, _LEAST = 128, 4, 96


def penalizing(penalty: float) -> list[Any]:
    """Logits processors with mlx-lm's repetition penalty; 1 is none."""
    from mlx_lm.sample_utils import make_logits_processors

    processors: list[Any] = make_logits_processors(
        repetition_penalty=None if penalty == 1 else penalty, repetition_context_size=_CONTEXT
    )
    return processors


def below_own_density(session: Session) -> bool:
    """Whether the next answer will run on fewer neurons than the checkpoint was made for."""
    if session.dense:
        return False
    live = session.selection
    fixed = live is not None and session.policy not in ("turn", "auto")
    keep = live.keep if fixed and live is not None else session.keep
    return sum(keep) < sum(session.model.keep(session.model.checkpoint.layout.density))


class LoopFinder:
    """Notices that an answer says the same run of tokens again and again. A table's rule or a short list is none."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._alike = [0] * (_LONGEST_RUN + 1)  # by length of the run: how many tokens now equal those before it

    def feed(self, token: int) -> bool:
        """Add a token; whether the answer is in a loop."""
        found = False
        for length in range(1, min(_LONGEST_RUN, len(self._tokens)) + 1):
            self._alike[length] = self._alike[length] + 1 if self._tokens[-length] == token else 0
            found = found or self._alike[length] >= max((_TIMES - 1) * length, _LEAST - length)
        self._tokens.append(token)
        return found
