"""How many of our functions lie between `stream_generate` and what it is for; one real call, traced."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

from ifprune_convert.pipeline import Options
from ifprune_mlx import load, stream_generate
from tests.tiny import write_checkpoint
from tests.tiny_predictor import write_predictor

# Where an instruction is scored and becomes a selection, rows are moved, and a token passes an FFN.
GOALS = {
    "selection.predictor.scores",
    "selection.selection.top_k",
    "sparse.slots.plan_switch",
    "sparse.inplace.exchange_rows",
    "sparse.ffn.__call__",
}
HOPS = [
    "generation.stream_generate",
    "model_lock.__next__",
    "generation.answer",
    "generation.select_and_switch",
    "generation._select",
    "selection.selectors.select",  # CachedSelector, and LearnedSelector behind it
    "selection.predictor.scores",  # SparsityPredictor, and the head's behind it
    "selection.predictor.__call__",
    "selection.selection.top_k",
    "model.switch",
    "sparse.slots.plan",
    "sparse.slots.plan_switch",
    "sparse.slots.apply",
    "sparse.inplace.exchange_rows",
    "generation.decode",
    "model.__call__",
    "sparse.ffn.__call__",
]
MOST_HOPS = 20


def named(frame: FrameType) -> str | None:
    """A function of ours, as module.function."""
    module = frame.f_globals.get("__name__", "")
    return (
        f"{module.removeprefix('ifprune_mlx.')}.{frame.f_code.co_name}" if module.startswith("ifprune_mlx.") else None
    )


def test_a_reader_follows_an_answer_through_at_most_twenty_functions(tmp_path: Path) -> None:
    write_predictor(tmp_path / "predictor")
    options = Options(predictor=tmp_path / "predictor", density=0.5)
    model, tokenizer = load(write_checkpoint(tmp_path / "checkpoint", options=options))
    assert model.predictor is not None  # loaded before
    passed: dict[str, None] = {}  # in the order of the first visit

    def trace(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and named(frame) in GOALS:
            stack, at = [], frame
            while at is not None:
                stack.append(named(at))
                at = at.f_back
            passed.update(dict.fromkeys(name for name in reversed(stack) if name is not None))

    answer = stream_generate(model, tokenizer, [{"role": "user", "content": "Hello"}], max_tokens=2)
    sys.setprofile(trace)
    try:
        next(answer)
    finally:
        sys.setprofile(None)
    assert set(passed) >= GOALS
    assert list(passed) == HOPS
    assert len(HOPS) <= MOST_HOPS
