"""Anthropic's API: messages, and counting their tokens."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from starlette.responses import Response

from ifprune_mlx.serving.engine.request import PromptProgress, Request, RequestOutput
from ifprune_mlx.serving.http.chat_rendering import Conversation, Tools, choose_tools
from ifprune_mlx.serving.http.errors import RequestError, error_body, field_error, to_json
from ifprune_mlx.serving.http.schemas_requests import (
    AssistantTurn,
    CountRequest,
    HeaderOptions,
    MessagesRequest,
    TextPart,
    Thinking,
    ToolResult,
    UserMessage,
)
from ifprune_mlx.serving.http.schemas_responses import Message
from ifprune_mlx.serving.http.service import Service
from ifprune_mlx.serving.http.streaming import AnswerFormat, AnswerSoFar, StreamingAnswer, sse
from ifprune_mlx.serving.http.tools import ToolCall


class Anthropic:
    """The endpoints of one service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, body: MessagesRequest, headers: HeaderOptions) -> Response:
        """Answer a conversation, in Anthropic's form."""
        return await self._service.in_thread(self._create, body, headers)

    def _create(self, body: MessagesRequest, headers: HeaderOptions) -> Response:
        service, conversation = self._service, _conversation(body)
        asked = body.output_format or (body.output_config and body.output_config.format)
        if asked:
            if conversation.prefill:
                raise field_error("messages", "end with a beginning of the answer, which a JSON schema excludes")
            conversation = replace(conversation, schema=asked.json_schema)
        stops = body.stop_sequences or []
        render = partial(service.renderer.constrained, conversation)
        requests = service.requests(body, headers, render, max_tokens=body.max_tokens, stop=stops)
        splitter = service.renderer.splitter(conversation.tools)
        return StreamingAnswer(
            service, requests, _MessageFormat(service, requests[0], stops), bool(body.stream), [splitter]
        )

    async def count(self, body: CountRequest) -> dict[str, int]:
        """Count a conversation's tokens."""
        return {"input_tokens": await self._service.in_thread(self._count, body)}

    def _count(self, body: CountRequest) -> int:
        self._service.check_model(body.model)
        [prompt] = self._service.renderer.conversation(_conversation(body))
        return len(prompt.tokens)


@dataclass
class _MessageFormat(AnswerFormat):
    """A message; as events, one content block after the other."""

    service: Service
    request: Request
    stops: Sequence[str]
    block = -1  # index of the last block that was started
    text_open = False  # that block is not closed yet

    def start(self) -> Iterator[bytes]:
        usage = {"input_tokens": len(self.request.tokens), "output_tokens": 0}
        empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        yield _event("message_start", message={**self._head(), **empty})

    def waiting(self, progress: PromptProgress) -> bytes:
        return _event("ping")

    def events(self, answer: AnswerSoFar, parts: Sequence[str | ToolCall], output: RequestOutput) -> Iterator[bytes]:
        for content in _blocks(parts):
            called = content["type"] == "tool_use"
            if called:
                yield from self._close_text()
                text = json.dumps(content["input"], ensure_ascii=False)
                delta = {"type": "input_json_delta", "partial_json": text}
            else:
                delta = {"type": "text_delta", "text": content["text"]}
            if not self.text_open:
                self.block += 1
                empty: dict[str, Any] = {"input": {}} if called else {"text": ""}
                yield _event("content_block_start", index=self.block, content_block={**content, **empty})
            self.text_open = True
            yield _event("content_block_delta", index=self.block, delta=delta)
            if called:
                yield from self._close_text()

    def end(self, answers: Sequence[AnswerSoFar]) -> Iterator[bytes]:
        yield from self._close_text()
        reason, figures = self._ending(answers[0])
        yield _event("message_delta", delta=reason, **figures)
        yield _event("message_stop")

    def error(self, error: RequestError) -> bytes:
        return sse(to_json(error_body("/v1/messages", error)), "error")

    def whole(self, answers: Sequence[AnswerSoFar]) -> Message:
        reason, figures = self._ending(answers[0])
        return Message.model_validate({**self._head(), "content": _blocks(answers[0].parts), **reason, **figures})

    def _head(self) -> dict[str, Any]:
        identity = f"msg_{uuid.uuid4().hex[:24]}"
        return {"id": identity, "type": "message", "role": "assistant", "model": self.service.name}

    def _close_text(self) -> Iterator[bytes]:
        if self.text_open:
            self.text_open = False
            yield _event("content_block_stop", index=self.block)

    def _ending(self, answer: AnswerSoFar) -> tuple[dict[str, Any], dict[str, Any]]:
        """The stop reason of an answer; its usage and figures."""
        stats = answer.complete
        matched = stats.matched_stop if stats.matched_stop in self.stops else None
        reason = "max_tokens" if stats.finish_reason == "length" else "end_turn"
        if matched is not None:
            reason = "stop_sequence"
        elif reason == "end_turn" and any(block["type"] == "tool_use" for block in _blocks(answer.parts)):
            reason = "tool_use"
        usage = {
            "input_tokens": stats.prompt_tokens - stats.cached_tokens,
            "cache_read_input_tokens": stats.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": stats.completion_tokens,
        }
        ending = {"stop_reason": reason, "stop_sequence": matched}
        return ending, {"usage": usage, "ifprune": self.service.figures(stats)}


