"""Thoughts: told apart from the answer, switched on and off, bounded; in all the ways that clients ask for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ifprune_mlx import load
from ifprune_mlx.serving.http.chat_rendering import ChatRenderer, Conversation, ThinkingOptions
from ifprune_mlx.thinking import Thinking
from tests.ifprune_mlx.serving.http.scripted import FAMILIES, Scripted, write_templated
from tests.ifprune_mlx.serving.http.serving import Served

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
TOOLS = [{"type": "function", "function": {"name": "clock"}}]
THOUGHTS = '<think>\nI could <tool_call>\n{"name": "clock"}\n</tool_call>.\n</think>\n\n'
Servers = Callable[[str], Scripted]
OFF: dict[str, tuple[str, dict[str, Any]]] = {
    "enable_thinking": (CHAT, {"enable_thinking": False}),
    "chat_template_kwargs": (CHAT, {"chat_template_kwargs": {"enable_thinking": False}}),
    "reasoning_effort": (CHAT, {"reasoning_effort": "none"}),
    "thinking in a chat": (CHAT, {"thinking": {"type": "disabled"}}),
    "thinking": (MESSAGES, {"thinking": {"type": "disabled"}}),
}


def post(served: Served, path: str, **fields: Any) -> Any:
    return served.post(path, {"messages": HELLO, "max_tokens": 200, **fields})


def answered(server: Scripted, path: str, **fields: Any) -> tuple[str, str]:
    """Text and thoughts."""
    response = post(server.served, path, **fields)
    assert response.status_code == 200, response.text
    body = response.json()
    if path == CHAT:
        message = body["choices"][0]["message"]
        return message["content"], message.get("reasoning_content", "")
    blocks = body["content"]
    return tuple("".join(block.get(kind, "") for block in blocks) for kind in ("text", "thinking"))  # type: ignore[return-value]


@pytest.mark.parametrize("way", OFF)
@pytest.mark.parametrize("family", ["thinking", "opened"])
def test_off(scripted_server: Servers, family: str, way: str) -> None:
    server = scripted_server(family)
    server.say("Hi")
    path, fields = OFF[way]
    assert answered(server, path, **fields) == ("Hi", "")
    assert server.prompt.endswith("assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {}),
        (CHAT, {"enable_thinking": True}),
        (CHAT, {"chat_template_kwargs": {"enable_thinking": True}}),
        (CHAT, {"reasoning_effort": "high"}),
        (CHAT, {"reasoning_effort": "low", "enable_thinking": True}),
        (MESSAGES, {}),
        (MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": 1024}}),
        (MESSAGES, {"thinking": {"type": "adaptive"}}),
    ],
)
@pytest.mark.parametrize("family", ["thinking", "opened"])
def test_on(scripted_server: Servers, family: str, path: str, fields: dict[str, Any]) -> None:
    server = scripted_server(family)
    thoughts = THOUGHTS.removeprefix("<think>\n") if family == "opened" else THOUGHTS
    server.say(f"{thoughts}Hi </think>")
    said = answered(server, path, **fields)
    assert said == ("Hi </think>", 'I could <tool_call>\n{"name": "clock"}\n</tool_call>.')
    assert server.prompt.endswith("assistant\n<think>\n" if family == "opened" else "assistant\n")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"enable_thinking": True}, "enable_thinking: cannot be had: this model does not think"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs.enable_thinking: cannot be had"),
        ({"reasoning_effort": "high"}, "reasoning_effort: cannot be had"),
        ({"thinking": {"type": "enabled"}}, "thinking.type: cannot be had"),
        ({"reasoning_effort": "some"}, "reasoning_effort: must be one of none, minimal, low"),
        ({"reasoning_effort": 3}, "reasoning_effort: must be a string"),
        ({"thinking": {"type": "often"}}, "thinking.type: must be one of"),
        ({"enable_thinking": False, "reasoning_effort": "high"}, "reasoning_effort: contradicts enable_thinking"),
        ({"chat_template_kwargs": {"enable_thinking": "no"}}, "must be true or false"),
        ({"chat_template_kwargs": {"depth": 3}}, "chat_template_kwargs.depth: is no variable of this model's"),
        ({"chat_template_kwargs": {"chat_template": "{{ 7 * 7 }}"}}, "chat_template: is set by the server"),
        ({"chat_template_kwargs": {"messages": []}}, "messages: is set by the server"),
        ({"chat_template_kwargs": {"tools": []}}, "tools: is set by the server"),
        ({"chat_template_kwargs": {"eos_token": ""}}, "eos_token: is set by the server"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs: must be an object"),
    ],
)
def test_what_cannot_be_had_is_refused(served: Served, fields: dict[str, Any], reason: str) -> None:
    response = post(served, CHAT, **fields)
    assert response.status_code == 400
    assert reason in response.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["disabled", "enabled", "adaptive"])
def test_agents_ask_models_that_do_not_think(scripted_server: Servers, kind: str) -> None:
    server = scripted_server("llama")
    server.say("Hi")
    assert answered(server, MESSAGES, thinking={"type": kind, "budget_tokens": 1024}) == ("Hi", "")
    assert answered(server, CHAT, enable_thinking=False) == ("Hi", "")
    lines = [line for line in server.served.stderr if "asks for thinking" in line]
    assert len(lines) <= 1
    assert kind != "enabled" or lines


@pytest.mark.parametrize(
    ("family", "start", "end"), [("unswitched", "<think>", "</think>"), ("bracketed", "[THINK]", "[/THINK]")]
)
def test_models_that_begin_their_thoughts_themselves(tmp_path: Path, family: str, start: str, end: str) -> None:
    model, tokenizer = load(write_templated(tmp_path / "checkpoint", *FAMILIES[family]))
    renderer = ChatRenderer(model, tokenizer)
    for enabled in (None, True, False):
        options = ThinkingOptions(enabled, variables={"style": "Terse."} if family == "unswitched" else {})
        [prompt] = renderer.conversation(Conversation(HELLO, thinking=options))
        text = tokenizer.decode(list(prompt.tokens))
        assert text.endswith(f"assistant\n{start}\n\n{end}\n\n" if enabled is False else "assistant\n")
        assert text.startswith("Terse." if family == "unswitched" else "<|im_start|>")
        assert prompt.thinking == Thinking(start, end)


LETTERS = "".join(chr(ord("a") + at % 26) for at in range(300))
CLOSING = 4  # tokens: a line break, the mark, two line breaks


@pytest.mark.parametrize("budget", [1, 5, 40])
def test_a_budget_closes_the_thoughts(scripted_server: Servers, budget: int) -> None:
    server = scripted_server("opened")
    server.say(LETTERS[: budget + 10])
    thinking = {"type": "enabled", "budget_tokens": budget}
    said, thoughts = answered(server, MESSAGES, thinking=thinking)
    assert (thoughts, said) == (LETTERS[:budget], LETTERS[budget + CLOSING : budget + 10])
    server.say(f"{LETTERS[:budget]}</think>Hi")  # they end in time
    assert answered(server, MESSAGES, thinking={**thinking, "budget_tokens": budget + 1}) == ("Hi", LETTERS[:budget])


@pytest.mark.parametrize(("effort", "most"), [("minimal", 256), ("low", 1024), ("medium", 4096), ("high", 8000)])
def test_effort_bounds_thoughts(scripted_server: Servers, effort: str, most: int) -> None:
    server = scripted_server("thinking")
    server.say(f"<think>{'ab' * 150}</think>Hi")
    said, thoughts = answered(server, CHAT, reasoning_effort=effort, max_tokens=8000)
    assert len(thoughts) == min(most - 1, 300)  # the first mark is a token
    assert said.endswith("Hi")
    server.say(LETTERS)  # no thoughts, so there is nothing to close
    assert answered(server, CHAT, reasoning_effort=effort, max_tokens=8000) == (LETTERS, "")


@pytest.mark.parametrize("family", ["thinking", "opened"])
def test_stop_strings_do_not_count_in_thoughts(scripted_server: Servers, family: str) -> None:
    server = scripted_server(family)
    opening = "" if family == "opened" else "<think>"
    server.say(f"{opening}one STOP two</think>three STOP four")
    assert answered(server, CHAT, stop="STOP") == ("three ", "one STOP two")
    assert answered(server, MESSAGES, stop_sequences=["STOP"]) == ("three ", "one STOP two")


@pytest.mark.parametrize("family", ["thinking", "opened"])
def test_one_call_at_most_and_none_that_was_drafted(scripted_server: Servers, family: str) -> None:
    server = scripted_server(family)
    opening = "" if family == "opened" else "<think>"
    call = '<tool_call>\n{"name": "clock"}\n</tool_call>'
    server.say(f"{opening}{call}</think>{call}\n{call}")
    body = post(server.served, CHAT, tools=TOOLS, parallel_tool_calls=False).json()
    message = body["choices"][0]["message"]
    assert [made["function"]["name"] for made in message["tool_calls"]] == ["clock"]
    assert message["reasoning_content"] == call
    server.say(f"{opening}{call}")  # thoughts that the limit cuts
    body = post(server.served, CHAT, tools=TOOLS, parallel_tool_calls=False).json()
    assert "tool_calls" not in body["choices"][0]["message"]


@pytest.mark.parametrize("family", ["thinking", "opened"])
def test_an_answer_that_is_begun_has_no_thoughts(scripted_server: Servers, family: str) -> None:
    server = scripted_server(family)
    server.say("so.")
    begun = [*HELLO, {"role": "assistant", "content": "I say"}]
    assert answered(server, MESSAGES, messages=begun) == ("so.", "")
    assert server.prompt.endswith("</think>\n\nI say" if family == "opened" else "assistant\nI say")
    thinking = {"type": "enabled", "budget_tokens": 1024}
    for fields in (
        {"messages": begun},
        {"tools": [{"name": "clock", "input_schema": {}}], "tool_choice": {"type": "any"}},
    ):
        response = post(server.served, MESSAGES, thinking=thinking, **fields)
        assert response.status_code == 400
        assert "cannot think before" in response.json()["error"]["message"]


def test_tokens_are_counted_as_they_are_read(scripted_server: Servers) -> None:
    served = scripted_server("thinking").served
    counts = [
        served.post(f"{MESSAGES}/count_tokens", {"messages": HELLO, "thinking": {"type": kind}}).json()["input_tokens"]
        for kind in ("disabled", "adaptive")
    ]
    assert counts[0] - counts[1] == len("\n\n\n\n") + 2  # the marks are tokens


YES_OR_NO = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
FORCED: dict[str, tuple[str, dict[str, Any]]] = {
    "a chat": (CHAT, {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}),
    "a named tool": (CHAT, {"tools": TOOLS, "tool_choice": TOOLS[0] | {"function": {"name": "clock"}}}),
    "messages": (
        MESSAGES,
        {
            "tools": [{"name": "clock", "input_schema": {}}],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        },
    ),
}


def called(server: Scripted, path: str, **fields: Any) -> tuple[str, list[str]]:
    """Thoughts, and the names of the called tools."""
    body = post(server.served, path, **fields).json()
    if path == CHAT:
        message = body["choices"][0]["message"]
        assert not message["content"]
        return message.get("reasoning_content", ""), [call["function"]["name"] for call in message["tool_calls"]]
    thoughts = "".join(block.get("thinking", "") for block in body["content"])
    return thoughts, [block["name"] for block in body["content"] if block["type"] != "thinking"]


@pytest.mark.parametrize("way", FORCED)
@pytest.mark.parametrize("family", ["thinking", "opened", "unswitched"])
def test_a_forced_call_comes_after_the_thoughts(scripted_server: Servers, family: str, way: str) -> None:
    server, (path, fields) = scripted_server(family), FORCED[way]
    opening = "" if family == "opened" else "<think>\n"
    server.say(f"{opening}What time?\n</think>\n\nI say.")  # the grammar makes it a call
    assert called(server, path, **fields) == ("What time?", ["clock"])


@pytest.mark.parametrize("family", ["thinking", "opened", "llama"])
def test_a_forced_call_without_thoughts(scripted_server: Servers, family: str) -> None:
    server = scripted_server(family)
    server.say("I say.")
    for path, fields in FORCED.values():
        assert called(server, path, thinking={"type": "disabled"}, **fields) == ("", ["clock"])


@pytest.mark.parametrize("family", ["thinking", "opened", "bracketed"])
def test_a_budget_closes_the_thoughts_before_a_constrained_answer(scripted_server: Servers, family: str) -> None:
    server = scripted_server(family)
    server.say({"opened": "", "bracketed": "[THINK]"}.get(family, "<think>") + LETTERS)
    thinking = {"type": "enabled", "budget_tokens": 20}
    text, thoughts = answered(server, CHAT, thinking=thinking, response_format=YES_OR_NO)
    assert text in ('"yes"', '"no"')
    assert thoughts.startswith(LETTERS[:10])
    if family != "bracketed":  # whose chat template has no tools
        thoughts, calls = called(server, CHAT, thinking=thinking, **FORCED["a chat"][1])
        assert thoughts.startswith(LETTERS[:10])
        assert calls == ["clock"]


def test_completions_that_are_constrained_hold_no_thoughts(scripted_server: Servers) -> None:
    server = scripted_server("thinking")
    server.say("<think>Hi")
    response = server.served.post("/v1/completions", {"prompt": "Yes or no?", "response_format": YES_OR_NO})
    assert response.json()["choices"][0]["text"] in ('"yes"', '"no"')
