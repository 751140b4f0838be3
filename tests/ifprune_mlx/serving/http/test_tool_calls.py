"""Telling calls from text, however the text is cut."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from mlx_lm.tool_parsers import json_tools, mistral, pythonic, qwen3_coder

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
