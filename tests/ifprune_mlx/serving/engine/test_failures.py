"""Every step of the decoder, and what else the worker calls, can fail: clients are told, and the engine goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from ifprune_mlx import Model
from ifprune_mlx.serving.engine.decoder import BatchDecoder, SingleDecoder
from ifprune_mlx.serving.engine.engine import Engine
from ifprune_mlx.serving.engine.output_processor import OutputProcessor
from ifprune_mlx.serving.engine.prefix_cache import PrefixCache
from ifprune_mlx.serving.engine.request import (
    EngineClosedError,
    GenerationFailedError,
    Request,
    RequestOutput,
    SamplingParams,
)
from tests.ifprune_mlx.serving.engine.engines import (
    END,
    B,
    Tiny,
    alone,
    ask,
    make_request,
    outputs_of,
    prompt,
    serving,
    text_of,
    together,
    until,
)

DECODER = ("__init__", "insert", "step", "remove", "close")
OTHERS = ((PrefixCache, "fetch"), (PrefixCache, "store"), (OutputProcessor, "add"), (Model, "switch"))


class Trouble:
    """While `now`, the methods that were given to `at` raise. `seen` counts how often."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.seen = False, 0
        self._patch = patch

    def at(self, kind: type, name: str) -> None:
        method = getattr(kind, name)

        def failing(*given: Any, **options: Any) -> Any:
            if self.now:
                self.seen += 1
                raise RuntimeError("out of\nmemory")
            return method(*given, **options)

        self._patch.setattr(kind, name, failing)


@pytest.fixture
def trouble(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trouble]:
    trouble = Trouble(monkeypatch)
    yield trouble
    trouble.now = False


async def ends_of(engine: Engine, requests: list[Request], trouble: Trouble) -> list[Any]:
    """How requests end that are asked for before the trouble, beside one that is left in the middle of it."""
    left = engine.stream(make_request(prompt(1), max_tokens=450))
    await anext(left)
    others = [asyncio.create_task(outputs_of(engine, one)) for one in requests]
    while engine.counters().running + engine.counters().waiting <= len(others):
        await asyncio.sleep(0)
    await asyncio.sleep(0.005)
    trouble.now = True
    await left.aclose()
    return await asyncio.wait_for(asyncio.gather(*others, return_exceptions=True), 30)


@pytest.mark.parametrize("batches", [True, False])
@pytest.mark.parametrize("steps", [*((step,) for step in DECODER), ("step", "close"), DECODER])
def test_every_step_of_a_decoder_can_fail(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, trouble: Trouble, steps: tuple[str, ...], batches: bool
) -> None:
    if not batches:
        monkeypatch.setattr("ifprune_mlx.serving.engine.engine.can_batch", lambda model: False)
    for step in steps:
        trouble.at(BatchDecoder if batches else SingleDecoder, step)
    check(tiny, trouble)


@pytest.mark.parametrize(("kind", "name"), OTHERS)
def test_what_the_decoder_is_used_with_can_fail(tiny: Tiny, trouble: Trouble, kind: type, name: str) -> None:
    trouble.at(kind, name)
    check(tiny, trouble)


def check(tiny: Tiny, trouble: Trouble) -> None:
    """Nobody waits for ever, no text is wrong, all are counted, and afterwards all is as before."""
    sampling = SamplingParams(temperature=1.0, seed=1, logit_bias={END: -1000.0})
    drawn = make_request(prompt(3), max_tokens=120, sampling=sampling)
    good = [make_request(prompt(1)), make_request(prompt(4), B)]
    expected = [alone(tiny, one) for one in good]
    with serving(tiny, patience=60) as engine:
        whole, _ = ask(engine, drawn)
        stop = whole[80:86]
        # The length ends one and a stop string another; the last one is of another selection.
        requests = [make_request(prompt(2), max_tokens=150), replace(drawn, stop=(stop,)), good[1]]
        texts = [alone(tiny, requests[0]), whole[: whole.index(stop)], expected[1]]
        for end, text in zip(asyncio.run(ends_of(engine, requests, trouble)), texts, strict=True):
            if isinstance(end, BaseException):
                assert isinstance(end, GenerationFailedError)
                assert str(end) == "the model failed (out of memory); ask again"
            else:
                assert text_of(end) == text
        until(engine._scheduler.idle.is_set)
        assert trouble.seen
        counters = engine.counters()
        assert (counters.requests, counters.running, counters.waiting) == (5, 0, 0)
        trouble.now = False
        assert [text_of(outputs) for outputs in together(engine, *good)] == expected


def test_closing_tells_clients_though_the_decoder_cannot_be_closed(tiny: Tiny, trouble: Trouble) -> None:
    trouble.at(BatchDecoder, "close")

    async def close(engine: Engine) -> list[Any]:
        tasks = [
            asyncio.create_task(outputs_of(engine, make_request(prompt(seed), max_tokens=450))) for seed in range(3)
        ]
        while engine.counters().running < 3:
            await asyncio.sleep(0.002)
        trouble.now = True
        engine.close()
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)

    engine = Engine(*tiny)
    assert [type(end) for end in asyncio.run(close(engine))] == [EngineClosedError] * 3
    assert trouble.seen == 1
    tiny[0].switch(B)  # the model has been given back


@pytest.mark.parametrize("fails", [False, True])
def test_a_request_that_comes_while_the_last_batch_is_closed(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """It is answered in the engine's next turn; or told, where closing fails and nothing else can tell it."""
    close = BatchDecoder.close
    expected = alone(tiny, make_request())

    async def two(engine: Engine) -> list[Any]:
        loop = asyncio.get_running_loop()
        late: list[asyncio.Task[list[RequestOutput]]] = []

        def closing(self: BatchDecoder) -> None:
            monkeypatch.setattr(BatchDecoder, "close", close)
            loop.call_soon_threadsafe(lambda: late.append(loop.create_task(outputs_of(engine, make_request()))))
            until(lambda: engine.counters().waiting == 1)
            close(self)
            if fails:
                raise RuntimeError("out of memory")

        monkeypatch.setattr(BatchDecoder, "close", closing)
        first = await outputs_of(engine, make_request())
        while not late:
            await asyncio.sleep(0)
        return [first, *await asyncio.wait_for(asyncio.gather(*late, return_exceptions=True), 30)]

    with serving(tiny) as engine:
        first, second = asyncio.run(two(engine))
        assert text_of(first) == expected
        if fails:
            assert str(second) == "the server failed (out of memory); ask again"
        else:
            assert text_of(second) == expected
        assert [text_of(outputs) for outputs in together(engine, make_request())] == [expected]
