"""What the activation selector read densely serves the selection that it was read for, and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ifprune_mlx import History, Selection, Session, load
from ifprune_mlx.prompt_cache import DENSE
from tests.ifprune_mlx.generating import TOKENS, A, Tiny, answer, tokens_of
from tests.ifprune_mlx.reference import random_selection
from tests.tiny import write_checkpoint

WIDTHS = (128, 128)


def named_activation(seed: int = 4) -> Selection:
    """A selection that says the activation selector made it."""
    return random_selection(WIDTHS, (48, 32), seed=seed, selector="activation")


def saved_and_loaded(history: History, tiny: Tiny, folder: Path) -> History:
    history.save(folder / "cache.safetensors", tiny[0])
    return History.load(folder / "cache.safetensors", tiny[0])


def reused(tiny: Tiny, history: History, **options: Any) -> int:
    """How much of a history an answer goes on from; it must answer as one without a history does."""
    read = [*history.tokens, 50]
    found = answer(tiny, [50], max_tokens=6, prompt_cache=history, **options)
    assert found[-1].stats is not None
    if not found[-1].stats.reused_tokens:
        assert tokens_of(found) == tokens_of(answer(tiny, read, max_tokens=6, **options))
    return found[-1].stats.reused_tokens


@pytest.mark.parametrize("saved", [False, True], ids=["in memory", "saved"])
@pytest.mark.parametrize("before", ["dense", "another run", "another run, then dense", "a fixed selection"])
def test_a_selection_of_the_activation_selector_takes_no_entries_that_were_not_read_for_it(
    tiny: Tiny, tmp_path: Path, before: str, saved: bool
) -> None:
    history = History.empty(tiny[0])
    if before.startswith("another run"):
        answer(tiny, TOKENS, selector="activation", density=0.25, max_tokens=4, prompt_cache=history)
    if before.endswith("dense"):
        answer(tiny, TOKENS, dense=True, max_tokens=4, prompt_cache=history)
    if before == "a fixed selection":
        answer(tiny, TOKENS, selection=A, max_tokens=4, prompt_cache=history)
    if saved:
        history = saved_and_loaded(history, tiny, tmp_path)
    assert reused(tiny, history, selection=named_activation()) == 0


def test_a_saved_selection_does_not_go_on_from_a_dense_history(tiny: Tiny, tmp_path: Path) -> None:
    answer(tiny, TOKENS, selector="activation", density=0.25, max_tokens=1)
    assert tiny[0].selection is not None
    tiny[0].selection.save(tmp_path / "made.safetensors")
    history = History.empty(tiny[0])
    answer(tiny, TOKENS, dense=True, max_tokens=4, prompt_cache=history)
    assert reused(tiny, history, selection=Selection.load(tmp_path / "made.safetensors")) == 0


@pytest.mark.parametrize("saved", [False, True], ids=["in memory", "saved"])
def test_the_selection_that_the_prompt_was_read_for_goes_on_from_it(tiny: Tiny, tmp_path: Path, saved: bool) -> None:
    history = History.empty(tiny[0])
    answer(tiny, TOKENS, selector="activation", density=0.25, max_tokens=4, prompt_cache=history)
    selection = tiny[0].selection
    assert selection is not None
    assert [(span.computed_by, span.read_for) for span in history.spans] == [
        (DENSE, selection.hash),
        (selection.hash, None),
    ]
    if saved:
        history = saved_and_loaded(history, tiny, tmp_path)
    assert reused(tiny, history, selection=selection) == len(TOKENS) + 4


def test_kept_entries_stay_apart_from_those_that_were_read_for_a_selection(tiny: Tiny) -> None:
    history = History.empty(tiny[0])
    answer(tiny, TOKENS, dense=True, max_tokens=4, prompt_cache=history)
    answer(
        tiny, [50, 51, 52], selector="activation", density=0.25, max_tokens=2, prompt_cache=history, on_switch="keep"
    )
    selection = tiny[0].selection
    assert selection is not None
    assert [(span.tokens, span.computed_by, span.read_for) for span in history.spans] == [
        (24, DENSE, None),
        (2, DENSE, selection.hash),
        (3, selection.hash, None),
    ]
    assert reused(tiny, history, selection=selection) == 0


@pytest.mark.parametrize("policy", ["first", "auto"])
def test_a_conversation_goes_on_from_its_own_reading_but_not_from_dense_turns(tiny: Tiny, policy: str) -> None:
    chat = Session(*tiny, policy=policy, selector="activation", density=0.25)
    chat.ask("One", max_tokens=4)
    chat.ask("Two", max_tokens=4)
    assert chat.stats is not None
    assert chat.stats.reused_tokens > 0
    selection = chat.selection
    assert selection is not None
    own = sum(span.tokens for span in chat.history.spans if span.read_for)
    chat.dense = True
    chat.ask("Three", max_tokens=4)
    chat.dense = False
    chat.policy = "first"
    chat.ask("Four", max_tokens=4)
    assert chat.stats.reused_tokens == own
    assert [(span.computed_by, span.read_for) for span in chat.history.spans] == [
        (DENSE, selection.hash),
        (selection.hash, None),
    ]


# A history keeps its bound.


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma2"])
def test_a_saved_history_keeps_its_bound(tmp_path: Path, family: str) -> None:
    tiny = load(write_checkpoint(tmp_path / "checkpoint", family))
    history = History.empty(tiny[0], max_kv_size=16)
    answer(tiny, TOKENS, selection=A, max_tokens=4, prompt_cache=history)
    loaded = saved_and_loaded(history, tiny, tmp_path)
    assert loaded.max_kv_size == 16
    answer(tiny, [50], dense=True, max_tokens=2, prompt_cache=loaded)  # made anew, as it cannot be trimmed
    assert [cache.max_size for cache in loaded.kv] == [16, 16]
