"""What the HTTP endpoints share: one model, its engine, its tasks, and the recently used selections."""

from __future__ import annotations

import asyncio
import base64
import re
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.errors import TaskError
from ifprune_mlx.model import Model
from ifprune_mlx.selection.presets import TaskStore
from ifprune_mlx.selection.selection import Selection
from ifprune_mlx.serving.engine.engine import Engine
from ifprune_mlx.serving.engine.request import (
    PromptProgress,
    Request,
    RequestOutput,
    RequestStats,
    SamplingParams,
    SelectionParams,
)
from ifprune_mlx.serving.http.chat_rendering import ChatRenderer, Prompt
from ifprune_mlx.serving.http.errors import RequestError, field_error, json_type
from ifprune_mlx.serving.http.schemas_requests import GenerationRequest, SelectionOptions
from ifprune_mlx.serving.http.schemas_responses import Figures

Result = TypeVar("Result")
Output = PromptProgress | RequestOutput
SILENCE_SECONDS: float | None = 5.0  # proxies and clients give up on a stream that says nothing for long
_KEPT_SELECTIONS = 64
_ALIASES = ("default", "default_model")
_SEEDS = 2**32
_TOKEN_ID = re.compile("[0-9]{1,9}")
_SAMPLING = tuple(each.name for each in fields(SamplingParams))
# Each option excludes the others, one of which would be ignored.
_EXCLUSIVE = (
    ("task", ("dense", "selector", "density", "active_parameters", "policy")),
    ("dense", ("selector", "density", "active_parameters", "policy")),
    ("density", ("active_parameters",)),
)


@dataclass(frozen=True)
class Defaults:
    """The values for what a request leaves out."""

    selection: SelectionOptions = field(default_factory=SelectionOptions)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int = 512  # above 0


