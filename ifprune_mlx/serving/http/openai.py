"""OpenAI's API: chat completions, completions and models."""

from __future__ import annotations

import time
import uuid
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from typing import Any, ClassVar

from pydantic import BaseModel
from starlette.responses import Response

from ifprune_mlx.detokenizer import bytes_of
from ifprune_mlx.serving.engine.request import Request, RequestOutput, RequestStats, TokenLogprob
from ifprune_mlx.serving.http.chat_rendering import (
    EFFORTS,
    ChatRenderer,
    Conversation,
    ThinkingOptions,
    choose_tools,
)
from ifprune_mlx.serving.http.errors import RequestError, error_body, field_error, to_json
from ifprune_mlx.serving.http.schemas_requests import (
    AssistantMessage,
    ChatRequest,
    CompletionRequest,
    FunctionMessage,
    HeaderOptions,
    MadeCall,
    TextRequest,
    Tool,
    ToolChoice,
    ToolMessage,
)
from ifprune_mlx.serving.http.schemas_responses import ChatCompletion, TextCompletion
from ifprune_mlx.serving.http.service import Service
from ifprune_mlx.serving.http.streaming import AnswerFormat, AnswerSoFar, Part, StreamingAnswer, sse
from ifprune_mlx.serving.http.template_fitting import call_id, earlier_call, text_of
from ifprune_mlx.serving.http.tools import ToolCall
from ifprune_mlx.thinking import Reasoning

Choice = dict[str, Any]
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
_UNLIKELY = -9999.0  # OpenAI's log-probability of an impossible token


