"""What real clients send besides the fields that everybody knows: it is honoured, and nothing of it is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.ifprune_mlx.serving.http.scripted import Scripted

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
HELLO: Any = {"role": "user", "content": "Hello"}
SCHEMA = {"type": "object", "properties": {"a": {"const": 12}}, "required": ["a"], "additionalProperties": False}
WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
Servers = Callable[[str], Scripted]


def answer(server: Scripted, path: str, **fields: Any) -> Any:
    response = server.served.post(path, {"messages": [HELLO], "max_tokens": 400, **fields})
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize(
    "asked",
    [
        {"type": "json_object", "schema": SCHEMA},  # llama.cpp
        {"type": "json_schema", "schema": SCHEMA},
        {"type": "json_schema", "json_schema": {"schema": SCHEMA}},  # OpenAI
    ],
    ids="+".join,
)
def test_a_schema_counts_wherever_it_stands(scripted_server: Servers, asked: Any) -> None:
    server = scripted_server("mistral")
    server.say('{"b": 1}')
    said = answer(server, CHAT, response_format=asked)["choices"][0]["message"]["content"]
    assert json.loads(said) == {"a": 12}


@pytest.mark.parametrize(
    "message",
    [{"content": None, "refusal": "I must not."}, {"content": [{"type": "refusal", "refusal": "I must not."}]}],
    ids=["field", "part"],
)
def test_an_earlier_refusal_is_read(scripted_server: Servers, message: Any) -> None:
    server = scripted_server("llama")
    server.say("Hi")
    answer(server, CHAT, messages=[HELLO, {"role": "assistant", **message}, HELLO])
    assert "I must not." in server.prompt


TEXTS = [{"type": "text", "text": "You are an agent."}, {"type": "text", "text": "Be brief. "}]
TEXTS += [{"type": "text", "text": "Now."}]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"messages": [{"role": "user", "content": TEXTS}]}),
        (CHAT, {"messages": [{"role": "developer", "content": TEXTS}, HELLO]}),
        (MESSAGES, {"messages": [{"role": "user", "content": TEXTS}]}),
        (MESSAGES, {"system": TEXTS}),
    ],
    ids=["user", "developer", "Anthropic's user", "system"],
)
def test_texts_are_not_run_together(scripted_server: Servers, path: str, fields: Any) -> None:
    server = scripted_server("thinking")
    server.say("Hi")
    answer(server, path, **fields)
    assert "You are an agent.\nBe brief. Now." in server.prompt


@pytest.mark.parametrize(
    ("result", "read"),
    [
        ({"content": "no such city"}, "Error: no such city"),
        ({"content": [{"type": "text", "text": "denied"}]}, "Error: denied"),
        ({}, "Error: "),
        ({"content": "<tool_use_error>x</tool_use_error>"}, "\n<tool_use_error>x</tool_use_error>"),
    ],
    ids=["text", "blocks", "nothing", "said already"],
)
def test_a_failed_tool_is_read_as_failed(scripted_server: Servers, result: Any, read: str) -> None:
    server = scripted_server("thinking")
    server.say("Hi")
    used = {"type": "tool_use", "id": "a", "name": "weather", "input": {}}
    told = {"type": "tool_result", "tool_use_id": "a", "is_error": True, **result}
    messages = [HELLO, {"role": "assistant", "content": [used]}, {"role": "user", "content": [told]}]
    answer(server, MESSAGES, messages=messages)
    assert f"{read}<|im_end|>" in server.prompt


@pytest.mark.parametrize("thinking", [{}, {"thinking": {"type": "adaptive"}}, {"thinking": {"type": "enabled"}}])
def test_anthropics_effort_bounds_thoughts(scripted_server: Servers, thinking: Any) -> None:
    server = scripted_server("thinking")
    server.say(f"<think>{'ab' * 700}</think>Hi")
    fields = {**thinking, "max_tokens": 3000}
    most = {"low": 1023, "high": 1400}
    for effort, length in most.items():
        content = answer(server, MESSAGES, output_config={"effort": effort}, **fields)["content"]
        assert (content[0]["type"], len(content[0]["thinking"])) == ("thinking", length)
    # A model that does not think is asked for it as well.
    plain = scripted_server("mistral")
    plain.say("Hi")
    assert answer(plain, MESSAGES, output_config={"effort": "low"})["content"] == [{"type": "text", "text": "Hi"}]


def test_servers_of_tools_are_left_out_and_the_log_says_so(scripted_server: Servers) -> None:
    server = scripted_server("llama")
    server.say("Hi")
    for _ in range(2):
        answer(server, MESSAGES, mcp_servers=[{"type": "url", "url": "https://example.com", "name": "m"}])
    assert len([line for line in server.served.stderr if "mcp_servers are left out" in line]) == 1


@pytest.mark.parametrize("family", ["thinking", "mistral", "llama"])
@pytest.mark.parametrize("stop", ['"Os', "lo"])
def test_a_call_that_a_stop_string_cuts_is_not_to_be_run(scripted_server: Servers, family: str, stop: str) -> None:
    server = scripted_server(family)
    key = "parameters" if family == "llama" else "arguments"
    call = f'{{"name": "weather", "{key}": {{"city": "Oslo"}}}}'
    server.say(
        {"thinking": f"<tool_call>\n{call}\n</tool_call>", "mistral": f"[TOOL_CALLS] [{call}]"}.get(family, call)
    )
    named = {"type": "function", "function": {"name": "weather"}}
    asked: dict[str, Any] = {"tools": [{"type": "function", "function": WEATHER}], "tool_choice": named}
    assert answer(server, CHAT, **asked)["choices"][0]["finish_reason"] == "tool_calls"
    assert answer(server, CHAT, stop=stop, **asked)["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("parameters", [{}, {"parameters": None}, {"parameters": {}}], ids=["none", "null", "empty"])
def test_a_template_finds_the_parameters_of_every_tool(scripted_server: Servers, parameters: Any) -> None:
    server = scripted_server("mistral")
    server.say("Hi")
    function = {"name": "clock", "description": None, "strict": None, **parameters}
    answer(server, CHAT, tools=[{"type": "function", "function": function}])
    shown = {"name": "clock", "parameters": {"type": "object", "properties": {}}}
    told = server.prompt.split("[AVAILABLE_TOOLS] ")[1].split("[/AVAILABLE_TOOLS]")[0]
    assert json.loads(told) == [{"type": "function", "function": shown}]


def test_calls_in_openais_first_form_are_read(scripted_server: Servers) -> None:
    server = scripted_server("mistral")
    server.say("Hi")
    call = {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    result = {"role": "function", "name": "weather", "content": "-3 C"}
    answer(server, CHAT, messages=[HELLO, call, result])
    identity = server.prompt.split('"id": "')[1][:9]
    assert '"name": "weather", "arguments": {"city": "Oslo"}' in server.prompt
    assert f'{{"content": -3 C, "call_id": "{identity}"}}' in server.prompt


@pytest.mark.parametrize("begun", ["So", "The answer: "])
def test_a_call_that_is_drafted_in_thoughts_after_a_begun_answer_is_none(scripted_server: Servers, begun: str) -> None:
    server = scripted_server("thinking")
    draft = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    asked: dict[str, Any] = {
        "messages": [HELLO, {"role": "assistant", "content": begun}],
        "tools": [{"name": "weather", "input_schema": WEATHER["parameters"]}],
    }
    server.say(f"<think>{draft}</think>it is.")
    blocks = answer(server, MESSAGES, **asked)["content"]
    assert [(block["type"], block.get("thinking"), block.get("text")) for block in blocks] == [
        ("thinking", draft, None),
        ("text", None, "it is."),
    ]
    server.say(" it is.")
    assert answer(server, MESSAGES, **asked)["content"] == [{"type": "text", "text": " it is."}]
