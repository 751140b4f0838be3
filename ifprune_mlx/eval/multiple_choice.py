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
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.data.jsonl import filled_text, parse_json_lines
from ifprune_mlx.eval.losses import answer_nll
from ifprune_mlx.eval.metrics import TaskRow
from ifprune_mlx.eval.tasks import EncodedQuestion, Option, Question, encode_question, read_prompt, score_task
from ifprune_mlx.model import Model
from ifprune_mlx.selection.selectors import Selected

EXPECTED = "query, choices and gold, or context_options, continuation and gold"


ChoiceQuestion = Question[tuple[str, str]]
"""Its answers are the options: of each the words that only lead to what is scored (empty as a rule), and what is."""


def read_choices(path: str | Path) -> list[ChoiceQuestion]:
    """The questions of a file of JSON lines, see above.

    Raises:
        DataError: for a file that cannot be read, and for its first bad line.
    """
    return parse_json_lines(path, _question, EXPECTED)


def encode_choices(tokenizer: TokenizerWrapper, question: ChoiceQuestion) -> EncodedQuestion:
    """Token ids of a question.

    Raises:
        PromptError: if the chat template refuses the query.
    """
    options = []
    for lead, scored in question.answers:
        whole = tokenizer.encode(f"{lead} {scored}" if lead else scored, add_special_tokens=False)
        before = tokenizer.encode(lead, add_special_tokens=False) if lead else []
        # A token may span the border: what is scored begins with it.
        options.append(Option(tuple(whole), agreeing(before, whole)))
    return replace(encode_question(tokenizer, question), options=tuple(options))


def score_choices(
    model: Model,
    task: str,
    questions: Sequence[EncodedQuestion],
    rows: Sequence[str],
    keep: Sequence[int],
    **options: Any,
) -> list[TaskRow]:
    """`score_task` by `accuracy` and `margin`; `options` are its `seed` and `progress`."""

    def score(question: EncodedQuestion, selected: Selected | None) -> dict[str, float]:
        scores = option_scores(model, question, selected)
        gold = scores.pop(question.source.gold)
        margin = gold - max(scores) if np.isfinite([gold, *scores]).all() else float("nan")
        # An option that is as likely as the right one was not told from it.
        return {"accuracy": float(margin > 0), "margin": margin}

    return score_task(model, task, questions, rows, keep, score, **options)


def option_scores(model: Model, question: EncodedQuestion, selected: Selected | None = None) -> list[float]:
    """Mean log likelihood per scored token of every option, nats, under the model's active selection.

    Args:
        selected: if it comes with a history of the prompt, scoring goes on from there.
    """
    prompt, history = question.instruction.tokens, read_prompt(model, question.instruction, selected)
    scores = []
    for option in question.options:
        tokens = np.array([*prompt, *option.tokens], np.int32)
        mask = np.arange(len(tokens)) >= len(prompt) + option.start
        # A copy, since not every kind of cache can be cut back to the prompt.
        losses = answer_nll(model, tokens, mask, history=copy.deepcopy(history))
        scores.append(-float(losses.mean(dtype=np.float64)))
    return scores


def agreeing(one: Sequence[object], other: Sequence[object]) -> int:
    """Length of what two sequences begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _question(value: dict[str, Any]) -> ChoiceQuestion:
    if "context_options" in value:
        beginnings = _texts(value["context_options"], "context_options")
        end = filled_text(value.get("continuation"), "the continuation")
        common = beginnings[0][: min(agreeing(beginnings[0], other) for other in beginnings[1:])]
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


def _texts(values: Any, what: str) -> list[str]:
    if not isinstance(values, list) or len(values) < 2:
        raise ValueError(f"{what} is no list of two options or more")
    return [filled_text(value, f"option {index} of {what}") for index, value in enumerate(values)]
