"""Anthropic's API: messages and counting their tokens. Reads its requests and words its answers."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from ifprune_mlx.serving.engine.request import Request, RequestOutput, RequestStats
from ifprune_mlx.serving.http.chat_rendering import AUTO, NAMED, NONE, REQUIRED, Conversation, Tools
from ifprune_mlx.serving.http.error_responses import JsonResponse, error_body, to_json
from ifprune_mlx.serving.http.fields import Fields, RequestError, read_sampling, read_stops, read_wish
from ifprune_mlx.serving.http.service import Service
from ifprune_mlx.serving.http.streaming import AnswerResponse, event, read_fields
from ifprune_mlx.serving.http.tools import ToolCall, ToolSplitter

_MOST_TOKENS = 2**31
_CHOICES = {"auto": AUTO, "any": REQUIRED, "tool": NAMED, "none": NONE}


class Anthropic:
    """The endpoints, for one service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, request: HTTPRequest) -> AnswerResponse:
        """POST /v1/messages."""
        service, fields = self._service, await read_fields(request)
        service.check_model(fields.text("model"))
        fields.required("max_tokens")
        max_tokens = fields.integer("max_tokens", 1, _MOST_TOKENS) or 1
        conversation = _conversation(fields)
        wish = service.wish(read_wish(fields, request.headers))
        sampling = read_sampling(fields, service.defaults.sampling, service.vocabulary)
        stops = read_stops(fields, "stop_sequences")
        stream = bool(fields.flag("stream"))
        tokens = await service.aside(lambda: service.renderer.conversation(conversation))
        choice = await service.aside(lambda: service.choice(wish))
        job = Request(
            tokens=tokens,
            instruction=conversation.instruction(choice.policy),
            choice=choice,
            sampling=sampling,
            max_tokens=max_tokens,
            stop=stops + service.renderer.stops(conversation.tools),
        )
        writer = _MessageWriter(service, job, service.renderer.splitter(conversation.tools), stops)
        return AnswerResponse(service, [job], writer, stream)

    async def count(self, request: HTTPRequest) -> Response:
        """POST /v1/messages/count_tokens."""
        service, fields = self._service, await read_fields(request)
        service.check_model(fields.text("model"))
        conversation = _conversation(fields)
        tokens = await service.aside(lambda: service.renderer.conversation(conversation))
        return JsonResponse({"input_tokens": len(tokens)})


