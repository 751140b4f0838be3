"""OpenAI's API: chat completions, completions and models. Reads its requests and words its answers."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from ifprune_mlx.serving.engine.request import Request, RequestOutput, RequestStats, TokenLogprob
from ifprune_mlx.serving.http.chat_rendering import AUTO, NAMED, NONE, REQUIRED, Conversation, Tools
from ifprune_mlx.serving.http.error_responses import JsonResponse, error_body, to_json
from ifprune_mlx.serving.http.fields import Fields, RequestError, read_sampling, read_stops, read_wish, seeded
from ifprune_mlx.serving.http.service import Service
from ifprune_mlx.serving.http.streaming import AnswerResponse, event, read_fields
from ifprune_mlx.serving.http.tools import ToolCall, ToolSplitter

_MOST_TOKENS = 2**31
_MOST_LOGPROBS = 20
_UNLIKELY = -9999.0  # what OpenAI says of tokens that cannot be
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class _Asked:
    """What both completion APIs ask for alike."""

    n: int
    stream: bool
    include_usage: bool


class OpenAI:
    """The endpoints, for one service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def chat(self, request: HTTPRequest) -> AnswerResponse:
        """POST /v1/chat/completions."""
        service, fields = self._service, await read_fields(request)
        asked = self._asked(fields)
        _refuse_unsupported(fields, {"functions": "use tools", "function_call": "use tool_choice"})
        _check_response_format(fields)
        conversation = Conversation(_messages(fields), _tools(fields))
        logprobs = _chat_logprobs(fields)
        wish = service.wish(read_wish(fields, request.headers))
        sampling = read_sampling(fields, service.defaults.sampling, service.vocabulary)
        stops = read_stops(fields, "stop")
        max_tokens = self._max_tokens(fields, "max_completion_tokens", "max_tokens")
        tokens = await service.aside(lambda: service.renderer.conversation(conversation))
        choice = await service.aside(lambda: service.choice(wish))
        jobs = [
            Request(
                tokens=tokens,
                instruction=conversation.instruction(choice.policy),
                choice=choice,
                sampling=seeded(sampling, index),
                max_tokens=max_tokens,
                stop=stops + service.renderer.stops(conversation.tools),
                logprobs=logprobs,
            )
            for index in range(asked.n)
        ]
        splitters = [service.renderer.splitter(conversation.tools) for _ in jobs]
        return AnswerResponse(service, jobs, _ChatWriter(service, asked, jobs, splitters), asked.stream)

    async def complete(self, request: HTTPRequest) -> AnswerResponse:
        """POST /v1/completions."""
        service, fields = self._service, await read_fields(request)
        asked = self._asked(fields)
        _refuse_unsupported(fields, {"suffix": "ask for it in the prompt", "echo": "put the prompt before the text"})
        best_of = fields.integer("best_of", 1, 2**31)
        if best_of not in (None, asked.n):
            raise fields.refuse("best_of", "is not supported; leave it out, or ask for n answers")
        logprobs = fields.integer("logprobs", 0, _MOST_LOGPROBS)
        prompts = _prompts(fields, service.vocabulary)
        self._check_count(fields, len(prompts) * asked.n)
        wish = service.wish(read_wish(fields, request.headers))
        sampling = read_sampling(fields, service.defaults.sampling, service.vocabulary)
        stops = read_stops(fields, "stop")
        max_tokens = self._max_tokens(fields, "max_tokens")
        choice = await service.aside(lambda: service.choice(wish))

        def encoded() -> list[tuple[tuple[int, ...], str]]:
            return [(service.renderer.prompt(prompt), service.renderer.instruction(prompt)) for prompt in prompts]

        jobs = [
            Request(tokens, instruction, choice, seeded(sampling, index), max_tokens, stops, logprobs)
            for tokens, instruction in await service.aside(encoded)
            for index in range(asked.n)
        ]
        return AnswerResponse(service, jobs, _TextWriter(service, asked, jobs), asked.stream)

    async def models(self, request: HTTPRequest) -> Response:
        """GET /v1/models; in the words of both APIs at once."""
        model = self._model()
        return JsonResponse(
            {
                "object": "list",
                "data": [model],
                "has_more": False,
                "first_id": model["id"],
                "last_id": model["id"],
            }
        )

    async def model(self, request: HTTPRequest) -> Response:
        """GET /v1/models/{model}."""
        self._service.check_model(request.path_params["model"])
        return JsonResponse(self._model())

    def _model(self) -> dict[str, Any]:
        service = self._service
        wish = service.defaults.wish
        keep = service.model.keep(wish.density, wish.active_parameters)
        return {
            "id": service.name,
            "object": "model",
            "created": service.started,
            "owned_by": "ifprune",
            "type": "model",
            "display_name": service.name,
            "created_at": datetime.fromtimestamp(service.started, timezone.utc).isoformat().replace("+00:00", "Z"),
            "ifprune": {
                "density": sum(keep) / sum(spec.d_ffn for spec in service.model.checkpoint.layout.ffns),
                "active_parameters": service.model.checkpoint.active_parameters(keep),
                "total_parameters": service.model.total_parameters,
                "context_length": service.model.context_length,
            },
        }

    def _asked(self, fields: Fields) -> _Asked:
        self._service.check_model(fields.text("model"))
        n = fields.integer("n", 1, 2**31)
        self._check_count(fields, n or 1)
        options = fields.object("stream_options")
        stream = bool(fields.flag("stream"))
        if options is not None and not stream:
            raise fields.refuse("stream_options", "needs stream to be true")
        return _Asked(n or 1, stream, bool(options and options.flag("include_usage")))

    def _check_count(self, fields: Fields, answers: int) -> None:
        if answers > self._service.jobs:
            raise fields.refuse(
                "n", f"that is {answers} answers; this server gives at most {self._service.jobs} at once"
            )

    def _max_tokens(self, fields: Fields, *names: str) -> int:
        for name in names:
            value = fields.integer(name, 1, _MOST_TOKENS)
            if value is not None:
                return value
        return self._service.defaults.max_tokens


