"""What the engine keeps of finished requests: KV caches under their own selections, within bounds; nothing else."""

from __future__ import annotations

import mlx.core as mx

from ifprune_mlx.serving.engine.request import SamplingParams
from tests.ifprune_mlx.serving.engine.engines import (
    END,
    A,
    B,
    Tiny,
    alone,
    ask,
    make_request,
    prompt,
    serving,
    stats_of,
    text_of,
    together,
)


def test_a_conversation_goes_on_from_its_cache_and_only_under_its_selection(tiny: Tiny) -> None:
    with serving(tiny) as engine:
        first, stats = ask(engine, make_request(prompt(1), A))
        assert stats.cached_tokens == 0
        said = tuple(tiny[1].encode(first, add_special_tokens=False))
        longer = (*prompt(1), *said[:8], *prompt(2, 9))
        for selection, cached in ((B, 0), (None, 0), (A, 28), (B, 35), (None, 35)):
            one = make_request(longer, selection)
            text, stats = ask(engine, one)
            assert stats.cached_tokens == cached
            assert text == alone(tiny, one)


def test_a_batch_of_cached_and_new_prompts_equals_each_alone(tiny: Tiny) -> None:
    # Penalties look at what was read, whether from a cache or not.
    sampling = SamplingParams(logit_bias={END: -1000.0}, repetition_penalty=1.5, presence_penalty=1.0)
    requests = [make_request((*prompt(1), *prompt(seed, 3 * seed)), sampling=sampling) for seed in range(2, 6)]
    with serving(tiny, prompt_cache_bytes=0) as engine:
        expected = [ask(engine, one)[0] for one in requests]
    with serving(tiny) as engine:
        ask(engine, make_request(prompt(1), max_tokens=1))
        answers = together(engine, *requests, make_request(prompt(9)))
    assert [text_of(outputs) for outputs in answers[:-1]] == expected
    assert [stats_of(outputs).cached_tokens for outputs in answers] == [20, 20, 20, 20, 0]


def test_caches_are_bounded_and_can_be_switched_off(tiny: Tiny) -> None:
    with serving(tiny, prompt_cache_bytes=0) as engine:
        assert [ask(engine, make_request())[1].cached_tokens for _ in range(2)] == [0, 0]
    # A token's keys and values: 2 layers, 2 of 2 heads of 16 float32 numbers.
    one = (20 + 12) * 2 * 2 * 2 * 16 * 4
    with serving(tiny, prompt_cache_bytes=3 * one) as engine:
        for seed in range(5):
            ask(engine, make_request(prompt(seed)))
        assert engine.counters().prompt_cache_bytes <= 3 * one
        assert [ask(engine, make_request(prompt(seed)))[1].cached_tokens > 0 for seed in (4, 0)] == [True, False]


def test_nothing_of_finished_requests_stays(tiny: Tiny) -> None:
    with serving(tiny, prompt_cache_bytes=0) as engine:
        together(engine, *[make_request(prompt(seed), max_tokens=100) for seed in range(8)])
        engine._scheduler.idle.wait()
        before = mx.get_active_memory()
        for _ in range(3):
            together(engine, *[make_request(prompt(seed), max_tokens=100) for seed in range(8)])
            engine._scheduler.idle.wait()
        assert mx.get_active_memory() <= before
        assert (engine.counters().running, engine.counters().waiting) == (0, 0)