class OpenAI:
    """The endpoints of one service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def chat(self, body: ChatRequest, headers: HeaderOptions) -> Response:
        """Answer a conversation."""
        return await self._service.in_thread(self._chat, body, headers)

    def _chat(self, body: ChatRequest, headers: HeaderOptions) -> Response:
        service, conversation = self._service, _conversation(body)
        conversation = replace(conversation, thinking=_thinking(body, service.renderer))
        if body.top_logprobs and not body.logprobs:
            raise field_error("top_logprobs", "needs logprobs to be true")
        requests = service.requests(
            body,
            headers,
            partial(service.renderer.constrained, conversation),
            n=_answers_per_prompt(body, 1, service.most_answers),
            max_tokens=body.max_completion_tokens or body.max_tokens,
            stop=body.stop_strings,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        splitters = [service.renderer.splitter(conversation.tools) for _ in requests]
        return StreamingAnswer(service, requests, _ChatFormat(service, body, requests), bool(body.stream), splitters)

    async def complete(self, body: TextRequest, headers: HeaderOptions) -> Response:
        """Continue texts."""
        return await self._service.in_thread(self._complete, body, headers)

    def _complete(self, body: TextRequest, headers: HeaderOptions) -> Response:
        service = self._service
        if body.best_of not in (None, body.n or 1):
            raise field_error("best_of", "is not supported; leave it out, or ask for n answers")
        prompts = _prompts(body.prompt, service.vocabulary)
        requests = service.requests(
            body,
            headers,
            lambda policy: service.renderer.prompts(prompts, _schema(body)),
            n=_answers_per_prompt(body, len(prompts), service.most_answers),
            max_tokens=body.max_tokens,
            stop=body.stop_strings,
            logprobs=body.logprobs,
        )
        return StreamingAnswer(service, requests, _TextFormat(service, body, requests), bool(body.stream))

    async def models(self) -> dict[str, Any]:
        """List the served model under each of its names, with the fields of both APIs."""
        names = self._service.names
        cards = [self._card(name) for name in names]
        return {"object": "list", "data": cards, "has_more": False, "first_id": names[0], "last_id": names[-1]}

    async def model(self, model: str) -> dict[str, Any]:
        """Describe the served model by one of its names."""
        self._service.check_model(model)
        return self._card(model if model in self._service.names else self._service.name)

    def _card(self, name: str) -> dict[str, Any]:
        service = self._service
        selection, checkpoint = service.defaults.selection, service.model.checkpoint
        keep = service.model.keep(selection.density, selection.active_parameters)
        selector = selection.selector or checkpoint.default_selector
        return {
            "id": name,
            "object": "model",
            "created": service.started,
            "owned_by": "ifprune",
            "type": "model",
            "display_name": service.name,
            "created_at": datetime.fromtimestamp(service.started, timezone.utc).isoformat().replace("+00:00", "Z"),
            "ifprune": {
                "task": selection.task,
                "dense": bool(selection.dense),
                "policy": selection.policy or "first",
                # What a person's chat begins with: it follows topics where a look at the message tells them.
                "chat_policy": selection.policy or ("auto" if selector == "learned" else "first"),
                "selector": selector,
                "density": sum(keep) / sum(spec.d_ffn for spec in checkpoint.layout.ffns),
                "active_parameters": checkpoint.active_parameters(keep),
                "total_parameters": service.model.total_parameters,
                "context_length": service.model.context_length,
            },
        }


@dataclass
class _CompletionFormat(AnswerFormat):
    """What chat completions and completions share."""

    service: Service
    body: CompletionRequest
    requests: Sequence[Request]
    whole_model: ClassVar[type[ChatCompletion | TextCompletion]]
    chunk_kind: ClassVar[str]

    def __post_init__(self) -> None:
        kind = self.whole_model.model_fields["object"].default
        self.head = {
            "id": f"{'chatcmpl' if kind == 'chat.completion' else 'cmpl'}-{uuid.uuid4().hex}",
            "object": self.chunk_kind if self.body.stream else kind,
            "created": int(time.time()),
            "model": self.service.name,
        }
        self.logprobs = self.requests[0].logprobs is not None
        self.include_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)

    @abstractmethod
    def choices(self, answer: AnswerSoFar, parts: Sequence[Part], output: RequestOutput) -> Iterator[Choice]:
        """The choices for the chunks of one more output."""

    @abstractmethod
    def choice(self, answer: AnswerSoFar) -> Choice:
        """The choice of a complete answer."""

    def events(self, answer: AnswerSoFar, parts: Sequence[Part], output: RequestOutput) -> Iterator[bytes]:
        for choice in self.choices(answer, parts, output):
            yield self.chunk(answer.index, choice, output.stats if choice.get("finish_reason") else None)

    def chunk(self, index: int, choice: Choice, stats: RequestStats | None = None) -> bytes:
        usage = {"usage": None} if self.include_usage else {}
        figures = {} if stats is None else {"ifprune": self.service.figures(stats)}
        whole = {"index": index, "logprobs": None, "finish_reason": None, **choice}
        return sse(to_json({**self.head, "choices": [whole], **usage, **figures}))

    def end(self, answers: Sequence[AnswerSoFar]) -> Iterator[bytes]:
        if self.include_usage:
            yield sse(to_json({**self.head, "choices": [], "usage": self._usage(answers)}))
        yield sse(b"[DONE]")

    def error(self, error: RequestError) -> bytes:
        return sse(to_json(error_body("", error)))

    def whole(self, answers: Sequence[AnswerSoFar]) -> BaseModel:
        figures = [{"ifprune": self.service.figures(answer.complete)} for answer in answers]
        choices = [{"index": answer.index, **self.choice(answer)} for answer in answers]
        if len(answers) > 1:
            choices = [{**choice, **own} for choice, own in zip(choices, figures, strict=True)]
        fields = {**self.head, "choices": choices, "usage": self._usage(answers), **figures[0]}
        return self.whole_model.model_validate(fields)

    def _usage(self, answers: Sequence[AnswerSoFar]) -> dict[str, Any]:
        firsts = [answer.complete for answer in answers[:: self.body.n or 1]]  # a prompt counts once for its n answers
        prompt = sum(stats.prompt_tokens for stats in firsts)
        completion = sum(answer.complete.completion_tokens for answer in answers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(stats.cached_tokens for stats in firsts)},
        }


class _ChatFormat(_CompletionFormat):
    whole_model, chunk_kind = ChatCompletion, "chat.completion.chunk"

    def start(self) -> Iterator[bytes]:
        for index in range(len(self.requests)):
            yield self.chunk(index, {"delta": {"role": "assistant", "content": ""}})

    def choices(self, answer: AnswerSoFar, parts: Sequence[Part], output: RequestOutput) -> Iterator[Choice]:
        tokens = output.tokens
        called = len(answer.calls) - sum(isinstance(part, ToolCall) for part in parts)
        for part in parts:
            if isinstance(part, str):
                delta: dict[str, Any] = {"content": part}
            elif isinstance(part, Reasoning):
                delta = {"reasoning_content": part.text}
            else:
                delta = {"tool_calls": [{"index": called, **_call(part)}]}
                called += 1
            yield {"delta": delta, "logprobs": self._content(tokens)}
            tokens = ()
        if tokens and self.logprobs:
            yield {"delta": {}, "logprobs": self._content(tokens)}
        if output.stats is not None:
            yield {"delta": {}, "finish_reason": _finish_reason(answer)}

    def choice(self, answer: AnswerSoFar) -> Choice:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message |= {"content": answer.text or None, "tool_calls": [_call(call) for call in answer.calls]}
        logprobs = self._content(answer.tokens)
        return {"message": message, "logprobs": logprobs, "finish_reason": _finish_reason(answer)}

    def _content(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = []
        for token in tokens:
            top = [_logprob(text, logprob) for _, text, logprob in token.top]
            content.append({**_logprob(token.text, token.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}


class _TextFormat(_CompletionFormat):
    whole_model, chunk_kind = TextCompletion, "text_completion"

    def choices(self, answer: AnswerSoFar, parts: Sequence[Part], output: RequestOutput) -> Iterator[Choice]:
        if output.text or (output.tokens and self.logprobs) or output.stats is not None:
            logprobs = self._content(answer.tokens, len(answer.tokens) - len(output.tokens))
            yield {"text": output.text, "logprobs": logprobs, "finish_reason": _finish_reason(answer)}

    def choice(self, answer: AnswerSoFar) -> Choice:
        logprobs = self._content(answer.tokens, 0)
        return {"text": answer.text, "logprobs": logprobs, "finish_reason": _finish_reason(answer)}

    def _content(self, tokens: Sequence[TokenLogprob], begin: int) -> dict[str, Any] | None:
        """The log-probabilities of an answer's tokens, from token `begin` on."""
        if not self.logprobs:
            return None
        tokens = tokens[begin:]
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [max(token.logprob, _UNLIKELY) for token in tokens],
            "top_logprobs": [_by_text(token.top) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }


