"""Anthropic's API: messages, and counting their tokens."""

from __future__ import annotations

import base64
import hashlib
import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from starlette.responses import Response

from ifprune_mlx.serving.engine.request import PromptProgress, Request, RequestOutput
from ifprune_mlx.serving.http.chat_rendering import Conversation, ThinkingOptions, Tools, choose_tools
from ifprune_mlx.serving.http.errors import RequestError, error_body, field_error, log, to_json
from ifprune_mlx.serving.http.schemas_requests import (
    AssistantTurn,
    CountRequest,
    HeaderOptions,
    MessagesRequest,
    OtherBlock,
    TextPart,
    ThinkingBlock,
    ToolResult,
    ToolUse,
    UserMessage,
)
from ifprune_mlx.serving.http.schemas_responses import Message
from ifprune_mlx.serving.http.service import Service
from ifprune_mlx.serving.http.streaming import AnswerFormat, AnswerSoFar, Part, StreamingAnswer, sse
from ifprune_mlx.serving.http.template_fitting import call_id, earlier_call, text_of
from ifprune_mlx.serving.http.tools import ToolCall

_MOST_SAID = 100  # lines of the log that are said once


class Anthropic:
    """The endpoints of one service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._said: set[str] = set()  # in the log

    async def create(self, body: MessagesRequest, headers: HeaderOptions) -> Response:
        """Answer a conversation, in Anthropic's form."""
        return await self._service.in_thread(self._create, body, headers)

    def _create(self, body: MessagesRequest, headers: HeaderOptions) -> Response:
        service, conversation = self._service, self._conversation(body)
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
        [prompt] = self._service.renderer.conversation(self._conversation(body))
        return len(prompt.tokens)

    def _conversation(self, body: CountRequest) -> Conversation:
        """Convert the messages and tools to a chat template's form.

        Raises:
            RequestError: if there is nothing to answer, or the answer cannot be had.
        """
        left_out = [tool.type for tool in body.tools or [] if isinstance(tool, OtherBlock)]
        for kind in left_out:
            self._say_once(f"tools of type {kind[:64]!r} are left out: they are not of the client's own")
        if body.mcp_servers:
            self._say_once("mcp_servers are left out: this server calls no others")
        conversation, switch = _conversation(body), body.thinking
        effort = body.output_config.effort if body.output_config and self._service.renderer.thinks else None
        if switch is None:
            return replace(conversation, thinking=ThinkingOptions(effort=effort))
        enabled = switch.enabled
        if enabled and not self._service.renderer.thinks:
            # Agents ask all models for it. They may think, and need not.
            self._say_once("a client asks for thinking, but this model does not think before it answers")
            enabled = None
        if enabled and (conversation.prefill or conversation.tools.forced):  # Anthropic refuses both, too
            param = "messages" if conversation.prefill else "tool_choice"
            raise field_error(param, "says how the answer begins, so the model cannot think before; disable thinking")
        return replace(conversation, thinking=ThinkingOptions(enabled, effort, switch.budget_tokens))

    def _say_once(self, message: str) -> None:
        if message not in self._said and len(self._said) < _MOST_SAID:
            self._said.add(message)
            log.warning("%s", message)


@dataclass
class _MessageFormat(AnswerFormat):
    """A message; as events, one content block after the other."""

    service: Service
    request: Request
    stops: Sequence[str]
    block = -1  # index of the last block that was started
    open = ""  # that block's type, if it is not closed yet
    thought = ""  # what it says, if it holds thoughts

    def start(self) -> Iterator[bytes]:
        usage = {"input_tokens": len(self.request.tokens), "output_tokens": 0}
        empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        yield _event("message_start", message={**self._head(), **empty})

    def waiting(self, progress: PromptProgress) -> bytes:
        return _event("ping")

    def events(self, answer: AnswerSoFar, parts: Sequence[Part], output: RequestOutput) -> Iterator[bytes]:
        for content in _blocks(parts):
            kind = content["type"]
            if kind == "tool_use":
                text = json.dumps(content["input"], ensure_ascii=False)
                delta = {"type": "input_json_delta", "partial_json": text}
                empty: dict[str, Any] = {"input": {}}
            elif kind == "thinking":
                delta = {"type": "thinking_delta", "thinking": content["thinking"]}
                empty = {"thinking": "", "signature": ""}
            else:
                delta, empty = {"type": "text_delta", "text": content["text"]}, {"text": ""}
            if self.open != kind or kind == "tool_use":
                yield from self._close()
                self.block, self.open = self.block + 1, kind
                yield _event("content_block_start", index=self.block, content_block={**content, **empty})
            yield _event("content_block_delta", index=self.block, delta=delta)
            if kind == "thinking":
                self.thought += content["thinking"]
            if kind == "tool_use":
                yield from self._close()

    def end(self, answers: Sequence[AnswerSoFar]) -> Iterator[bytes]:
        yield from self._close()
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

    def _close(self) -> Iterator[bytes]:
        if self.open == "thinking":
            delta = {"type": "signature_delta", "signature": _signature(self.thought)}
            yield _event("content_block_delta", index=self.block, delta=delta)
        if self.open:
            yield _event("content_block_stop", index=self.block)
        self.open, self.thought = "", ""

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


