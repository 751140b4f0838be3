"""JSON mode, schemas, forced and strict tools, with both clients; the models are random and know nothing of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from tests.ifprune_mlx.serving.http.serving import QUESTION, Served, serving
from tests.random_schemas import random_schema
from tests.tiny import write_checkpoint

ASKED: list[Any] = [{"role": "user", "content": QUESTION}]
PLAN: dict[str, Any] = {
    "name": "plan",
    "parameters": {
        "type": "object",
        "properties": {
            "steps": {"type": "array", "items": {"enum": ["go", "stay"]}, "minItems": 1, "maxItems": 2},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["steps", "days"],
        "additionalProperties": False,
    },
}
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 9}}, "required": ["city"]}
BOTH: list[Any] = [
    {"type": "function", "function": {"name": 'a "city"', "parameters": CITY}},
    {"type": "function", "function": PLAN},
    {"type": "function", "function": {"name": "nothing"}},
]
NAMED: Any = {"type": "function", "function": {"name": "plan"}}
SCHEMAS = [random_schema(seed) for seed in range(100, 104)]


class Trip(BaseModel):
    """As people write their answers' types."""

    place: Literal["Oslo", "Rome"]
    days: int = Field(ge=1, le=30)
    back: bool | None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    checkpoint = write_checkpoint(folder / "checkpoint", max_position_embeddings=4096)
    with serving(checkpoint, folder / "cache", "--max-tokens", "2000", "--dense") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def other(server: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as made:
        yield made


def schema_format(schema: dict[str, Any]) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


@pytest.mark.parametrize("at", range(len(SCHEMAS)))
def test_answers_satisfy_the_schema_whole_streamed_and_several(client: openai.OpenAI, at: int) -> None:
    asked: Any = {"model": "default", "messages": ASKED, "response_format": schema_format(SCHEMAS[at])}
    whole = client.chat.completions.create(**asked, n=2, temperature=1, seed=at)
    with client.chat.completions.create(**asked, stream=True, temperature=1, seed=at) as stream:
        choices = [chunk.choices[0] for chunk in stream]
    streamed = "".join(choice.delta.content or "" for choice in choices)
    assert streamed == whole.choices[0].message.content
    for text in (streamed, whole.choices[1].message.content):
        jsonschema.validate(json.loads(text or ""), SCHEMAS[at])
    assert [choice.finish_reason for choice in (*whole.choices, choices[-1])] == ["stop"] * 3


def test_max_tokens_cuts_an_answer(client: openai.OpenAI) -> None:
    asked: Any = {"model": "default", "messages": ASKED, "max_tokens": 2}
    for kind in (schema_format(SCHEMAS[0]), {"type": "json_object"}):
        answer = client.chat.completions.create(**asked, response_format=kind).choices[0]
        assert answer.finish_reason == "length"
        assert (answer.message.content or "").startswith("{")


def test_types_of_the_openai_client(client: openai.OpenAI) -> None:
    for parse in (client.chat.completions.parse, client.beta.chat.completions.parse):
        parsed = parse(model="default", messages=ASKED, response_format=Trip, temperature=1, seed=5)
        trip = parsed.choices[0].message.parsed
        assert isinstance(trip, Trip)


def test_completions_take_a_schema_too(client: openai.OpenAI) -> None:
    kind = schema_format(Trip.model_json_schema())
    answers = client.completions.create(
        model="default", prompt=["a", "b"], extra_body={"response_format": kind}, max_tokens=200
    )
    for choice in answers.choices:
        Trip.model_validate_json(choice.text)


def test_schemas_in_anthropics_words(other: anthropic.Anthropic) -> None:
    kind = {"type": "json_schema", "schema": Trip.model_json_schema()}
    for extra in ({"output_config": {"format": kind}}, {"output_format": kind}):
        message = other.messages.create(model="default", messages=ASKED, max_tokens=300, extra_body=extra)
        assert message.content[0].type == "text"
        Trip.model_validate_json(message.content[0].text)
        assert message.stop_reason == "end_turn"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (schema_format({"type": "strin"}), "Invalid type"),
        (schema_format({"not": {}}), "not"),
        (schema_format({"type": "integer", "allOf": [{"multipleOf": 10007}, {"multipleOf": 9973}]}), "simpler"),
        (schema_format({"enum": ["x" * 200_000]}), "characters"),
        ({"type": "json_schema"}, "is required"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "response_format.json_schema.schema"),
        ({"type": "xml"}, "response_format.type"),
        ("json", "response_format"),
    ],
)
def test_what_cannot_be_a_format_is_refused(server: Served, kind: Any, reason: str) -> None:
    response = server.post("/v1/chat/completions", {"messages": ASKED, "response_format": kind})
    assert response.status_code == 400
    assert reason in response.json()["error"]["message"]
    assert "\n" not in response.json()["error"]["message"]


