"""Tools, from the question to the answer, with both clients and a model that has learned to call one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.ifprune_mlx.serving.http.serving import ARGUMENTS, CONCLUSION, QUESTION, RESULT, SPOKEN, WEATHER, Served

TOOLS: list[Any] = [{"type": "function", "function": WEATHER}]
OWN: list[Any] = [{"name": "weather", "description": WEATHER["description"], "input_schema": WEATHER["parameters"]}]
ASKED: list[Any] = [{"role": "user", "content": QUESTION}]
FORCED: list[Any] = ["required", {"type": "function", "function": {"name": "weather"}}]


@pytest.fixture
def client(served_tools: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served_tools.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def other(served_tools: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served_tools.url, api_key="none", max_retries=0) as made:
        yield made


def test_a_round_trip(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="default", messages=ASKED, tools=TOOLS)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == SPOKEN
    assert choice.message.tool_calls is not None
    [call] = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments) == ARGUMENTS
    told = [*ASKED, choice.message, {"role": "tool", "tool_call_id": call.id, "content": RESULT}]
    final = client.chat.completions.create(model="default", messages=told, tools=TOOLS)
    assert final.choices[0].message.content == CONCLUSION
    assert final.choices[0].finish_reason == "stop"


def test_a_streamed_call(client: openai.OpenAI) -> None:
    with client.chat.completions.create(model="default", messages=ASKED, tools=TOOLS, stream=True) as stream:
        choices = [chunk.choices[0] for chunk in stream]
    assert "".join(choice.delta.content or "" for choice in choices) == SPOKEN
    [call] = [call for choice in choices for call in choice.delta.tool_calls or []]
    assert call.function is not None
    assert (call.index, call.function.name) == (0, "weather")
    assert json.loads(call.function.arguments or "") == ARGUMENTS
    assert choices[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize("choice", FORCED, ids=["required", "named"])
def test_a_forced_call_says_nothing_before(client: openai.OpenAI, choice: Any) -> None:
    answer = client.chat.completions.create(
        model="default", messages=ASKED, tools=TOOLS, tool_choice=choice, max_tokens=80
    )
    message = answer.choices[0].message
    assert message.content is None
    assert message.tool_calls is not None
    [call] = message.tool_calls
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", ARGUMENTS)
    assert answer.choices[0].finish_reason == "tool_calls"


def test_no_call_where_none_is_wanted(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="default", messages=ASKED, tools=TOOLS, tool_choice="none", max_tokens=30
    )
    assert answer.choices[0].message.tool_calls is None


def test_a_round_trip_in_anthropics_words(other: anthropic.Anthropic) -> None:
    message = other.messages.create(model="default", messages=ASKED, tools=OWN, max_tokens=100)
    assert [block.type for block in message.content] == ["text", "tool_use"]
    assert message.stop_reason == "tool_use"
    call = message.content[1]
    assert call.type == "tool_use"
    assert (call.name, call.input) == ("weather", ARGUMENTS)
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": RESULT}
    told: Any = [
        *ASKED,
        {"role": "assistant", "content": [block.to_dict() for block in message.content]},
        {"role": "user", "content": [result]},
    ]
    final = other.messages.create(model="default", messages=told, tools=OWN, max_tokens=100)
    assert final.content[0].type == "text"
    assert final.content[0].text == CONCLUSION
    assert final.stop_reason == "end_turn"


@pytest.mark.parametrize("choice", [{"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_streamed_call_in_anthropics_words(other: anthropic.Anthropic, choice: Any) -> None:
    with other.messages.stream(
        model="default", messages=ASKED, tools=OWN, tool_choice=choice, max_tokens=100
    ) as stream:
        message = stream.get_final_message()
    call = message.content[-1]
    assert call.type == "tool_use"
    assert (call.name, call.input) == ("weather", ARGUMENTS)
    assert message.stop_reason == "tool_use"


def test_a_model_without_tools_says_so(served: Served) -> None:
    for path, body in (
        ("/v1/chat/completions", {"messages": ASKED, "tools": TOOLS}),
        ("/v1/messages", {"messages": ASKED, "tools": OWN, "max_tokens": 4}),
    ):
        response = served.post(path, body)
        assert response.status_code == 400
        assert "has no tools" in response.json()["error"]["message"]
