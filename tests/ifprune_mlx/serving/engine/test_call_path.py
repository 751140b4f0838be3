"""How far a request travels through the engine's folder, up to its first token."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import ifprune_mlx.serving.engine
from ifprune_mlx.serving.engine.engine import Engine
from ifprune_mlx.serving.engine.request import Request, RequestState, SelectionParams
from tests.ifprune_mlx.serving.engine.engines import Tiny, ask, make_request, serving

FOLDER = Path(ifprune_mlx.serving.engine.__file__).parent


def test_a_request_passes_few_functions_before_its_first_token(tiny: Tiny) -> None:
    path: dict[tuple[str, str], None] = {}
    listening = False

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if listening and event == "call" and Path(code.co_filename).parent == FOLDER:
            given = [frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount]]
            if any(isinstance(one, (Request, RequestState)) for one in given):
                path[Path(code.co_filename).stem, code.co_name] = None

    async def first_token(engine: Engine, one: Request) -> None:
        nonlocal listening
        listening = True
        async for _ in engine.stream(one):
            listening = False

    with serving(tiny) as engine:
        ask(engine, make_request())  # what is done once for an engine
        tiny[0].lock._worker().submit(sys.setprofile, note).result()
        sys.setprofile(note)
        try:
            asyncio.run(first_token(engine, make_request(choice=SelectionParams(selector="random", density=0.5))))
        finally:
            sys.setprofile(None)
            tiny[0].lock._worker().submit(sys.setprofile, None).result()
    steps = list(path)
    assert (steps[0], steps[-1]) == (("engine", "stream"), ("request", "put"))
    assert len(steps) <= 12, steps
    assert len({module for module, _ in steps}) <= 6, steps
