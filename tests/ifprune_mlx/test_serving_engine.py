"""The serving engine on real tiny models: what comes out of a crowd equals what each job gets alone."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_logits_processors

from ifprune_mlx import (
    BudgetError,
    IfpruneError,
    Model,
    ModelBusyError,
    PromptError,
    Selection,
    SelectionError,
    Session,
    generate,
    load,
    make_selector,
    stream_generate,
)
from ifprune_mlx.predictor import Head, SparsityPredictor
from ifprune_mlx.selectors import Instruction
from ifprune_mlx.serving.engine import Engine
from ifprune_mlx.serving.jobs import (
    Choice,
    EngineClosedError,
    EngineFullError,
    GenerationFailedError,
    Job,
    JobStats,
    Piece,
    Sampling,
)
from tests.family_configs import tiny_config
from tests.tiny import VOCABULARY, write_checkpoint

from .reference import random_selection

Tiny = tuple[Model, Any]
WIDTHS = (128, 128)
A = random_selection(WIDTHS, (48, 32), seed=1)
B = random_selection(WIDTHS, (24, 64), seed=2)
C = random_selection(WIDTHS, (64, 64), seed=3)
CHOICES: dict[str, Selection | None] = {"A": A, "B": B, "C": C, "dense": None}
# The tiny tokenizer has a token for every byte; those of letters make answers that are easy to cut. 2 is <|im_end|>.
END = 2


@contextmanager
def serving(tiny: Tiny, **options: Any) -> Iterator[Engine]:
    engine = Engine(*tiny, **options)
    try:
        yield engine
    finally:
        engine.close()


def prompt(seed: int, length: int = 20) -> tuple[int, ...]:
    generator = np.random.default_rng(seed)
    return tuple(int(token) for token in generator.integers(40, 100, length))


def job(tokens: tuple[int, ...] = prompt(0), selection: Selection | None = A, **changes: Any) -> Job:
    """A greedy job of 12 tokens that no end-of-text token ends."""
    choice = Choice(selection=selection, dense=selection is None)
    sampling = Sampling(logit_bias={END: -1000.0})
    return replace(Job(tokens, "instruction", choice, sampling, max_tokens=12), **changes)


async def pieces_of(engine: Engine, one: Job) -> list[Piece]:
    return [piece async for piece in engine.stream(one)]


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def stats_of(pieces: list[Piece]) -> JobStats:
    assert [piece.stats is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    stats = pieces[-1].stats
    assert stats is not None
    return stats


def together(engine: Engine, *jobs: Job) -> list[list[Piece]]:
    """The answers of jobs that are asked for at the same time, in the order given."""

    async def gather() -> list[list[Piece]]:
        return await asyncio.gather(*(pieces_of(engine, one) for one in jobs))

    answers = asyncio.run(gather())
    until(lambda: not engine._working)  # then the model is free again
    return answers


def ask(engine: Engine, one: Job) -> tuple[str, JobStats]:
    pieces = together(engine, one)[0]
    return text_of(pieces), stats_of(pieces)


def alone(tiny: Tiny, one: Job) -> str:
    """The same answer from `ifprune_mlx.generate`, under the same selection."""
    processors = make_logits_processors({END: -1000.0})
    return generate(
        *tiny,
        list(one.tokens),
        max_tokens=one.max_tokens,
        selection=one.choice.selection,
        dense=one.choice.dense,
        logits_processors=processors,
    )


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# The same tokens as alone.


def test_a_batch_equals_each_job_alone(tiny: Tiny) -> None:
    jobs = [job(prompt(seed, length), max_tokens=16) for seed, length in enumerate((20, 7, 1, 33, 2))]
    expected = [alone(tiny, one) for one in jobs]
    with serving(tiny) as engine:
        answers = together(engine, *jobs)
    assert [text_of(pieces) for pieces in answers] == expected
    assert {stats_of(pieces).batch for pieces in answers} == {5}
    assert {stats_of(pieces).selection for pieces in answers} == {A.hash}


def test_sixteen_jobs_over_three_selections_and_dense(tiny: Tiny) -> None:
    names = ["A", "B", "dense", "A", "C", "B", "B", "A", "dense", "C", "A", "A", "C", "B", "dense", "A"]
    jobs = [job(prompt(seed, 5 + 3 * seed % 11), CHOICES[name], max_tokens=6 + seed) for seed, name in enumerate(names)]
    expected = [alone(tiny, one) for one in jobs]
    tiny[0].switch(None)
    with serving(tiny, concurrency=4, patience=60) as engine:
        answers = together(engine, *jobs)
        counters = engine.counters()
    for name, pieces, text in zip(names, answers, expected, strict=True):
        selection, stats = CHOICES[name], stats_of(pieces)
        assert text_of(pieces) == text
        assert stats.selection == (None if selection is None else selection.hash)
        assert stats.density == (1.0 if selection is None else selection.density)
        assert stats.finish_reason == "length"
    # From dense: to A, and to each other one once.
    assert counters.switches == 4
    assert (counters.requests, counters.failed, counters.cancelled) == (16, 0, 0)
    assert (counters.running, counters.waiting) == (0, 0)
    assert counters.completion_tokens == sum(one.max_tokens for one in jobs)
    assert counters.prompt_tokens == sum(len(one.tokens) for one in jobs)


def test_event_loops_of_several_threads_share_an_engine(tiny: Tiny) -> None:
    jobs = [job(prompt(seed), CHOICES[name]) for seed, name in enumerate(["A", "B", "A", "dense", "B"])]
    expected = [alone(tiny, one) for one in jobs]
    with serving(tiny) as engine, ThreadPoolExecutor(5) as threads:
        answers = list(threads.map(lambda one: ask(engine, one)[0], jobs))
    assert answers == expected


@pytest.mark.parametrize("selector", ["static", "random", "activation"])
def test_selectors_select_as_generate_does(tiny: Tiny, selector: str) -> None:
    jobs = [
        job(prompt(seed), choice=Choice(selector=selector, density=density), instruction=f"instruction {seed}")
        for seed, density in enumerate((0.5, 0.25, 0.5))
    ]
    expected = []
    for one in jobs:
        options = {"selector": selector, "density": one.choice.density, "instruction": one.instruction}
        processors = make_logits_processors({END: -1000.0})
        responses = list(
            stream_generate(*tiny, list(one.tokens), max_tokens=12, logits_processors=processors, **options)
        )
        expected.append(("".join(r.text for r in responses), responses[-1].stats))
    with serving(tiny) as engine:
        answers = together(engine, *jobs)
    for pieces, (text, wanted) in zip(answers, expected, strict=True):
        stats = stats_of(pieces)
        assert wanted is not None
        assert text_of(pieces) == text
        assert (stats.selection, stats.selector, stats.density) == (wanted.selection, selector, wanted.density)
        assert stats.batch == (1 if selector == "activation" else stats.batch)


# lfm2 has a cache of arrays beside those of keys and values, gemma2 and mistral mask in their own way.
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "lfm2", "qwen3_5"])
def test_other_families(tmp_path: Path, family: str) -> None:
    if family in ("lfm2", "qwen3_5"):
        config = tiny_config(family)
        assert config is not None
        path = write_checkpoint(tmp_path / "checkpoint", **(config | {"vocab_size": VOCABULARY}))
    else:
        path = write_checkpoint(tmp_path / "checkpoint", family)
    tiny = load(path)
    widths = [spec.d_ffn for spec in tiny[0].checkpoint.layout.ffns]
    some = [random_selection(widths, [width // 2 for width in widths], seed) for seed in range(2)]
    jobs = [job(prompt(seed, length), some[seed % 2]) for seed, length in enumerate((12, 5, 9, 3))]
    expected = [alone(tiny, one) for one in jobs]
    with serving(tiny) as engine:
        assert [text_of(pieces) for pieces in together(engine, *jobs)] == expected
        # Once more, and on: from caches where they are kept.
        assert [text_of(pieces) for pieces in together(engine, *jobs)] == expected
    tiny[0].close()


def test_a_family_that_does_not_batch_is_served_one_by_one(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ifprune_mlx.serving.engine.can_batch", lambda model: False)
    penalties = Sampling(logit_bias={END: -1000.0}, repetition_penalty=1.3, frequency_penalty=0.5)
    jobs = [job(prompt(seed), CHOICES[name], sampling=penalties) for seed, name in enumerate(["A", "B", "A", "A"])]
    with serving(tiny, patience=60) as engine:
        single = together(engine, *jobs)
        assert {stats_of(pieces).batch for pieces in single} == {1}
        assert engine.counters().switches == 2
        again, stats = ask(engine, jobs[1])
        assert stats.cached_tokens == 18
    monkeypatch.undo()
    with serving(tiny) as engine:
        batched = together(engine, *jobs)
    assert [text_of(pieces) for pieces in single] == [text_of(pieces) for pieces in batched]
    assert again == text_of(batched[1])


# Caches of finished jobs.


def test_a_conversation_goes_on_from_its_cache_and_only_under_its_selection(tiny: Tiny) -> None:
    with serving(tiny) as engine:
        first, stats = ask(engine, job(prompt(1), A))
        assert stats.cached_tokens == 0
        said = tuple(tiny[1].encode(first, add_special_tokens=False))
        longer = (*prompt(1), *said[:8], *prompt(2, 9))
        for selection, cached in ((B, 0), (None, 0), (A, 28), (B, 35), (None, 35)):
            one = job(longer, selection)
            text, stats = ask(engine, one)
            assert stats.cached_tokens == cached
            assert text == alone(tiny, one)


def test_a_batch_of_cached_and_new_prompts_equals_each_alone(tiny: Tiny) -> None:
    # Penalties look at what was read, whether from a cache or not.
    sampling = Sampling(logit_bias={END: -1000.0}, repetition_penalty=1.5, presence_penalty=1.0)
    jobs = [job((*prompt(1), *prompt(seed, 3 * seed)), sampling=sampling) for seed in range(2, 6)]
    with serving(tiny, prompt_cache_bytes=0) as engine:
        expected = [ask(engine, one)[0] for one in jobs]
    with serving(tiny) as engine:
        ask(engine, job(prompt(1), max_tokens=1))
        answers = together(engine, *jobs, job(prompt(9)))
    assert [text_of(pieces) for pieces in answers[:-1]] == expected
    assert [stats_of(pieces).cached_tokens for pieces in answers] == [20, 20, 20, 20, 0]


def test_caches_are_bounded_and_can_be_switched_off(tiny: Tiny) -> None:
    with serving(tiny, prompt_cache_bytes=0) as engine:
        assert [ask(engine, job())[1].cached_tokens for _ in range(2)] == [0, 0]
    # A token's keys and values: 2 layers, 2 of 2 heads of 16 float32 numbers.
    one = (20 + 12) * 2 * 2 * 2 * 16 * 4
    with serving(tiny, prompt_cache_bytes=3 * one) as engine:
        for seed in range(5):
            ask(engine, job(prompt(seed)))
        assert engine._prefixes.nbytes <= 3 * one
        assert [ask(engine, job(prompt(seed)))[1].cached_tokens > 0 for seed in (4, 0)] == [True, False]


# Whose turn it is.


def test_a_job_joins_the_running_batch_of_its_selection(tiny: Tiny) -> None:
    late = job(prompt(2))
    expected = alone(tiny, late)

    async def join(engine: Engine) -> tuple[list[Piece], list[Piece]]:
        first = engine.stream(job(prompt(1), max_tokens=60))
        head = [await first.__anext__() for _ in range(3)]
        joined = await pieces_of(engine, late)
        return [*head, *[piece async for piece in first]], joined

    with serving(tiny) as engine:
        longer, joined = asyncio.run(join(engine))
    assert stats_of(longer).batch == stats_of(joined).batch == 2
    assert stats_of(longer).completion_tokens == 60
    assert (text_of(joined), stats_of(joined).switch_s) == (expected, 0)


def test_the_live_selection_goes_first_within_patience(tiny: Tiny) -> None:
    jobs = [job(prompt(seed), CHOICES[name]) for seed, name in enumerate("AABABAAB")]
    with serving(tiny, concurrency=2, patience=60) as engine:
        together(engine, *jobs)
        assert engine.counters().switches == 2


def test_no_patience_is_first_come_first_served(tiny: Tiny) -> None:
    ended: list[int] = []

    async def ask_in_order(engine: Engine) -> None:
        async def note(number: int, name: str) -> None:
            await pieces_of(engine, job(prompt(number), CHOICES[name]))
            ended.append(number)

        await asyncio.gather(*(note(number, name) for number, name in enumerate("ABABAB")))

    with serving(tiny, patience=0) as engine:
        asyncio.run(ask_in_order(engine))
    assert ended == list(range(6))


def test_a_stream_of_live_jobs_does_not_starve_another_selection(tiny: Tiny) -> None:
    async def crowd(engine: Engine) -> int:
        done = asyncio.Event()
        asked = [0]

        async def keep_asking(number: int) -> None:
            while not done.is_set():
                asked[0] += 1
                await pieces_of(engine, job(prompt(number), A, max_tokens=20 + 7 * number))

        async def other() -> None:
            await asyncio.sleep(0.05)
            assert stats_of(await pieces_of(engine, job(prompt(9), B))).selection == B.hash
            done.set()

        await asyncio.wait_for(asyncio.gather(*map(keep_asking, range(3)), other()), 30)
        return asked[0]

    with serving(tiny, patience=0.1, concurrency=4) as engine:
        asyncio.run(crowd(engine))
        assert engine.counters().switches <= 3


def test_auto_keeps_a_live_selection_that_agrees(tiny: Tiny) -> None:
    near = Choice(selector="static", density=0.5, policy="auto")
    with serving(tiny) as engine:
        _, first = ask(engine, job(choice=replace(near, policy="turn")))
        ids = [list(ids) for ids in tiny[0].selection.ids]
        spare = [next(i for i in range(128) if i not in layer) for layer in ids]
        close = Selection(
            tuple(np.array(sorted([*layer[1:], one]), np.int32) for layer, one in zip(ids, spare, strict=True)),
            WIDTHS,
            "static",
        )
        assert ask(engine, job(selection=close))[1].selection == close.hash
        assert ask(engine, job(choice=near))[1].selection == close.hash
        assert ask(engine, job(choice=replace(near, policy="turn")))[1].selection == first.selection
        # Another density is another matter, however much it has in common.
        assert ask(engine, job(choice=replace(near, density=0.25)))[1].density == 0.25


# Ends.


def test_a_job_that_is_left_makes_room_and_the_others_go_on(tiny: Tiny) -> None:
    stays = job(prompt(1), max_tokens=40)
    expected = alone(tiny, stays)

    async def leave(engine: Engine) -> str:
        other = asyncio.create_task(pieces_of(engine, stays))
        left = engine.stream(job(prompt(2), max_tokens=450))
        async for _ in left:
            break
        await left.aclose()
        task = asyncio.create_task(pieces_of(engine, job(prompt(3), B, max_tokens=450)))  # waits for its turn
        await asyncio.sleep(0)
        task.cancel()
        return text_of(await other)

    with serving(tiny, patience=60) as engine:
        assert asyncio.run(leave(engine)) == expected
        until(lambda: engine.counters().cancelled == 2)
        counters = engine.counters()
        assert (counters.requests, counters.failed, counters.running, counters.waiting) == (3, 0, 0, 0)
        assert ask(engine, job())[1].finish_reason == "length"


@pytest.mark.parametrize("batches", [True, False])
@pytest.mark.parametrize("selector", ["static", "activation"])
def test_leaving_while_a_long_prompt_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, selector: str, batches: bool
) -> None:
    if not batches:
        monkeypatch.setattr("ifprune_mlx.serving.engine.can_batch", lambda model: False)
    tiny = load(write_checkpoint(tmp_path / "checkpoint", max_position_embeddings=16384))
    long = job(prompt(1, 12000), choice=Choice(selector=selector, density=0.5))

    async def leave(engine: Engine) -> None:
        task = asyncio.create_task(pieces_of(engine, long))
        await asyncio.sleep(0.2)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    with serving(tiny) as engine:
        asyncio.run(leave(engine))
        until(lambda: engine.counters().cancelled == 1)
        assert engine.counters().running == 0
        assert ask(engine, job())[0] == alone(tiny, job())
    tiny[0].close()


def test_stop_strings_end_the_text_wherever_tokens_end(tiny: Tiny) -> None:
    whole = alone(tiny, job(max_tokens=40))
    with serving(tiny) as engine:
        for start, length in ((0, 1), (5, 1), (5, 4), (9, 7)):
            stop = whole[start : start + length]
            text, stats = ask(engine, job(max_tokens=40, stop=("never", stop)))
            assert (text, stats.matched_stop, stats.finish_reason) == (whole[: whole.index(stop)], stop, "stop")
        # What looks like the beginning of a stop string is given out in the end.
        text, stats = ask(engine, job(max_tokens=40, stop=(whole[-3:] + "\0",)))
        assert (text, stats.matched_stop, stats.finish_reason) == (whole, None, "length")


def test_no_piece_holds_what_may_be_a_stop_string(tiny: Tiny) -> None:
    whole = alone(tiny, job(max_tokens=40))
    stop = whole[10:16]
    with serving(tiny) as engine:
        pieces = together(engine, job(max_tokens=40, stop=(stop,), logprobs=0))[0]
    assert text_of(pieces) == whole[: whole.index(stop)]
    assert [token.text for piece in pieces for token in piece.tokens] == list(whole[: whole.index(stop)])


def test_an_end_of_text_token_ends_the_answer_and_is_not_text(tiny: Tiny) -> None:
    whole = alone(tiny, job())
    with serving(tiny) as engine:
        text, stats = ask(engine, job(sampling=Sampling(logit_bias={END: 1000.0})))
        assert (text, stats.finish_reason, stats.completion_tokens) == ("", "stop", 1)
        assert ask(engine, job())[0] == whole


def test_the_context_bounds_the_answer(tiny: Tiny) -> None:
    with serving(tiny) as engine:
        _, stats = ask(engine, job(prompt(1, 500), max_tokens=100))
        assert (stats.completion_tokens, stats.finish_reason) == (12, "length")
        with pytest.raises(PromptError, match="context holds 512"):
            ask(engine, job(prompt(1, 512)))


def test_closing_ends_all_jobs_and_gives_the_model_back(tiny: Tiny) -> None:
    async def close(engine: Engine) -> list[Any]:
        tasks = [
            asyncio.create_task(pieces_of(engine, job(prompt(seed), CHOICES[name], max_tokens=450)))
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
            ask(engine, job())
        assert engine.counters().failed == 3


def test_an_engine_waits_for_its_turn_with_the_model(tiny: Tiny) -> None:
    chat = Session(*tiny, selector="static", density=0.5)
    responses = chat.stream("One", max_tokens=400)
    next(responses)
    with serving(tiny) as engine:
        done: list[str] = []
        asking = threading.Thread(target=lambda: done.append(ask(engine, job())[0]))
        asking.start()
        until(lambda: engine.counters().waiting == 1)
        responses.close()
        asking.join(30)
    assert done == [alone(tiny, job())]
    responses = chat.stream("Two", max_tokens=400)
    next(responses)
    engine = Engine(*tiny)
    raised: list[BaseException] = []

    def refused() -> None:
        with pytest.raises(EngineClosedError) as caught:
            ask(engine, job())
        raised.append(caught.value)

    asking = threading.Thread(target=refused)
    asking.start()
    until(lambda: engine.counters().waiting == 1)
    engine.close()
    asking.join(30)
    assert len(raised) == 1
    responses.close()


# Errors.


def test_what_cannot_be_answered_fails_alone(tiny: Tiny) -> None:
    wrong = random_selection((64, 64), (8, 8), seed=0)
    good = job(prompt(1), max_tokens=30)
    bad: list[tuple[Job, type[IfpruneError], str]] = [
        (job(choice=Choice(selector="static", density=7.0)), BudgetError, "density 7"),
        (job(choice=Choice(selector="nonsense")), IfpruneError, "unknown selector"),
        (job(choice=Choice(selector="static", policy="never")), IfpruneError, "unknown policy"),
        (job(selection=wrong), SelectionError, ""),
        (job(()), PromptError, "empty"),
        (job((VOCABULARY,)), PromptError, "token ids"),
        (job(max_tokens=0), PromptError, "max tokens"),
        (job(stop=("",)), IfpruneError, "stop string"),
        (job(logprobs=21), IfpruneError, "from 0 to 20"),
        (job(sampling=Sampling(temperature=-1)), IfpruneError, "temperature"),
        (job(sampling=Sampling(top_p=0)), IfpruneError, "top_p"),
        (job(sampling=Sampling(logit_bias={VOCABULARY: 1.0})), IfpruneError, "logit_bias"),
        (job(sampling=Sampling(logit_bias={3: float("nan")})), IfpruneError, "logit_bias"),
    ]

    async def all_at_once(engine: Engine) -> list[Any]:
        jobs = [good, *(one for one, _, _ in bad), good]
        return await asyncio.gather(*(pieces_of(engine, one) for one in jobs), return_exceptions=True)

    with serving(tiny) as engine:
        first, *failed, last = asyncio.run(all_at_once(engine))
    assert text_of(first) == text_of(last) == alone(tiny, good)
    for (_, kind, message), error in zip(bad, failed, strict=True):
        assert type(error) is kind
        assert message in str(error)
        assert "\n" not in str(error)


def test_a_full_queue_refuses(tiny: Tiny) -> None:
    async def fill(engine: Engine) -> None:
        running = engine.stream(job(prompt(1), max_tokens=400))
        await running.__anext__()
        waiting = [asyncio.create_task(pieces_of(engine, job(prompt(seed), B))) for seed in range(2)]
        while engine.counters().waiting < 2:
            await asyncio.sleep(0)
        with pytest.raises(EngineFullError, match="2 requests wait"):
            await pieces_of(engine, job())
        await running.aclose()
        for pieces in await asyncio.gather(*waiting):
            assert stats_of(pieces).selection == B.hash

    with serving(tiny, queue=2, patience=60) as engine:
        asyncio.run(fill(engine))


def test_a_model_that_fails_takes_its_batch_with_it_and_nothing_else(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny[0]
    jobs = [job(prompt(seed), CHOICES[name]) for seed, name in enumerate("AAB")]
    expected = [alone(tiny, one) for one in jobs]
    layer = model.layers[1]
    with serving(tiny, patience=60) as engine:
        together(engine, *jobs)
        calls = [0]
        whole = type(layer).__call__

        def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls[0] += self is layer
            if self is layer and calls[0] == 5:
                raise RuntimeError("out of\nmemory")
            return whole(self, *args, **kwargs)

        monkeypatch.setattr(type(layer), "__call__", failing)

        async def fail() -> list[Any]:
            return await asyncio.gather(*(pieces_of(engine, one) for one in jobs), return_exceptions=True)

        ends = asyncio.run(fail())
        failed = [isinstance(end, GenerationFailedError) for end in ends]
        assert failed in ([True, True, False], [False, False, True])
        for end, text in zip(ends, expected, strict=True):
            if isinstance(end, GenerationFailedError):
                assert str(end) == "the model failed (out of memory); ask again"
            else:
                assert text_of(end) == text
        again = together(engine, *jobs)
        assert [text_of(pieces) for pieces in again] == expected
        assert not any(stats_of(pieces).cached_tokens for pieces, gone in zip(again, failed, strict=True) if gone)
        assert engine.counters().failed == sum(failed)


# Sampling.


def test_the_same_seed_draws_the_same_tokens_whoever_is_beside(tiny: Tiny) -> None:
    def drawn(seed: int | None, **settings: Any) -> Job:
        sampling = Sampling(temperature=1.0, seed=seed, logit_bias={END: -1000.0}, **settings)
        return job(prompt(1), sampling=sampling, max_tokens=20)

    with serving(tiny) as engine:
        for settings in ({}, {"top_p": 0.9}, {"top_k": 40, "min_p": 0.05}, {"top_k": 10**6}):
            text = ask(engine, drawn(7, **settings))[0]
            crowd = [drawn(8), drawn(7, **settings), drawn(None), job(prompt(3)), drawn(7, **settings), drawn(None)]
            answers = [text_of(pieces) for pieces in together(engine, *crowd)]
            assert answers[1] == answers[4] == text
            assert len({text, answers[0], answers[2], answers[5]}) == 4
            assert answers[3] == alone(tiny, job(prompt(3)))
        assert ask(engine, drawn(-1))[0] == ask(engine, drawn(-1))[0]


def test_a_temperature_draws_by_the_models_own_distribution(tiny: Tiny) -> None:
    bias = {100: 50.0, 101: 50.0 + float(np.log(3.0))}
    with serving(tiny, concurrency=32, queue=400) as engine:
        one = job(max_tokens=1, logprobs=2, sampling=Sampling(temperature=1.0, logit_bias=bias))
        answers = together(engine, *[replace(one, sampling=replace(one.sampling, seed=seed)) for seed in range(300)])
    tokens = [pieces[-1].tokens[0] for pieces in answers]
    top = {id: np.exp(logprob) for id, _, logprob in tokens[0].top}
    assert set(top) == {100, 101}
    share = np.mean([token.id == 101 for token in tokens])
    assert share == pytest.approx(top[101], abs=4 * np.sqrt(top[100] * top[101] / 300))


def test_logprobs_are_the_models(tiny: Tiny) -> None:
    model, _ = tiny
    one = job(logprobs=3, sampling=Sampling())
    with serving(tiny) as engine:
        pieces = together(engine, one, job(prompt(2)))[0]
    tokens = [token for piece in pieces for token in piece.tokens]
    assert "".join(token.text for token in tokens) == text_of(pieces)
    model.switch(A)
    read = list(one.tokens)
    for token in tokens:
        logits = model(mx.array([read]))[0, -1]
        logprobs = np.array(logits - mx.logsumexp(logits))
        assert token.logprob == pytest.approx(logprobs[token.id], abs=1e-4)
        assert [id for id, _, _ in token.top] == list(np.argsort(-logprobs)[:3])
        assert [logprob for _, _, logprob in token.top] == pytest.approx(np.sort(logprobs)[::-1][:3], abs=1e-4)
        assert token.top[0][0] == token.id
        read.append(token.id)


def test_nothing_of_finished_jobs_stays(tiny: Tiny) -> None:
    with serving(tiny, prompt_cache_bytes=0) as engine:
        together(engine, *[job(prompt(seed), max_tokens=100) for seed in range(8)])
        until(lambda: not engine._working)
        before = mx.get_active_memory()
        for _ in range(3):
            together(engine, *[job(prompt(seed), max_tokens=100) for seed in range(8)])
            until(lambda: not engine._working)
        assert mx.get_active_memory() <= before
        assert not engine._running
        assert not engine._waiting


# Selectors and residencies that touch the model while others are decoded.


def test_selecting_with_the_models_own_layers_disturbs_no_running_job(tiny: Tiny) -> None:
    model, tokenizer = tiny
    mx.random.seed(3)
    first, second = mx.random.normal((16, 64)), mx.random.normal((256, 16))
    head = Head(first, None, second, None, WIDTHS, layers=1)
    model.__dict__["predictor"] = SparsityPredictor(model.module, tokenizer, head, model.context_length)
    learned = [
        job(prompt(seed), choice=Choice(selector="learned", density=0.5), instruction=f"{seed} instruction {seed}")
        for seed in range(4)
    ]
    expected = []
    for one in learned:
        model.switch(None)
        selection = make_selector(model, "learned").select(
            Instruction(one.instruction, one.tokens), model.keep(density=0.5)
        )
        expected.append((selection.selection.hash, alone(tiny, job(one.tokens, selection.selection))))
    assert len({selected for selected, _ in expected}) > 1
    running = job(prompt(9), A, max_tokens=150)
    whole = alone(tiny, running)

    async def crowd(engine: Engine) -> tuple[str, list[list[Piece]]]:
        stream = engine.stream(running)
        said = (await stream.__anext__()).text
        others = asyncio.gather(*(pieces_of(engine, one) for one in learned))
        async for piece in stream:
            said += piece.text
        return said, await others

    with serving(tiny, patience=60) as engine:
        said, others = asyncio.run(crowd(engine))
    assert said == whole
    assert [(stats_of(pieces).selection, text_of(pieces)) for pieces in others] == expected
    assert {stats_of(pieces).selector for pieces in others} == {"learned"}


def test_a_model_on_ssd_is_served_but_never_dense(tiny: Tiny, tiny_checkpoint: Path) -> None:
    jobs = [job(prompt(seed), CHOICES[name]) for seed, name in enumerate("ABAC")]
    expected = [alone(tiny, one) for one in jobs]
    streamed = load(tiny_checkpoint, residency="ssd")
    with serving(streamed) as engine:
        assert [text_of(pieces) for pieces in together(engine, *jobs)] == expected
        for choice in (Choice(dense=True), Choice(selector="activation")):
            with pytest.raises(BudgetError, match="residency ram"):
                ask(engine, job(choice=choice))
    streamed[0].close()
