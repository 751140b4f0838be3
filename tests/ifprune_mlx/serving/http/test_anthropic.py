"""Anthropic's own client against a real server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from tests.ifprune_mlx.serving.http.serving import Served

HELLO: list[Any] = [{"role": "user", "content": "Hello there"}]
WARM: dict[str, Any] = {
    "model": "default",
    "messages": HELLO,
    "max_tokens": 12,
    "extra_body": {"seed": 7, "temperature": 1},
}


@pytest.fixture
def client(served: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as made:
        yield made


def test_a_message_has_its_text_usage_and_figures(client: anthropic.Anthropic) -> None:
    message = client.messages.create(**WARM)
    assert message.content[0].type == "text"
    assert message.stop_reason in ("end_turn", "max_tokens")
    assert message.usage.input_tokens > 0
    assert 1 <= message.usage.output_tokens <= 12
    assert message.to_dict()["ifprune"]["selector"] == "activation"  # type: ignore[index]


def test_a_stream_says_what_the_whole_message_says(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(**WARM)
    with client.messages.stream(**WARM) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert [block.to_dict() for block in final.content] == [block.to_dict() for block in whole.content]
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.usage.input_tokens == whole.usage.input_tokens
    assert kinds[0] == "message_start"
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_a_stop_sequence_is_named(client: anthropic.Anthropic) -> None:
    options = WARM | {"extra_body": {"logit_bias": {"2": -100}, "seed": 7, "temperature": 1}}
    block = client.messages.create(**options).content[0]
    assert block.type == "text"
    stop = block.text[4:6]
    message = client.messages.create(stop_sequences=[stop], **options)
    assert message.stop_reason == "stop_sequence"
    assert message.stop_sequence == stop
    assert message.content[0] == block.model_copy(update={"text": block.text[: block.text.index(stop)]})


def test_an_answer_goes_on_from_what_it_is_said_to_begin_with(client: anthropic.Anthropic) -> None:
    begun = client.messages.count_tokens(model="default", messages=[*HELLO, {"role": "assistant", "content": "I say"}])
    plain = client.messages.count_tokens(model="default", messages=HELLO)
    assert begun.input_tokens == plain.input_tokens + len("I say")


def test_system_prompts_and_blocks(client: anthropic.Anthropic) -> None:
    blocks: Any = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]
    one = client.messages.create(**(WARM | {"system": "Be brief."}))
    many = client.messages.create(
        **(
            WARM
            | {"system": [{"type": "text", "text": "Be brief."}], "messages": [{"role": "user", "content": blocks}]}
        )
    )
    assert one.content == many.content


def test_models(client: anthropic.Anthropic) -> None:
    assert [model.id for model in client.models.list()] == ["checkpoint"]


def test_refusals_are_the_clients_errors(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="top_p"):
        client.messages.create(model="default", messages=HELLO, max_tokens=4, extra_body={"top_p": 3})
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="another", messages=HELLO, max_tokens=4)
