"""Whose turn it is in the serving engine: few switches, and nobody starves."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from ifprune_mlx.serving.engine.engine import Engine
from ifprune_mlx.serving.engine.request import RequestOutput, SelectionParams
from tests.ifprune_mlx.serving.engine.engines import (
    CHOICES,
    A,
    B,
    Tiny,
    alone,
    ask,
    make_request,
    outputs_of,
    prompt,
    serving,
    stats_of,
    text_of,
    together,
)


def test_a_request_joins_the_running_batch_of_its_selection(tiny: Tiny) -> None:
    late = make_request(prompt(2))
    expected = alone(tiny, late)

    async def join(engine: Engine) -> tuple[list[RequestOutput], list[RequestOutput]]:
        first = engine.stream(make_request(prompt(1), max_tokens=60))
        head = [await first.__anext__() for _ in range(3)]
        joined = await outputs_of(engine, late)
        return [*head, *[output async for output in first]], joined

    with serving(tiny) as engine:
        longer, joined = asyncio.run(join(engine))
    assert stats_of(longer).batch == stats_of(joined).batch == 2
    assert stats_of(longer).completion_tokens == 60
    assert (text_of(joined), stats_of(joined).switch_s) == (expected, 0)


def test_the_live_selection_goes_first_within_patience(tiny: Tiny) -> None:
    requests = [make_request(prompt(seed), CHOICES[name]) for seed, name in enumerate("AABABAAB")]
    with serving(tiny, concurrency=2, patience=60) as engine:
        together(engine, *requests)
        assert engine.counters().switches == 2


def test_no_patience_is_first_come_first_served(tiny: Tiny) -> None:
    ended: list[int] = []

    async def ask_in_order(engine: Engine) -> None:
        async def note(number: int, name: str) -> None:
            await outputs_of(engine, make_request(prompt(number), CHOICES[name]))
            ended.append(number)

        await asyncio.gather(*(note(number, name) for number, name in enumerate("ABABAB")))

    with serving(tiny, patience=0) as engine:
        asyncio.run(ask_in_order(engine))
    assert ended == list(range(6))


def test_a_stream_of_live_requests_does_not_starve_another_selection(tiny: Tiny) -> None:
    async def crowd(engine: Engine) -> int:
        done = asyncio.Event()
        asked = [0]

        async def keep_asking(number: int) -> None:
            while not done.is_set():
                asked[0] += 1
                await outputs_of(engine, make_request(prompt(number), A, max_tokens=20 + 7 * number))

        async def other() -> None:
            await asyncio.sleep(0.05)
            assert stats_of(await outputs_of(engine, make_request(prompt(9), B))).selection == B.hash
            done.set()

        await asyncio.wait_for(asyncio.gather(*map(keep_asking, range(3)), other()), 30)
        return asked[0]

    with serving(tiny, patience=0.1, concurrency=4) as engine:
        asyncio.run(crowd(engine))
        assert engine.counters().switches <= 3


def test_auto_goes_through_a_conversation_whoever_else_asks(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one message to the next a selection stays if it agrees enough; what is live does not matter."""
    auto = SelectionParams(selector="random", density=0.5, policy="auto")
    texts = ("one", "two", "three")
    with serving(tiny) as engine:

        def chosen(*said: str, policy: str = "auto") -> str | None:
            params = replace(auto, policy=policy)
            request = replace(make_request(selection_params=params), instruction=said[-1], earlier=said[:-1])
            ask(engine, make_request(selection=A))  # another client's
            return ask(engine, request)[1].selection

        alone = [chosen(text, policy="turn") for text in texts]
        assert len(set(alone)) == 3
        for below, expected in ((2.0, alone), (-2.0, alone[:1] * 3)):
            monkeypatch.setattr("ifprune_mlx.serving.engine.active_selection.SWITCH_BELOW", below)
            assert [chosen(*texts[: count + 1]) for count in range(3)] == expected
