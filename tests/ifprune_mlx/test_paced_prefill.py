"""Prompts that are read in steps of a given time, so that cancelling is heard soon, and what a message would select."""

from __future__ import annotations

import time
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ifprune_mlx import Model, Session
from ifprune_mlx.prompt_cache import Pace
from tests.ifprune_mlx.generating import assert_in_step

Tiny = tuple[Model, Any]
TEXT = "a message that is a good deal longer than a step " * 8


def test_steps_become_longer_while_they_are_quick_and_shorter_while_they_are_slow() -> None:
    quick = [len(step) for step in Pace(60).steps(range(1000), 256)]
    assert quick == [32, 64, 128, 256, 256, 256, 8]
    slow = []
    for step in Pace(0.001).steps(range(80), 256):
        slow.append(len(step))
        time.sleep(0.005)
    assert slow == [32, 16, 8, 8, 8, 8]
    assert [len(step) for step in Pace().steps(range(1000), 512)] == [512, 488]
    assert [token for step in Pace(60).steps(range(100), 64) for token in step] == list(range(100))


@pytest.mark.parametrize("selector", ["static", "activation"])
def test_the_answer_is_that_of_one_step(tiny: Tiny, selector: str) -> None:
    plain, paced = (Session(*tiny, selector=selector, **more) for more in ({}, {"prefill_seconds": 60.0}))
    for text in (TEXT, "and on"):
        assert paced.ask(text, max_tokens=8) == plain.ask(text, max_tokens=8)
        assert paced.history.tokens == plain.history.tokens
        assert paced.history.spans == plain.history.spans
    for mine, theirs in zip(paced.history.kv, plain.history.kv, strict=True):
        keys, wanted = (np.array(cache.state[0])[:, :, : cache.offset] for cache in (mine, theirs))
        np.testing.assert_allclose(keys, wanted, atol=1e-4)


def test_a_bounded_cache(tiny: Tiny) -> None:
    session = Session(*tiny, selector="static", prefill_seconds=60.0, max_kv_size=64)
    assert session.ask(TEXT, max_tokens=8)
    assert_in_step(session.history)


def test_progress_counts_all_steps(tiny: Tiny) -> None:
    session = Session(*tiny, selector="static", prefill_seconds=60.0)
    seen: list[tuple[int, int]] = []
    session.ask(TEXT, max_tokens=2, progress=lambda done, total: seen.append((done, total)))
    total = seen[-1][0]
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen][:4] == [0, 32, 96, 224]
    assert {count for _, count in seen} == {total}


@pytest.mark.parametrize("selector", ["static", "activation"])
def test_cancelling_is_heard_after_each_step(tiny: Tiny, selector: str) -> None:
    session = Session(*tiny, selector=selector, prefill_seconds=60.0)
    calls = []

    def stop(done: int, total: int) -> None:
        calls.append(done)
        session.cancel()

    (last,) = session.stream(TEXT, max_tokens=8, progress=stop)
    assert last.finish_reason == "cancelled"
    assert calls == [0]
    assert session.messages == []
    assert_in_step(session.history)
    assert session.ask(TEXT, max_tokens=8) == Session(*tiny, selector=selector).ask(TEXT, max_tokens=8)


def test_what_a_message_would_select(tiny: Tiny) -> None:
    session = Session(*tiny, selector="random", density=0.25)
    session.ask("one", max_tokens=4)
    first, history, live = session.selection, list(session.history.tokens), tiny[0].selection
    assert first is not None
    again, other = session.would_select("one"), session.would_select("two")
    assert again is not None
    assert other is not None
    assert again.hash == first.hash != other.hash
    assert (session.selection, session.history.tokens, tiny[0].selection) == (first, history, live)
    session.policy = "turn"
    session.ask("two", max_tokens=4)
    assert session.selection is not None
    assert session.selection.hash == other.hash
    for nothing in (
        Session(*tiny, dense=True, selector="random"),
        Session(*tiny, selector="activation"),
        Session(*tiny, selection=first),
    ):
        assert nothing.would_select("one") is None
    mx.eval(tiny[0](mx.array([[1, 2]])))  # the model is as usable as before