class _MessageWriter:
    """A message; as events, one content block after the other."""

    def __init__(self, service: Service, job: Request, splitter: ToolSplitter | None, stops: tuple[str, ...]) -> None:
        self._service, self._job, self._splitter, self._stops = service, job, splitter, stops
        self._blocks: list[dict[str, Any]] = []
        self._open = False
        self._stats: RequestStats | None = None
        self._head = {
            "id": f"msg_{uuid.uuid4().hex[:24]}",
            "type": "message",
            "role": "assistant",
            "model": service.name,
        }

    def start(self) -> Iterator[bytes]:
        """An empty message."""
        usage = {"input_tokens": len(self._job.tokens), "output_tokens": 0}
        message: dict[str, Any] = {
            **self._head,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        yield _event("message_start", message=message)

    def take(self, index: int, piece: RequestOutput) -> Iterator[bytes]:
        """Text and calls, as they become certain."""
        for part in self._parts(piece):
            tool = _tool_use(part) if isinstance(part, ToolCall) else None
            if tool is not None:
                yield from self._close()
                self._blocks.append(tool)
                at = len(self._blocks) - 1
                yield _event("content_block_start", index=at, content_block={**tool, "input": {}})
                delta = {"type": "input_json_delta", "partial_json": json.dumps(tool["input"], ensure_ascii=False)}
                yield _event("content_block_delta", index=at, delta=delta)
                yield _event("content_block_stop", index=at)
                continue
            text = part if isinstance(part, str) else part.arguments
            if not self._open:
                self._open = True
                self._blocks.append({"type": "text", "text": ""})
                start = {"type": "text", "text": ""}
                yield _event("content_block_start", index=len(self._blocks) - 1, content_block=start)
            self._blocks[-1]["text"] += text
            delta = {"type": "text_delta", "text": text}
            yield _event("content_block_delta", index=len(self._blocks) - 1, delta=delta)
        self._stats = piece.stats

    def end(self) -> Iterator[bytes]:
        """Why it ends, the usage and the figures."""
        yield from self._close()
        yield _event("message_delta", delta=self._ending(), usage=self._usage(), **self._figures())
        yield _event("message_stop")

    def error(self, error: RequestError) -> bytes:
        """A failure on the way; clients raise it."""
        return event(to_json(error_body("/v1/messages", error)), "error")

    def whole(self) -> dict[str, Any]:
        """The message object."""
        return {**self._head, "content": self._blocks, **self._ending(), "usage": self._usage(), **self._figures()}

    def _parts(self, piece: RequestOutput) -> Iterator[str | ToolCall]:
        if self._splitter is None:
            if piece.text:
                yield piece.text
            return
        yield from self._splitter.feed(piece.text)
        if piece.stats is not None:
            yield from self._splitter.finish()

    def _close(self) -> Iterator[bytes]:
        if self._open:
            self._open = False
            yield _event("content_block_stop", index=len(self._blocks) - 1)

    def _ending(self) -> dict[str, Any]:
        stats = self._stats
        matched = stats.matched_stop if stats is not None and stats.matched_stop in self._stops else None
        if matched is not None:
            reason = "stop_sequence"
        elif stats is not None and stats.finish_reason == "length":
            reason = "max_tokens"
        else:
            reason = "tool_use" if any(block["type"] == "tool_use" for block in self._blocks) else "end_turn"
        return {"stop_reason": reason, "stop_sequence": matched}

    def _usage(self) -> dict[str, Any]:
        cached = self._stats.cached_tokens if self._stats is not None else 0
        return {
            "input_tokens": len(self._job.tokens) - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": self._stats.completion_tokens if self._stats is not None else 0,
        }

    def _figures(self) -> dict[str, Any]:
        return {} if self._stats is None else {"ifprune": self._service.figures(self._stats)}


def _event(name: str, **fields: Any) -> bytes:
    return event(to_json({"type": name, **fields}), name)


def _tool_use(call: ToolCall) -> dict[str, Any] | None:
    """The block of a call; None if its arguments are no object, which this API cannot say."""
    try:
        given = json.loads(call.arguments)
    except (ValueError, RecursionError):
        return None
    if not isinstance(given, dict):
        return None
    return {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": call.name, "input": given}


def _conversation(fields: Fields) -> Conversation:
    fields.required("messages")
    given = fields.objects("messages") or []
    if not given:
        raise fields.refuse("messages", "is empty; say something to answer")
    messages: list[dict[str, Any]] = []
    if fields.raw("system") is not None:
        messages.append({"role": "system", "content": _text(fields, "system")})
    names: dict[str, str] = {}
    for one in given:
        one.required("role")
        one.required("content")
        role = one.one_of("role", ("user", "assistant"))
        messages += _assistant(one, names) if role == "assistant" else _user(one, names)
    prefill = ""
    if messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:
        prefill = messages.pop()["content"]
    if not any(message["role"] == "user" for message in messages):
        raise fields.refuse("messages", "need a message of the user to answer")
    return Conversation(messages, _tools(fields), prefill)


def _text(fields: Fields, field: str) -> str:
    """A string, or the text of text blocks."""
    value = fields.raw(field)
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise fields.refuse(field, "must be a string or an array of text blocks")
    return "".join(_block_text(block) for block in fields.objects(field) or [])


def _block_text(block: Fields) -> str:
    block.required("type")
    kind = block.text("type") or ""
    if kind != "text":
        raise block.refuse("type", f"{kind[:40]!r} is not supported here; this model reads text only")
    block.required("text")
    return block.text("text") or ""


def _blocks(message: Fields) -> list[Fields] | None:
    """The content blocks; None where the content is a string."""
    content = message.raw("content")
    if isinstance(content, str):
        return None
    if not isinstance(content, list):
        raise message.refuse("content", "must be a string or an array of blocks")
    return message.objects("content")


def _user(message: Fields, names: dict[str, str]) -> list[dict[str, Any]]:
    """A user's message; the results of tools become messages of their own before it."""
    blocks = _blocks(message)
    if blocks is None:
        return [{"role": "user", "content": message.text("content") or ""}]
    results: list[dict[str, Any]] = []
    text, said = "", False
    for block in blocks:
        if block.text("type") != "tool_result":
            text, said = text + _block_text(block), True
            continue
        block.required("tool_use_id")
        called = block.text("tool_use_id") or ""
        content = "" if block.raw("content") is None else _text(block, "content")
        result = {"role": "tool", "content": content, "tool_call_id": called}
        results.append({**result, "name": names[called]} if called in names else result)
    return [*results, {"role": "user", "content": text}] if said or not results else results


def _assistant(message: Fields, names: dict[str, str]) -> list[dict[str, Any]]:
    blocks = _blocks(message)
    if blocks is None:
        return [{"role": "assistant", "content": message.text("content") or ""}]
    text, calls = "", []
    for block in blocks:
        kind = block.text("type")
        if kind in ("thinking", "redacted_thinking"):
            continue
        if kind != "tool_use":
            text += _block_text(block)
            continue
        for needed in ("id", "name", "input"):
            block.required(needed)
        identity, name = block.text("id") or "", block.text("name") or ""
        arguments = (block.object("input") or Fields({})).values()
        names[identity] = name
        calls.append({"type": "function", "id": identity, "function": {"name": name, "arguments": arguments}})
    said = {"role": "assistant", "content": text}
    return [{**said, "tool_calls": calls} if calls else said]


def _tools(fields: Fields) -> Tools:
    functions, names = [], set()
    for tool in fields.objects("tools") or []:
        if tool.text("type") not in (None, "custom"):
            raise tool.refuse("type", "only tools of your own are supported: type 'custom', with an input_schema")
        tool.required("name")
        tool.required("input_schema")
        name = tool.text("name") or ""
        if not name:
            raise tool.refuse("name", "is empty")
        function: dict[str, Any] = {"name": name, "parameters": (tool.object("input_schema") or Fields({})).values()}
        description = tool.text("description")
        if description is not None:
            function["description"] = description
        names.add(name)
        functions.append({"type": "function", "function": function})
    choice = fields.object("tool_choice")
    if choice is None:
        return Tools(functions, AUTO if functions else NONE)
    choice.required("type")
    how = _CHOICES[choice.one_of("type", tuple(_CHOICES)) or "auto"]
    several = not choice.flag("disable_parallel_tool_use")
    called = choice.text("name") if how == NAMED else None
    if how == NAMED:
        choice.required("name")
        if called not in names:
            raise choice.refuse("name", "is none of the tools")
    if how == REQUIRED and not functions:
        raise choice.refuse("type", "needs tools to choose from")
    return Tools(functions, how if functions else NONE, called, several)
