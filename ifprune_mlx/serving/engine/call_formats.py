"""How model families write tool calls: where a call ends in a text that streams, and what it says.

mlx-lm tells a model's family and parses most formats. Here is what mlx-lm does not do: telling early that a text is no
call, Mistral's ids, and Llama's calls, which are JSON without markers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import regex
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.thinking import template_text

NO_CALL = -1  # a text that cannot become a call any more
# Control characters in strings are no JSON, but models write line breaks as they are.
_JSON = json.JSONDecoder(strict=False)
_KEYS = ("name", "arguments", "parameters", "function", "type", "id")
_FIRST_KEY = re.compile(r'[\s\[]*\{\s*"([^"]*)("?)')
_HEADER = regex.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?\[ARGS\]\s*")  # Mistral's, since version 11
_PYTHON_TAG = "<|python_tag|>"  # may stand before Llama's calls


@dataclass(frozen=True)
class CallFormat:
    """A format of calls.

    Attributes:
        name: the module of mlx-lm's parser, or `bare` for calls without marks.
        start, end: the marks around calls; empty if there is none. Without `start`, calls stand before other text, and
            name offered tools: other JSON is an answer.
        repeats: more calls may follow without a start mark.
        scan: of a text after the start mark, how long the calls at its beginning are, end mark included; None while
            they may go on, or `NO_CALL`.
        parse: of the calls' text, without marks, and the offered tools, a call (`name`, `arguments`) or several.
            Raises anything if it is none.
    """

    name: str
    start: str
    end: str
    scan: Callable[[str], int | None]
    parse: Callable[[str, list[dict[str, Any]]], Any]
    repeats: bool = False


def call_format(tokenizer: TokenizerWrapper) -> CallFormat | None:
    """The format of the model's calls; None if its chat template has no tools."""
    start, end = tokenizer.tool_call_start, tokenizer.tool_call_end
    if start is None:
        template = template_text(tokenizer)
        bare = '"parameters"' in template and "tool_calls" in template
        return CallFormat("bare", "", "", _scan_bare, _parse_bare, repeats=True) if bare else None
    name = tokenizer.tool_parser.__module__.rsplit(".", 1)[-1]
    if name == "json_tools":
        return CallFormat(name, start, end, partial(_scan_json, end), _parse_json)
    if name == "mistral":
        return CallFormat(name, start, end, _scan_mistral, _parse_mistral, repeats=True)
    pattern = regex.compile(f"(?s:{_PATTERNS.get(name, '.*?')}){regex.escape(end)}")
    return CallFormat(name, start, end, partial(_scan_pattern, pattern), partial(_parse_pattern, tokenizer.tool_parser))


def json_end(text: str) -> int | None:
    """Where the JSON value that a text begins with ends; None while it may go on, `NO_CALL` if it is none."""
    try:
        return _JSON.raw_decode(text, len(text) - len(text.lstrip()))[1]
    except RecursionError:
        return NO_CALL
    except json.JSONDecodeError as exc:
        rest = text[exc.pos :]
        cut = (
            not rest.strip()
            or exc.msg.startswith("Unterminated string")
            or (exc.msg.startswith("Invalid \\u") and len(rest) <= 6)
            or any(word.startswith(rest) for word in ("true", "false", "null", "-"))
            or re.fullmatch(r"[.eE][+-]?", rest)
            or (exc.msg.startswith("Illegal trailing comma") and not rest[1:].strip())
        )
        return None if cut else NO_CALL


def _scan_json(end: str, text: str) -> int | None:
    """A JSON object or list of a call or of calls, up to the end mark."""
    first = _FIRST_KEY.match(text)
    if first and not any(key == first[1] if first[2] else key.startswith(first[1]) for key in _KEYS):
        return NO_CALL
    if text.lstrip()[:1] not in ("", "{", "["):
        return NO_CALL
    length = json_end(text)
    if length is None or length == NO_CALL:
        return length
    rest = text[length:].lstrip()
    if rest.startswith(end):
        return len(text) - len(rest) + len(end)
    return None if end.startswith(rest) else NO_CALL


