"""Grammars of tool calls in the dialects of model families, for calls that an answer must make, and strict ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.constraint import Grammars, json_rule
from ifprune_mlx.serving.engine.call_formats import call_format


class Dialect(NamedTuple):
    """How a call of the tool `{name}` is written between the dialect's start and end markers."""

    begin: str  # up to the arguments
    end: str = ""  # after them
    parameter: str = ""  # before a parameter `{key}`, where each is written by itself and text is not quoted
    close: str = ""  # after it


_JSON = Dialect('\n{{"name": "{name}", "arguments": ', "}}\n")
_DIALECTS = {
    "json_tools": _JSON,
    "longcat": _JSON,
    "bare": Dialect('{{"name": "{name}", "parameters": ', "}}"),
    "mistral": Dialect(' [{{"name": "{name}", "arguments": ', "}}]"),
    "mistral with [ARGS]": Dialect("{name}[ARGS]"),
    "kimi_k2": Dialect("<|tool_call_begin|>functions.{name}:0<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    "qwen3_coder": Dialect("\n<function={name}>\n", "</function>\n", "<parameter={key}>\n", "\n</parameter>\n"),
    "minimax_m2": Dialect('\n<invoke name="{name}">\n', "</invoke>\n", '<parameter name="{key}">', "</parameter>\n"),
    "glm47": Dialect("{name}\n", "", "<arg_key>{key}</arg_key>\n<arg_value>", "</arg_value>\n"),
}


def dialect_of(tokenizer: TokenizerWrapper) -> Dialect | None:
    """The dialect of the model's calls; None if it has none, or one whose grammar is not known."""
    calls = call_format(tokenizer)
    name = "" if calls is None else calls.name
    if name == "mistral" and "[ARGS]" in tokenizer.get_vocab():
        name = "mistral with [ARGS]"
    return _DIALECTS.get("glm47" if name == "laguna" else name)


def call_head(dialect: Dialect, name: str) -> str:
    """What stands between the start marker and the arguments of a call."""
    return dialect.begin.format(name=json.dumps(name)[1:-1] if dialect.begin.endswith('": ') else name)


def answer_rules(
    grammars: Grammars,
    tokenizer: TokenizerWrapper,
    tools: list[dict[str, Any]],
    *,
    forced: bool,
    single: bool,
    schema: dict[str, Any] | None = None,
) -> str | None:
    """The Lark rules, `answer` among them, of what an answer must satisfy; None if it is free.

    Args:
        tools: those it may call; the arguments of `strict` ones, and of all that it must call, satisfy the parameters.
        forced: it must call one.
        single: it calls one at most.
        schema: what is no call must be JSON that this allows.

    Raises:
        GrammarError: if a schema is too long.
    """
    strict = any(tool["function"].get("strict") for tool in tools)
    dialect, marks = dialect_of(tokenizer), call_format(tokenizer)
    if dialect is None or marks is None or not (forced or strict or (tools and schema is not None)):
        return None if schema is None or forced else f"answer: {json_rule(schema)}"
    start, end = grammars.literal(marks.start), grammars.literal(marks.end)
    calls = "call" if single else "call (BREAK call)*"
    lines = ["call: " + " | ".join(f"call_{at}" for at in range(len(tools))), "BREAK: /\\n?/"]
    for at, tool in enumerate(tools):
        lines += _call(grammars, dialect, f"call_{at}", tool["function"], start, end)
    if forced:
        return "\n".join([f"answer: {calls}", *lines])
    if schema is not None:
        return "\n".join([f"answer: {calls} | told", f"told: {json_rule(schema)}", *lines])
    # A start marker that is a token cannot be part of free text; for another one, text and calls cannot be told apart.
    if start.startswith("<["):
        return "\n".join([f"answer: (FREE? call){'?' if single else '*'} FREE?", "FREE: /(.|\\n)+/", *lines])
    return None


def _call(
    grammars: Grammars, dialect: Dialect, rule: str, function: dict[str, Any], start: str, end: str
) -> Iterator[str]:
    """The rules of a call of one tool."""
    head, tail = grammars.literal(call_head(dialect, function["name"])), grammars.literal(dialect.end.format())
    schema = {"type": "object", **(function.get("parameters") or {"properties": {}})}
    lenient = not function.get("strict")
    if not dialect.parameter:
        yield f"{rule}: {start} {head} {rule}_arguments {tail} {end}"
        yield f"{rule}_arguments: {json_rule(schema, lenient=lenient)}"
        return
    required, properties, parts = schema.get("required"), schema.get("properties"), []
    for at, (key, given) in enumerate(properties.items() if isinstance(properties, dict) else ()):
        one = f"{rule}_{at}"
        parts.append(one if isinstance(required, list) and key in required else f"{one}?")
        before, close = grammars.literal(dialect.parameter.format(key=key)), grammars.literal(dialect.close)
        value = given if isinstance(given, dict) else {}
        choices = [value["const"]] if "const" in value else value.get("enum")
        if value.get("type") == "string" and choices is None:
            yield f"{one}: {before} {one}_text"
            yield f"{one}_text[suffix={json.dumps(dialect.close)}]: /(.|\\n)*/"
        elif isinstance(choices, list) and all(isinstance(choice, str) for choice in choices):
            yield f"{one}: {before} ({' | '.join(map(grammars.literal, choices))}) {close}"
        else:
            definitions = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
            yield f"{one}: {before} {one}_json {close}"
            yield f"{one}_json: {json_rule({**definitions, **value}, lenient=lenient)}"
    yield f"{rule}: {start} {head} {' '.join(parts)} {tail} {end}"
