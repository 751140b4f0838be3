"""Generation that is cancelled, left or fails midway: the history can be gone on from all the same."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest

from ifprune_mlx import History, stream_generate
from tests.ifprune_mlx.generating import (
    END,
    TOKENS,
    A,
    B,
    Broken,
    Tiny,
    answer,
    asked,
    assert_in_step,
    failing,
    tokens_of,
)


@pytest.mark.parametrize("on_switch", ["reprefill", "keep"])
@pytest.mark.parametrize("selector", ["random", "activation", "dense"])
@pytest.mark.parametrize("times", range(14))
def test_cancelling_anywhere_leaves_a_history_that_can_be_gone_on_from(
    tiny: Tiny, selector: str, on_switch: str, times: int
) -> None:
    how: dict[str, Any] = {"dense": True} if selector == "dense" else {"selector": selector, "density": 0.25}
    history = History.empty(tiny[0])
    answer(tiny, TOKENS[:5], selection=A, max_tokens=2, prompt_cache=history)
    read = list(history.tokens)
    options = {"prompt_cache": history, "on_switch": on_switch, "prefill_step_size": 4}

    responses = answer(tiny, TOKENS, cancel=asked(times), max_tokens=4, **options, **how)

    stats = responses[-1].stats
    assert stats is not None
    assert stats.finish_reason == responses[-1].finish_reason
    assert stats.completion_tokens == responses[-1].generation_tokens
    if stats.completion_tokens < 4 and END not in tokens_of(responses):
        assert stats.finish_reason == "cancelled"
    assert_in_step(history)
    said = [token for token in tokens_of(responses) if token >= 0]
    assert history.tokens == (read + TOKENS + said)[: len(history.tokens)]
    if said:
        assert history.tokens == read + TOKENS + said

    # Going on under a selection of its own equals a fresh start, so nothing stale is left in any cache.
    tokens = [*history.tokens, 50]
    after = answer(tiny, [50], selection=B, max_tokens=3, prompt_cache=history)
    assert tokens_of(after) == tokens_of(answer(tiny, tokens, selection=B, max_tokens=3))
    assert_in_step(history)


def test_cancelling_at_once_leaves_the_live_selection(tiny: Tiny) -> None:
    tiny[0].switch(A)
    (response,) = answer(tiny, TOKENS, selector="activation", cancel=lambda: True)
    assert response.finish_reason == "cancelled"
    assert (response.text, response.token) == ("", -1)
    assert tiny[0].selection is A


def test_a_consumer_that_stops_listening_leaves_the_history_in_step(tiny: Tiny) -> None:
    history = History.empty(tiny[0])
    stream = stream_generate(*tiny, TOKENS, selection=A, prompt_cache=history, max_tokens=9)
    said = [next(stream).token, next(stream).token]
    stream.close()  # type: ignore[attr-defined]
    assert history.tokens == TOKENS + said
    assert_in_step(history)


@pytest.mark.parametrize("where", ["logits_processors", "progress"])
@pytest.mark.parametrize("after", range(9))
@pytest.mark.parametrize("on_switch", ["reprefill", "keep"])
@pytest.mark.parametrize("selector", ["random", "activation"])
def test_a_callback_that_raises_leaves_a_history_that_can_be_gone_on_from(
    tiny: Tiny, selector: str, on_switch: str, after: int, where: str
) -> None:
    history = History.empty(tiny[0])
    answer(tiny, TOKENS[:5], selection=A, max_tokens=2, prompt_cache=history)
    option = {where: [failing(after)] if where == "logits_processors" else failing(after)}
    options = {"prompt_cache": history, "on_switch": on_switch, "prefill_step_size": 4, "max_tokens": 12}
    with suppress(Broken):  # not every selector reports progress nine times
        answer(tiny, TOKENS, selector=selector, **options, **option)
        assert where == "progress"
        assert after >= 3
    assert_in_step(history)
    tokens = [*history.tokens, 50]
    after_it = answer(tiny, [50], selection=B, max_tokens=3, prompt_cache=history)
    assert tokens_of(after_it) == tokens_of(answer(tiny, tokens, selection=B, max_tokens=3))


@pytest.mark.parametrize("after", range(8))
def test_a_model_call_that_dies_between_two_layers_leaves_no_half_read_token(tiny: Tiny, after: int) -> None:
    # As Ctrl-C may: the first layer's cache has the tokens by then, the second layer's has not.
    history = History.empty(tiny[0])
    tiny[0].down_leaves[0].observer = failing(after)
    with pytest.raises(Broken):
        answer(tiny, TOKENS, selection=A, prompt_cache=history, prefill_step_size=4, max_tokens=12)
    tiny[0].down_leaves[0].observer = None
    assert_in_step(history)
    fresh = tokens_of(answer(tiny, [*history.tokens, 50], selection=A, max_tokens=3))
    assert tokens_of(answer(tiny, [50], selection=A, max_tokens=3, prompt_cache=history)) == fresh
