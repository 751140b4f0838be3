"""Chats and plain texts from JSON lines: reading them, and holding some out by prompt."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ifprune_mlx.data.jsonl import checked_text, json_lines
from ifprune_mlx.errors import DataError

Message = dict[str, str]

_EXPECTED = "messages, prompt and completion, or text"


@dataclass(frozen=True)
class Record:
    """One chat, or one plain text for pretraining.

    Attributes:
        messages: of a chat, ending with the assistant's; empty for a text.
        domain: label of what it is about, such as `code`; the reader of the file decides.
        text: of a plain text, else None.
    """

    messages: tuple[Message, ...]
    domain: str = ""
    text: str | None = None

    @cached_property
    def instruction(self) -> str:
        """What a selector reads: the first user message; all of a plain text."""
        if self.text is not None:
            return self.text
        return next((message["content"] for message in self.messages if message["role"] == "user"), "")

    @cached_property
    def key(self) -> str:
        """Hash (16 hexadecimal digits) of the instruction; case, spacing and Unicode form make no difference."""
        normal = " ".join(unicodedata.normalize("NFKC", self.instruction).casefold().split())
        return hashlib.sha256(normal.encode()).hexdigest()[:16]


def read_records(
    path: str | Path,
    domain: str,
    *,
    strict: bool = False,
    report: Callable[[str], object] | None = None,
    answers: bool = True,
) -> list[Record]:
    """Read JSON lines as mlx-lm does: `prompt` and `completion`, `messages`, or `text`; other keys are ignored.

    A chat is read up to its last answer, since nothing is learned from what follows. A file may be packed as .gz
    or .bz2. Empty lines are passed over.

    Args:
        strict: raise at a line that cannot be used, instead of skipping it.
        report: receives "file, line N: reason" for every line that is skipped. Without it such a line is an error.
        answers: False takes chats without an answer as well, and `prompt` alone.

    Raises:
        DataError: if the file cannot be read, is not UTF-8, holds no usable line, or (see above) has a bad line.
    """
    path = Path(path)
    records, first_bad = [], None
    for number, value in json_lines(path):
        try:
            records.append(_record(value, domain, answers))
        except ValueError as exc:
            bad = f"{path}, line {number}: {exc}"
            if strict or report is None:
                raise DataError(bad) from exc
            first_bad = first_bad or bad
            report(bad)
    if not records:
        raise DataError(
            f"{path}: holds no chats or texts; give JSON lines with {_EXPECTED}"
            if first_bad is None
            else f"{path}: no line of it can be used; the first reason is {first_bad}"
        )
    return records


def split(record: Record, share: float) -> str:
    """`valid` for about `share` of all instructions, else `train`.

    The record's key alone decides, so an instruction is never in both parts, whatever else is read and in whatever
    order. A larger share only moves records from train to valid.
    """
    return "valid" if int(record.key, 16) / 16 ** len(record.key) < share else "train"


def _record(value: Any, domain: str, answers: bool = True) -> Record:
    """The record that a line's JSON value holds; ValueError says why there is none."""
    if not isinstance(value, dict):
        kind = "JSON" if value is None else "a JSON object"
        raise ValueError(f"not a chat or text; expected {kind} with {_EXPECTED}")
    # The order of precedence is mlx-lm's.
    if "prompt" in value and "completion" in value:
        user, assistant = checked_text(value["prompt"], "prompt"), checked_text(value["completion"], "completion")
        return _chat([{"role": "user", "content": user}, {"role": "assistant", "content": assistant}], domain)
    if "messages" in value:
        if value.get("tools"):
            raise ValueError("a chat with tools, which are not supported")
        return _chat(value["messages"], domain, answers)
    if "prompt" in value and not answers:
        return _chat([{"role": "user", "content": checked_text(value["prompt"], "prompt")}], domain, answers)
    if "text" in value:
        record = Record((), domain, checked_text(value["text"], "text"))
        if not record.instruction.strip():
            raise ValueError("text is blank")
        return record
    raise ValueError(f"not a chat or text; expected {_EXPECTED}")


def _chat(values: Any, domain: str, answers: bool = True) -> Record:
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError("messages are no list of objects with role and content")
    messages = [
        {key: checked_text(value.get(key), f"the {key} of message {number}") for key in ("role", "content")}
        for number, value in enumerate(values, 1)
    ]
    roles = [message["role"] for message in messages]
    if answers or "assistant" in roles:
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        if not messages:
            raise ValueError("no answer by the assistant")
        roles = roles[: roles.index("assistant")]
    if "user" not in roles:
        raise ValueError("no user message before the first answer")
    record = Record(tuple(messages), domain)
    if not record.instruction.strip():
        raise ValueError("the first user message is blank")
    if not messages[-1]["content"].strip():
        raise ValueError("the last answer is blank")
    return record