def _signature(thoughts: str) -> str:
    """Clients send thoughts back with it; it is not checked."""
    return base64.b64encode(hashlib.sha256(thoughts.encode()).digest()).decode()


def _blocks(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Make content blocks. A call whose arguments are not a JSON object becomes text."""
    blocks: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, ToolCall):
            try:
                given = json.loads(part.arguments)
            except (ValueError, RecursionError):
                given = None
            if isinstance(given, dict):
                blocks.append(
                    {"type": "tool_use", "id": call_id(uuid.uuid4().bytes), "name": part.name, "input": given}
                )
                continue
            kind, text = "text", part.arguments
        else:
            kind, text = ("text", part) if isinstance(part, str) else ("thinking", part.text)
        if blocks and blocks[-1]["type"] == kind:
            blocks[-1][kind] += text
        else:
            blocks.append({"type": kind, kind: text})
    for block in blocks:
        if block["type"] == "thinking":
            block["signature"] = _signature(block["thinking"])
    return blocks


def _conversation(body: CountRequest) -> Conversation:
    """Convert the messages and tools to a chat template's form."""
    messages: list[dict[str, Any]] = []
    if body.system is not None:
        messages.append({"role": "system", "content": text_of(body.system, "\n")})
    names: dict[str, str] = {}
    for given in body.messages:
        if isinstance(given, UserMessage):
            messages += _user_messages(given, names)
        elif isinstance(given, AssistantTurn):
            messages.append(_assistant_message(given, names))
        else:
            messages.append({"role": "system", "content": text_of(given.content, "\n")})
    prefill = ""
    if messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:
        prefill = messages.pop()["content"]
    if not any(message["role"] in ("user", "tool") for message in messages):
        raise field_error("messages", "need a message of the user to answer")
    return Conversation(messages, _tools(body), prefill)


def _user_messages(given: UserMessage, names: dict[str, str]) -> list[dict[str, Any]]:
    """Convert a user's message. Tool results become separate messages before it."""
    if isinstance(given.content, str):
        return [{"role": "user", "content": given.content}]
    results: list[dict[str, Any]] = []
    rest: list[TextPart | OtherBlock] = []
    for block in given.content:
        if isinstance(block, ToolResult):
            text = text_of(block.content, "\n")
            if block.is_error and "error" not in text.lower():
                text = f"Error: {text}"
            result = {"role": "tool", "content": text, "tool_call_id": block.tool_use_id}
            known = {"name": names[block.tool_use_id]} if block.tool_use_id in names else {}
            results.append({**result, **known})
        else:
            rest.append(block)
    return [*results, {"role": "user", "content": text_of(rest, "\n")}] if rest or not results else results


def _assistant_message(given: AssistantTurn, names: dict[str, str]) -> dict[str, Any]:
    """Convert an earlier answer. `names` gets the names of the called tools, by call id."""
    if isinstance(given.content, str):
        return {"role": "assistant", "content": given.content}
    rest: list[TextPart | OtherBlock] = []
    calls, thoughts = [], ""
    for block in given.content:
        if isinstance(block, ThinkingBlock):
            thoughts += block.thinking or ""
        elif isinstance(block, ToolUse):
            names[block.id] = block.name
            calls.append(earlier_call(block.id, block.name, block.input))
        elif block.type != "redacted_thinking":
            rest.append(block)
    message = {"role": "assistant", "content": text_of(rest)}
    if thoughts:
        message["reasoning_content"] = thoughts
    return {**message, "tool_calls": calls} if calls else message


def _tools(body: CountRequest) -> Tools:
    functions: list[dict[str, Any]] = []
    for tool in body.tools or []:
        if isinstance(tool, OtherBlock):
            continue
        described = {} if tool.description is None else {"description": tool.description}
        strict = {"strict": True} if tool.strict else {}
        function = {"name": tool.name, "parameters": tool.input_schema, **described, **strict}
        functions.append({"type": "function", "function": function})
    choice = body.tool_choice
    if choice is None:
        return Tools(functions)
    param, single = f"tool_choice.{'name' if choice.type == 'tool' else 'type'}", bool(choice.disable_parallel_tool_use)
    return choose_tools(functions, choice.type, choice.name, single=single, param=param)
