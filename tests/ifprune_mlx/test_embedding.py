"""What apps use: `load()` alone, `Session.select` with its `save`, and a function that is told of switches."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from ifprune_convert import embedded
from ifprune_mlx import Model, PromptError, Selection, Session, TaskError, TaskStore, load, make_selector
from ifprune_mlx.model_lock import ModelBusyError

Tiny = tuple[Model, Any]


@pytest.fixture(autouse=True)
def _data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IFPRUNE_DATA", str(tmp_path / "data"))


def test_load_alone_loads_the_embedded_model(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one in the cache; a tiny one stands in its place here."""
    monkeypatch.setenv("IFPRUNE_CACHE", str(tmp_path))
    short = "f16" if mx.default_device() == mx.gpu else "f32"
    shutil.copytree(tiny_checkpoint, tmp_path / f"smollm2-135m-instruct-{short}-r{embedded._REVISION}")
    model, tokenizer = load()
    assert model.checkpoint.path.parent == tmp_path
    assert Session(model, tokenizer).ask("hello", max_tokens=2)
    model.close()


def test_load_alone_says_what_it_fetches(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def ensure(note: Any) -> Path:
        note("Fetching 98 MB, 100 % of it")
        return tiny_checkpoint

    monkeypatch.setattr(embedded, "ensure_embedded", ensure)
    with caplog.at_level(logging.WARNING):
        load()[0].close()
    assert "Fetching 98 MB, 100 % of it" in caplog.text


def test_a_session_selects_and_saves(tiny: Tiny, tmp_path: Path) -> None:
    """`select` is what the message would select first, changes nothing, and is kept under a name or in a file."""
    model, tokenizer = tiny
    session = Session(model, tokenizer, density=0.5, system_prompt="Be brief.")
    session.ask("hello", max_tokens=2)
    live, messages = model.selection, list(session.messages)
    found = session.select("Where is Oslo?")
    assert (model.selection, session.messages) == (live, messages)
    assert session.selection is live
    other = Session(model, tokenizer, density=0.5, system_prompt="Be brief.")
    other.ask("Where is Oslo?", max_tokens=2)
    assert other.selection is not None
    assert found.hash == other.selection.hash
    found.save("geography")
    assert TaskStore(model.checkpoint).load("geography").hash == found.hash
    found.save(tmp_path / "s.safetensors")
    assert Selection.load(tmp_path / "s.safetensors").hash == found.hash
    with pytest.raises(TaskError, match="cannot name a task"):
        found.save("no/name")
    session.use(found)
    session.ask("go on", max_tokens=2)
    assert model.selection is not None
    assert model.selection.hash == found.hash


def test_select_where_a_selection_is_fixed(tiny: Tiny) -> None:
    """The checkpoint's selector, at the fixed selection's density."""
    model, tokenizer = tiny
    fixed = Session(model, tokenizer, density=0.25).select("x")
    session = Session(model, tokenizer, selection=fixed)
    assert session.select("Where is Oslo?").keep == fixed.keep


def test_select_refuses(tiny: Tiny) -> None:
    model, tokenizer = tiny
    session = Session(model, tokenizer)
    with pytest.raises(PromptError, match="empty"):
        session.select("  ")
    with pytest.raises(PromptError, match="context"):
        session.select("word " * 5000)
    answer = session.stream("hello", max_tokens=3)
    next(answer)
    with pytest.raises(ModelBusyError):
        session.select("hello")
    answer.close()


def test_on_switch_is_told_before_the_first_token(tiny: Tiny) -> None:
    """Of every other selection that the conversation gets, and of none that it has already."""
    model, tokenizer = tiny
    told: list[tuple[Selection | None, Selection]] = []
    session = Session(
        model, tokenizer, policy="turn", density=0.25, on_switch=lambda before, after: told.append((before, after))
    )
    assert session.on_switch == "reprefill"
    for response in session.stream("one", max_tokens=2):
        assert len(told) == 1, response
    before, first = told[0]
    assert before is None
    assert first is model.selection
    session.ask("a quite different question", max_tokens=2)
    session.dense = True
    session.ask("all neurons", max_tokens=2)
    session.dense = False
    assert model.selection is None
    _, second = told[-1]
    assert [(a and a.hash, b.hash) for a, b in told] == [(None, first.hash), (first.hash, second.hash)]
    assert first.hash != second.hash
    # Another conversation's switches are not this one's.
    Session(model, tokenizer, density=0.5).ask("x", max_tokens=2)
    session.policy = "first"
    session.ask("go on", max_tokens=2)
    assert len(told) == 2
    session.reset()
    session.ask("one", max_tokens=2)
    assert told[-1][0] is None


def test_an_error_in_the_callback_is_the_callers(tiny: Tiny) -> None:
    """It ends the answer, and the conversation goes on from what it was."""
    model, tokenizer = tiny

    def wrong(before: Selection | None, after: Selection) -> None:
        raise ValueError("mine")

    session = Session(model, tokenizer, on_switch=wrong)
    with pytest.raises(ValueError, match="mine"):
        session.ask("hello", max_tokens=2)
    assert session.messages == []
    session.switched = None
    assert session.ask("hello", max_tokens=2)


def test_a_saved_chat_keeps_the_way_and_not_the_function(tiny: Tiny, tmp_path: Path) -> None:
    model, tokenizer = tiny
    session = Session(model, tokenizer, on_switch=lambda before, after: None)
    session.ask("hello", max_tokens=2)
    session.save(tmp_path / "chat.json")
    other = Session(model, tokenizer, on_switch="keep")
    other.load(tmp_path / "chat.json")
    assert other.on_switch == "reprefill"


def test_the_selector_of_a_session_is_used(tiny: Tiny) -> None:
    model, tokenizer = tiny
    static = Session(model, tokenizer, selector="static").select("x")
    assert static.selector == "static"
    assert make_selector(model).name != "static"
