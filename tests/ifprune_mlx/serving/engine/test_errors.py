"""Errors of the serving engine: what fails takes nothing else with it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from ifprune_mlx import BudgetError, IfpruneError, PromptError, SelectionError
from ifprune_mlx.serving.engine.engine import Engine
from ifprune_mlx.serving.engine.request import (
    EngineFullError,
    GenerationFailedError,
    Request,
    SamplingParams,
    SelectionParams,
)
from tests.ifprune_mlx.reference import random_selection
from tests.ifprune_mlx.serving.engine.engines import (
    CHOICES,
    B,
    Tiny,
    alone,
    make_request,
    outputs_of,
    prompt,
    serving,
    stats_of,
    text_of,
    together,
)
from tests.tiny import VOCABULARY


def test_what_cannot_be_answered_fails_alone(tiny: Tiny) -> None:
    wrong = random_selection((64, 64), (8, 8), seed=0)
    good = make_request(prompt(1), max_tokens=30)
    bad: list[tuple[Request, type[IfpruneError], str]] = [
        (make_request(selection_params=SelectionParams(selector="static", density=7.0)), BudgetError, "density 7"),
        (make_request(selection_params=SelectionParams(selector="nonsense")), IfpruneError, "unknown selector"),
        (
            make_request(selection_params=SelectionParams(selector="static", policy="never")),
            IfpruneError,
            "unknown policy",
        ),
        (make_request(selection=wrong), SelectionError, ""),
        (make_request(()), PromptError, "empty"),
        (make_request((VOCABULARY,)), PromptError, "token id"),
        (make_request(max_tokens=0), PromptError, "max tokens"),
        (make_request(stop=("",)), IfpruneError, "stop string"),
        (make_request(logprobs=21), IfpruneError, "from 0 to 20"),
        (make_request(sampling=SamplingParams(temperature=-1)), IfpruneError, "temperature"),
        (make_request(sampling=SamplingParams(top_p=0)), IfpruneError, "top_p"),
        (make_request(sampling=SamplingParams(logit_bias={VOCABULARY: 1.0})), IfpruneError, "logit_bias"),
        (make_request(sampling=SamplingParams(logit_bias={3: float("nan")})), IfpruneError, "logit_bias"),
    ]

    async def all_at_once(engine: Engine) -> list[Any]:
        requests = [good, *(one for one, _, _ in bad), good]
        return await asyncio.gather(*(outputs_of(engine, one) for one in requests), return_exceptions=True)

    with serving(tiny) as engine:
        first, *failed, last = asyncio.run(all_at_once(engine))
    assert text_of(first) == text_of(last) == alone(tiny, good)
    for (_, kind, message), error in zip(bad, failed, strict=True):
        assert type(error) is kind
        assert message in str(error)
        assert "\n" not in str(error)


def test_a_full_queue_refuses(tiny: Tiny) -> None:
    async def fill(engine: Engine) -> None:
        running = engine.stream(make_request(prompt(1), max_tokens=400))
        await running.__anext__()
        waiting = [asyncio.create_task(outputs_of(engine, make_request(prompt(seed), B))) for seed in range(2)]
        while engine.counters().waiting < 2:
            await asyncio.sleep(0)
        with pytest.raises(EngineFullError, match="2 requests wait"):
            await outputs_of(engine, make_request())
        await running.aclose()
        for outputs in await asyncio.gather(*waiting):
            assert stats_of(outputs).selection == B.hash

    with serving(tiny, concurrency=1, queue=2, patience=60) as engine:
        asyncio.run(fill(engine))


def test_a_model_that_fails_takes_its_batch_with_it_and_nothing_else(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny[0]
    requests = [make_request(prompt(seed), CHOICES[name]) for seed, name in enumerate("AAB")]
    expected = [alone(tiny, one) for one in requests]
    layer = model.layers[1]
    with serving(tiny, patience=60) as engine:
        together(engine, *requests)
        calls = [0]
        whole = type(layer).__call__

        def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls[0] += self is layer
            if self is layer and calls[0] == 5:
                raise RuntimeError("out of\nmemory")
            return whole(self, *args, **kwargs)

        monkeypatch.setattr(type(layer), "__call__", failing)

        async def fail() -> list[Any]:
            return await asyncio.gather(*(outputs_of(engine, one) for one in requests), return_exceptions=True)

        ends = asyncio.run(fail())
        failed = [isinstance(end, GenerationFailedError) for end in ends]
        assert failed in ([True, True, False], [False, False, True])
        for end, text in zip(ends, expected, strict=True):
            if isinstance(end, GenerationFailedError):
                assert str(end) == "the model failed (out of memory); ask again"
            else:
                assert text_of(end) == text
        again = together(engine, *requests)
        assert [text_of(outputs) for outputs in again] == expected
        assert not any(stats_of(outputs).cached_tokens for outputs, gone in zip(again, failed, strict=True) if gone)
        assert engine.counters().failed == sum(failed)
