"""Conversations of agents on chat templates that accept little."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ifprune_mlx import PromptError, load
from ifprune_mlx.serving.http.chat_rendering import ChatRenderer, Conversation
from ifprune_mlx.serving.http.schemas_requests import OtherBlock, TextPart
from ifprune_mlx.serving.http.template_fitting import call_id, earlier_call, text_of, with_fitting_ids
from tests.ifprune_mlx.serving.http.scripted import write_templated

CALLS = [earlier_call(identity, name, "{}") for identity, name in (("toolu_a", "clock"), ("call_b", "weather"))]
RESULTS = [
    {"role": "tool", "tool_call_id": "call_b", "content": "cold"},
    {"role": "tool", "tool_call_id": "toolu_a", "content": "noon"},
]
PARALLEL = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "", "tool_calls": CALLS}, *RESULTS]
EACH = "{% for m in messages %}"
PLAIN = "<{{ m.role }}>{{ m.content }}"
TOOLS = "{# <tool_call> tool_call.name #}"  # mlx-lm takes it for a template with tools


def rendered(folder: Path, template: str, messages: list[dict[str, Any]]) -> str:
    """The prompt of messages under a chat template; its roles are marked as in `<user>`."""
    model, tokenizer = load(write_templated(folder / "checkpoint", template + TOOLS))
    [prompt] = ChatRenderer(model, tokenizer).conversation(Conversation(messages))
    text: str = tokenizer.decode(list(prompt.tokens))
    return text


@pytest.mark.parametrize(
    "check",
    [
        "{% if m.tool_calls | length > 1 %}{{ raise_exception('one at a time') }}{% endif %}",
        "",  # all calls but the first are left out without a word
    ],
)
def test_one_call_at_a_time(tmp_path: Path, check: str) -> None:
    calls = "{% if m.tool_calls %}" + check + "{{ m.tool_calls[0].function.name }}{% endif %}"
    text = rendered(tmp_path, EACH + PLAIN + calls + "{% endfor %}", PARALLEL)
    assert text == "<user>Q<assistant>clock<tool>noon<assistant>weather<tool>cold"


def test_parallel_calls_stay_where_the_template_shows_them(tmp_path: Path) -> None:
    calls = "{% for call in m.tool_calls or [] %}{{ call.function.name }},{% endfor %}"
    text = rendered(tmp_path, EACH + PLAIN + calls + "{% endfor %}", PARALLEL)
    assert text == "<user>Q<assistant>clock,weather,<tool>cold<tool>noon"


@pytest.mark.parametrize("arguments", ['{"a": 1', "[1]", "no", [1], 3, True])
def test_arguments_that_must_be_an_object(tmp_path: Path, arguments: Any) -> None:
    shown = (
        "{% for call in m.tool_calls or [] %}{% for key, value in call.function.arguments | items %}"
        "{{ key }}={{ value }}{% endfor %}{% endfor %}"
    )
    call = earlier_call("a", "clock", arguments)
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    text = rendered(tmp_path, EACH + PLAIN + shown + "{% endfor %}", messages)
    written = arguments if isinstance(arguments, str) else json.dumps(arguments)
    assert text == f"<user>Q<assistant>invalid={written}"


STRICT = (
    "{% set ns = namespace(last='assistant') %}{% for m in messages %}"
    "{% if m.role == 'system' and not loop.first %}{{ raise_exception('no system here') }}{% endif %}"
    "{% if m.role == 'user' and ns.last == 'user' %}{{ raise_exception('must alternate') }}{% endif %}"
    "{% if m.role in ('user', 'assistant') and not m.tool_calls %}{% set ns.last = m.role %}{% endif %}"
    + PLAIN
    + "{% endfor %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + STRICT
)


def said(*turns: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in (turn.split(" ", 1) for turn in turns)]


@pytest.mark.parametrize(
    ("template", "messages", "text"),
    [
        (STRICT, said("system S", "user a", "user b"), "<system>S<user>a\n\nb"),
        (STRICT, said("system S", "system T", "user a"), "<system>S\n\nT<user>a"),
        (STRICT, said("user a", "system late", "assistant b", "user c"), "<user>a\n\nlate<assistant>b<user>c"),
        (STRICT, [*PARALLEL[:1], *RESULTS[:1], *said("user go on")], None),
        (NO_SYSTEM, said("system S", "user a"), "<user>S\n\na"),
        (NO_SYSTEM, said("system S", "user a", "user b"), "<user>S\n\na\n\nb"),
    ],
)
def test_roles_that_must_alternate(tmp_path: Path, template: str, messages: Any, text: str | None) -> None:
    assert rendered(tmp_path, template, messages) == (text or "<user>Q<tool>cold\n\ngo on")


def test_a_template_that_accepts_nothing_says_why(tmp_path: Path) -> None:
    template = "{{ raise_exception('not ' ~ messages | length) }}"
    with pytest.raises(PromptError, match="not 3"):
        rendered(tmp_path, template, said("system S", "user a", "user b"))  # the reason for what was asked


def test_ids() -> None:
    first, second, result = (
        {"role": "assistant", "content": "", "tool_calls": [earlier_call("toolu_01ABC", "f", {})]},
        {"role": "assistant", "content": "", "tool_calls": [earlier_call("aB3aB3aB3", "f", {})]},
        {"role": "tool", "content": "", "tool_call_id": "toolu_01ABC"},
    )
    fitted = with_fitting_ids([first, second, result])
    [call], [kept] = fitted[0]["tool_calls"], fitted[1]["tool_calls"]
    assert kept["id"] == "aB3aB3aB3"
    assert call["id"] == fitted[2]["tool_call_id"] == call_id(b"toolu_01ABC")
    assert len(call["id"]) == 9
    assert call["id"].isalnum()
    assert first["tool_calls"][0]["id"] == "toolu_01ABC"
    assert len({call_id(str(at).encode()) for at in range(1000)}) == 1000


@pytest.mark.parametrize(
    ("block", "line"),
    [
        (
            {"type": "image", "source": {"type": "base64", "data": "AAAA"}},
            "[image: left out, as this model reads text only]",
        ),
        ({"type": "tool_reference", "tool_name": "clock"}, "[tool_reference: clock]"),
        ({"type": "document", "title": "T", "source": {"type": "text", "data": "words"}}, "[document: T words]"),
        (
            {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "w"}]}},
            "[document: w]",
        ),
        (
            {"type": "document", "source": {"type": "base64", "data": "AA"}},
            "[document: left out, as this model reads text only]",
        ),
        ({"type": "server_tool_use", "name": "web_search", "input": {"query": "q"}}, "[server_tool_use: web_search q]"),
        ({"type": "mcp_tool_result", "content": [{"type": "text", "text": "r"}]}, "[mcp_tool_result: r]"),
        (
            {"type": "web_fetch_tool_result", "content": {"type": "web_fetch_tool_error", "error_code": "x"}},
            "[web_fetch_tool_result: x]",
        ),
        (
            {"type": "bash_code_execution_tool_result", "content": {"stdout": "1"}},
            "[bash_code_execution_tool_result: 1]",
        ),
        ({"type": "input_text", "text": "plain"}, "plain"),
        ({"type": "thing_of_2031"}, "[thing_of_2031: left out, as this model reads text only]"),
    ],
)
def test_a_line_for_what_is_no_text(block: dict[str, Any], line: str) -> None:
    other, before, after = OtherBlock(**block), TextPart(type="text", text="a"), TextPart(type="text", text="b")
    assert text_of([other]) == line
    assert text_of([before, other, other, after, before]) == f"a\n{line}\n{line}\nba"


def test_deep_blocks_are_cut() -> None:
    block: Any = {"type": "text", "text": "deep"}
    for _ in range(900):
        block = {"type": "x", "content": [block]}
    assert text_of([OtherBlock(**block)]) == "[x: left out, as this model reads text only]"