@dataclass
class _Said:
    """What one answer has come to so far."""

    text: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[TokenLogprob] = field(default_factory=list)
    stats: RequestStats | None = None

    @property
    def finish_reason(self) -> str | None:
        if self.stats is None:
            return None
        return "tool_calls" if self.calls and self.stats.finish_reason == "stop" else self.stats.finish_reason


class _OpenAIWriter(ABC):
    """What both completion APIs word alike."""

    kind = ""
    prefix = ""

    def __init__(self, service: Service, asked: _Asked, jobs: Sequence[Request]) -> None:
        self._service, self._asked, self._jobs = service, asked, jobs
        self._said = [_Said() for _ in jobs]
        self._logprobs = jobs[0].logprobs is not None
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.kind,
            "created": int(time.time()),
            "model": service.name,
        }

    def end(self) -> Iterator[bytes]:
        """The usage, if it was asked for, and what ends every stream."""
        if self._asked.include_usage:
            yield event(to_json({**self._head, "choices": [], "usage": self._usage()}))
        yield event(b"[DONE]")

    def error(self, error: RequestError) -> bytes:
        """A failure on the way; clients raise it."""
        return event(to_json(error_body("", error)))

    def whole(self) -> dict[str, Any]:
        """The completion object."""
        choices = []
        for index, said in enumerate(self._said):
            choice = self._choice(index, said)
            if len(self._said) > 1 and said.stats is not None:
                choice["ifprune"] = self._service.figures(said.stats)
            choices.append(choice)
        return {**self._head, "choices": choices, "usage": self._usage(), **self._figures(self._said[0].stats)}

    @abstractmethod
    def _choice(self, index: int, said: _Said) -> dict[str, Any]:
        """One answer of the completion object."""

    def _chunk(self, choice: dict[str, Any], stats: RequestStats | None = None) -> bytes:
        usage = {"usage": None} if self._asked.include_usage else {}
        return event(to_json({**self._head, "choices": [choice], **usage, **self._figures(stats)}))

    def _figures(self, stats: RequestStats | None) -> dict[str, Any]:
        return {} if stats is None else {"ifprune": self._service.figures(stats)}

    def _usage(self) -> dict[str, Any]:
        stats = [said.stats for said in self._said if said.stats is not None]
        # The answers to one prompt read it once.
        prompt = sum(len(job.tokens) for job in self._jobs[:: self._asked.n])
        completion = sum(each.completion_tokens for each in stats)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(each.cached_tokens for each in stats[:: self._asked.n])},
        }