def _finish_reason(answer: AnswerSoFar) -> str | None:
    if answer.stats is None:
        return None
    called = answer.calls and not answer.calls[-1].cut  # agents would run what a stop string has cut
    return "tool_calls" if called and answer.stats.finish_reason == "stop" else answer.stats.finish_reason


def _logprob(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": max(logprob, _UNLIKELY), "bytes": list(bytes_of(text))}


def _by_text(tokens: Sequence[tuple[int, str, float]]) -> dict[str, float]:
    """Log-probabilities by text; of tokens with equal texts, the less likely ones go by their ids."""
    found: dict[str, float] = {}
    for token, text, logprob in tokens:
        found[f"token_id:{token}" if text in found else text] = max(logprob, _UNLIKELY)
    return found


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call_id(uuid.uuid4().bytes), "type": "function", "function": function}


def _answers_per_prompt(body: CompletionRequest, prompts: int, most: int) -> int:
    """`n`; raises RequestError if that makes too many answers."""
    n = body.n or 1
    if body.stream_options is not None and not body.stream:
        raise field_error("stream_options", "needs stream to be true")
    if n * prompts > most:
        raise field_error("n", f"that is {n * prompts} answers; this server gives at most {most} at once")
    return n


def _conversation(body: ChatRequest) -> Conversation:
    """Convert the messages and tools to a chat template's form."""
    messages: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for index, given in enumerate(body.messages):
        text = text_of(given.content, "" if isinstance(given, AssistantMessage) else "\n")
        message: dict[str, Any] = {"role": "system" if given.role == "developer" else given.role, "content": text}
        if isinstance(given, AssistantMessage):
            message["content"] = text or given.refusal or ""
            first_form = [MadeCall(function=given.function_call)] if given.function_call else []
            if calls := given.tool_calls or first_form:
                message["tool_calls"] = [
                    earlier_call(call.id or f"{index} {at}", call.function.name, call.function.arguments)
                    for at, call in enumerate(calls)
                ]
                names |= {call.id or "": call.function.name for call in calls}
            if given.reasoning_content:
                message["reasoning_content"] = given.reasoning_content
        elif isinstance(given, ToolMessage):
            message["tool_call_id"] = given.tool_call_id
            if given.tool_call_id in names:
                message["name"] = names[given.tool_call_id]
        elif isinstance(given, FunctionMessage):  # it follows its call
            message |= {"role": "tool", "tool_call_id": f"{index - 1} 0", "name": given.name}
        messages.append(message)
    functions = [_tool(tool) for tool in body.tools or []]
    choice, single = body.tool_choice, body.parallel_tool_calls is False
    if isinstance(choice, ToolChoice):
        name, param = choice.function.name, "tool_choice.function.name"
        tools = choose_tools(functions, "function", name, single=single, param=param)
    else:
        tools = choose_tools(functions, choice, None, single=single, param="tool_choice")
    return Conversation(messages, tools, schema=_schema(body))


