"""Conversations with the tiny model, in letters."""

from __future__ import annotations

from typing import Any

from ifprune_mlx import (
    Model,
    Session,
    make_selector,
)
from ifprune_mlx.selection.selectors import Instruction
from tests.ifprune_mlx.generating import assert_in_step, letters

Tiny = tuple[Model, Any]
WIDTHS = (128, 128)


def session(tiny: Tiny, **options: Any) -> Session:
    """A conversation in letters, so that its tokens are those of its text; each text has a selection of its own."""
    defaults = {"selector": "random", "density": 0.25, "logits_processors": [letters]}
    return Session(*tiny, **(defaults | options))


def say(chat: Session, text: str, max_tokens: int = 4) -> Any:
    """Ask, and return the figures."""
    chat.ask(text, max_tokens=max_tokens)
    assert chat.stats is not None
    assert_in_step(chat.history)
    return chat.stats


def hash_of(tiny: Tiny, text: str, density: float = 0.25, seed: int = 0) -> str:
    """What the random selector chooses for a text."""
    chosen = make_selector(tiny[0], "random", seed=seed).select(Instruction(text, ()), tiny[0].keep(density))
    return chosen.selection.hash
