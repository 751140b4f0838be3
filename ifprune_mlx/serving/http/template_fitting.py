"""Makes conversations fit chat templates, which read text and differ in what they accept.

Messages are in the chat template's form. None of this changes the messages that it is given.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ifprune_mlx.serving.http.schemas_requests import OtherBlock, RefusalPart, TextPart

Message = dict[str, Any]
Messages = list[Message]

# Mistral's templates accept ids of this form alone; others accept any.
_ID_LENGTH = 9
_CHARACTERS = string.ascii_letters + string.digits
_ID = re.compile(f"[A-Za-z0-9]{{{_ID_LENGTH}}}")
_PROBE = ("firstProbe", "otherProbe")
# What a block that is no text tells in words.
_TOLD = ("title", "name", "tool_name", "url", "query", "command", "code", "text", "stdout", "stderr", "error_code")


def text_of(content: str | Sequence[TextPart | RefusalPart | OtherBlock] | None, between: str = "") -> str:
    """The text of a message's content, with a line for each block that is no text.

    Args:
        between: stands between two texts that no space parts.
    """
    if content is None or isinstance(content, str):
        return content or ""
    text = line = ""
    for block in content:
        other, said = isinstance(block, OtherBlock), _line(block) if isinstance(block, OtherBlock) else block.text
        parted = not text or not said or text[-1].isspace() or said[0].isspace()
        text += ("\n" if line or (text and other) else "" if parted else between) + said
        line = said if other else ""
    return text


def _line(block: OtherBlock) -> str:
    fields = block.model_extra or {}
    words = " ".join(_told(fields))
    if words == fields.get("text"):
        return words
    return f"[{block.type}: {words or 'left out, as this model reads text only'}]"


def _told(value: Any, depth: int = 5) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list) and depth:
        for item in value:
            yield from _told(item, depth - 1)
    elif isinstance(value, dict) and depth:
        keys = (*_TOLD, "data") if value.get("type") == "text" else _TOLD
        yield from (value[key] for key in keys if isinstance(value.get(key), str))
        for key in ("input", "source", "content"):
            yield from _told(value.get(key), depth - 1)


def earlier_call(identity: str, name: str, arguments: Any) -> Message:
    """A call that was made before; arguments that are no JSON object stay text."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    try:
        value = json.loads(text.strip() or "{}")
    except (ValueError, RecursionError):
        value = text
    given = {} if value is None else value if isinstance(value, dict) else text
    return {"type": "function", "id": identity, "function": {"name": name, "arguments": given}}


def call_id(seed: bytes) -> str:
    """An id of a tool call that every template accepts; equal seeds give equal ids."""
    value = int.from_bytes(hashlib.sha256(seed).digest(), "big")
    digits = []
    for _ in range(_ID_LENGTH):
        value, digit = divmod(value, len(_CHARACTERS))
        digits.append(_CHARACTERS[digit])
    return "".join(digits)


def with_fitting_ids(messages: Sequence[Message]) -> Messages:
    """The messages with ids of calls that every template accepts; results keep belonging to their calls."""

    def fitting(given: str) -> str:
        return given if _ID.fullmatch(given) else call_id(given.encode())

    fitted = []
    for message in messages:
        changed: Message = {}
        if "tool_calls" in message:
            changed["tool_calls"] = [{**call, "id": fitting(call["id"])} for call in message["tool_calls"]]
        elif "tool_call_id" in message:
            changed["tool_call_id"] = fitting(message["tool_call_id"])
        fitted.append({**message, **changed})
    return fitted


def forms(messages: Messages, shows_parallel_calls: Callable[[], bool]) -> Iterator[Messages]:
    """The messages in forms that more and more templates accept, the given one first; none comes twice.

    Args:
        shows_parallel_calls: whether the template shows all calls of a message; asked only if that matters.
    """
    if any(len(message.get("tool_calls", ())) > 1 for message in messages) and not shows_parallel_calls():
        messages = _one_call_a_message(messages)
    yield messages
    for change in (_one_call_a_message, _arguments_as_objects, _alternating, _without_system):
        changed = change(messages)
        if changed != messages:
            yield changed
        messages = changed


def probe_of_parallel_calls() -> tuple[Messages, tuple[str, str]]:
    """A conversation with parallel calls, and what a template that shows both of them writes."""
    calls = [
        {"type": "function", "id": f"{name[:5]}0000", "function": {"name": name, "arguments": {}}} for name in _PROBE
    ]
    results = [
        {"role": "tool", "tool_call_id": call["id"], "name": name, "content": "done"}
        for call, name in zip(calls, _PROBE, strict=True)
    ]
    asked = {"role": "user", "content": "Hello"}
    return [asked, {"role": "assistant", "content": "", "tool_calls": calls}, *results], _PROBE


def _one_call_a_message(messages: Messages) -> Messages:
    """Parallel calls one after the other, each with its result."""
    fitted: Messages = []
    results: dict[str, Messages] = {}  # of the calls that were just split
    for at, message in enumerate(messages):
        calls = message.get("tool_calls", ())
        if message["role"] == "tool" and message["tool_call_id"] in results:
            continue  # stands behind its call already
        results = results if message["role"] == "tool" else {}
        if len(calls) < 2:
            fitted.append(message)
            continue
        for later in messages[at + 1 :]:
            if later["role"] != "tool":
                break
            results.setdefault(later["tool_call_id"], []).append(later)
        results = {call["id"]: results.get(call["id"], []) for call in calls}
        for index, call in enumerate(calls):
            said = {} if index == 0 else {"content": ""}
            fitted += [{**message, **said, "tool_calls": [call]}, *results[call["id"]]]
    return fitted


def _arguments_as_objects(messages: Messages) -> Messages:
    """Arguments that are no object, as an object with their text."""

    def call_of(call: Message) -> Message:
        function = call["function"]
        if isinstance(function["arguments"], dict):
            return call
        return {**call, "function": {**function, "arguments": {"invalid": function["arguments"]}}}

    return [
        {**message, "tool_calls": [call_of(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _alternating(messages: Messages) -> Messages:
    """One system message at most, the first, and no two messages of one role in a row, but for results of tools."""
    fitted: Messages = []
    for given in messages:
        late = given["role"] == "system" and any(one["role"] != "system" for one in fitted)
        message = {**given, "role": "user"} if late else given
        role = message["role"]
        last = fitted[-1] if fitted else {}
        joins = last.get("role") == role and role != "tool" and "tool_calls" not in last
        if joins or (role == "user" and last.get("role") == "tool"):
            content = "\n\n".join(filter(None, (last["content"], message["content"])))
            fitted[-1] = {**last, **({} if last["role"] == "tool" else message), "content": content}
        else:
            fitted.append(message)
    return fitted


def _without_system(messages: Messages) -> Messages:
    """The system message at the beginning of the first message of the user."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return messages
    content = "\n\n".join(filter(None, (messages[0]["content"], messages[1]["content"])))
    return [{**messages[1], "content": content}, *messages[2:]]
