"""Selectors behind their one protocol: what each reads, what it keeps, and what it leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ifprune_convert.pipeline import Options
from ifprune_mlx import (
    CheckpointError,
    History,
    IfpruneError,
    Instruction,
    Model,
    SelectionError,
    Selector,
    make_selector,
)
from ifprune_mlx.history import DENSE, Span
from ifprune_mlx.selection import top_k
from ifprune_mlx.selectors import ActivationSelector, FixedSelector, default_selector
from tests.tiny import write_checkpoint

from .reference import open_model, random_selection
from .test_importance import captured, reference

TOKENS = (1, 40, 300, 7, 7, 99, 250, 3, 18, 120, 64, 201)
KEEP = (40, 32)
PROMPT = Instruction("Write a haiku.", TOKENS)


@pytest.fixture
def model(tiny_checkpoint: Path) -> Model:
    return open_model(tiny_checkpoint)


def ids_of(selector: Selector, instruction: Instruction = PROMPT, keep: tuple[int, ...] = KEEP) -> list[list[int]]:
    return [ids.tolist() for ids in selector.select(instruction, keep).selection.ids]


@pytest.mark.parametrize("name", ["activation", "static", "random"])
def test_every_selector_keeps_as_many_neurons_as_it_is_told(model: Model, name: str) -> None:
    selector = make_selector(model, name)
    assert selector.name == name
    for keep in ((8, 128), (128, 128), (1, 3)):
        selection = selector.select(PROMPT, keep).selection
        assert (selection.keep, selection.widths, selection.selector) == (keep, (128, 128), name)
        model.switch(selection)


# static


def test_static_keeps_the_top_of_the_prior_whatever_is_said(model: Model) -> None:
    selector = make_selector(model, "static")
    assert ids_of(selector) == ids_of(selector, Instruction("Something else", (5,)))
    for ids, prior, k in zip(ids_of(selector), model.prior, KEEP, strict=True):
        assert ids == sorted(np.argsort(-prior)[:k].tolist())
    assert selector.select(PROMPT, KEEP).history is None


def test_static_uses_a_ready_prior(tmp_path: Path) -> None:
    prior = [np.arange(128, dtype=np.float32), np.arange(128, 0, -1, dtype=np.float32)]
    model = open_model(write_checkpoint(tmp_path / "checkpoint", options=Options(prior=prior)))
    assert model.checkpoint.prior_method == "calibrated"
    assert ids_of(make_selector(model, "static"), keep=(8, 8)) == [list(range(120, 128)), list(range(8))]


# random


def test_random_is_the_same_for_the_same_text_and_seed_and_no_other(model: Model) -> None:
    first = ids_of(make_selector(model, "random", seed=1))
    assert ids_of(make_selector(model, "random", seed=1), Instruction(PROMPT.text, (9,))) == first
    assert ids_of(make_selector(model, "random", seed=2)) != first
    assert ids_of(make_selector(model, "random", seed=1), Instruction("Write a poem.", TOKENS)) != first
    assert first[0] != first[1]


def test_random_spares_no_neuron(model: Model) -> None:
    selector = make_selector(model, "random")
    counts = np.zeros(128)
    for number in range(200):
        counts[ids_of(selector, Instruction(str(number), ()), (64, 64))[0]] += 1
    assert counts.min() > 60
    assert counts.max() < 140


# fixed


def test_fixed_gives_its_selection_back_whatever_the_budget(model: Model) -> None:
    selection = random_selection((128, 128), (24, 16), seed=1)
    selected = FixedSelector(model, selection).select(PROMPT, (128, 128))
    assert selected.selection is selection
    assert selected.history is None


@pytest.mark.parametrize("widths", [(128,), (64, 64), (128, 128, 128)])
def test_fixed_refuses_a_selection_for_another_model(model: Model, widths: tuple[int, ...]) -> None:
    with pytest.raises(SelectionError, match="made for another model"):
        FixedSelector(model, random_selection(widths, [8] * len(widths), seed=1))


# activation


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_activation_ranks_what_the_prompt_uses_and_the_prior(model: Model, tiny_checkpoint: Path, share: float) -> None:
    # The last token is not read ahead: it is what decoding begins with.
    selection = ActivationSelector(model, share).select(PROMPT, KEEP).selection
    scores = []
    for hidden, norms, prior in zip(*captured(tiny_checkpoint, list(TOKENS[:-1])), model.prior, strict=True):
        seen = reference(hidden, norms, np.ones(len(TOKENS) - 1))
        ranks = [np.argsort(np.argsort(values, kind="stable")) / 127 for values in (seen, prior)]
        scores.append((share * ranks[0] + (1 - share) * ranks[1]).astype(np.float32))
    assert [ids.tolist() for ids in selection.ids] == [ids.tolist() for ids in top_k(scores, KEEP, "activation").ids]


def test_activation_is_deterministic_and_reads_the_prompt(model: Model) -> None:
    selector = make_selector(model, "activation")
    first = ids_of(selector)
    model.switch(random_selection((128, 128), (8, 8), seed=3))  # neither slots nor the live selection matter
    assert ids_of(selector) == first
    assert ids_of(selector, Instruction(PROMPT.text, (5, 6, 7, 8))) != first


def test_activation_leaves_a_dense_prefill_and_a_dense_model(model: Model) -> None:
    model.switch(random_selection((128, 128), (8, 8), seed=3))
    selected = make_selector(model, "activation").select(PROMPT, KEEP)
    assert model.selection is None
    history = selected.history
    assert history is not None
    assert (history.tokens, history.spans) == (list(TOKENS[:-1]), [Span(11, DENSE)])
    assert {cache.offset for cache in history.kv} == {11}

    plain = History.empty(model)
    model(mx.array([TOKENS[:-1]]), cache=plain.kv)
    found, expected = (np.array(model(mx.array([TOKENS[-1:]]), cache=h.kv)) for h in (history, plain))
    assert np.abs(found - expected).max() < 1e-5
    assert all(leaf.observer is None for leaf in model.down_leaves)


def test_activation_goes_on_from_a_given_history(model: Model) -> None:
    given = History.empty(model)
    model(mx.array([TOKENS[:6]]), cache=given.kv)
    given.append(list(TOKENS[:6]), "earlier")
    selected = make_selector(model, "activation").select(Instruction("Hi", TOKENS, given), KEEP)
    assert selected.history is given
    assert given.spans == [Span(6, "earlier"), Span(5, DENSE)]
    assert given.tokens == list(TOKENS[:-1])


@pytest.mark.parametrize("read", [0, 5])
def test_activation_selects_by_a_single_new_token_without_reading_it_ahead(model: Model, read: int) -> None:
    given = History.empty(model)
    if read:
        model(mx.array([TOKENS[:read]]), cache=given.kv)
        given.append(list(TOKENS[:read]), DENSE)
    selected = make_selector(model, "activation").select(Instruction("H", TOKENS[: read + 1], given), KEEP)
    assert selected.selection.keep == KEEP
    assert len(given.tokens) == read
    assert {cache.offset for cache in given.kv} == {read}


def test_activation_reports_progress_and_can_be_stopped_there(model: Model) -> None:
    class Stop(Exception):
        pass

    seen: list[Any] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        if done:
            raise Stop

    with pytest.raises(Stop):
        make_selector(model, "activation").select(Instruction("Hi", tuple([5] * 1000), None, progress), KEEP)
    assert seen == [(0, 1000), (512, 1000)]
    assert all(leaf.observer is None for leaf in model.down_leaves)


# By name.


def test_the_default_is_what_the_checkpoint_names(model: Model) -> None:
    assert default_selector(model) == "activation"
    assert make_selector(model).name == "activation"


def test_an_unknown_name_is_refused_and_the_known_ones_are_said(model: Model) -> None:
    with pytest.raises(IfpruneError, match="unknown selector 'best'; choose learned, activation, static or random"):
        make_selector(model, "best")


def test_learned_needs_a_predictor_in_the_checkpoint(model: Model) -> None:
    with pytest.raises(CheckpointError, match="has no trained predictor; use --selector activation") as caught:
        make_selector(model, "learned")
    assert str(caught.value).startswith(str(model.checkpoint.path))