class Service:
    """One served model.

    Args:
        model, tokenizer: from `ifprune_mlx.load`.
        engine: the model's engine; the caller closes it.
        name: the model's name in the API.
        aliases: more names that clients may use, and are told.
        path: where the model came from; a name that clients may use, but are not told.
        any_model: clients may use any name.
        most_answers: the most answers to one HTTP request.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: TokenizerWrapper,
        engine: Engine,
        *,
        name: str,
        aliases: Sequence[str] = (),
        path: str | None = None,
        any_model: bool = False,
        defaults: Defaults | None = None,
        most_answers: int = 64,
    ) -> None:
        self.model = model
        self.engine = engine
        self.name = name
        self.defaults = defaults or Defaults()
        self.most_answers = most_answers
        self.started = int(time.time())
        self.renderer = ChatRenderer(model, tokenizer)
        self.names = tuple(dict.fromkeys((name, *aliases)))
        self._accepted = None if any_model else {path, *self.names, *_ALIASES}
        self.vocabulary = model.vocabulary or len(tokenizer)
        self._tasks = TaskStore(model.checkpoint)
        self._used: OrderedDict[str, dict[str, Any]] = OrderedDict()
        # Decoding, checking and encoding a long prompt must not block the event loop, nor other prompts. Only the fast
        # tokenizers may be used in two threads.
        self._threads = ThreadPoolExecutor(2 if getattr(tokenizer, "is_fast", False) else 1, "ifprune-prepare")

    def close(self) -> None:
        """Stop the threads that prepare requests."""
        self._threads.shutdown(cancel_futures=True)

    async def in_thread(self, work: Callable[..., Result], *given: Any) -> Result:
        """Run slow work in one of the threads that prepare requests."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *given)

    def check_model(self, name: str | None) -> None:
        """Raise RequestError unless this names the served model; None does."""
        if name is not None and self._accepted is not None and name not in self._accepted:
            names = ", ".join(repr(one) for one in (*self.names, "default"))
            reason = f"the model {name[:100]!r} is not served here; ask for {names}, or serve it with --alias"
            raise RequestError(reason, "model", status=404, code="model_not_found")

    def requests(
        self,
        body: GenerationRequest,
        headers: SelectionOptions,
        render: Callable[[str], list[Prompt]],
        *,
        n: int = 1,
        max_tokens: int | None,
        stop: Sequence[str],
        logprobs: int | None = None,
    ) -> list[Request]:
        """Make the engine's requests: `n` for each prompt, with different seeds. It is slow: see `in_thread`.

        Args:
            render: turns the policy into the prompts.

        Raises:
            RequestError: if the body contradicts itself, or names a model or task that does not exist.
            PromptError: if a prompt cannot be answered.
        """
        self.check_model(body.model)
        options = self._selection_options(body.ifprune or SelectionOptions(), headers)
        selection = SelectionParams(
            selector=options.selector,
            selection=self._load_task(options.task) if options.task else None,
            dense=bool(options.dense),
            density=options.density,
            active_parameters=options.active_parameters,
            policy=options.policy or "first",
        )
        given = {name: value for name in _SAMPLING if (value := getattr(body, name)) is not None}
        if given.get("top_k", 0) >= self.vocabulary:
            given["top_k"] = 0
        if "logit_bias" in given:
            given["logit_bias"] = self._logit_bias(given["logit_bias"])
        seeds = [(given["seed"] + index) % _SEEDS if "seed" in given else None for index in range(n)]
        return [
            Request(
                tokens=prompt.tokens,
                instruction=prompt.instruction,
                selection_params=selection,
                sampling=replace(self.defaults.sampling, **{**given, "seed": seed}),
                max_tokens=max_tokens or self.defaults.max_tokens,
                stop=(*stop, *prompt.stop),
                logprobs=logprobs,
                instruction_tokens=prompt.instruction_tokens,
                grammar=prompt.grammar,
                continues=prompt.continues,
                earlier=prompt.earlier,
                thinking=prompt.thinking,
                thinking_budget=prompt.budget,
            )
            for prompt in render(selection.policy)
            for seed in seeds
        ]

    def _selection_options(self, given: SelectionOptions, headers: SelectionOptions) -> SelectionOptions:
        """A request's options, completed by its headers and by the server's defaults where these do not conflict.

        Raises:
            RequestError: if two options exclude each other.
        """
        own = self.defaults.selection
        options = {**headers.model_dump(), **given.model_dump(exclude_none=True)}
        for first, others in _EXCLUSIVE:
            for other in others:
                if options.get(first) and options.get(other):
                    raise field_error(f"ifprune.{other}", f"excludes ifprune.{first}; give one of them")
        if own.task or own.dense:
            return SelectionOptions(**options) if any(options.values()) else own
        if not options.get("task") and not options.get("dense"):
            budget = {"density", "active_parameters"}
            left_out = own.model_dump(exclude=budget if any(options.get(name) for name in budget) else None)
            options = {**left_out, **{name: value for name, value in options.items() if value is not None}}
        return SelectionOptions(**options)

    def tasks(self) -> list[dict[str, Any]]:
        """All usable tasks. It is slow, as it reads their files: see `in_thread`."""
        found = []
        for task in self._tasks.tasks():
            with suppress(TaskError):
                selection = self._tasks.load(task.name)
                figures = {name: getattr(selection, name) for name in ("selector", "density")}
                found.append({"name": task.name, "shipped": task.shipped, "selection": selection.hash, **figures})
        return found

    def selection(self, key: str) -> dict[str, Any]:
        """The kept neurons of a recently used selection.

        Raises:
            RequestError: if it is not among them.
        """
        if key not in self._used:
            reason = "no such selection among those used recently"
            raise RequestError(reason, "hash", status=404, code="selection_not_found")
        return self._used[key]

    async def run(self, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, Output], None]:
        """Answer requests together. Yields each output as it is computed, with the index of its request.

        The first is a PromptProgress, once all requests are accepted. Until there is a token, another one follows for
        every part of a prompt that is read, or after some seconds in which nothing happens.

        Raises:
            IfpruneError, GenerationFailedError: when the first request fails; the others end with it.
        """
        queue: asyncio.Queue[tuple[int, Output | Exception]] = asyncio.Queue()

        async def follow(index: int, request: Request) -> None:
            def progress(now: PromptProgress) -> None:
                queue.put_nowait((index, now))

            try:
                async with aclosing(self.engine.stream(request, progress)) as outputs:
                    async for output in outputs:
                        queue.put_nowait((index, output))
            except Exception as exc:
                queue.put_nowait((index, exc))

        tasks = [asyncio.ensure_future(follow(index, request)) for index, request in enumerate(requests)]
        left, accepted, silence = len(tasks), set[int](), SILENCE_SECONDS
        latest: tuple[int, Output | Exception] = 0, PromptProgress(None, len(requests[0].tokens))
        try:
            while left:
                with suppress(asyncio.TimeoutError):
                    latest = await asyncio.wait_for(queue.get(), silence)
                index, output = latest
                if isinstance(output, Exception):
                    raise output
                self._remember(output.selection)
                if isinstance(output, PromptProgress):
                    accepted.add(index)
                    latest = index, replace(output, selection=None)  # which is told once
                    if len(accepted) < len(tasks):
                        continue
                else:
                    silence = None
                    left -= output.stats is not None
                yield index, output
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def figures(self, stats: RequestStats) -> dict[str, Any]:
        """The `ifprune` object of a response."""
        total = self.model.total_parameters
        active = total if stats.selection is None else self._used.get(stats.selection, {}).get("active_parameters")
        figures = {name: getattr(stats, name, None) for name in Figures.model_fields}
        return {**figures, "active_parameters": active, "total_parameters": total}

    def _load_task(self, name: str) -> Selection:
        known = [task.name for task in self._tasks.tasks()]
        if name.lower() not in map(str.lower, known):
            there = f"there are {', '.join(known)}" if known else "there are none"
            raise RequestError(f"no task {name[:64]!r} for this model; {there}", "ifprune.task", code="task_not_found")
        try:
            return self._tasks.load(name)
        except TaskError as exc:  # its message names files of this machine
            reason = f"the task {name!r} is damaged; `ifprune tasks` on the server's machine says how"
            raise RequestError(reason, "ifprune.task") from exc

    def _logit_bias(self, given: dict[str, Any]) -> dict[int, float]:
        for token, value in given.items():
            param = f"logit_bias.{token[:20]}"
            if not _TOKEN_ID.fullmatch(token) or int(token) >= self.vocabulary:
                raise field_error(param, f"is no token id; they go from 0 to {self.vocabulary - 1}")
            if value is not None and type(value) not in (int, float):
                raise field_error(param, f"must be a number, not {json_type(value)}")
            if value is not None and not -100 <= value <= 100:
                raise field_error(param, "must be from -100 to 100")
        return {int(token): float(value) for token, value in given.items() if value is not None}

    def _remember(self, selection: Selection | None) -> None:
        if selection is None:
            return
        if selection.hash not in self._used:
            self._used[selection.hash] = {
                "hash": selection.hash,
                "selector": selection.selector,
                "density": selection.density,
                "active_parameters": self.model.checkpoint.active_parameters(selection.keep),
                "widths": list(selection.widths),
                "kept": list(selection.keep),
                "masks": [_mask(ids, width) for ids, width in zip(selection.ids, selection.widths, strict=True)],
            }
        self._used.move_to_end(selection.hash)
        if len(self._used) > _KEPT_SELECTIONS:
            self._used.popitem(last=False)


def _mask(ids: Any, width: int) -> str:
    """Base64 of one bit per neuron. The first neuron is the highest bit of the first byte."""
    bits = np.zeros(width, dtype=np.uint8)
    bits[ids] = 1
    return base64.b64encode(np.packbits(bits).tobytes()).decode("ascii")
