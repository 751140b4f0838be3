"""Whose turn it is in the serving engine: few switches, and nobody starves."""

from __future__ import annotations

import asyncio

from ifprune_mlx.serving.engine.engine import Engine
from ifprune_mlx.serving.engine.request import RequestOutput
from tests.ifprune_mlx.serving.engine.engines import (
    CHOICES,
    A,
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
