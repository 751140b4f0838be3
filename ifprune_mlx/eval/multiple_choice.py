"""Multiple choice: does the right option have the highest likelihood as the model's answer, under every selection?

The query is the instruction: it selects, and goes through the chat template as the user's message. Every option is
scored as the assistant's answer, by the mean log likelihood of its tokens, without the token that ends the turn, which
says nothing of the option. A question counts as right if the gold option's score is above all others'; its margin is
the gold score minus the best other one, in nats per token.

A line of a file is one of

    {"query": str, "choices": [str, ...], "gold": int}
    {"context_options": [str, ...], "continuation": str, "gold": int}

`gold` is the right one's index, from 0. The second is Winogrande's form, in which the beginnings differ and the ends
do not: the words that all beginnings have in common are the query, each option is what is left of its beginning with
the continuation after it, and only the continuation's tokens are scored ("partial evaluation", arXiv 1806.02847).
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.chat_template import render_messages
from ifprune_mlx.data.jsonl import filled_text, parse_json_lines
from ifprune_mlx.errors import IfpruneError
from ifprune_mlx.eval.losses import answer_nll
from ifprune_mlx.eval.metrics import TaskRow
from ifprune_mlx.eval.task_rows import Choosers
from ifprune_mlx.model import Model, Progress
from ifprune_mlx.prompt_cache import History
from ifprune_mlx.selection.selectors import Instruction, Selected

EXPECTED = "query, choices and gold, or context_options, continuation and gold"


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question with its options.

    Attributes:
        query: the user's message.
        options: for each the words that only lead to what is scored (empty as a rule), and what is scored.
        gold: index of the right option.
    """

    query: str
    options: tuple[tuple[str, str], ...]
    gold: int

    @property
    def key(self) -> str:
        """Hash of query and options."""
        return hashlib.sha256(json.dumps([self.query, self.options]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Option:
    """An option as token ids.

    Attributes:
        tokens: what follows the prompt.
        start: index in `tokens` of the first that is scored.
    """

    tokens: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class AskedChoice:
    """A question as a model reads it."""

    instruction: Instruction
    options: tuple[Option, ...]
    gold: int

    @property
    def length(self) -> int:
        """Tokens of the prompt with the longest option."""
        return len(self.instruction.tokens) + max(len(option.tokens) for option in self.options)


def read_choices(path: str | Path) -> list[ChoiceQuestion]:
    """The questions of a file of JSON lines, see above.

    Raises:
        DataError: for a file that cannot be read, and for its first bad line.
    """
    return parse_json_lines(path, _question, EXPECTED)


def encode_choices(tokenizer: TokenizerWrapper, question: ChoiceQuestion) -> AskedChoice:
    """Token ids of a question.

    Raises:
        PromptError: if the chat template refuses the query.
    """
    prompt = render_messages(tokenizer, [{"role": "user", "content": question.query}])
    options = []
    for lead, scored in question.options:
        whole = _encode(tokenizer, f"{lead} {scored}" if lead else scored)
        before = _encode(tokenizer, lead) if lead else []
        # A token may span the border: what is scored begins with it.
        options.append(Option(tuple(whole), _agreeing(before, whole)))
    return AskedChoice(Instruction(question.query, tuple(prompt)), tuple(options), question.gold)


def score_choices(
    model: Model,
    task: str,
    questions: Sequence[AskedChoice],
    rows: Sequence[str],
    keep: Sequence[int],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[TaskRow]:
    """Measure a task under every row's selections. Leaves the model with whatever selection came last.

    Args:
        task: its name.
        rows: of `ifprune_mlx.eval.task_rows.TASK_ROWS`, in the order wanted.
        keep: per FFN, *k*.
        seed: of the random selector, and of who is whose other question.
        progress: called with (answered, to be answered), questions times rows.

    Returns:
        `accuracy` and then `margin` of every row.

    Raises:
        DataError, CheckpointError, PredictorError: as `Choosers` and the selectors raise them.
        IfpruneError: where a likelihood is not a number.
    """
    choosers = Choosers(model, task, [question.instruction for question in questions], rows, keep, seed)
    margins: dict[str, list[float]] = {row: [] for row in rows}
    for place, row in enumerate(rows):
        for index, question in enumerate(questions):
            selected = choosers.choose(row, index)
            model.switch(None if selected is None else selected.selection)
            scores = option_scores(model, question, selected)
            if not np.isfinite(scores).all():
                raise IfpruneError(
                    f"{row}, task {task!r}, question {index + 1}: a likelihood is not a finite number; the weights "
                    "are damaged or float16 overflows, try --dtype float32 or bfloat16"
                )
            gold = scores.pop(question.gold)
            margins[row].append(gold - max(scores))
            mx.clear_cache()
            if progress is not None:
                progress(place * len(questions) + index + 1, len(rows) * len(questions))
    result = []
    for row in rows:
        # An option that is as likely as the right one was not told from it.
        result.append(TaskRow(row, task, "accuracy", tuple(float(margin > 0) for margin in margins[row])))
        result.append(TaskRow(row, task, "margin", tuple(margins[row])))
    return result


def option_scores(model: Model, question: AskedChoice, selected: Selected | None = None) -> list[float]:
    """Mean log likelihood per scored token of every option, nats, under the model's active selection.

    Args:
        selected: a history that it comes with is gone on from.
    """
    prompt = question.instruction.tokens
    history = selected.history if selected is not None else None
    if history is None:
        history = History.empty(model).read(model, prompt[:-1])
    scores = []
    for option in question.options:
        tokens = np.array([*prompt, *option.tokens], np.int32)
        mask = np.arange(len(tokens)) >= len(prompt) + option.start
        # A copy, since not every kind of cache can be cut back to the prompt.
        losses = answer_nll(model, tokens, mask, history=copy.deepcopy(history))
        scores.append(-float(losses.mean(dtype=np.float64)))
    return scores


def _encode(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _question(value: dict[str, Any]) -> ChoiceQuestion:
    if "context_options" in value:
        beginnings = _texts(value["context_options"], "context_options")
        end = filled_text(value.get("continuation"), "the continuation")
        common = beginnings[0][: min(_agreeing(beginnings[0], other) for other in beginnings[1:])]
        # Up to the last space, or the query might end within a word.
        cut = common.rfind(" ") + 1
        query = filled_text(common[:cut], "what all context_options begin with").rstrip()
        options = tuple((beginning[cut:].strip(), end) for beginning in beginnings)
    else:
        query = filled_text(value.get("query"), "the query")
        options = tuple(("", choice) for choice in _texts(value.get("choices"), "choices"))
    gold = value.get("gold")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(options):
        raise ValueError(f"gold is no index of its {len(options)} options, which count from 0")
    return ChoiceQuestion(query, options, gold)


def _agreeing(one: Sequence[object], other: Sequence[object]) -> int:
    """Length of what two sequences begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _texts(values: Any, what: str) -> list[str]:
    if not isinstance(values, list) or len(values) < 2:
        raise ValueError(f"{what} is no list of two options or more")
    return [filled_text(value, f"option {index} of {what}") for index, value in enumerate(values)]
