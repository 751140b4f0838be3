"""Generation that goes on from a history: never from entries that another selection computed, unless told to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from ifprune_mlx import History, IfpruneError, Selection
from ifprune_mlx.prompt_cache import DENSE, Span
from tests.ifprune_mlx.generating import TOKENS, A, B, Tiny, answer, assert_in_step, tokens_of, until_end
from tests.ifprune_mlx.reference import greedy, mask_ffns, source_model


@pytest.mark.parametrize("options", [{"dense": True}, {"selection": A}], ids=["dense", "sliced"])
def test_a_prompt_in_two_parts_equals_the_whole(tiny: Tiny, options: dict[str, Any]) -> None:
    history = History.empty(tiny[0])
    first = answer(tiny, TOKENS[:12], max_tokens=3, prompt_cache=history, **options)
    read = TOKENS[:12] + tokens_of(first)
    second = answer(tiny, TOKENS[12:], max_tokens=8, prompt_cache=history, **options)
    whole = answer(tiny, read + TOKENS[12:], max_tokens=8, **options)
    assert tokens_of(second) == tokens_of(whole)
    assert second[-1].stats is not None
    assert (second[-1].stats.reused_tokens, second[-1].stats.prompt_tokens) == (15, 23)
    assert whole[-1].stats is not None
    assert whole[-1].stats.reused_tokens == 0
    assert history.tokens == read + TOKENS[12:] + tokens_of(second)
    assert_in_step(history)


def test_reprefill_answers_as_a_fresh_history_does(tiny: Tiny) -> None:
    history = History.empty(tiny[0])
    answer(tiny, TOKENS, selection=A, max_tokens=6, prompt_cache=history)
    read = [*history.tokens, 50, 51]
    second = answer(tiny, [50, 51], selection=B, max_tokens=8, prompt_cache=history)

    assert tokens_of(second) == tokens_of(answer(tiny, read, selection=B, max_tokens=8))
    assert second[-1].stats is not None
    assert second[-1].stats.reused_tokens == 0
    assert history.spans == [Span(len(read) + 8, B.hash)]
    assert_in_step(history)


@pytest.mark.parametrize("then", [A, B, None], ids=["A", "B", "dense"])
@pytest.mark.parametrize("first", [A, B, None], ids=["A", "B", "dense"])
def test_only_entries_of_the_same_selection_are_gone_on_from(
    tiny: Tiny, first: Selection | None, then: Selection | None
) -> None:
    def options(selection: Selection | None) -> dict[str, Any]:
        return {"dense": True} if selection is None else {"selection": selection}

    history = History.empty(tiny[0])
    answer(tiny, TOKENS, max_tokens=6, prompt_cache=history, **options(first))
    read = [*history.tokens, 50]
    second = answer(tiny, [50], max_tokens=12, prompt_cache=history, **options(then))
    fresh = answer(tiny, read, max_tokens=12, **options(then))
    assert tokens_of(second) == tokens_of(fresh)
    assert [np.array(r.logprobs) for r in second] == [pytest.approx(np.array(r.logprobs), abs=1e-4) for r in fresh]
    assert second[-1].stats is not None
    assert second[-1].stats.reused_tokens == (len(read) - 1 if first is then else 0)
    assert [span.computed_by for span in history.spans] == [DENSE if then is None else then.hash]


def test_keep_goes_on_from_what_another_selection_computed(tiny: Tiny, tiny_checkpoint: Path) -> None:
    history = History.empty(tiny[0])
    answer(tiny, TOKENS, selection=A, max_tokens=6, prompt_cache=history)
    read = list(history.tokens)
    second = answer(tiny, [50, 51], selection=B, max_tokens=8, prompt_cache=history, on_switch="keep")
    assert history.spans == [Span(26, A.hash), Span(10, B.hash)]
    assert second[-1].stats is not None
    assert second[-1].stats.reused_tokens == 26
    assert_in_step(history)

    one, other = (mask_ffns(source_model(tiny_checkpoint), selection) for selection in (A, B))
    cache = make_prompt_cache(one)
    one(mx.array([read]), cache=cache)
    assert tokens_of(second) == until_end(greedy(other, [50, 51], 8, prompt_cache=cache))


def test_keep_with_the_activation_selector_reads_only_the_news_densely(tiny: Tiny, tiny_checkpoint: Path) -> None:
    history = History.empty(tiny[0])
    answer(tiny, TOKENS, selection=A, max_tokens=6, prompt_cache=history)
    read = list(history.tokens)
    second = answer(
        tiny, [50, 51, 52], selector="activation", density=0.25, max_tokens=6, prompt_cache=history, on_switch="keep"
    )
    selection = tiny[0].selection
    assert selection is not None
    assert history.spans == [Span(26, A.hash), Span(2, DENSE), Span(7, selection.hash)]
    assert_in_step(history)

    dense = source_model(tiny_checkpoint)
    cache = make_prompt_cache(dense)
    mask_ffns(source_model(tiny_checkpoint), A)(mx.array([read]), cache=cache)
    dense(mx.array([[50, 51]]), cache=cache)
    assert tokens_of(second) == until_end(greedy(mask_ffns(dense, selection), [52], 6, prompt_cache=cache))


def test_a_prompt_that_is_in_the_history_to_its_last_token_reads_that_one_again(tiny: Tiny) -> None:
    history = History.empty(tiny[0])
    answer(tiny, TOKENS, selection=A, max_tokens=1, prompt_cache=history)
    read = list(history.tokens)
    second = answer(tiny, [], selection=A, max_tokens=5, prompt_cache=history)
    assert tokens_of(second) == tokens_of(answer(tiny, read, selection=A, max_tokens=5))
    assert_in_step(history)


def test_an_unknown_way_to_switch_is_refused(tiny: Tiny) -> None:
    with pytest.raises(IfpruneError, match="on_switch 'forget' is unknown; choose reprefill or keep"):
        answer(tiny, TOKENS, selection=A, on_switch="forget")
