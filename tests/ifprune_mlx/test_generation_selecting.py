"""What generation computes under: selectors, what cannot be selected, and the figures that tell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import pytest

from ifprune_mlx import BudgetError, GenerationResponse, History, SelectionError, make_selector, stream_generate
from ifprune_mlx.prompt_cache import DENSE
from tests.ifprune_mlx.generating import TOKENS, Tiny, answer, letters, tokens_of
from tests.ifprune_mlx.reference import random_selection


def test_the_random_selector_follows_the_seed(tiny: Tiny) -> None:
    hashes = set()
    for seed in (0, 0, 1):
        stats = answer(tiny, "What?", selector="random", seed=seed, max_tokens=1)[-1].stats
        assert stats is not None
        hashes.add(stats.selection)
    assert len(hashes) == 2


def test_a_selector_object_and_its_name_select_the_same(tiny: Tiny) -> None:
    named = answer(tiny, TOKENS, selector="static", density=0.5, max_tokens=4)
    made = answer(tiny, TOKENS, selector=make_selector(tiny[0], "static"), density=0.5, max_tokens=4)
    assert named[-1].stats is not None
    assert made[-1].stats is not None
    assert named[-1].stats.selection == made[-1].stats.selection
    assert tokens_of(named) == tokens_of(made)


def test_a_selection_for_another_model_is_refused_before_anything_is_read(tiny: Tiny) -> None:
    history = History.empty(tiny[0])
    with pytest.raises(SelectionError, match="another model"):
        answer(tiny, TOKENS, selection=random_selection((64,), (8,), seed=1), prompt_cache=history)
    assert history.tokens == []


def test_a_budget_that_cannot_be_met_is_refused(tiny: Tiny) -> None:
    for budget in ({"density": 2}, {"density": 0.5, "active_parameters": 100}, {"memory": 1}):
        with pytest.raises(BudgetError):
            answer(tiny, TOKENS, **budget)


def test_the_last_response_carries_consistent_figures(tiny: Tiny) -> None:
    model = tiny[0]
    history = History.empty(model)
    seen: list[GenerationResponse] = []
    stream: Iterator[GenerationResponse] = stream_generate(
        *tiny, "What?", selector="random", density=0.25, max_tokens=6, prompt_cache=history, logits_processors=[letters]
    )
    seen.extend(stream)
    assert [response.finish_reason for response in seen] == [None] * 5 + ["length"]
    assert [response.stats for response in seen[:-1]] == [None] * 5
    assert [response.generation_tokens for response in seen] == list(range(1, 7))
    assert {response.prompt_tokens for response in seen} == {5}
    stats = seen[-1].stats
    assert stats is not None
    assert model.selection is not None
    assert (stats.selector, stats.selection, stats.density) == ("random", model.selection.hash, 0.25)
    assert (stats.prompt_tokens, stats.completion_tokens, stats.reused_tokens) == (5, 6, 0)
    assert (stats.finish_reason, stats.overlap) == ("length", None)
    per_neuron = 3 * 64
    assert stats.total_parameters - stats.active_parameters == 2 * (128 - 32) * per_neuron
    assert min(stats.select_s, stats.switch_s, stats.prefill_s, stats.decode_s) > 0
    assert stats.tokens_per_s == pytest.approx(5 / stats.decode_s)
    assert stats.peak_memory > 0
    assert all(isinstance(value, int | float | str) or value is None for value in asdict(stats).values())

    first = model.selection
    again = answer(tiny, "Else?", selector="random", density=0.25, max_tokens=1)[-1].stats
    assert again is not None
    assert again.overlap == pytest.approx(model.selection.overlap(first))
    assert 0 < again.overlap < 1

    dense = answer(tiny, "What?", dense=True, max_tokens=1)[-1].stats
    assert dense is not None
    assert (dense.selector, dense.selection, dense.density, dense.overlap) == (DENSE, None, 1.0, None)
    assert dense.active_parameters == dense.total_parameters
