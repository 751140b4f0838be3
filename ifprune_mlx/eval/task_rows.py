"""What tasks share: which questions are asked, and on which selection each row answers them.

A row's name means what it means in `eval.losses`. Those left out there make no sense for a task, or need the
answer: `oracle` and `static-own` look at answers, `cross-domain` at domains.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np

from ifprune_mlx.errors import DataError, PromptError
from ifprune_mlx.eval.losses import derangement
from ifprune_mlx.model import Model
from ifprune_mlx.selection.selection import Selection
from ifprune_mlx.selection.selectors import Instruction, Selected, make_selector

TASK_ROWS = ("dense", "learned", "static", "activation", "activation-sliced", "random", "mismatched")


class Question(Protocol):
    """As it stands in a file."""

    @property
    def key(self) -> str:
        """Tells it apart from the others."""


class Asked(Protocol):
    """As a model reads it."""

    @property
    def instruction(self) -> Instruction:
        """What selects, and the prompt."""

    @property
    def length(self) -> int:
        """Tokens that must fit into the context."""


Q = TypeVar("Q", bound=Question)
A = TypeVar("A", bound=Asked)


def pick(
    name: str,
    questions: Sequence[Q],
    encode: Callable[[Q], A],
    *,
    context: int | None,
    limit: int | None,
    seed: int,
    report: Callable[[str], object],
) -> list[A]:
    """Encode up to `limit` questions, in an order that only the seed and the questions fix, whatever the file's.

    Args:
        name: the task's, for messages.
        encode: raises PromptError for a question that the chat template refuses.
        context: the most tokens that the model can read; None for no limit.
        report: is told, once for each reason, how many questions were left out.

    Raises:
        DataError: if nothing is left.
    """
    picked: list[A] = []
    seen, reasons = 0, dict[str, int]()
    for question in sorted(questions, key=lambda q: hashlib.sha256(f"{seed}/{q.key}".encode()).digest()):
        if len(picked) == limit:
            break
        seen += 1
        try:
            asked = encode(question)
            if context is not None and asked.length > context:
                raise PromptError(f"longer than the model's context of {context} tokens")
            picked.append(asked)
        except PromptError as exc:
            reasons[str(exc)] = reasons.get(str(exc), 0) + 1
    told = [f"task {name!r}: {count} of {seen} questions left out: {reason}" for reason, count in reasons.items()]
    if not picked:
        raise DataError(f"{told[0] if told else f'task {name!r} has no questions'}; none is left, give other questions")
    for line in told:
        report(line)
    return picked


def check_rows(name: str, instructions: Sequence[Instruction], rows: Sequence[str]) -> None:
    """Raise DataError if a task, `name`, has no other question for `mismatched` to select by."""
    if "mismatched" in rows and len({instruction.text for instruction in instructions}) < 2:
        raise DataError(
            f"task {name!r} has no two different questions, mismatched needs another one beside each; give more, "
            "or leave it out of --selectors"
        )


class Choosers:
    """What every row of a task selects for every question.

    Args:
        name: the task's, for messages.
        instructions: one per question.
        rows: names of `TASK_ROWS`.
        keep: per FFN, *k*.
        seed: of the random selector, and of who is whose other question.

    Raises:
        DataError: if `mismatched` is asked for and there is no other question.
        CheckpointError: for `learned` without a predictor.
    """

    def __init__(
        self,
        model: Model,
        name: str,
        instructions: Sequence[Instruction],
        rows: Sequence[str],
        keep: Sequence[int],
        seed: int,
    ) -> None:
        check_rows(name, instructions, rows)
        self._instructions, self._keep = instructions, tuple(keep)
        matched = "learned" if model.checkpoint.has_predictor else "activation"
        self._owners = {"activation-sliced": "activation", "mismatched": matched}
        owners = {self._owners.get(row, row) for row in rows if row != "dense"}
        self._selectors = {owner: make_selector(model, owner, seed=seed) for owner in owners}
        # What another row will ask for again: a selection is 4 bytes per kept neuron, a predictor's pass is not free.
        self._reused = {owner for row, owner in self._owners.items() if row in rows}
        self._known: dict[tuple[str, int], Selection] = {}
        self._other = _others(instructions, seed) if "mismatched" in rows else []

    def choose(self, row: str, index: int) -> Selected | None:
        """The selection of a row for a question, with the history of the prompt if that was read; None is dense.

        May leave the model dense.
        """
        if row == "dense":
            return None
        if row not in self._owners:
            return self._select(row, index)
        owner = self._owners[row]
        place = self._other[index] if row == "mismatched" else index
        selection = self._known.get((owner, place))
        return Selected(self._select(owner, place).selection if selection is None else selection)

    def _select(self, owner: str, index: int) -> Selected:
        selected = self._selectors[owner].select(self._instructions[index], self._keep)
        if owner in self._reused:
            self._known[owner, index] = selected.selection
        return selected


def _others(instructions: Sequence[Instruction], seed: int) -> list[int]:
    """For every question another one that selects by another text: Winogrande asks most things twice."""
    partner = derangement(len(instructions), np.random.default_rng(seed % 2**63))
    result = []
    for index, instruction in enumerate(instructions):
        other = int(partner[index])
        while instructions[other].text == instruction.text:
            other = int(partner[other])
        result.append(other)
    return result
