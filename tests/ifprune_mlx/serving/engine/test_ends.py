"""How requests of the serving engine end: left, stopped, at the end of the text or the context, closed."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from ifprune_mlx import ModelBusyError, PromptError, Session, load
from ifprune_mlx.serving.engine.engine import Engine
from ifprune_mlx.serving.engine.request import EngineClosedError, RequestState, SamplingParams, SelectionParams
from ifprune_mlx.serving.engine.scheduler import Scheduler
from tests.ifprune_mlx.serving.engine.engines import (
    CHOICES,
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
from tests.tiny import write_checkpoint


def test_a_request_that_is_left_makes_room_and_the_others_go_on(tiny: Tiny) -> None:
    stays = make_request(prompt(1), max_tokens=40)
    expected = alone(tiny, stays)

    async def leave(engine: Engine) -> str:
        other = asyncio.create_task(outputs_of(engine, stays))
        left = engine.stream(make_request(prompt(2), max_tokens=450))
        async for _ in left:
            break
        await left.aclose()
        task = asyncio.create_task(outputs_of(engine, make_request(prompt(3), B, max_tokens=450)))  # waits for its turn
        await asyncio.sleep(0)
        task.cancel()
        return text_of(await other)

    with serving(tiny, patience=60) as engine:
        assert asyncio.run(leave(engine)) == expected
        until(lambda: engine.counters().cancelled == 2)
        counters = engine.counters()
        assert (counters.requests, counters.failed, counters.running, counters.waiting) == (3, 0, 0, 0)
        assert ask(engine, make_request())[1].finish_reason == "length"


@pytest.mark.parametrize("batches", [True, False])
@pytest.mark.parametrize("selector", ["static", "activation"])
def test_leaving_while_a_long_prompt_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, selector: str, batches: bool
) -> None:
    if not batches:
        monkeypatch.setattr("ifprune_mlx.serving.engine.engine.can_batch", lambda model: False)
    tiny = load(write_checkpoint(tmp_path / "checkpoint", max_position_embeddings=16384))
    long = make_request(prompt(1, 12000), selection_params=SelectionParams(selector=selector, density=0.5))

    async def leave(engine: Engine) -> None:
        task = asyncio.create_task(outputs_of(engine, long))
        await asyncio.sleep(0.2)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    with serving(tiny) as engine:
        asyncio.run(leave(engine))
        until(lambda: engine.counters().cancelled == 1)
        assert engine.counters().running == 0
        assert ask(engine, make_request())[0] == alone(tiny, make_request())
    tiny[0].close()


def test_stop_strings_end_the_text_wherever_tokens_end(tiny: Tiny) -> None:
    whole = alone(tiny, make_request(max_tokens=40))
    with serving(tiny) as engine:
        for start, length in ((0, 1), (5, 1), (5, 4), (9, 7)):
            stop = whole[start : start + length]
            text, stats = ask(engine, make_request(max_tokens=40, stop=("never", stop)))
            assert (text, stats.matched_stop, stats.finish_reason) == (whole[: whole.index(stop)], stop, "stop")
        # What looks like the beginning of a stop string is given out in the end.
        text, stats = ask(engine, make_request(max_tokens=40, stop=(whole[-3:] + "\0",)))
        assert (text, stats.matched_stop, stats.finish_reason) == (whole, None, "length")


def test_no_output_holds_what_may_be_a_stop_string(tiny: Tiny) -> None:
    whole = alone(tiny, make_request(max_tokens=40))
    stop = whole[10:16]
    with serving(tiny) as engine:
        outputs = together(engine, make_request(max_tokens=40, stop=(stop,), logprobs=0))[0]
    assert text_of(outputs) == whole[: whole.index(stop)]
    assert [token.text for output in outputs for token in output.tokens] == list(whole[: whole.index(stop)])


def test_an_end_of_text_token_ends_the_answer_and_is_not_text(tiny: Tiny) -> None:
    whole = alone(tiny, make_request())
    with serving(tiny) as engine:
        text, stats = ask(engine, make_request(sampling=SamplingParams(logit_bias={END: 1000.0})))
        assert (text, stats.finish_reason, stats.completion_tokens) == ("", "stop", 1)
        assert ask(engine, make_request())[0] == whole


def test_the_context_bounds_the_answer(tiny: Tiny) -> None:
    with serving(tiny) as engine:
        _, stats = ask(engine, make_request(prompt(1, 500), max_tokens=100))
        assert (stats.completion_tokens, stats.finish_reason) == (12, "length")
        with pytest.raises(PromptError, match="context holds 512"):
            ask(engine, make_request(prompt(1, 512)))


def test_closing_ends_all_requests_and_gives_the_model_back(tiny: Tiny) -> None:
    async def close(engine: Engine) -> list[Any]:
        tasks = [
            asyncio.create_task(outputs_of(engine, make_request(prompt(seed), CHOICES[name], max_tokens=450)))
            for seed, name in enumerate("AAB")
        ]
        while engine.counters().running < 2:
            await asyncio.sleep(0.002)
        with pytest.raises(ModelBusyError):
            tiny[0].switch(B)
        engine.close()
        tiny[0].switch(B)
        return await asyncio.gather(*tasks, return_exceptions=True)

    with serving(tiny, patience=60) as engine:
        assert [type(end) for end in asyncio.run(close(engine))] == [EngineClosedError] * 3
        with pytest.raises(EngineClosedError, match="shutting down"):
            ask(engine, make_request())
        assert engine.counters().failed == 3


def test_an_engine_waits_for_its_turn_with_the_model(tiny: Tiny) -> None:
    chat = Session(*tiny, selector="static", density=0.5)
    responses = chat.stream("One", max_tokens=400)
    next(responses)
    with serving(tiny) as engine:
        done: list[str] = []
        asking = threading.Thread(target=lambda: done.append(ask(engine, make_request())[0]))
        asking.start()
        until(lambda: engine.counters().waiting == 1)
        responses.close()
        asking.join(30)
    assert done == [alone(tiny, make_request())]
    responses = chat.stream("Two", max_tokens=400)
    next(responses)
    engine = Engine(*tiny)
    raised: list[BaseException] = []

    def refused() -> None:
        with pytest.raises(EngineClosedError) as caught:
            ask(engine, make_request())
        raised.append(caught.value)

    asking = threading.Thread(target=refused)
    asking.start()
    until(lambda: engine.counters().waiting == 1)
    engine.close()
    asking.join(30)
    assert len(raised) == 1
    responses.close()


def test_closing_while_a_request_gets_in_line_for_the_model(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, lock = Engine(*tiny), tiny[0].lock
    in_turn = lock.in_turn

    def closed_meanwhile(*given: Any) -> Any:
        turn = in_turn(*given)
        engine._scheduler.close()  # as `Engine.close` begins, before it could see the turn
        return turn

    monkeypatch.setattr(lock, "in_turn", closed_meanwhile)
    with lock.held(), pytest.raises(EngineClosedError):
        asyncio.run(outputs_of(engine, make_request()))
    assert engine.counters().failed == 1
    engine.close()


@pytest.mark.parametrize("moment", ["while it waits", "while it is next"])
def test_a_request_that_is_left_and_fails_is_counted_once(moment: str) -> None:
    """Its client leaves while the worker makes its selection, which then fails."""
    scheduler = Scheduler(queue=4, patience=1.0)
    loop = asyncio.new_event_loop()
    state = RequestState(make_request(), loop)
    scheduler.add(state)
    if moment == "while it is next":
        state.selection_key = "dense"
        assert scheduler.next("dense", 0.0) is state
    scheduler.cancel(state)
    scheduler.finish(state)
    assert scheduler.rest()
    loop.close()
    counters = scheduler.counters()
    assert (counters["requests"], counters["cancelled"], counters["failed"]) == (1, 1, 0)
