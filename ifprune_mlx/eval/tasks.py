"""What tasks share: picking questions, what each row selects for them, and the loop that scores them.

A row's name means what it means in `eval.losses`. Those left out here make no sense for a task, or need the answer:
`oracle` and `static-own` look at answers, `cross-domain` at domains.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.chat_template import render_messages
from ifprune_mlx.errors import DataError, IfpruneError, PromptError
from ifprune_mlx.eval.losses import NOT_FINITE, derangement
from ifprune_mlx.eval.metrics import TaskRow
from ifprune_mlx.generation import GenerationRequest, answer
from ifprune_mlx.model import Model, Progress
from ifprune_mlx.prompt_cache import History
from ifprune_mlx.selection.selection import Selection
from ifprune_mlx.selection.selectors import Instruction, Selected, make_selector

A = TypeVar("A")

TASK_ROWS = ("dense", "learned", "static", "activation", "activation-sliced", "random", "mismatched")


@dataclass(frozen=True)
class Question(Generic[A]):
    """A question as it stands in a file.

    Attributes:
        prompt: the user's message, which selects.
        answers: what `eval.multiple_choice` and `eval.exact_match` make of it.
        gold: index of the right answer, where only one is right.
    """

    prompt: str
    answers: tuple[A, ...]
    gold: int = 0

    @property
    def key(self) -> str:
        """Hash (16 hexadecimal digits) of prompt and answers, which tells it apart from the others."""
        return hashlib.sha256(json.dumps([self.prompt, self.answers]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Option:
    """An option of a multiple choice question as token ids.

    Attributes:
        tokens: what follows the prompt.
        start: index in `tokens` of the first that is scored.
    """

    tokens: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class EncodedQuestion:
    """A question as a model reads it.

    Attributes:
        source: the question in words.
        instruction: what selects, and the prompt.
        options: of multiple choice, else empty.
    """

    source: Question[Any]
    instruction: Instruction
    options: tuple[Option, ...] = ()

    @property
    def length(self) -> int:
        """Tokens that must fit into the context: the prompt with the longest option, or with one of an answer."""
        return len(self.instruction.tokens) + max((len(option.tokens) for option in self.options), default=1)


def encode_question(tokenizer: TokenizerWrapper, question: Question[Any]) -> EncodedQuestion:
    """The prompt as token ids.

    Raises:
        PromptError: if the chat template refuses it.
    """
    tokens = render_messages(tokenizer, [{"role": "user", "content": question.prompt}])
    return EncodedQuestion(question, Instruction(question.prompt, tuple(tokens)))


def pick_questions(
    task: str,
    questions: Sequence[Question[A]],
    encode: Callable[[Question[A]], EncodedQuestion],
    *,
    context: int | None,
    limit: int | None,
    seed: int,
    report: Callable[[str], object],
) -> list[EncodedQuestion]:
    """Encode up to `limit` questions, in an order that only the seed and the questions fix, whatever the file's.

    Args:
        task: its name, for messages.
        encode: raises PromptError for a question that the chat template refuses.
        context: the most tokens that the model can read; None for no limit.
        report: is told, once for each reason, how many questions were left out.

    Raises:
        DataError: if nothing is left.
    """
    picked: list[EncodedQuestion] = []
    seen, reasons = 0, dict[str, int]()
    for question in sorted(questions, key=lambda q: hashlib.sha256(f"{seed}/{q.key}".encode()).digest()):
        if len(picked) == limit:
            break
        seen += 1
        try:
            encoded = encode(question)
            if context is not None and encoded.length > context:
                raise PromptError(f"longer than the model's context of {context} tokens")
            picked.append(encoded)
        except PromptError as exc:
            reasons[str(exc)] = reasons.get(str(exc), 0) + 1
    told = [f"task {task!r}: {count} of {seen} questions left out: {reason}" for reason, count in reasons.items()]
    if not picked:
        raise DataError(f"{told[0] if told else f'task {task!r} has no questions'}; none is left, give other questions")
    for line in told:
        report(line)
    return picked


def check_rows(task: str, instructions: Sequence[Instruction], rows: Sequence[str]) -> None:
    """Raise DataError if a task has no other question for `mismatched` to select by."""
    if "mismatched" in rows and len({instruction.text for instruction in instructions}) < 2:
        raise DataError(
            f"task {task!r} has no two different questions, mismatched needs another one beside each; give more, "
            "or leave it out of --selectors"
        )


class RowSelections:
    """What every row of a task selects for every question.

    Args:
        task: its name, for messages.
        instructions: one per question.
        rows: names of `TASK_ROWS`.
        keep: per FFN, *k*.
        seed: of the random selector, and of who is whose other question.

    Raises:
        DataError: if `mismatched` is among the rows and there is no other question.
        CheckpointError: for `learned` without a predictor.
    """

    def __init__(
        self,
        model: Model,
        task: str,
        instructions: Sequence[Instruction],
        rows: Sequence[str],
        keep: Sequence[int],
        seed: int,
    ) -> None:
        check_rows(task, instructions, rows)
        self._model, self._instructions, self._keep = model, instructions, tuple(keep)
        matched = "learned" if model.checkpoint.has_predictor else "activation"
        # The selector behind a row that has not its name.
        self._behind = {"activation-sliced": "activation", "mismatched": matched}
        names = {self._behind.get(row, row) for row in rows if row != "dense"}
        self._selectors = {name: make_selector(model, name, seed=seed) for name in names}
        # Kept for another row: a selection is 4 bytes per kept neuron, a predictor's pass is not free.
        self._reused = {name for row, name in self._behind.items() if row in rows}
        self._known: dict[tuple[str, int], Selection] = {}
        self._other = _others(instructions, seed) if "mismatched" in rows else []

    def switch(self, row: str, index: int) -> Selected | None:
        """Make a row's selection for a question the active one.

        Returns:
            The selection, with the history of the prompt if the selector has read it; None for `dense`.
        """
        selected = None if row == "dense" else self._selected(row, index)
        self._model.switch(None if selected is None else selected.selection)
        return selected

    def _selected(self, row: str, index: int) -> Selected:
        if row not in self._behind:
            return self._select(row, index)
        name, place = self._behind[row], self._other[index] if row == "mismatched" else index
        selection = self._known.get((name, place))
        return Selected(self._select(name, place).selection if selection is None else selection)

    def _select(self, name: str, index: int) -> Selected:
        selected = self._selectors[name].select(self._instructions[index], self._keep)
        if name in self._reused:
            self._known[name, index] = selected.selection
        return selected


def score_task(
    model: Model,
    task: str,
    questions: Sequence[EncodedQuestion],
    rows: Sequence[str],
    keep: Sequence[int],
    score: Callable[[EncodedQuestion, Selected | None], dict[str, float]],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[TaskRow]:
    """Measure a task under every row's selections. Leaves the model with whatever selection came last.

    Args:
        task: its name.
        rows: of `TASK_ROWS`, in the order wanted.
        keep: per FFN, *k*.
        score: gives a question's value by metric, under the model's active selection, which it is given as well (None
            is dense); of every question the same metrics in the same order.
        seed: of the random selector, and of who is whose other question.
        progress: called with (answered, to be answered), questions times rows.

    Returns:
        Row by row, every metric.

    Raises:
        DataError, CheckpointError, PredictorError: as `RowSelections` and the selectors raise them.
        IfpruneError: where a value is not a number.
    """
    selections = RowSelections(model, task, [question.instruction for question in questions], rows, keep, seed)
    values: dict[tuple[str, str], list[float]] = {}
    for place, row in enumerate(rows):
        for index, question in enumerate(questions):
            for metric, value in score(question, selections.switch(row, index)).items():
                if not np.isfinite(value):
                    raise IfpruneError(
                        f"{row}, task {task!r}, question {index + 1}: a likelihood is not a finite number; {NOT_FINITE}"
                    )
                values.setdefault((row, metric), []).append(value)
            mx.clear_cache()
            if progress is not None:
                progress(place * len(questions) + index + 1, len(rows) * len(questions))
    return [TaskRow(row, task, metric, tuple(found)) for (row, metric), found in values.items()]


def read_prompt(model: Model, instruction: Instruction, selected: Selected | None) -> History:
    """The history of a prompt but for its last token: the selector's, or read under the active selection."""
    if selected is not None and selected.history is not None:
        return selected.history
    return History.empty(model).read(model, instruction.tokens[:-1])


def generate_answer(
    model: Model,
    tokenizer: TokenizerWrapper,
    instruction: Instruction,
    selected: Selected | None,
    keep: Sequence[int],
    max_tokens: int,
    *,
    stops: Sequence[str] = (),
    **options: Any,
) -> tuple[str, bool]:
    """Generate under a selection, greedily unless `options` say otherwise.

    Args:
        selected: goes on from its history, if it has one; None is dense.
        stops: the text ends before the first of them.
        options: as `ifprune_mlx.generation.answer` takes them.

    Returns:
        The text, and whether the token limit cut it off.
    """
    selection, history = (None, None) if selected is None else (selected.selection, selected.history)
    request = GenerationRequest(list(instruction.tokens), instruction.text, None, selection, tuple(keep))
    text, reason = "", None
    for response in answer(model, tokenizer, history or History.empty(model), request, max_tokens, **options):
        text, reason = text + response.text, response.finish_reason
        if any(stop in text for stop in stops):
            break
    return text[: min((text.find(stop) for stop in stops if stop in text), default=None)], reason == "length"


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
