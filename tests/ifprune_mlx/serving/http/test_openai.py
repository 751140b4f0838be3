"""OpenAI's own client against a real server."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.ifprune_mlx.serving.http.serving import Served, eventually, serving
from tests.tiny import write_checkpoint

HELLO: list[Any] = [{"role": "user", "content": "Hello there"}]
WARM: dict[str, Any] = {"temperature": 1.0, "seed": 7, "max_tokens": 12}


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def streamed(client: openai.OpenAI, **options: Any) -> list[Any]:
    with client.chat.completions.create(model="default", messages=HELLO, stream=True, **options) as stream:
        return list(stream)


def test_an_answer_has_its_text_usage_and_figures(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="default", messages=HELLO, **WARM)
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert 1 <= answer.usage.completion_tokens <= 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    figures = answer.to_dict()["ifprune"]
    assert isinstance(figures, dict)
    assert figures["selector"] == "activation"
    assert {"selection", "density", "overlap", "queue_s", "select_s", "switch_s", "prefill_s", "decode_s"} <= set(
        figures
    )


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="default", messages=HELLO, **WARM)
    chunks = streamed(client, stream_options={"include_usage": True}, **WARM)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    ending = chunks[-2]
    assert ending.choices[0].finish_reason == whole.choices[0].finish_reason
    assert ending.ifprune["selection"] == whole.to_dict()["ifprune"]["selection"]  # type: ignore[index]
    assert not any(hasattr(chunk, "ifprune") for chunk in chunks[:-2])
    assert [chunk.usage for chunk in streamed(client, **WARM)] == [None] * (len(chunks) - 1)


def test_a_seed_repeats_and_others_differ(client: openai.OpenAI) -> None:
    def said(seed: int) -> str | None:
        options = WARM | {"seed": seed}
        return client.chat.completions.create(model="default", messages=HELLO, **options).choices[0].message.content

    assert said(1) == said(1)
    assert len({said(seed) for seed in (1, 2, -3)}) == 3


def test_several_answers_have_seeds_of_their_own(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="default", messages=HELLO, n=3, **WARM)
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 3
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    alone = client.chat.completions.create(model="default", messages=HELLO, **(WARM | {"seed": 9}))
    assert alone.choices[0].message.content == texts[2]
    assert answer.usage is not None
    assert alone.usage is not None
    assert answer.usage.prompt_tokens == alone.usage.prompt_tokens


@pytest.mark.parametrize("many", [False, True])
def test_an_answer_ends_before_a_stop_string(client: openai.OpenAI, many: bool) -> None:
    options = WARM | {"logit_bias": {"2": -100}}
    text = client.chat.completions.create(model="default", messages=HELLO, **options).choices[0].message.content or ""
    stop = text[4:6]
    stops: Any = ["nothing of it", stop] if many else stop
    answer = client.chat.completions.create(model="default", messages=HELLO, stop=stops, **options)
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    chunks = streamed(client, stop=stops, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text[: text.index(stop)]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(client: openai.OpenAI, stream: bool) -> None:
    options: dict[str, Any] = {"logprobs": True, "top_logprobs": 3, "logit_bias": {"2": -100}, "max_tokens": 5}
    if stream:
        found = [chunk.choices[0].logprobs for chunk in streamed(client, **options)]
        tokens = [token for each in found if each for token in each.content or []]
    else:
        logprobs = client.chat.completions.create(model="default", messages=HELLO, **options).choices[0].logprobs
        assert logprobs is not None
        tokens = logprobs.content or []
    assert len(tokens) == 5
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob  # temperature 0 takes the likeliest
        assert math.exp(token.logprob) <= 1


def test_completions_take_text_texts_and_token_ids(client: openai.OpenAI) -> None:
    one = client.completions.create(model="default", prompt="ab", max_tokens=6)
    ids = [ord("a") - 33 + 3, ord("b") - 33 + 3]  # of the tiny byte tokenizer
    two = client.completions.create(model="default", prompt=ids, max_tokens=6)
    assert one.choices[0].text == two.choices[0].text
    both = client.completions.create(model="default", prompt=["ab", "zz"], max_tokens=6, logprobs=2)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == one.choices[0].text
    assert both.choices[0].logprobs is not None
    assert len(both.choices[0].logprobs.tokens or []) == len(both.choices[0].logprobs.text_offset or []) > 0
    with client.completions.create(model="default", prompt="ab", max_tokens=6, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == one.choices[0].text


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["checkpoint"]
    assert client.models.retrieve("default").id == "checkpoint"
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert caught.value.code == "model_not_found"


def test_fields_that_mean_nothing_here_are_ignored(client: openai.OpenAI) -> None:
    extra: Any = {"min_p": 0.1, "top_k": 5, "repetition_penalty": 1.1, "unheard_of": [1]}
    answer = client.chat.completions.create(
        model="default",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        ],
        user="me",
        metadata={"a": "b"},
        store=True,
        response_format={"type": "text"},
        max_completion_tokens=3,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        top_p=0.9,
        extra_body=extra,
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 3


def test_refusals_are_the_clients_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="default", messages=HELLO, temperature=-1)
    assert caught.value.param == "temperature"
    assert "from 0 to 2" in caught.value.message


def test_a_client_that_goes_away_ends_its_answer(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", max_position_embeddings=8192)  # for an answer that lasts
    with serving(checkpoint, tmp_path) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        stream = client.chat.completions.create(
            model="default", messages=HELLO, stream=True, max_tokens=8000, logit_bias={"2": -100}
        )
        next(iter(stream))
        stream.close()
        eventually(lambda: server.metric("ifprune_jobs_cancelled_total") == 1)
        assert server.metric("ifprune_jobs_running") == 0


def test_sixteen_clients_at_once_get_what_each_gets_alone(client: openai.OpenAI) -> None:
    def said(number: int) -> tuple[str, Any]:
        answer = client.chat.completions.create(
            model="default", messages=[{"role": "user", "content": f"Question {number % 4}"}], max_tokens=12
        )
        return answer.choices[0].message.content or "", answer.to_dict()["ifprune"]["selection"]  # type: ignore[index]

    alone = [said(number) for number in range(4)]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(said, range(16))) == alone * 4
