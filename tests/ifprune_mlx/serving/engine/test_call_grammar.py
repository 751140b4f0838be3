"""Calls in the dialects of model families: what a random model is made to write, mlx-lm's own parsers read."""

from __future__ import annotations

import importlib
import json
import sys
from copy import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from ifprune_mlx.constraint import Grammars
from ifprune_mlx.serving.engine.call_grammar import answer_rules
from ifprune_mlx.serving.engine.request import SamplingParams
from ifprune_mlx.serving.http.tools import ToolCall, ToolSplitter
from tests.ifprune_mlx.serving.engine.engines import Tiny, accepts, make_request, serving, stats_of, text_of, together
from tests.tiny import add_tokens, write_tokenizer

PLACE = {"type": "object", "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["x"]}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "travel_to",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"enum": ["Oslo", "São Paulo"]},
                    "days": {"type": "integer", "minimum": 1, "maximum": 30},
                    "place": {"$ref": "#/$defs/place"},
                    "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
                },
                "required": ["city", "days"],
                "$defs": {"place": PLACE},
            },
        },
    },
    {"type": "function", "function": {"name": "stay"}},
]
# mlx-lm 0.31, the last for Python 3.10, has fewer parsers, and simpler ones.
NEW = sys.version_info >= (3, 11)
DIALECTS = [
    "json_tools",
    "bare",
    "qwen3_coder",
    "minimax_m2",
    "longcat",
    "kimi_k2",
    "glm47",
    *(["mistral"] if NEW else []),
]


def speaking(tokenizer: TokenizerWrapper, dialect: str) -> TokenizerWrapper:
    if dialect == "bare":  # Llama's, which mlx-lm does not know
        bare = copy(tokenizer._tokenizer)
        bare.chat_template = '{# {"name": function name, "parameters": dictionary} and m.tool_calls #}'
        return TokenizerWrapper(bare, eos_token_ids=tokenizer.eos_token_ids)
    parser = importlib.import_module(f"mlx_lm.tool_parsers.{dialect}")
    return TokenizerWrapper(
        tokenizer._tokenizer,
        eos_token_ids=tokenizer.eos_token_ids,
        tool_call_start=parser.tool_call_start,
        tool_call_end=parser.tool_call_end,
        tool_parser=parser.parse_tool_call,
    )


def split(tokenizer: TokenizerWrapper, text: str) -> list[str | ToolCall]:
    splitter = ToolSplitter(tokenizer, TOOLS)
    return [*splitter.feed(text), *splitter.finish()]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_calls_that_must_be_made_are_read_back_and_satisfy_their_schemas(dialect: str, roomy: Tiny) -> None:
    model, tokenizer = roomy[0], speaking(roomy[1], dialect)
    grammars = Grammars(tokenizer)
    named = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in TOOLS}
    grammar = {}
    for name, tools in (("both", TOOLS), ("travel_to", TOOLS[:1])):
        rules = answer_rules(grammars, tokenizer, tools, forced=True, single=True)
        assert rules is not None
        grammar[name] = grammars.compile(rules, ())
    with serving((model, tokenizer)) as engine:
        sampled = [SamplingParams(temperature=2.0, seed=seed) for seed in range(2)]
        requests = [
            make_request(selection=None, max_tokens=900, grammar=each, sampling=sampling)
            for each in grammar.values()
            for sampling in sampled
        ]
        answers = together(engine, *requests)
    for outputs in answers:
        assert stats_of(outputs).finish_reason == "stop"
        [call] = split(tokenizer, text_of(outputs))
        assert isinstance(call, ToolCall), text_of(outputs)
        jsonschema.validate(json.loads(call.arguments), named[call.name])


@pytest.mark.parametrize("dialect", ["qwen3_coder", "minimax_m2"])
def test_texts_that_are_not_quoted(dialect: str, tiny: Tiny) -> None:
    tokenizer = speaking(tiny[1], dialect)
    grammars = Grammars(tokenizer)
    parameters = {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]}
    tools = [{"type": "function", "function": {"name": "run", "parameters": parameters}}]
    rules = answer_rules(grammars, tokenizer, tools, forced=True, single=True)
    assert rules is not None
    grammar = grammars.compile(rules, ())
    text = {
        "qwen3_coder": '<tool_call>\n<function=run>\n<parameter=code>\nif a < b:\n  "x"\n</parameter>\n'
        "</function>\n</tool_call>",
        "minimax_m2": '<minimax:tool_call>\n<invoke name="run">\n<parameter name="code">if a < b:\n  "x"</parameter>\n'
        "</invoke>\n</minimax:tool_call>",
    }[dialect]
    assert accepts(grammar, tokenizer, text)
    [call] = split(tokenizer, text)
    assert isinstance(call, ToolCall)
    assert json.loads(call.arguments) == {"code": 'if a < b:\n  "x"'}


def test_answers_are_free_unless_something_is_asked_of_them(tiny: Tiny) -> None:
    tokenizer = speaking(tiny[1], "json_tools")
    grammars = Grammars(tokenizer)
    assert answer_rules(grammars, tokenizer, TOOLS, forced=False, single=False) is None
    assert answer_rules(grammars, tokenizer, [], forced=False, single=False) is None
    either = answer_rules(grammars, tokenizer, TOOLS, forced=False, single=False, schema=PLACE)
    assert either is not None
    grammar = grammars.compile(either, ())
    call = '<tool_call>\n{"name": "stay", "arguments": {}}\n</tool_call>'
    for text, accepted in ((call, True), (f"{call}\n{call}", True), ('{"x": 3}', True), ("well", False)):
        assert accepts(grammar, tokenizer, text) == accepted


def test_arguments_of_strict_tools_are_held_to_their_schema_among_free_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    add_tokens(tmp_path, ["<tool_call>", "</tool_call>"])
    (tmp_path / "config.json").write_text("{}")
    tokenizer = speaking(load_tokenizer(tmp_path), "json_tools")
    grammars = Grammars(tokenizer)
    strict = {"type": "function", "function": {"name": "go", "parameters": PLACE, "strict": True}}
    rules = answer_rules(grammars, tokenizer, [strict, TOOLS[1]], forced=False, single=False)
    assert rules is not None
    grammar = grammars.compile(rules, ())
    good = '<tool_call>\n{"name": "go", "arguments": {"x": 5}}\n</tool_call>'
    bad = '<tool_call>\n{"name": "go", "arguments": {"x": "5"}}\n</tool_call>'
    other = '<tool_call>\n{"name": "stay", "arguments": {}}\n</tool_call>'
    for text, accepted in (
        ("Well { I say.", True),
        (good, True),
        (f"so\n{good}\n{other} and so on", True),
        (bad, False),
        (f"so {bad}", False),
    ):
        assert accepts(grammar, tokenizer, text) == accepted, text
