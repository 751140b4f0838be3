"""What the HTTP endpoints share: one model, its engine, its tasks, and the selections that were used of late."""

from __future__ import annotations

import asyncio
import base64
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.errors import TaskError
from ifprune_mlx.model import Model
from ifprune_mlx.selection.presets import TaskStore
from ifprune_mlx.selection.selection import Selection
from ifprune_mlx.serving.engine.engine import Engine
from ifprune_mlx.serving.engine.request import Request, RequestOutput, RequestStats, SamplingParams, SelectionParams
from ifprune_mlx.serving.http.chat_rendering import ChatRenderer
from ifprune_mlx.serving.http.fields import RequestError, Wish

Result = TypeVar("Result")
_KEPT_SELECTIONS = 64
ALIASES = ("default", "default_model")


@dataclass(frozen=True)
class Defaults:
    """What holds for a request that does not say.

    Attributes:
        wish: which neurons.
        max_tokens: above 0.
    """

    wish: Wish = field(default_factory=Wish)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int = 512


class Service:
    """One served model.

    Args:
        model, tokenizer: from `ifprune_mlx.load`.
        engine: of that model. It is not closed here.
        name: what clients call the model.
        aliases: other names that they may use.
        jobs: the most answers of one request.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: TokenizerWrapper,
        engine: Engine,
        *,
        name: str,
        aliases: Sequence[str] = (),
        defaults: Defaults | None = None,
        jobs: int = 64,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.engine = engine
        self.name = name
        self.defaults = defaults or Defaults()
        self.jobs = jobs
        self.started = int(time.time())
        self.renderer = ChatRenderer(model, tokenizer)
        self.vocabulary = int(model.config.get("vocab_size") or model.config["text_config"]["vocab_size"])
        self._names = {name, *aliases, *ALIASES}
        self._tasks = TaskStore(model.checkpoint)
        self._used: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._active: OrderedDict[str, int] = OrderedDict()
        # Long prompts take a while to encode, and must not hold up the streams of others. One thread, as a tokenizer
        # is not made for several.
        self._aside = ThreadPoolExecutor(1, "ifprune-encode")

    def close(self) -> None:
        """Give the encoding thread back."""
        self._aside.shutdown(cancel_futures=True)

    async def aside(self, work: Callable[[], Result]) -> Result:
        """Do something that takes a while, in the thread for it."""
        return await asyncio.get_running_loop().run_in_executor(self._aside, work)

    def check_model(self, name: str | None) -> None:
        """Raise RequestError unless this is the model that is served; None means it."""
        if name is not None and name not in self._names:
            raise RequestError(
                f"the model {name[:100]!r} is not served here; ask for {self.name!r} or 'default'",
                "model",
                status=404,
                code="model_not_found",
            )

    def wish(self, asked: Wish) -> Wish:
        """What a request asks for, completed by the server's defaults where they do not contradict it."""
        own = self.defaults.wish
        if asked.task is not None or asked.dense:
            return asked
        chooses = asked.selector or asked.density or asked.active_parameters
        if own.task is not None or own.dense:
            return asked if chooses or asked.policy else own
        budget = asked.density is not None or asked.active_parameters is not None
        return replace(
            asked,
            selector=asked.selector or own.selector,
            density=asked.density if budget else own.density,
            active_parameters=asked.active_parameters if budget else own.active_parameters,
            policy=asked.policy or own.policy,
        )

    def choice(self, wish: Wish) -> SelectionParams:
        """What chooses the neurons; reads the file of a task, so call it aside.

        Raises:
            RequestError: if there is no such task.
        """
        return SelectionParams(
            selector=wish.selector,
            selection=None if wish.task is None else self._task(wish.task),
            dense=wish.dense,
            density=wish.density,
            active_parameters=wish.active_parameters,
            policy=wish.policy or "first",
        )

    def tasks(self) -> list[dict[str, Any]]:
        """Every task that can be used; reads their files, so call it aside."""
        found = []
        for task in self._tasks.tasks():
            try:
                selection = self._tasks.load(task.name)
            except TaskError:
                continue
            found.append(
                {
                    "name": task.name,
                    "shipped": task.shipped,
                    "selection": selection.hash,
                    "selector": selection.selector,
                    "density": selection.density,
                }
            )
        return found

    def selection(self, key: str) -> dict[str, Any]:
        """The kept neurons of a selection that was used of late.

        Raises:
            RequestError: if it was not.
        """
        if key not in self._used:
            raise RequestError(
                "no such selection among those used of late", "hash", status=404, code="selection_not_found"
            )
        return self._used[key]

    async def run(self, jobs: Sequence[Request]) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """Answer jobs side by side; pieces come as they are computed, each with the place of its job.

        Raises:
            IfpruneError, GenerationFailedError: of the first job that fails; the others end with it.
        """
        pieces = self._one(jobs[0]) if len(jobs) == 1 else _merged(self.engine, jobs)
        async with aclosing(pieces):
            async for index, piece in pieces:
                if piece.selection is not None:
                    self._remember(piece.selection)
                yield index, piece

    def figures(self, stats: RequestStats) -> dict[str, Any]:
        """What clients are told of how an answer came about: the `ifprune` object of a response."""
        total = self.model.total_parameters
        return {
            "selection": stats.selection,
            "selector": stats.selector,
            "density": stats.density,
            "overlap": stats.overlap,
            "active_parameters": total if stats.selection is None else self._active.get(stats.selection),
            "total_parameters": total,
            "queue_s": stats.queue_s,
            "select_s": stats.select_s,
            "switch_s": stats.switch_s,
            "prefill_s": stats.prefill_s,
            "decode_s": stats.decode_s,
            "tokens_per_s": stats.tokens_per_s,
            "cached_tokens": stats.cached_tokens,
            "batch": stats.batch,
        }

    async def _one(self, job: Request) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        async with aclosing(self.engine.stream(job)) as stream:
            async for piece in stream:
                yield 0, piece

    def _task(self, name: str) -> Selection:
        known = [task.name for task in self._tasks.tasks()]
        if name not in known:
            there = f"there are {', '.join(known)}" if known else "there are none"
            raise RequestError(f"no task {name[:64]!r} for this model; {there}", "ifprune.task", code="task_not_found")
        try:
            return self._tasks.load(name)
        except TaskError:  # which names files of this machine
            raise RequestError(
                f"the task {name!r} is damaged; `ifprune tasks` on the server's machine says how", "ifprune.task"
            ) from None

    def _remember(self, selection: Selection) -> None:
        key = selection.hash
        if key in self._used:
            self._used.move_to_end(key)
            return
        self._used[key] = {
            "hash": key,
            "selector": selection.selector,
            "density": selection.density,
            "widths": list(selection.widths),
            "kept": list(selection.keep),
            "masks": [_mask(ids, width) for ids, width in zip(selection.ids, selection.widths, strict=True)],
        }
        self._active[key] = self.model.checkpoint.active_parameters(selection.keep)
        if len(self._used) > _KEPT_SELECTIONS:
            oldest, _ = self._used.popitem(last=False)
            del self._active[oldest]


async def _merged(engine: Engine, jobs: Sequence[Request]) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    news: asyncio.Queue[tuple[int, RequestOutput] | Exception | None] = asyncio.Queue()

    async def follow(index: int, job: Request) -> None:
        try:
            async with aclosing(engine.stream(job)) as stream:
                async for piece in stream:
                    news.put_nowait((index, piece))
        except Exception as exc:
            news.put_nowait(exc)
        else:
            news.put_nowait(None)

    tasks = [asyncio.ensure_future(follow(index, job)) for index, job in enumerate(jobs)]
    try:
        left = len(tasks)
        while left:
            said = await news.get()
            if isinstance(said, Exception):
                raise said
            if said is None:
                left -= 1
            else:
                yield said
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _mask(ids: Any, width: int) -> str:
    """Base64 of a bit for each neuron, the first in the highest bit of the first byte."""
    bits = np.zeros(width, dtype=np.uint8)
    bits[ids] = 1
    return base64.b64encode(np.packbits(bits).tobytes()).decode("ascii")
