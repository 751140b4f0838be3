"""Exact match: does the model, decoding greedily under every selection, come to the wanted answer?

A line of a file holds the question as `prompt`, `question` or `context` (the first of them that is there), which
selects and goes through the chat template as the user's message, and the wanted `answer` or `continuation`, text or a
number; `aliases`, a list, are as good. Of a wanted answer with "####" in it, as GSM8K has them, only what follows is
wanted.

If the wanted answer is a number, it is compared with the last number of the model's text (after its last "####", if
it has one), by value: 1,000 is 1000.0. Else the whole texts are compared, without regard to case, punctuation, spacing
and the articles a, an and the.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.data.jsonl import filled_text, parse_json_lines
from ifprune_mlx.eval.metrics import TaskRow
from ifprune_mlx.eval.tasks import EncodedQuestion, Question, generate_answer, score_task
from ifprune_mlx.model import Model
from ifprune_mlx.selection.selectors import Selected

EXPECTED = "prompt (or question, or context) and answer (or continuation)"
_MARK = "####"
# A minus after a word or a bracket is an operator. Commas belong to a number only where they part thousands.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")
_ARTICLES = {"a", "an", "the"}


def read_exact(path: str | Path) -> list[Question[str]]:
    """The questions of a file of JSON lines, see above, with their wanted answers, any of which will do.

    Raises:
        DataError: for a file that cannot be read, and for its first bad line.
    """
    return parse_json_lines(path, _question, EXPECTED)


def score_exact(
    model: Model,
    tokenizer: TokenizerWrapper,
    task: str,
    questions: Sequence[EncodedQuestion],
    rows: Sequence[str],
    keep: Sequence[int],
    *,
    max_tokens: int = 256,
    **options: Any,
) -> list[TaskRow]:
    """`score_task` by `accuracy` and `cut_off`; `options` are its `seed` and `progress`.

    Args:
        max_tokens: an answer's limit.
    """

    def score(question: EncodedQuestion, selected: Selected | None) -> dict[str, float]:
        text, cut = generate_answer(model, tokenizer, question.instruction, selected, keep, max_tokens)
        return {"accuracy": float(matches(text, question.source.answers)), "cut_off": float(cut)}

    return score_task(model, task, questions, rows, keep, score, **options)


def matches(text: str, wanted: Sequence[str]) -> bool:
    """Whether a model's text gives one of the wanted answers."""
    found = last_number(text)
    for one in wanted:
        number = as_number(one)
        if found == number if number is not None else normalized(text) == normalized(one):
            return True
    return False


def as_number(wanted: str) -> Decimal | None:
    """The number that a wanted answer is, without its currency or percent sign; None if it is none."""
    match = _NUMBER.fullmatch(_plain(wanted).strip().removeprefix("$").removesuffix(".").removesuffix("%"))
    return _value(match.group()) if match else None


def last_number(text: str) -> Decimal | None:
    """The last number of a text, after its last "####" if it has one; None if there is none."""
    numbers = [match.group() for match in _NUMBER.finditer(_plain(text.rpartition(_MARK)[2]))]
    return _value(numbers[-1]) if numbers else None


def normalized(text: str) -> str:
    """A text without case, punctuation, spacing and articles, as SQuAD compares them (arXiv 1606.05250)."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(character for character in folded if not unicodedata.category(character).startswith("P"))
    words = kept.split()
    # "A" may be an option's letter.
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def _plain(text: str) -> str:
    return text.replace("\N{MINUS SIGN}", "-")


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


def _question(value: dict[str, Any]) -> Question[str]:
    name = next((key for key in ("prompt", "question", "context") if key in value), "prompt")
    aliases = value.get("aliases", [])
    if not isinstance(aliases, list):
        raise ValueError("aliases is no list")
    wanted = _wanted(value.get("answer", value.get("continuation")), "the answer")
    if _is_empty(wanted):
        raise ValueError(f"the answer {wanted!r} holds no word and no number")
    # An alias of nothing but punctuation would agree with every text of such.
    others = [other for other in (_wanted(alias, "an alias") for alias in aliases) if not _is_empty(other)]
    return Question(filled_text(value.get(name), f"the {name}"), tuple(dict.fromkeys([wanted, *others])))


def _wanted(value: Any, what: str) -> str:
    plain_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return filled_text(str(value) if plain_number else value, what).rpartition(_MARK)[2].strip()


def _is_empty(wanted: str) -> bool:
    return as_number(wanted) is None and not normalized(wanted)
