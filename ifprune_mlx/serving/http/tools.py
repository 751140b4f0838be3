"""Splits the text of an answer into plain text and tool calls, while it streams.

Each model family writes calls in its own dialect. mlx-lm has a parser for each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.serving.engine.call_grammar import call_head, dialect_of


@dataclass(frozen=True)
class ToolCall:
    """A call that the model makes."""

    name: str
    arguments: str  # JSON text of an object; for a forced call, the model's text if that is not JSON


def beginning(tokenizer: TokenizerWrapper) -> str:
    """What a prompt holds of a call that must be made: the start marker, unless a grammar makes the answer a call."""
    return "" if dialect_of(tokenizer) else str(tokenizer.tool_call_start)


class ToolSplitter:
    """Splits the text of an answer into plain text and calls.

    Args:
        tokenizer: has the markers and the parser of its dialect.
        tools: the offered tools; some dialects need their parameter types.
        begun: the prompt already holds a start marker.
        forced: the tool that the first call is of, if that is known.
    """

    def __init__(
        self, tokenizer: TokenizerWrapper, tools: list[dict[str, Any]], begun: bool = False, forced: str | None = None
    ) -> None:
        self._start: str = tokenizer.tool_call_start
        self._end: str = tokenizer.tool_call_end
        self._parse: Callable[[str, Any], Any] = tokenizer.tool_parser
        self._tools = tools
        dialect = dialect_of(tokenizer)
        self._forced = forced
        self._head = "" if dialect is None or forced is None else call_head(dialect, forced)
        self._begun = self._inside = begun
        self._pending = ""
        self._after_call = False

    def feed(self, text: str) -> Iterator[str | ToolCall]:
        """Add text; yields the parts that are final now, never an empty string."""
        self._pending += text
        while True:
            if self._inside:
                at = self._pending.find(self._end) if self._end else -1
                if at < 0:
                    return
                body, self._pending = self._pending[:at], self._pending[at + len(self._end) :]
                yield from self._call(body, self._end)
            else:
                at = self._pending.find(self._start)
                keep = len(self._pending) - at if at >= 0 else self._overhang()
                final = len(self._pending) - keep
                text, self._pending = self._pending[:final], self._pending[final:]
                yield from self._plain(text)
                if at < 0:
                    return
                self._pending = self._pending[len(self._start) :]
                self._inside = True

    def finish(self) -> Iterator[str | ToolCall]:
        """The rest, after the last text."""
        pending, self._pending = self._pending, ""
        if self._inside:
            yield from self._call(pending, "")
        else:
            yield from self._plain(pending)

    def _plain(self, text: str) -> Iterator[str]:
        if self._after_call:  # dialects put a line break between calls
            text = text.lstrip()
        if text:
            self._after_call = False
            yield text

    def _call(self, body: str, end: str) -> Iterator[str | ToolCall]:
        begun, forced, head = self._begun, self._forced, self._head
        self._begun, self._forced, self._inside = False, None, False
        calls = self._calls(body)
        if not calls and forced is not None and head and body.startswith(head):  # the answer was cut
            calls = [ToolCall(forced, _first_json(body[len(head) :]))]
        self._after_call = bool(calls)
        if calls:
            yield from calls
        else:
            yield f"{'' if begun else self._start}{body}{end}"

    def _calls(self, text: str) -> list[ToolCall]:
        """The calls in the text between two markers; empty if it cannot be parsed."""
        try:
            parsed = self._parse(text, self._tools)
            found = parsed if isinstance(parsed, list) else [parsed]
            calls = [ToolCall(call["name"], _object(call["arguments"])) for call in found]
        except Exception:  # mlx-lm's parsers can raise anything on text that is not a call
            return []
        return calls if all(isinstance(call.name, str) and call.name for call in calls) else []

    def _overhang(self) -> int:
        """How many characters at the end of the pending text may begin the start marker."""
        for length in range(min(len(self._start) - 1, len(self._pending)), 0, -1):
            if self._start.startswith(self._pending[-length:]):
                return length
        return 0


def _object(arguments: Any) -> str:
    value = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(value, dict):
        raise ValueError("the arguments are no object")
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _first_json(text: str) -> str:
    """The JSON value that a text begins with, or all of it."""
    try:
        value, _ = json.JSONDecoder().raw_decode(text.strip())
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        return text