def _tool(tool: Tool) -> dict[str, Any]:
    """A tool in the chat template's form: templates read parameters where there are none, and cannot read null."""
    given = {name: value for name, value in tool.function.model_dump(exclude_unset=True).items() if value is not None}
    return {"type": "function", "function": {**given, "parameters": tool.function.parameters or _NO_PARAMETERS}}


def _schema(body: CompletionRequest) -> dict[str, Any] | None:
    """The JSON schema that the answers satisfy, if any."""
    asked = body.response_format
    if asked is None or asked.type == "text":
        return None
    if asked.json_schema is None and asked.own_schema is not None:
        return asked.own_schema
    if asked.type == "json_object":
        return {"type": "object"}
    if asked.json_schema is None:
        raise field_error("response_format.json_schema", "is required", "missing_required_parameter")
    return asked.json_schema.json_schema


def _thinking(body: ChatRequest, renderer: ChatRenderer) -> ThinkingOptions:
    """What the request says of thinking, in any of its ways.

    Raises:
        RequestError: if two contradict each other, or the model cannot do it.
    """
    variables = dict(body.chat_template_kwargs or {})
    renderer.check_variables(variables, "chat_template_kwargs")
    template_switch, effort = variables.pop("enable_thinking", None), body.reasoning_effort
    if not isinstance(template_switch, bool | None):
        raise field_error("chat_template_kwargs.enable_thinking", "must be true or false")
    if effort is not None and effort not in EFFORTS and not renderer.knows("reasoning_effort"):
        raise field_error("reasoning_effort", f"must be one of {', '.join(EFFORTS)}")
    switch = None if body.thinking is None else body.thinking.enabled
    wishes = {
        "chat_template_kwargs.enable_thinking": template_switch,
        "enable_thinking": body.enable_thinking,
        "thinking.type": switch,
        "reasoning_effort": None if effort is None else effort != "none",
    }
    given = {param: value for param, value in wishes.items() if value is not None}
    first = next(iter(given), None)
    for param, value in given.items():
        if value is not given[first or param]:
            raise field_error(param, f"contradicts {first}")
        if value and not renderer.thinks:
            raise field_error(param, "cannot be had: this model does not think before it answers")
    budget = body.thinking.budget_tokens if body.thinking else None
    return ThinkingOptions(given[first] if first else None, None if effort == "none" else effort, budget, variables)


def _prompts(prompt: Any, vocabulary: int) -> list[str | list[int]]:
    """The prompts of a completion: a string, strings, token ids, or lists of them."""
    if isinstance(prompt, str):
        return [prompt]
    if prompt is None:
        raise field_error("prompt", "is required", "missing_required_parameter")
    if not isinstance(prompt, list) or not prompt:
        raise field_error("prompt", "must be a string, an array of strings, or an array of token ids")
    if all(isinstance(item, str) for item in prompt):
        return list(prompt)
    rows = prompt if all(isinstance(item, list) for item in prompt) else [prompt]
    for row in rows:
        if not all(type(item) is int and 0 <= item < vocabulary for item in row):
            raise field_error(
                "prompt", f"an array must hold strings, or token ids from 0 to {vocabulary - 1}, and nothing else"
            )
        if not row:
            raise field_error("prompt", "an array of token ids is empty")
    return rows