def _scan_pattern(pattern: regex.Pattern[str], text: str) -> int | None:
    found = pattern.match(text, partial=True)
    if found is None:
        return NO_CALL
    return None if found.partial else int(found.end())


def _scan_mistral(text: str) -> int | None:
    if text.lstrip()[:1] in ("", "[", "{"):
        return _scan_json("", text)
    header = _HEADER.match(text, partial=True)
    if header is None:
        return NO_CALL
    length = None if header.partial else json_end(text[header.end() :])
    return length if length in (None, NO_CALL) else int(header.end()) + length


def _parse_mistral(text: str, tools: list[dict[str, Any]]) -> Any:
    header = _HEADER.match(text)
    if header is None:
        return _JSON.decode(text.strip())
    return {"name": header[1], "arguments": _JSON.decode(text[header.end() :].strip() or "{}")}


def _scan_bare(text: str) -> int | None:
    rest = text.lstrip(" \t\r\n;")
    if _PYTHON_TAG.startswith(rest):
        return None
    rest = rest.removeprefix(_PYTHON_TAG)
    length = _scan_json("", rest)
    return length if length in (None, NO_CALL) else len(text) - len(rest) + length


def _parse_bare(text: str, tools: list[dict[str, Any]]) -> Any:
    return _JSON.decode(text.lstrip(" \t\r\n;").removeprefix(_PYTHON_TAG).strip())


def _parse_json(text: str, tools: list[dict[str, Any]]) -> Any:
    return _JSON.decode(text.strip())


def _parse_pattern(parser: Callable[[str, list[dict[str, Any]]], Any], text: str, tools: list[dict[str, Any]]) -> Any:
    return _parse_json(text, tools) if text.lstrip().startswith("{") else parser(text, tools)


def _arguments(key: str, close_key: str, value: str, close_value: str) -> str:
    """The pattern of arguments of which each is written by itself."""
    return f"(?:{key}(?>.*?{close_key})\\s*+{value}(?>.*?{close_value})\\s*+)*+"


def _invokes(prefix: str) -> str:
    """The pattern of calls as `<invoke name="f"><parameter name="x">1</parameter></invoke>`."""
    parameter = f"<{prefix}parameter\\b[^>]*>(?>.*?</{prefix}parameter>)\\s*+"
    return f"\\s*+(?:<{prefix}invoke\\b[^>]*>\\s*+(?:{parameter})*+</{prefix}invoke>\\s*+)++"


# What stands between the marks, by mlx-lm's parser. The calls of other parsers end at the end mark. Nothing is tried
# twice (`(?>`, `++`): answers must not take time without end.
_JSON_OR_NAME = r"\s*+(?:\{.*?\}|\w[\w.:/-]*+\s*+(?:\{.*?\}|%s))\s*+"
_GLM = _JSON_OR_NAME % _arguments("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
_GEMMA = r"\s*+call:[\w.-]+\{.*?\}\s*+"
_PATTERNS = {
    "function_gemma": _GEMMA,
    "gemma4": _GEMMA,
    "glm47": _GLM,
    "laguna": _GLM,
    "kimi_k2": r"\s*+(?:<\|tool_call_begin\|>\s*+[^\s<>{}]+\s*+"
    r"<\|tool_call_argument_begin\|>(?>.*?<\|tool_call_end\|>)\s*+)++",
    "kimi_k3": r"\s*+<\|open\|>call\b.*?",
    "longcat": _JSON_OR_NAME
    % _arguments("<longcat_arg_key>", "</longcat_arg_key>", "<longcat_arg_value>", "</longcat_arg_value>"),
    "minicpm5": r"""\s*+["']?[^"'<>\s]+["']?\s*+>\s*+(?:<param\s[^>]*>(?>.*?</param>)\s*+)*+""",
    "minimax_m2": _invokes(""),
    "muse_spark": _invokes("atem:"),
    "pythonic": r"\s*+\[\s*+[\w.]+\s*+\(.*?\)\s*+\]\s*+",
    "qwen3_coder": r"\s*+<function=[^\s<>]+>?\s*+(?:<parameter=[^<>]+>(?>.*?</parameter>)\s*+)*+</function>\s*+",
}
