"""Selecting while others are decoded: how many selectors run between two tokens, and what switches they cost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from ifprune_mlx import Model, Selection
from ifprune_mlx.selection.predictor import SparsityPredictor
from ifprune_mlx.selection.selectors import RandomSelector
from ifprune_mlx.serving.engine.decoder import BatchDecoder
from ifprune_mlx.serving.engine.engine import Engine
from ifprune_mlx.serving.engine.request import Request, RequestOutput, SelectionParams
from tests.ifprune_mlx.serving.engine.engines import (
    A,
    Tiny,
    ask,
    make_request,
    outputs_of,
    prompt,
    serving,
    stats_of,
    until,
    use_first_layers_predictor,
)


def selecting(selector: str, number: int = 0) -> Request:
    choice = SelectionParams(selector=selector, density=0.5)
    return make_request(prompt(number), selection_params=choice, instruction=f"{number} instruction {number}")


def noted(patch: pytest.MonkeyPatch, kind: type, name: str, note: Callable[..., None]) -> None:
    """Call `note` with the arguments of every call of a method before the method itself."""
    method = getattr(kind, name)

    def noting(self: Any, *args: Any, **options: Any) -> Any:
        note(*args, **options)
        return method(self, *args, **options)

    patch.setattr(kind, name, noting)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`select` and `decode`, as they come."""
    events: list[str] = []
    noted(monkeypatch, RandomSelector, "select", lambda *given: events.append("select"))
    noted(monkeypatch, BatchDecoder, "step", lambda: events.append("decode"))
    return events


@pytest.fixture
def switches(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The selections that are made active, by hash; None is dense."""
    switches: list[str | None] = []

    def note(selection: Selection | None) -> None:
        switches.append(None if selection is None else selection.hash)

    noted(monkeypatch, Model, "switch", note)
    return switches


def test_one_selector_at_most_runs_between_two_tokens_of_others(tiny: Tiny, events: list[str]) -> None:
    async def crowd(engine: Engine) -> None:
        running = engine.stream(make_request(prompt(9), A, max_tokens=450))
        await anext(running)
        del events[:]
        others = [asyncio.create_task(outputs_of(engine, selecting("random", number))) for number in range(6)]
        fixed = [asyncio.create_task(outputs_of(engine, make_request(prompt(number)))) for number in range(3)]
        async for _ in running:
            pass
        assert events.count("select") == 6
        first = " ".join(events[: 1 + max(at for at, event in enumerate(events) if event == "select")])
        assert "select select" not in first
        # Requests that need no selector do not wait for those that do.
        assert {stats_of(await task).batch for task in fixed} == {4}
        await asyncio.gather(*others)

    with serving(tiny, patience=60) as engine:
        asyncio.run(crowd(engine))


async def six_at_once(engine: Engine, model: Model, tasks: list[asyncio.Task[list[RequestOutput]]]) -> None:
    """Let requests wait for the engine's turn together, before it comes."""
    with model.lock.held():
        tasks += [asyncio.create_task(outputs_of(engine, selecting("random", number))) for number in range(6)]
        while engine.counters().waiting < 6:
            await asyncio.sleep(0)


def test_all_that_wait_are_selected_for_while_nothing_runs(tiny: Tiny, events: list[str]) -> None:
    async def crowd(engine: Engine) -> None:
        tasks: list[asyncio.Task[list[RequestOutput]]] = []
        await six_at_once(engine, tiny[0], tasks)
        await asyncio.gather(*tasks)

    with serving(tiny) as engine:
        asyncio.run(crowd(engine))
    assert events[:7] == ["select"] * 6 + ["decode"]
    assert events.count("select") == 6


def test_no_selector_runs_for_those_that_have_left_meanwhile(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [0]

    async def crowd(engine: Engine) -> None:
        loop = asyncio.get_running_loop()

        def leave(*given: Any) -> None:
            calls[0] += 1
            for task in tasks[1:]:
                loop.call_soon_threadsafe(task.cancel)
            until(lambda: engine.counters().cancelled == 5)

        noted(monkeypatch, RandomSelector, "select", leave)
        tasks: list[asyncio.Task[list[RequestOutput]]] = []
        await six_at_once(engine, tiny[0], tasks)
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(end, asyncio.CancelledError) for end in ends] == [False, *[True] * 5]

    with serving(tiny) as engine:
        asyncio.run(crowd(engine))
    assert calls == [1]


def test_a_pass_that_leaves_the_model_dense_costs_no_switch_back(tiny: Tiny, switches: list[str | None]) -> None:
    use_first_layers_predictor(tiny)
    with serving(tiny) as engine:
        ask(engine, make_request())
        found = ask(engine, selecting("learned"))[1].selection
        assert switches == [A.hash, None, found]  # the predictor reads with the dense first layers
        del switches[:]
        found = ask(engine, selecting("activation"))[1].selection
        assert switches == [None, found]
        assert engine.counters().switches == 3


def test_a_pass_beside_a_running_request_costs_one_switch_back(
    tiny: Tiny, switches: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_first_layers_predictor(tiny)

    async def crowd(engine: Engine, leave: bool) -> str | None:
        running = engine.stream(make_request(prompt(9), A, max_tokens=450))
        await anext(running)
        loop = asyncio.get_running_loop()

        def left(*given: Any) -> None:
            """The running request's client leaves while the predictor reads."""
            asyncio.run_coroutine_threadsafe(running.aclose(), loop).result(30)

        with pytest.MonkeyPatch.context() as patch:
            if leave:
                noted(patch, SparsityPredictor, "scores", left)
            selected = asyncio.create_task(outputs_of(engine, selecting("learned", int(leave))))
            if not leave:
                assert len([output async for output in running]) > 1
            return stats_of(await selected).selection

    with serving(tiny, patience=60) as engine:
        found = asyncio.run(crowd(engine, leave=False))
        assert switches == [A.hash, None, A.hash, found]  # None: the predictor reads
        del switches[:]
        # The switch back would be for nobody.
        found = asyncio.run(crowd(engine, leave=True))
        assert switches == [A.hash, None, found]  # the predictor reads with the dense first layers