def _event(name: str, **fields: Any) -> bytes:
    return sse(to_json({"type": name, **fields}), name)


def _blocks(parts: Sequence[str | ToolCall]) -> list[dict[str, Any]]:
    """Make content blocks. A call whose arguments are not a JSON object becomes text."""
    blocks: list[dict[str, Any]] = []
    for part in parts:
        text = part if isinstance(part, str) else part.arguments
        if isinstance(part, ToolCall):
            try:
                given = json.loads(part.arguments)
            except (ValueError, RecursionError):
                given = None
            if isinstance(given, dict):
                identity = f"toolu_{uuid.uuid4().hex[:24]}"
                blocks.append({"type": "tool_use", "id": identity, "name": part.name, "input": given})
                continue
        if blocks and blocks[-1]["type"] == "text":
            blocks[-1]["text"] += text
        else:
            blocks.append({"type": "text", "text": text})
    return blocks


def _conversation(body: CountRequest) -> Conversation:
    """Convert the messages and tools to a chat template's form."""
    messages: list[dict[str, Any]] = []
    if body.system is not None:
        messages.append({"role": "system", "content": _text(body.system)})
    names: dict[str, str] = {}
    for given in body.messages:
        if isinstance(given, UserMessage):
            messages += _user_messages(given, names)
        else:
            messages.append(_assistant_message(given, names))
    prefill = ""
    if messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:
        prefill = messages.pop()["content"]
    if not any(message["role"] == "user" for message in messages):
        raise field_error("messages", "need a message of the user to answer")
    return Conversation(messages, _tools(body), prefill)


def _text(content: str | list[TextPart] | None) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content or [])


def _user_messages(given: UserMessage, names: dict[str, str]) -> list[dict[str, Any]]:
    """Convert a user's message. Tool results become separate messages before it."""
    if isinstance(given.content, str):
        return [{"role": "user", "content": given.content}]
    results: list[dict[str, Any]] = []
    for block in given.content:
        if isinstance(block, ToolResult):
            result = {"role": "tool", "content": _text(block.content), "tool_call_id": block.tool_use_id}
            known = {"name": names[block.tool_use_id]} if block.tool_use_id in names else {}
            results.append({**result, **known})
    texts = [block.text for block in given.content if isinstance(block, TextPart)]
    return [*results, {"role": "user", "content": "".join(texts)}] if texts or not results else results


def _assistant_message(given: AssistantTurn, names: dict[str, str]) -> dict[str, Any]:
    """Convert an earlier answer. `names` gets the names of the called tools, by call id."""
    if isinstance(given.content, str):
        return {"role": "assistant", "content": given.content}
    text, calls = "", []
    for block in given.content:
        if isinstance(block, TextPart):
            text += block.text
        elif not isinstance(block, Thinking):
            names[block.id] = block.name
            function = {"name": block.name, "arguments": block.input}
            calls.append({"type": "function", "id": block.id, "function": function})
    message = {"role": "assistant", "content": text}
    return {**message, "tool_calls": calls} if calls else message


def _tools(body: CountRequest) -> Tools:
    functions: list[dict[str, Any]] = []
    for tool in body.tools or []:
        described = {} if tool.description is None else {"description": tool.description}
        strict = {"strict": True} if tool.strict else {}
        function = {"name": tool.name, "parameters": tool.input_schema, **described, **strict}
        functions.append({"type": "function", "function": function})
    choice = body.tool_choice
    if choice is None:
        return Tools(functions)
    param, single = f"tool_choice.{'name' if choice.type == 'tool' else 'type'}", bool(choice.disable_parallel_tool_use)
    return choose_tools(functions, choice.type, choice.name, single=single, param=param)