def test_a_begun_answer_and_a_schema_exclude_each_other(server: Served) -> None:
    kind = {"type": "json_schema", "schema": {"type": "object"}}
    begun = [*ASKED, {"role": "assistant", "content": "{"}]
    body = {"messages": begun, "max_tokens": 9, "output_config": {"format": kind}}
    response = server.post("/v1/messages", body)
    assert response.status_code == 400
    assert "beginning" in response.json()["error"]["message"]


def test_penalties_that_overflow_are_refused(server: Served) -> None:
    for penalty in (1e-300, 1e-40, 1e-3):
        body = {"messages": ASKED, "repetition_penalty": penalty, "logprobs": True, "max_tokens": 3}
        response = server.post("/v1/chat/completions", body)
        assert response.status_code == 400
        assert "repetition_penalty" in response.json()["error"]["message"]


@pytest.fixture(scope="module")
def calling(served_tools: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served_tools.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_forced_calls_satisfy_their_schemas(calling: openai.OpenAI) -> None:
    schemas = {each["function"]["name"]: each["function"].get("parameters", {}) for each in BOTH}
    asked: Any = {"model": "default", "messages": ASKED, "tools": BOTH, "temperature": 2, "max_tokens": 300}
    for choice in ("required", NAMED):
        for seed in range(3):
            answer = calling.chat.completions.create(
                **asked, tool_choice=choice, seed=seed, parallel_tool_calls=False
            ).choices[0]
            assert answer.finish_reason == "tool_calls"
            assert answer.message.tool_calls is not None
            [call] = answer.message.tool_calls
            assert call.type == "function"
            jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])
            assert choice == "required" or call.function.name == "plan"


def test_a_forced_call_that_is_cut(calling: openai.OpenAI) -> None:
    answer = calling.chat.completions.create(
        model="default", messages=ASKED, tools=BOTH, tool_choice=NAMED, max_tokens=55
    ).choices[0]
    assert answer.finish_reason == "length"
    assert answer.message.tool_calls is not None
    [call] = answer.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "plan"
    assert call.function.arguments.startswith("{")


def test_forced_calls_in_anthropics_words(served_tools: Served) -> None:
    own: Any = [{"name": "plan", "input_schema": PLAN["parameters"]}]
    with anthropic.Anthropic(base_url=served_tools.url, api_key="none", max_retries=0) as other:
        for choice in ({"type": "any"}, {"type": "tool", "name": "plan"}):
            message = other.messages.create(
                model="default",
                messages=ASKED,
                tools=own,
                tool_choice=choice,
                max_tokens=300,  # type: ignore[arg-type]
            )
            call = message.content[0]
            assert call.type == "tool_use"
            jsonschema.validate(call.input, PLAN["parameters"])


def test_a_tool_whose_schema_cannot_be_used(served_tools: Served) -> None:
    bad = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "strin"}}}}}
    body = {"messages": ASKED, "tools": [bad], "tool_choice": "required"}
    response = served_tools.post("/v1/chat/completions", body)
    assert response.status_code == 400
    assert "Invalid type" in response.json()["error"]["message"]


@pytest.mark.slow
def test_a_real_model(served_real: Served) -> None:
    schema = Trip.model_json_schema()
    answer = served_real.chat("Plan a week in Rome.", response_format=schema_format(schema), max_tokens=200)
    Trip.model_validate_json(answer["choices"][0]["message"]["content"])
