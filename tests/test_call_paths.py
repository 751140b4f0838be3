"""The paths of an answer and of a chat request, as docs/architecture.md lists them: one real call of each, traced.

A path is every function of ours on the call stack when one of the places is reached where something happens: an
instruction is scored, a selection is made, rows move, a token is computed. What such a function calls on the way and
gets back from (checks, arithmetic on shapes) is not part of the path.
"""

from __future__ import annotations

import asyncio
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from ifprune_convert.pipeline import Options
from ifprune_mlx import Model, load, stream_generate
from ifprune_mlx.serving.engine.engine import Engine
from tests.tiny import write_checkpoint
from tests.tiny_predictor import write_predictor

PAGE = Path(__file__).parent.parent / "docs" / "architecture.md"
ANSWER = {
    "selection.predictor.scores",
    "selection.selection.top_k",
    "sparse.slots.plan_switch",
    "sparse.inplace.exchange_rows",
    "sparse.ffn.__call__",
}
REQUEST = {
    "serving.http.openai.chat",
    "serving.http.chat_rendering.conversation",
    "serving.engine.scheduler.add",
    "serving.engine.active_selection.select",
    "serving.engine.active_selection.activate",
    "serving.engine.decoder.step",
    "serving.engine.output_processor.add",
    "serving.http.streaming.add",
}


@pytest.fixture
def tiny_learned(tmp_path: Path) -> Iterator[tuple[Model, Any]]:
    """A tiny model with a predictor of its own, loaded."""
    write_predictor(tmp_path / "predictor")
    options = Options(predictor=tmp_path / "predictor", density=0.5)
    model, tokenizer = load(write_checkpoint(tmp_path / "checkpoint", options=options))
    assert model.predictor is not None  # loaded before anything is traced
    yield model, tokenizer
    model.close()


def listed(heading: str) -> list[str]:
    """The functions under a heading of the page, in order."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\d+\. `([\w.]+)`", section, re.MULTILINE)


def named(frame: FrameType) -> str | None:
    """A function of ours, as module.function."""
    module = frame.f_globals.get("__name__") or ""
    name = frame.f_code.co_name
    return f"{module.removeprefix('ifprune_mlx.')}.{name}" if module.startswith("ifprune_mlx.") else None


@contextmanager
def traced(goals: set[str]) -> Iterator[dict[str, None]]:
    """Every function of ours on the stack when a goal is called, in the order of the first visit, in all threads."""
    passed: dict[str, None] = {}

    def trace(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and named(frame) in goals:
            stack: list[str | None] = []
            at: FrameType | None = frame
            while at is not None:
                stack.append(named(at))
                at = at.f_back
            passed.update(dict.fromkeys(name for name in reversed(stack) if name is not None))

    threading.setprofile(trace)
    sys.setprofile(trace)
    try:
        yield passed
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


def test_an_answer_passes_at_most_twenty_functions(tiny_learned: tuple[Model, Any]) -> None:
    answer = stream_generate(*tiny_learned, [{"role": "user", "content": "Hello"}], max_tokens=2)
    with traced(ANSWER) as passed:
        next(answer)
    answer.close()
    assert set(passed) >= ANSWER
    assert list(passed) == listed("The path of an answer")
    assert len(passed) <= 20


def test_a_chat_request_passes_at_most_25_functions_of_12_modules(tiny_learned: tuple[Model, Any]) -> None:
    httpx = pytest.importorskip("httpx")
    make_app = pytest.importorskip("ifprune_mlx.serving.http.app").make_app
    from ifprune_mlx.serving.http.middleware import Limits
    from ifprune_mlx.serving.http.service import Service

    async def ask(app: Callable[..., Any]) -> int:
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1")
        async with client:
            body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
            return int((await client.post("/v1/chat/completions", json=body)).status_code)

    with traced(REQUEST) as passed:
        engine = Engine(*tiny_learned)
        service = Service(*tiny_learned, engine, name="tiny")
        assert asyncio.run(ask(make_app(service, Limits()))) == 200
    engine.close()
    service.close()
    assert set(passed) >= REQUEST
    # What lies below `serving` is the path of an answer.
    path = [name for name in passed if name.startswith("serving.")]
    assert path == listed("The path of a chat request")
    assert len(path) <= 25
    assert len({name.rsplit(".", 1)[0] for name in path}) <= 12