class _ChatWriter(_OpenAIWriter):
    """Chat completions."""

    prefix = "chatcmpl"

    def __init__(
        self, service: Service, asked: _Asked, jobs: Sequence[Request], splitters: Sequence[ToolSplitter | None]
    ) -> None:
        self.kind = "chat.completion.chunk" if asked.stream else "chat.completion"
        super().__init__(service, asked, jobs)
        self._splitters = splitters

    def start(self) -> Iterator[bytes]:
        """Who speaks."""
        for index in range(len(self._jobs)):
            yield self._chunk(_delta(index, {"role": "assistant", "content": ""}))

    def take(self, index: int, piece: RequestOutput) -> Iterator[bytes]:
        """Text and calls, as they become certain."""
        said, tokens = self._said[index], list(piece.tokens)
        said.tokens += tokens
        for part in self._parts(index, piece):
            if isinstance(part, str):
                said.text += part
                yield self._chunk(_delta(index, {"content": part}, None, self._content(tokens)))
            else:
                call = {"id": f"call_{uuid.uuid4().hex[:24]}", **_as_call(part)}
                said.calls.append(call)
                delta = {"tool_calls": [{"index": len(said.calls) - 1, **call}]}
                yield self._chunk(_delta(index, delta, None, self._content(tokens)))
            tokens = []
        if tokens and self._logprobs:
            yield self._chunk(_delta(index, {}, None, self._content(tokens)))
        if piece.stats is not None:
            said.stats = piece.stats
            yield self._chunk(_delta(index, {}, said.finish_reason), piece.stats)

    def _parts(self, index: int, piece: RequestOutput) -> Iterator[str | ToolCall]:
        splitter = self._splitters[index]
        if splitter is None:
            if piece.text:
                yield piece.text
            return
        yield from splitter.feed(piece.text)
        if piece.stats is not None:
            yield from splitter.finish()

    def _choice(self, index: int, said: _Said) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": said.text, "refusal": None}
        if said.calls:
            message["tool_calls"] = said.calls
            message["content"] = said.text or None
        return {
            "index": index,
            "message": message,
            "logprobs": self._content(said.tokens),
            "finish_reason": said.finish_reason,
        }

    def _content(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return {
            "content": [
                {
                    **_logprob(token.text, token.logprob),
                    "top_logprobs": [_logprob(text, logprob) for _, text, logprob in token.top],
                }
                for token in tokens
            ],
            "refusal": None,
        }


class _TextWriter(_OpenAIWriter):
    """Completions."""

    kind = "text_completion"
    prefix = "cmpl"

    def start(self) -> Iterator[bytes]:
        """Nothing goes before the text."""
        return iter(())

    def take(self, index: int, piece: RequestOutput) -> Iterator[bytes]:
        """Text, as it becomes certain."""
        said, tokens = self._said[index], list(piece.tokens)
        offset = sum(len(token.text) for token in said.tokens)
        said.text += piece.text
        said.tokens += tokens
        said.stats = piece.stats
        if piece.text or (tokens and self._logprobs) or piece.stats is not None:
            choice = {
                "index": index,
                "text": piece.text,
                "logprobs": self._content(tokens, offset),
                "finish_reason": said.finish_reason,
            }
            yield self._chunk(choice, piece.stats)

    def _choice(self, index: int, said: _Said) -> dict[str, Any]:
        return {
            "index": index,
            "text": said.text,
            "logprobs": self._content(said.tokens, 0),
            "finish_reason": said.finish_reason,
        }

    def _content(self, tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [max(token.logprob, _UNLIKELY) for token in tokens],
            "top_logprobs": [{text: max(value, _UNLIKELY) for _, text, value in token.top} for token in tokens],
            "text_offset": offsets,
        }


def _delta(
    index: int, delta: dict[str, Any], finish_reason: str | None = None, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _logprob(text: str, logprob: float) -> dict[str, Any]:
    # Half a character is shown as U+FFFD, which is not what its bytes are.
    whole = "\ufffd" not in text
    return {"token": text, "logprob": max(logprob, _UNLIKELY), "bytes": list(text.encode()) if whole else None}


def _as_call(call: ToolCall) -> dict[str, Any]:
    return {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _messages(fields: Fields) -> list[dict[str, Any]]:
    """The messages as a chat template takes them."""
    fields.required("messages")
    given = fields.objects("messages") or []
    if not given:
        raise fields.refuse("messages", "is empty; say something to answer")
    messages: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for one in given:
        one.required("role")
        role = one.one_of("role", _ROLES)
        message: dict[str, Any] = {"role": "system" if role == "developer" else role, "content": _content(one)}
        if role == "assistant" and one.raw("tool_calls"):
            message["tool_calls"] = [_called(call, names) for call in one.objects("tool_calls") or []]
        elif role == "tool":
            one.required("tool_call_id")
            called = one.text("tool_call_id") or ""
            message["tool_call_id"] = called
            if called in names:
                message["name"] = names[called]
        elif one.raw("content") is None:
            one.required("content")
        messages.append(message)
    return messages


def _content(message: Fields) -> str:
    content = message.raw("content")
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise message.refuse("content", "must be a string or an array of text parts")
    return "".join(_part(part) for part in message.objects("content") or [])


def _part(part: Fields) -> str:
    part.required("type")
    kind = part.text("type") or ""
    if kind not in ("text", "refusal"):
        raise part.refuse("type", f"{kind[:40]!r} is not supported; this model reads text only", "unsupported_content")
    part.required(kind)
    return part.text(kind) or ""


def _called(call: Fields, names: dict[str, str]) -> dict[str, Any]:
    """A call of an earlier answer; its id is remembered in `names`."""
    call.required("function")
    function = call.object("function") or Fields({})
    function.required("name")
    name, text = function.text("name") or "", function.text("arguments") or "{}"
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise function.refuse("arguments", "must be the JSON text of an object")
    identity = call.text("id") or ""
    names[identity] = name
    return {"type": "function", "id": identity, "function": {"name": name, "arguments": arguments}}


def _tools(fields: Fields) -> Tools:
    given = fields.objects("tools") or []
    functions, names = [], set()
    for tool in given:
        tool.required("type")
        if tool.text("type") != "function":
            raise tool.refuse("type", "must be 'function'")
        tool.required("function")
        function = tool.object("function") or Fields({})
        function.required("name")
        name = function.text("name") or ""
        if not name:
            raise function.refuse("name", "is empty")
        function.text("description")
        function.object("parameters")
        names.add(name)
        functions.append({"type": "function", "function": function.values()})
    several = fields.flag("parallel_tool_calls") is not False
    choice = fields.raw("tool_choice")
    if choice is None:
        return Tools(functions, AUTO if functions else NONE, None, several)
    if not isinstance(choice, dict):
        how = fields.one_of("tool_choice", (NONE, AUTO, REQUIRED)) or AUTO
        if how == REQUIRED and not functions:
            raise fields.refuse("tool_choice", "needs tools to choose from")
        return Tools(functions, how if functions else NONE, None, several)
    chosen = fields.object("tool_choice") or Fields({})
    if chosen.text("type") != "function":
        raise chosen.refuse("type", "must be 'function'")
    chosen.required("function")
    function = chosen.object("function") or Fields({})
    function.required("name")
    if function.text("name") not in names:
        raise function.refuse("name", "is none of the tools")
    return Tools(functions, NAMED, function.text("name"), several)


def _prompts(fields: Fields, vocabulary: int) -> list[str | list[int]]:
    """The prompts of a completion: a string, strings, token ids, or lists of them."""
    fields.required("prompt")
    prompt = fields.raw("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise fields.refuse("prompt", "must be a string, an array of strings, or an array of token ids")
    if all(isinstance(item, str) for item in prompt):
        return list(prompt)
    rows = prompt if all(isinstance(item, list) for item in prompt) else [prompt]
    for row in rows:
        if not all(type(item) is int and 0 <= item < vocabulary for item in row):
            raise fields.refuse(
                "prompt", f"an array must hold strings, or token ids from 0 to {vocabulary - 1}, and nothing else"
            )
        if not row:
            raise fields.refuse("prompt", "an array of token ids is empty")
    return [list(row) for row in rows]


def _chat_logprobs(fields: Fields) -> int | None:
    wanted, top = fields.flag("logprobs"), fields.integer("top_logprobs", 0, _MOST_LOGPROBS)
    if top and not wanted:
        raise fields.refuse("top_logprobs", "needs logprobs to be true")
    return (top or 0) if wanted else None


def _check_response_format(fields: Fields) -> None:
    form = fields.object("response_format")
    if form is None:
        return
    form.required("type")
    if form.text("type") != "text":
        raise form.refuse("type", "only 'text' is supported; ask for JSON in words, or with a tool")


def _refuse_unsupported(fields: Fields, instead: dict[str, str]) -> None:
    for name, advice in instead.items():
        if fields.raw(name):
            raise fields.refuse(name, f"is not supported; {advice}", "unsupported_parameter")
