"""After `close` whatever would need the model says so, in one class of error."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from ifprune_mlx import History, Instruction, Model, Session, load, make_selector, stream_generate
from ifprune_mlx.errors import ModelClosedError
from ifprune_mlx.serving.engine.engine import Engine
from tests.ifprune_mlx.generating import TOKENS, A, Tiny
from tests.ifprune_mlx.serving.engine.engines import make_request

MODEL: dict[str, Callable[[Model], object]] = {
    "call": lambda model: model(mx.array([TOKENS])),
    "module": lambda model: model.module,
    "layers": lambda model: model.layers,
    "make_cache": lambda model: model.make_cache(),
    "dtype": lambda model: model.dtype,
    "prior": lambda model: model.prior,
    "down_norms": lambda model: model.down_norms,
    "predictor": lambda model: model.predictor,
    "keep": lambda model: model.keep(0.5),
    "check": lambda model: model.check(A),
    "switch": lambda model: model.switch(A),
    "dense": lambda model: model.switch(None),
    "first_layers_in_order": lambda model: model.first_layers_in_order(1),
}
SESSION: dict[str, Callable[[Session, Path], object]] = {
    "stream": lambda chat, path: list(chat.stream("Hello")),
    "ask": lambda chat, path: chat.ask("Hello"),
    "astream": lambda chat, path: asyncio.run(anext(chat.astream("Hello"))),
    "reset": lambda chat, path: chat.reset(),
    "reselect": lambda chat, path: chat.reselect("poetry"),
    "use": lambda chat, path: chat.use(A),
    "set_budget": lambda chat, path: chat.set_budget(density=0.5),
    "load": lambda chat, path: chat.load(path / "chat.json"),
}
HISTORY: dict[str, Callable[[History, Model, Path], object]] = {
    "empty": lambda history, model, path: History.empty(model),
    "clear": lambda history, model, path: history.clear(model),
    "read": lambda history, model, path: history.read(model, TOKENS),
    "load": lambda history, model, path: History.load(path / "kv.safetensors", model),
}


@pytest.fixture
def closed(tiny_checkpoint: Path) -> Tiny:
    """A model that was used, and is closed."""
    model, tokenizer = load(tiny_checkpoint)
    assert len(model.prior) == len(model.down_norms)
    list(stream_generate(model, tokenizer, TOKENS, selection=A, max_tokens=1))
    model.close()
    return model, tokenizer


@pytest.mark.parametrize("method", MODEL)
def test_a_closed_model(closed: Tiny, method: str) -> None:
    with pytest.raises(ModelClosedError, match="the model was closed; load it again"):
        MODEL[method](closed[0])


def test_closing_twice_is_harmless(closed: Tiny) -> None:
    closed[0].close()


def test_a_module_that_outlives_its_model(tiny_checkpoint: Path) -> None:
    model, _ = load(tiny_checkpoint)
    module = model.module
    model.close()
    with pytest.raises(ModelClosedError):
        module(mx.array([TOKENS]))


@pytest.mark.parametrize("method", SESSION)
def test_a_conversation_of_a_closed_model(tiny_checkpoint: Path, tmp_path: Path, method: str) -> None:
    model, tokenizer = load(tiny_checkpoint)
    chat = Session(model, tokenizer, selector="static")
    chat.ask("One", max_tokens=2)
    chat.save(tmp_path / "chat.json")
    model.close()
    messages = list(chat.messages)
    with pytest.raises(ModelClosedError):
        SESSION[method](chat, tmp_path)
    assert chat.messages == messages
    chat.cancel()
    chat.save(tmp_path / "saved.json")  # what was said is not lost with the model
    assert (tmp_path / "saved.json").read_bytes() == (tmp_path / "chat.json").read_bytes()


@pytest.mark.parametrize("method", HISTORY)
def test_a_history_of_a_closed_model(tiny_checkpoint: Path, tmp_path: Path, method: str) -> None:
    model, _ = load(tiny_checkpoint)
    history = History.empty(model).read(model, TOKENS)
    history.save(tmp_path / "kv.safetensors", model)
    model.close()
    with pytest.raises(ModelClosedError):
        HISTORY[method](history, model, tmp_path)


@pytest.mark.parametrize("options", [{}, {"dense": True}, {"selection": A}, {"selector": "activation"}], ids=str)
def test_an_answer_of_a_closed_model(closed: Tiny, options: dict[str, Any]) -> None:
    with pytest.raises(ModelClosedError):
        list(stream_generate(*closed, TOKENS, **options))
    with pytest.raises(ModelClosedError):
        Session(*closed, **options)


def test_a_selector_of_a_closed_model(tiny_checkpoint: Path) -> None:
    model, _ = load(tiny_checkpoint)
    selectors = [make_selector(model, name) for name in ("activation", "static")]
    model.close()
    for selector in selectors:
        with pytest.raises(ModelClosedError):
            selector.select(Instruction("poetry", tuple(TOKENS)), (32, 32))


def test_a_request_to_an_engine_of_a_closed_model(tiny_checkpoint: Path) -> None:
    model, tokenizer = load(tiny_checkpoint)
    engine = Engine(model, tokenizer)
    model.close()

    async def ask() -> None:
        async for _ in engine.stream(make_request()):
            pass

    with pytest.raises(ModelClosedError):
        asyncio.run(asyncio.wait_for(ask(), 20))
    engine.close()
