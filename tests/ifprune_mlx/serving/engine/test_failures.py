"""Every step of the decoder, and what else the worker calls, can fail: clients are told, and the engine goes on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ifprune_mlx import Model, Selection, load
from ifprune_mlx.detokenizer import Detokenizer
from ifprune_mlx.serving.engine import decoder as decoder_module
from ifprune_mlx.serving.engine.active_selection import ActiveSelection
from ifprune_mlx.serving.engine.decoder import BatchDecoder, SingleDecoder
from ifprune_mlx.serving.engine.engine import Engine
from ifprune_mlx.serving.engine.output_processor import OutputProcessor
from ifprune_mlx.serving.engine.prefix_cache import PrefixCache
from ifprune_mlx.serving.engine.request import (
    EngineClosedError,
    EngineFullError,
    GenerationFailedError,
    PromptProgress,
    Request,
    RequestOutput,
    SamplingParams,
    SelectionParams,
)
from tests.ifprune_mlx.serving.engine.engines import (
    END,
    A,
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
from tests.tiny import write_checkpoint

DECODER = ("__init__", "insert", "step", "remove", "close")
OTHERS = ((PrefixCache, "fetch"), (PrefixCache, "store"), (OutputProcessor, "add"), (Model, "switch"))


class Trouble:
    """While `now`, the methods that were given to `at` raise, `times` at most. `seen` counts how often."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.seen, self.times = False, 0, float("inf")
        self._patch = patch

    def at(self, kind: Any, name: str) -> None:
        method = getattr(kind, name)

        def failing(*given: Any, **options: Any) -> Any:
            if self.now and self.seen < self.times:
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


def test_detokenizing_can_fail(tiny: Tiny, trouble: Trouble) -> None:
    trouble.at(Detokenizer, "add_token")
    check(tiny, trouble)


STARTING = (
    (ActiveSelection, "select"),
    (ActiveSelection, "activate"),
    (PrefixCache, "fetch"),
    (OutputProcessor, "__init__"),
    (decoder_module, "make_sampler"),
    (decoder_module, "make_processors"),
    (decoder_module, "BatchGenerator"),
)


@pytest.mark.parametrize(("owner", "name"), STARTING)
@pytest.mark.parametrize("selection", [A, B])
def test_what_starts_a_request_can_fail_beside_others(
    tiny: Tiny, trouble: Trouble, owner: Any, name: str, selection: Selection
) -> None:
    """The others go on, and so does what is asked for later."""
    goes_on = make_request(prompt(1), max_tokens=200)
    expected, later = alone(tiny, goes_on), alone(tiny, make_request(prompt(2), selection))
    trouble.at(owner, name)

    async def all_at_once(engine: Engine) -> list[Any]:
        running = engine.stream(goes_on)
        begun = await anext(running)

        async def rest() -> list[RequestOutput]:
            return [begun, *[output async for output in running]]

        first = asyncio.create_task(rest())
        trouble.now = True
        failing = [asyncio.create_task(outputs_of(engine, make_request(prompt(2), selection))) for _ in range(2)]
        ends = await asyncio.wait_for(asyncio.gather(first, *failing, return_exceptions=True), 30)
        trouble.now = False
        return [*ends, await asyncio.wait_for(outputs_of(engine, make_request(prompt(2), selection)), 30)]

    with serving(tiny, patience=60) as engine:
        first, *failed, last = asyncio.run(all_at_once(engine))
        assert text_of(first) == expected
        assert text_of(last) == later
        if trouble.seen:  # a batch that runs needs no new generator
            assert [type(end) for end in failed] == [GenerationFailedError] * 2
        else:
            assert (owner, name, selection) == (decoder_module, "BatchGenerator", A)
        assert (engine.counters().running, engine.counters().waiting) == (0, 0)


@pytest.mark.parametrize("batches", [True, False])
@pytest.mark.parametrize("selector", ["static", "activation"])
def test_reading_a_long_prompt_can_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: Trouble, selector: str, batches: bool
) -> None:
    """In its second part; who waits behind it is answered."""
    if not batches:
        monkeypatch.setattr("ifprune_mlx.serving.engine.engine.can_batch", lambda model: False)
    tiny = load(write_checkpoint(tmp_path / "checkpoint", max_position_embeddings=4096))
    long = make_request(prompt(1, 2000), selection_params=SelectionParams(selector=selector, density=0.5))
    behind = make_request(prompt(2), B)
    expected = alone(tiny, behind)
    trouble.at(type(tiny[0].layers[1]), "__call__")
    trouble.times = 1  # the worker may begin with who is behind before this thread hears of the failure

    async def ask_both(engine: Engine) -> list[Any]:
        def progress(now: PromptProgress) -> None:
            trouble.now = now.read is not None and 0 < now.read < now.total

        reading = engine.stream(long, progress)
        begun = asyncio.create_task(anext(reading))
        other = asyncio.create_task(outputs_of(engine, behind))
        [failed] = await asyncio.wait_for(asyncio.gather(begun, return_exceptions=True), 30)
        trouble.now = False
        return [failed, await asyncio.wait_for(other, 30)]

    with serving(tiny, patience=60) as engine:
        failed, other = asyncio.run(ask_both(engine))
        assert str(failed) == "the model failed (out of memory); ask again"
        assert text_of(other) == expected
        assert ask(engine, behind)[0] == expected
    tiny[0].close()


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


def test_closing_tells_those_that_wait_before_the_current_step_ends(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, go_on = BatchDecoder.step, threading.Event()
    stuck = threading.Event()

    def long_step(self: BatchDecoder) -> Any:
        stuck.set()
        assert go_on.wait(30)
        return step(self)

    monkeypatch.setattr(BatchDecoder, "step", long_step)

    async def close(engine: Engine) -> list[Any]:
        runs = asyncio.create_task(outputs_of(engine, make_request(prompt(1), max_tokens=450)))
        await asyncio.to_thread(stuck.wait, 30)
        waits = [asyncio.create_task(outputs_of(engine, make_request(prompt(2), selection))) for selection in (A, B)]
        while engine.counters().waiting < 2:
            await asyncio.sleep(0)
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        ends = await asyncio.wait_for(asyncio.gather(*waits, return_exceptions=True), 30)
        assert not runs.done()
        go_on.set()
        await closing
        return [*ends, *await asyncio.gather(runs, return_exceptions=True)]

    engine = Engine(*tiny)
    assert [type(end) for end in asyncio.run(close(engine))] == [EngineClosedError] * 3
    assert engine.counters().failed == 3


def test_room_for_all_that_run_and_wait_and_no_more(tiny: Tiny) -> None:
    requests = [make_request(prompt(seed), max_tokens=100) for seed in range(6)]

    async def ask_all(engine: Engine) -> list[Any]:
        return await asyncio.gather(*(outputs_of(engine, one) for one in requests), return_exceptions=True)

    with serving(tiny, concurrency=2, queue=3) as engine:
        ends = asyncio.run(ask_all(engine))
    assert [isinstance(end, EngineFullError) for end in ends] == [False] * 5 + [True]
