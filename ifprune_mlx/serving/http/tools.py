"""Splits the text of an answer into plain text and tool calls, while it streams.

Each model family writes calls in its own format. Only what parses as calls is a call; other text goes on as soon as it
cannot become one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.serving.engine.call_formats import NO_CALL, call_format, json_end
from ifprune_mlx.serving.engine.call_grammar import call_head, dialect_of
from ifprune_mlx.thinking import overhang


@dataclass(frozen=True)
class ToolCall:
    """A call that the model makes."""

    name: str
    arguments: str  # JSON text of an object; for a forced call, the model's text if that is not JSON
    cut: bool = False  # the answer ended within it


def beginning(tokenizer: TokenizerWrapper, name: str | None) -> str:
    """What a prompt holds of a call of the tool `name`, or of any, that must be made: nothing if a grammar makes it."""
    calls = call_format(tokenizer)
    if calls is None or dialect_of(tokenizer):
        return ""
    return calls.start + {"pythonic": "[" if name is None else f"[{name}("}.get(calls.name, "")


class ToolSplitter:
    """Splits the text of an answer into plain text and calls.

    Args:
        tokenizer: its chat template has tools.
        tools: the offered tools; some formats need their parameter types.
        begun: the beginning of a call that the prompt already holds, start marker included.
        forced: the tool that the first call is of, if that is known.
        single: there is one call at most; what comes after it is left out.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        tools: list[dict[str, Any]],
        begun: str = "",
        forced: str | None = None,
        *,
        single: bool = False,
    ) -> None:
        calls = call_format(tokenizer)
        assert calls is not None
        self._format, self._tools, self._single = calls, tools, single
        self._pending = self._head = begun[len(calls.start) :]
        if forced is not None and (dialect := dialect_of(tokenizer)):
            self._head = call_head(dialect, forced)
        self._forced = forced if self._head else None
        # A call may begin, or has begun; the text that stands before `_pending` if it turns out to be none.
        self._inside = bool(begun) or not calls.start
        self._before = ""
        self._called = False
        self._after_call = False

    def feed(self, text: str) -> Iterator[str | ToolCall]:
        """Add text; yields the parts that are final now, never an empty string."""
        self._pending += text
        start = self._format.start
        while not self._ended:
            if self._inside:
                length = self._format.scan(self._pending)
                if length is None or (length == NO_CALL and self._forced is not None):
                    return
                calls = self._calls(self._pending[:length].removesuffix(self._format.end)) if length > 0 else []
                if calls:
                    self._pending = self._pending[length:]
                    yield from self._made(calls)
                else:
                    yield from self._no_call()
            else:
                at = self._pending.find(start) if start else -1
                keep = len(self._pending) - at if at >= 0 else overhang(self._pending, start)
                final = len(self._pending) - keep
                text, self._pending = self._pending[:final], self._pending[final:]
                yield from self._plain(text)
                if at < 0:
                    return
                self._pending = self._pending[len(start) :]
                self._before, self._inside = start, True

    def finish(self, *, cut: bool = False) -> Iterator[str | ToolCall]:
        """The rest, after the last text.

        Args:
            cut: something else than the model has ended the answer.
        """
        if self._ended:
            return
        if self._inside:
            # The end marker may be missing, or be cut. Of a cut call, only JSON tells that no argument is missing.
            ends = (len(self._pending), len(self._pending) - overhang(self._pending, self._format.end))
            written_as_json = self._pending.lstrip().startswith(("{", "[")) and (json_end(self._pending) or NO_CALL) > 0
            whole = written_as_json or not cut
            calls = next((found for end in ends if whole and (found := self._calls(self._pending[:end]))), [])
            rest = self._pending.removeprefix(self._head)
            # Clients take no arguments for `{}`.
            if not calls and self._forced is not None and self._pending.startswith(self._head) and rest.strip():
                calls = [ToolCall(self._forced, _first_json(rest), cut and (json_end(rest) or NO_CALL) < 0)]
            if calls:
                yield from self._made(calls)
                return
            yield from self._no_call()
        pending, self._pending = self._pending, ""
        yield from self._plain(pending)

    def cut_by(self, stop: str | None) -> bool:
        """Whether a stop string ends an answer that was not complete; calls end at their end marker."""
        return stop is not None and stop != self._format.end

    @property
    def _ended(self) -> bool:
        return self._single and self._called

    def _plain(self, text: str) -> Iterator[str]:
        if self._after_call:  # formats put a line break between calls
            text = text.lstrip()
        if text:
            self._after_call = False
            yield text

    def _made(self, calls: list[ToolCall]) -> Iterator[ToolCall]:
        yield from calls[:1] if self._single else calls
        self._called = self._after_call = True
        self._head, self._forced, self._before = "", None, ""
        self._inside = self._format.repeats

    def _no_call(self) -> Iterator[str]:
        """What stands pending is text."""
        before, self._before, self._head, self._inside = self._before, "", "", False
        yield from self._plain(before)

    def _calls(self, text: str) -> list[ToolCall]:
        """The calls in the text between two markers; empty if it cannot be parsed."""
        offered = {tool["function"]["name"] for tool in self._tools}
        if not text.strip():
            return []
        if self._before and (named := text.strip().removesuffix("[ARGS]")) in offered:
            return [ToolCall(named, "{}")]
        try:
            parsed = self._format.parse(text, self._tools)
            found = parsed if isinstance(parsed, list) else [parsed]
            calls = [_call(call) for call in found]
        except Exception:  # parsers can raise anything on text that is not a call
            return []
        return calls if self._format.start or offered.issuperset(call.name for call in calls) else []


def _call(call: dict[str, Any]) -> ToolCall:
    """A call as models write it; raises anything if it is none."""
    call = call["function"] if isinstance(call.get("function"), dict) else call
    name = call.get("name", call.get("function"))
    if not isinstance(name, str) or not name:
        raise ValueError("the call has no name")
    written = [call[key] for key in ("arguments", "parameters") if key in call]
    if not written and not call.keys() <= {"name", "function", "type", "id"}:
        raise ValueError("the arguments stand elsewhere")
    arguments = written[0] if written else None
    value = json.loads(arguments or "null") if isinstance(arguments, str) else arguments
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise ValueError("the arguments are no object")
    return ToolCall(name, json.dumps(value, ensure_ascii=False, allow_nan=False))


def _first_json(text: str) -> str:
    """The JSON value that a text begins with, or all of it."""
    try:
        value, _ = json.JSONDecoder().raw_decode(text.strip())
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        return text
