"""The OpenAPI 3.1 document of the server: what it takes, and what it answers.

The tests hold it against the server: every path of one is in the other, and answers are as it says.
"""

from __future__ import annotations

from typing import Any

from ifprune_mlx import __version__
from ifprune_mlx.serving.engine.request import POLICIES
from ifprune_mlx.serving.http.fields import MAX_STOP_LENGTH, MAX_STOPS, SELECTORS

Schema = dict[str, Any]


def document(model: str, with_key: bool) -> Schema:
    """The document.

    Args:
        model: the served model's name.
        with_key: whether the server asks for an API key.
    """
    described: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": "ifprune serve",
            "version": __version__,
            "description": f"Serves {model}. Every request is computed on the neurons that it selects. Fields that are "
            "not named here are ignored.",
        },
        "paths": _paths(),
        "components": {"schemas": _schemas()},
    }
    if with_key:
        described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        described["security"] = [{"key": []}]
    return described


def _paths() -> Schema:
    wished = [
        _parameter("x-ifprune-task", "header", _text()),
        _parameter("x-ifprune-density", "header", {"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
        _parameter("x-ifprune-policy", "header", {"enum": list(POLICIES)}),
    ]
    return {
        "/v1/chat/completions": {
            "post": _post("Answer a conversation.", "ChatRequest", "ChatCompletion", "Error", wished, stream=True)
        },
        "/v1/completions": {
            "post": _post("Continue texts.", "TextRequest", "TextCompletion", "Error", wished, stream=True)
        },
        "/v1/messages": {
            "post": _post(
                "Answer a conversation, in Anthropic's words.",
                "MessagesRequest",
                "Message",
                "AnthropicError",
                wished,
                stream=True,
            )
        },
        "/v1/messages/count_tokens": {
            "post": _post("Count a conversation's tokens.", "CountRequest", "Count", "AnthropicError", [])
        },
        "/v1/models": {"get": _get("The model that is served.", _json(_ref("Models")))},
        "/v1/models/{model}": {
            "get": {
                **_get("The same, by name.", _json(_ref("Model")), missing=True),
                "parameters": [_parameter("model", "path", _text())],
            }
        },
        "/v1/ifprune/tasks": {"get": _get("Saved selections that requests may name.", _json(_ref("Tasks")))},
        "/v1/ifprune/selections/{hash}": {
            "get": {
                **_get("The neurons of a selection that was used of late.", _json(_ref("Selection")), missing=True),
                "parameters": [_parameter("hash", "path", _text())],
            }
        },
        "/health": {"get": _get("Whether the server is there; needs no key.", _json(_ref("Health")))},
        "/metrics": {"get": _get("Figures for Prometheus.", {"text/plain": {"schema": {"type": "string"}}})},
        "/openapi.json": {"get": _get("This document.", _json({"type": "object"}))},
    }


def _post(
    summary: str, takes: str, gives: str, fails: str, parameters: list[Schema], *, stream: bool = False
) -> Schema:
    content = _json(_ref(gives))
    if stream:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "summary": summary,
        "parameters": parameters,
        "requestBody": {"required": True, "content": _json(_ref(takes))},
        "responses": {"200": {"description": "The answer.", "content": content}, **_errors(fails)},
    }


def _get(summary: str, content: Schema, *, missing: bool = False) -> Schema:
    refused = {"404": _error("There is none.", "Error")} if missing else {}
    return {
        "summary": summary,
        "responses": {"200": {"description": "It.", "content": content}, **refused, "4XX": _error("Refused.", "Error")},
    }


def _errors(schema: str) -> Schema:
    return {
        "400": _error("The request cannot be answered; the message says why.", schema),
        "404": _error("Another model is asked for.", schema),
        "408": _error("The body took too long.", schema),
        "413": _error("The body is too large.", schema),
        "429": {
            **_error("Too many requests wait.", schema),
            "headers": {"Retry-After": {"schema": {"type": "string"}}},
        },
        "4XX": _error("Refused.", schema),
        "5XX": _error("The server failed, or ends.", schema),
    }


def _error(description: str, schema: str) -> Schema:
    return {"description": description, "content": _json(_ref(schema))}


def _schemas() -> Schema:
    return {**_requests(), **_answers(), **_shared()}


def _requests() -> Schema:
    sampling = {
        "temperature": _maybe({"type": "number", "minimum": 0, "maximum": 2}),
        "top_p": _maybe({"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
        "top_k": _maybe({"type": "integer", "minimum": 0, "maximum": 2**31}),
        "min_p": _maybe({"type": "number", "minimum": 0, "maximum": 1}),
        "repetition_penalty": _maybe({"type": "number", "exclusiveMinimum": 0, "maximum": 10}),
        "presence_penalty": _maybe({"type": "number", "minimum": -2, "maximum": 2}),
        "frequency_penalty": _maybe({"type": "number", "minimum": -2, "maximum": 2}),
        "logit_bias": _maybe(
            {
                "type": "object",
                "propertyNames": {"pattern": "^[0-9]+$"},
                "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            }
        ),
        "seed": _maybe({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}),
    }
    stop = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
    stops = {"type": "array", "items": stop, "maxItems": MAX_STOPS}
    count = {"type": "integer", "minimum": 1, "maximum": 2**31}
    shared = {"model": _maybe(_text()), "ifprune": _maybe(_ref("Wish")), **sampling}
    openai = {
        **shared,
        "n": _maybe({"type": "integer", "minimum": 1}),
        "stream": _maybe({"type": "boolean"}),
        "stream_options": _maybe(_object({"include_usage": _maybe({"type": "boolean"})})),
        "stop": _maybe({"anyOf": [stop, stops]}),
        "max_tokens": _maybe(count),
    }
    messages = {"messages": {"type": "array", "minItems": 1, "items": _ref("AnthropicMessage")}}
    spoken = {
        **messages,
        "model": _maybe(_text()),
        "system": _maybe(_ref("AnthropicText")),
        "tools": _maybe({"type": "array", "items": _ref("AnthropicTool")}),
        "tool_choice": _maybe(
            _object(
                {
                    "type": {"enum": ["auto", "any", "tool", "none"]},
                    "name": _maybe(_text()),
                    "disable_parallel_tool_use": _maybe({"type": "boolean"}),
                },
                "type",
            )
        ),
    }
    named = _object({"type": {"const": "function"}, "function": _object({"name": _text()}, "name")}, "type", "function")
    chat = {
        "messages": {"type": "array", "minItems": 1, "items": _ref("ChatMessage")},
        "max_completion_tokens": _maybe(count),
        "logprobs": _maybe({"type": "boolean"}),
        "top_logprobs": _maybe({"type": "integer", "minimum": 0, "maximum": 20}),
        "response_format": _maybe(_object({"type": {"const": "text"}}, "type")),
        "tools": _maybe({"type": "array", "items": _ref("Tool")}),
        "tool_choice": _maybe({"anyOf": [{"enum": ["none", "auto", "required"]}, named]}),
        "parallel_tool_calls": _maybe({"type": "boolean"}),
    }
    ids = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
    prompts = [_text(), {"type": "array", "minItems": 1, "items": _text()}, ids]
    text = {
        "prompt": {"anyOf": [*prompts, {"type": "array", "minItems": 1, "items": ids}]},
        "logprobs": _maybe({"type": "integer", "minimum": 0, "maximum": 20}),
        "best_of": _maybe({"type": "integer", "minimum": 1}),
    }
    messaging = {
        **sampling,
        **spoken,
        "ifprune": _maybe(_ref("Wish")),
        "max_tokens": count,
        "stop_sequences": _maybe(stops),
        "stream": _maybe({"type": "boolean"}),
    }
    return {
        "ChatRequest": _object({**openai, **chat}, "messages"),
        "TextRequest": _object({**openai, **text}, "prompt"),
        "MessagesRequest": _object(messaging, "messages", "max_tokens"),
        "CountRequest": _object(spoken, "messages"),
        "Wish": _object(
            {
                "task": _maybe(_text()),
                "selector": _maybe({"enum": list(SELECTORS)}),
                "dense": _maybe({"type": "boolean"}),
                "density": _maybe({"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
                "active_parameters": _maybe({"type": "integer", "minimum": 1}),
                "policy": _maybe({"enum": list(POLICIES)}),
            }
        ),
    }


def _answers() -> Schema:
    number, whole = {"type": "number"}, {"type": "integer"}
    head = {"id": _text(), "created": whole, "model": _text()}
    figures = {"ifprune": _ref("Figures"), "usage": _object({"prompt_tokens": whole, "completion_tokens": whole})}
    required = ("id", "object", "created", "model", "choices", "usage")
    mask = {"type": "string", "contentEncoding": "base64"}
    model = {**head, "object": {"const": "model"}, "owned_by": _text(), "ifprune": {"type": "object"}}
    del model["model"]
    return {
        "ChatCompletion": _object(
            {**head, "object": {"const": "chat.completion"}, "choices": _list("ChatChoice"), **figures}, *required
        ),
        "ChatChoice": _object(
            {
                "index": whole,
                "message": _object({"role": {"const": "assistant"}, "content": _maybe(_text())}, "role", "content"),
                "logprobs": _maybe({"type": "object"}),
                "finish_reason": {"enum": ["stop", "length", "tool_calls"]},
            },
            "index",
            "message",
            "finish_reason",
        ),
        "TextCompletion": _object(
            {**head, "object": {"const": "text_completion"}, "choices": _list("TextChoice"), **figures}, *required
        ),
        "TextChoice": _object(
            {
                "index": whole,
                "text": _text(),
                "logprobs": _maybe({"type": "object"}),
                "finish_reason": {"enum": ["stop", "length"]},
            },
            "index",
            "text",
            "finish_reason",
        ),
        "Message": _object(
            {
                "id": _text(),
                "type": {"const": "message"},
                "role": {"const": "assistant"},
                "content": {"type": "array", "items": _object({"type": {"enum": ["text", "tool_use"]}}, "type")},
                "stop_reason": {"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
                "stop_sequence": _maybe(_text()),
                "usage": _object({"input_tokens": whole, "output_tokens": whole}, "input_tokens", "output_tokens"),
                "ifprune": _ref("Figures"),
            },
            "id",
            "type",
            "role",
            "content",
            "stop_reason",
            "usage",
        ),
        "Count": _object({"input_tokens": whole}, "input_tokens"),
        "Figures": _object(
            {
                "selection": _maybe(_text()),
                "selector": _text(),
                "density": number,
                "overlap": _maybe(number),
                "active_parameters": _maybe(whole),
                "total_parameters": whole,
                **dict.fromkeys(("queue_s", "select_s", "switch_s", "prefill_s", "decode_s"), number),
                "tokens_per_s": number,
                "cached_tokens": whole,
                "batch": whole,
            },
            "selection",
            "selector",
            "density",
        ),
        "Models": _object({"object": {"const": "list"}, "data": _list("Model")}, "object", "data"),
        "Model": _object(model, "id", "object", "created", "owned_by"),
        "Tasks": _object(
            {
                "tasks": {
                    "type": "array",
                    "items": _object({"name": _text(), "shipped": {"type": "boolean"}, "density": number}, "name"),
                }
            },
            "tasks",
        ),
        "Selection": _object(
            {
                "hash": _text(),
                "selector": _text(),
                "density": number,
                "widths": {"type": "array", "items": whole, "description": "Neurons of each FFN."},
                "kept": {"type": "array", "items": whole, "description": "Those of them that are kept."},
                "masks": {
                    "type": "array",
                    "items": mask,
                    "description": "A bit for each neuron, the first in the highest bit of the first byte.",
                },
            },
            "hash",
            "widths",
            "masks",
        ),
        "Health": _object({"status": {"const": "ok"}, "model": _text()}, "status"),
    }


def _shared() -> Schema:
    part = _object({"type": {"const": "text"}, "text": _text()}, "type", "text")
    content = {"anyOf": [_text(), {"type": "array", "items": part}]}
    call = _object(
        {
            "id": _maybe(_text()),
            "type": {"const": "function"},
            "function": _object({"name": _text(), "arguments": _text()}, "name", "arguments"),
        },
        "function",
    )
    return {
        "ChatMessage": {
            "anyOf": [
                _object({"role": {"enum": ["system", "developer", "user"]}, "content": content}, "role", "content"),
                _object(
                    {
                        "role": {"const": "assistant"},
                        "content": _maybe(content),
                        "tool_calls": _maybe({"type": "array", "items": call}),
                    },
                    "role",
                    "content",
                ),
                _object(
                    {"role": {"const": "tool"}, "content": content, "tool_call_id": _text()}, "role", "tool_call_id"
                ),
            ]
        },
        "Tool": _object(
            {
                "type": {"const": "function"},
                "function": _object(
                    {
                        "name": {"type": "string", "minLength": 1},
                        "description": _maybe(_text()),
                        "parameters": _maybe({"type": "object"}),
                    },
                    "name",
                ),
            },
            "type",
            "function",
        ),
        "AnthropicText": content,
        "AnthropicMessage": _object(
            {
                "role": {"enum": ["user", "assistant"]},
                "content": {"anyOf": [_text(), {"type": "array", "items": _ref("AnthropicBlock")}]},
            },
            "role",
            "content",
        ),
        "AnthropicBlock": {
            "anyOf": [
                part,
                _object(
                    {"type": {"const": "tool_use"}, "id": _text(), "name": _text(), "input": {"type": "object"}},
                    "type",
                    "id",
                    "name",
                    "input",
                ),
                _object(
                    {"type": {"const": "tool_result"}, "tool_use_id": _text(), "content": _maybe(content)},
                    "type",
                    "tool_use_id",
                ),
            ]
        },
        "AnthropicTool": _object(
            {
                "type": _maybe({"const": "custom"}),
                "name": {"type": "string", "minLength": 1},
                "description": _maybe(_text()),
                "input_schema": {"type": "object"},
            },
            "name",
            "input_schema",
        ),
        "Error": _object(
            {
                "error": _object(
                    {"message": _text(), "type": _text(), "param": _maybe(_text()), "code": _maybe(_text())},
                    "message",
                    "type",
                    "param",
                    "code",
                )
            },
            "error",
        ),
        "AnthropicError": _object(
            {"type": {"const": "error"}, "error": _object({"type": _text(), "message": _text()}, "type", "message")},
            "type",
            "error",
        ),
    }


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _list(name: str) -> Schema:
    return {"type": "array", "items": _ref(name)}


def _text() -> Schema:
    return {"type": "string"}


def _object(properties: Schema, *required: str) -> Schema:
    return {"type": "object", "properties": properties, **({"required": list(required)} if required else {})}


def _maybe(schema: Schema) -> Schema:
    """What may be null, which counts as left out."""
    return {"anyOf": [schema, {"type": "null"}]}


def _parameter(name: str, where: str, schema: Schema) -> Schema:
    return {"name": name, "in": where, "required": where == "path", "schema": schema}
