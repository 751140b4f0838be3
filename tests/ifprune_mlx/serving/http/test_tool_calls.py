"""Telling calls from text, however the text is cut."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlx_lm.tool_parsers import json_tools, mistral, pythonic, qwen3_coder

from ifprune_mlx.serving.engine.call_formats import NO_CALL, call_format, json_end
from ifprune_mlx.serving.http.tools import ToolCall, ToolSplitter, beginning

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
F = ToolCall("f", '{"x": 1}')


def dialect(parser: Any) -> Any:
    return SimpleNamespace(
        tool_call_start=parser.tool_call_start,
        tool_call_end=parser.tool_call_end,
        tool_parser=parser.parse_tool_call,
        get_vocab=dict,
    )


def split(text: str, size: int, parser: Any = json_tools, **options: Any) -> list[str | ToolCall]:
    splitter = ToolSplitter(dialect(parser), [], **options)
    parts: list[str | ToolCall] = []
    for start in range(0, len(text), size):
        parts += splitter.feed(text[start : start + size])
    parts += splitter.finish()
    joined: list[str | ToolCall] = []
    for part in parts:
        assert part
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("plain < text <tool", ["plain < text <tool"]),
        (CALL, [F]),
        (f"so {CALL}", ["so ", F]),
        (f"{CALL}\n{CALL}\n", [F, F]),
        (f"{CALL} done", [F, "done"]),
        ("<tool_call>nonsense</tool_call> then", ["<tool_call>nonsense</tool_call> then"]),
        ("<tool_call>[1]</tool_call>", ["<tool_call>[1]</tool_call>"]),
        (CALL.removesuffix("</tool_call>"), [F]),
        ('<tool_call>{"name": "f"', ['<tool_call>{"name": "f"']),
        ("", []),
    ],
)
def test_however_it_is_cut(text: str, parts: list[str | ToolCall], size: int) -> None:
    assert split(text, size) == parts


def test_other_dialects() -> None:
    assert split(
        "a <tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>", 5, qwen3_coder
    ) == [
        "a ",
        ToolCall("f", '{"x": "1"}'),
    ]
    if sys.version_info >= (3, 11):  # mlx-lm 0.31, the last for Python 3.10, reads one call of Mistral's, and no list
        assert split('[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}]', 5, mistral) == [F]


def test_a_forced_call_is_known_even_if_it_is_cut() -> None:
    begun = '<tool_call>\n{"name": "f", "arguments": '
    assert split(begun + '{"x": 1}}\n</tool_call>', 2, forced="f") == [F]
    assert split(begun + '{"x": 1}', 2, forced="f") == [F]  # its end is missing: the tool is known all the same
    assert split(begun + '{"x": ', 2, forced="f") == [ToolCall("f", '{"x": ')]
    # Where the grammar of calls is not known, the prompt holds the beginning.
    assert beginning(dialect(json_tools), "f") == beginning(dialect(json_tools), None) == ""
    begun = beginning(dialect(pythonic), "f")
    assert begun == "<|tool_call_start|>[f("
    assert split("x=1)]<|tool_call_end|>", 2, pythonic, begun=begun, forced="f") == [F]
    unnamed = beginning(dialect(pythonic), None)
    assert split("f(x=1)]<|tool_call_end|>", 2, pythonic, begun=unnamed) == [F]


def family(name: str) -> Any:
    """What tells the format of a family's calls; Llama's has no parser in mlx-lm."""
    if name != "llama":
        return dialect(pytest.importorskip(f"mlx_lm.tool_parsers.{name}"))
    template = '{"name": function name, "parameters": ...} {{ message.tool_calls }}'
    none: dict[str, Any] = {"tool_call_start": None, "tool_call_end": None, "tool_parser": None}
    return SimpleNamespace(**none, has_chat_template=True, chat_template=template)


def parts_of(name: str, text: str, size: int, **options: Any) -> tuple[list[str | ToolCall], str]:
    """The parts of a text, and how much of it was there before its end."""
    tools = [{"type": "function", "function": {"name": tool, "parameters": {}}} for tool in ("clock", "write")]
    splitter, parts = ToolSplitter(family(name), tools, **options), []
    for start in range(0, len(text), size):
        parts += splitter.feed(text[start : start + size])
    early = "".join(part for part in parts if isinstance(part, str))
    joined: list[str | ToolCall] = []
    for part in [*parts, *splitter.finish()]:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined, early


WITHOUT_ARGUMENTS = {
    "json_tools": [
        '<tool_call>\n{"name": "clock"}\n</tool_call>',
        '<tool_call>{"name": "clock", "arguments": null}</tool_call>',
        '<tool_call>{"name": "clock", "arguments": ""}</tool_call>',
        '<tool_call>{"name": "clock", "arguments": "null"}</tool_call>',
        '<tool_call>{"arguments": {}, "name": "clock"}</tool_call>',
        '<tool_call>{"type": "function", "function": {"name": "clock"}}</tool_call>',
        '<tool_call>{"name": "clock", "parameters": {}}',
        '<tool_call>{"name": "clock"}</tool_c',
    ],
    "mistral": [
        '[TOOL_CALLS][{"name": "clock"}]',
        '[TOOL_CALLS] [{"name": "clock", "arguments": null, "id": "abcDEF123"}]',
        '[TOOL_CALLS]{"name": "clock"}',
        "[TOOL_CALLS]clock[ARGS]{}",
        "[TOOL_CALLS]clock[CALL_ID]abcDEF123[ARGS]{}",
        "[TOOL_CALLS]clock[ARGS]",
        "[TOOL_CALLS]clock",
    ],
    "llama": [
        '{"name": "clock"}',
        '\n{"name": "clock", "parameters": null}',
        '<|python_tag|>{"name": "clock", "parameters": {}}',
        '{"type": "function", "name": "clock", "parameters": {}}',
    ],
    "qwen3_coder": ["<tool_call>\n<function=clock>\n</function>\n</tool_call>"],
    "glm47": ["<tool_call>clock\n</tool_call>", '<tool_call>{"name": "clock"}</tool_call>'],
    "longcat": [
        "<longcat_tool_call>clock\n</longcat_tool_call>",
        '<longcat_tool_call>{"name": "clock"}</longcat_tool_call>',
    ],
    "pythonic": ["<|tool_call_start|>[clock()]<|tool_call_end|>"],
    "gemma4": ["<|tool_call>call:clock{}<tool_call|>"],
    "function_gemma": ["<start_function_call>call:clock{}<end_function_call>"],
    "minimax_m2": ['<minimax:tool_call>\n<invoke name="clock">\n</invoke>\n</minimax:tool_call>'],
    "muse_spark": ['<atem:function_calls>\n<atem:invoke name="clock">\n</atem:invoke>\n</atem:function_calls>'],
    "minicpm5": ['<function name="clock"></function>'],
    "kimi_k2": [
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.clock:0<|tool_call_argument_begin|>{}"
        "<|tool_call_end|><|tool_calls_section_end|>",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.clock:0<|tool_call_argument_begin|>"
        "<|tool_call_end|><|tool_calls_section_end|>",
    ],
    "kimi_k3": [
        '<|open|>tools<|sep|><|open|>call tool="clock" index="1"<|sep|><|close|>call<|sep|><|close|>tools<|sep|>'
    ],
}


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name, texts in WITHOUT_ARGUMENTS.items() for text in texts]
)
def test_calls_without_arguments(name: str, text: str, size: int) -> None:
    assert parts_of(name, text, size)[0] == [ToolCall("clock", "{}")]


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize("name", sorted(WITHOUT_ARGUMENTS.keys() - {"llama"}))
def test_text_that_mentions_a_call_streams_on(name: str, size: int) -> None:
    start, end = family(name).tool_call_start, family(name).tool_call_end
    for text in (
        f"Use the {start} mark to call, then go on.",
        f"`{start}` is it. More words follow.",
        f"{start}...{end} holds a call. And more.",
    ):
        assert parts_of(name, text, size) == ([text], text)
        parts, _ = parts_of(name, f"{text} {WITHOUT_ARGUMENTS[name][0]}", size)
        assert parts == [f"{text} ", ToolCall("clock", "{}")]  # what follows is found all the same


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llama", '{"name": "Bob", "age": 3}'),
        ("llama", '{"name": "write_all", "parameters": {}}'),
        ("llama", '{"temperature": 3}'),
        ("llama", "clock"),
        ("llama", "A set {x} of [1, 2]"),
        ("llama", '[{"id": 1}]'),
        ("mistral", "The clock[1] shows"),
        ("json_tools", '<tool_call>{"name": "clock", "zone": "CET"}</tool_call>'),
        ("json_tools", '<tool_call>{"name": "clock", "arguments": [1]}</tool_call>'),
        ("json_tools", '<tool_call>{"name": "clock", "arguments": {}} and so on</tool_call>'),
        ("glm47", "<tool_call>some words here</tool_call>"),
    ],
)
@pytest.mark.parametrize("size", [1, 1000])
def test_what_is_no_call_stays_text(name: str, text: str, size: int) -> None:
    assert parts_of(name, text, size)[0] == [text]


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        (
            "json_tools",
            '<tool_call>{"name": "write", "arguments": {"text": "a</tool_call>b\n"}}</tool_call>\nok',
            [ToolCall("write", '{"text": "a</tool_call>b\\n"}'), "ok"],
        ),
        (
            "qwen3_coder",
            "<tool_call><function=write><parameter=text>a</tool_call>b</parameter></function></tool_call>",
            [ToolCall("write", '{"text": "a</tool_call>b"}')],
        ),
        ("mistral", '[TOOL_CALLS]write[ARGS]{"text": "[TOOL_CALLS]"}', [ToolCall("write", '{"text": "[TOOL_CALLS]"}')]),
        (
            "mistral",
            '[TOOL_CALLS]write[ARGS]{"a": 1}[TOOL_CALLS]clock[ARGS]{} Done',
            [ToolCall("write", '{"a": 1}'), ToolCall("clock", "{}"), "Done"],
        ),
        (
            "llama",
            '{"name": "write", "parameters": {"a": 1}}; {"name": "clock", "parameters": {}}\nDone',
            [ToolCall("write", '{"a": 1}'), ToolCall("clock", "{}"), "Done"],
        ),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_where_calls_end(name: str, text: str, parts: list[str | ToolCall], size: int) -> None:
    assert parts_of(name, text, size)[0] == parts
    calls = [part for part in parts if isinstance(part, ToolCall)]
    assert parts_of(name, text, size, single=True)[0] == calls[:1]


def test_every_format_of_mlx_lm_is_known() -> None:
    parsers = import_module("mlx_lm.tool_parsers").__path__
    names = {file.stem for folder in parsers for file in Path(folder).glob("*.py")} - {"__init__", "laguna"}
    assert names <= WITHOUT_ARGUMENTS.keys()


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_every_beginning_of_json_may_go_on(indent: int | None, ascii_only: bool) -> None:
    value = {"a": [1, -2.5e-3, True, None, 'x\\"é\n😀'], "b": {}, "c": [{}, {"d": []}], "": 0}
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert [json_end(text[:length]) for length in range(len(text))] == [None] * len(text)
    assert json_end(f"  {text} and more") == len(text) + 2
    for broken in ("{x", '{"a" 1', "[1 2", '{"a": 1 "b"', "no", '{"a": no', '{"a": "\\x', "[" * 100_000):
        assert json_end(broken) == NO_CALL


@pytest.mark.parametrize("name", sorted(WITHOUT_ARGUMENTS))
def test_texts_that_repeat_themselves_take_no_time_without_end(name: str) -> None:
    calls = call_format(family(name))
    assert calls is not None
    inner = WITHOUT_ARGUMENTS[name][0].removeprefix(calls.start).removesuffix(calls.end)
    for text in (inner * 500, inner + " " * 5000 + "x", inner + "}" * 5000, inner[:-1] * 500, inner + "<" * 5000):
        assert calls.scan(text) in (None, NO_CALL) or calls.end == ""


# Calls of `write` with two arguments, by family.
WITH_ARGUMENTS = {
    "json_tools": '<tool_call>{"name": "write", "arguments": {"a": "/home/me", "b": 12}}</tool_call>',
    "mistral": '[TOOL_CALLS]write[ARGS]{"a": "/home/me", "b": 12}',
    "llama": '{"name": "write", "parameters": {"a": "/home/me", "b": 12}}',
    "qwen3_coder": "<tool_call>\n<function=write>\n<parameter=a>\n/home/me\n</parameter>\n<parameter=b>\n12\n"
    "</parameter>\n</function>\n</tool_call>",
    "glm47": "<tool_call>write\n<arg_key>a</arg_key>\n<arg_value>/home/me</arg_value>\n<arg_key>b</arg_key>\n"
    "<arg_value>12</arg_value>\n</tool_call>",
    "longcat": "<longcat_tool_call>write\n<longcat_arg_key>a</longcat_arg_key>\n"
    "<longcat_arg_value>/home/me</longcat_arg_value>\n<longcat_arg_key>b</longcat_arg_key>\n"
    "<longcat_arg_value>12</longcat_arg_value>\n</longcat_tool_call>",
    "pythonic": '<|tool_call_start|>[write(a="/home/me", b=12)]<|tool_call_end|>',
    "gemma4": '<|tool_call>call:write{a:<|"|>/home/me<|"|>,b:12}<tool_call|>',
    "minimax_m2": '<minimax:tool_call>\n<invoke name="write">\n<parameter name="a">/home/me</parameter>\n'
    '<parameter name="b">12</parameter>\n</invoke>\n</minimax:tool_call>',
    "minicpm5": '<function name="write"><param name="a">/home/me</param><param name="b">12</param></function>',
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.write:0<|tool_call_argument_begin|>"
    '{"a": "/home/me", "b": 12}<|tool_call_end|><|tool_calls_section_end|>',
}


@pytest.mark.parametrize("name", sorted(WITH_ARGUMENTS))
def test_a_cut_call_without_all_of_its_arguments_is_none(name: str) -> None:
    text = WITH_ARGUMENTS[name]
    parameters = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}}
    tools = [{"type": "function", "function": {"name": "write", "parameters": parameters}}]
    for length in range(len(text) + 1):
        splitter = ToolSplitter(family(name), tools)
        parts = [*splitter.feed(text[:length]), *splitter.finish(cut=True)]
        calls = [part for part in parts if isinstance(part, ToolCall)]
        assert all(json.loads(call.arguments) == {"a": "/home/me", "b": 12} for call in calls), text[:length]
        assert calls or "".join(map(str, parts)) == text[:length]
    assert calls


def test_a_cut_call_that_must_be_made_says_so() -> None:
    begun = '<tool_call>\n{"name": "f", "arguments": '
    for arguments, parts in (
        ("", []),
        (" ", []),
        ('{"x": ', [ToolCall("f", '{"x": ', cut=True)]),
        ('{"x": 1}', [F]),
    ):
        splitter = ToolSplitter(dialect(json_tools), [], begun, "f")
        made = [*splitter.feed(arguments), *splitter.finish(cut=True)]
        assert [part for part in made if isinstance(part, ToolCall)] == parts
