"""The engine: many jobs on one model, each computed under its own selection, those of one selection together.

The model's worker thread has the model for as long as there is work. It selects for jobs as they come, switches when
`queueing` says so, decodes in a `Lane`, and hands pieces to the event loops that asked. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.budget import SSD
from ifprune_mlx.errors import BudgetError, CheckpointError, IfpruneError, PromptError
from ifprune_mlx.history import DENSE, History
from ifprune_mlx.model import Model
from ifprune_mlx.prompts import check_prompt
from ifprune_mlx.selection import Selection
from ifprune_mlx.selectors import Instruction, default_selector, make_selector
from ifprune_mlx.session import SWITCH_BELOW

from .answering import Answer
from .jobs import (
    POLICIES,
    Counters,
    EngineClosedError,
    EngineFullError,
    GenerationFailedError,
    Job,
    JobStats,
    Piece,
)
from .lanes import BatchLane, Lane, Read, Sequence, SoloLane, Token, can_batch
from .prefixes import Prefixes
from .queueing import ALONE, next_job
from .sampling import check_sampling, make_processors, make_sampler

_ACTIVATION = "activation"
_MOST_LOGPROBS = 20
_SUMS = ("prompt_tokens", "cached_tokens", "completion_tokens", "select_s", "switch_s", "prefill_s", "decode_s")


class _Ticket:
    """A job on its way through the engine. The worker thread owns it, but for `left`, which any thread may set."""

    def __init__(self, job: Job, tell: Callable[[Piece | BaseException], None]) -> None:
        self.job, self.tell = job, tell
        self.arrived = time.monotonic()
        self.left = False  # nobody listens any more
        self.owner: str | None = None
        self.selection: Selection | None = None
        self.answer: Answer | None = None
        self.overlap: float | None = None
        self.cached_tokens = self.batch = 0
        self.select_s = self.switch_s = 0.0
        self.started = self.first = 0.0

    def stats(self, answer: Answer, now: float) -> JobStats:
        """What it took, at its end."""
        count, decode_s = answer.completion_tokens, now - self.first
        assert answer.finish_reason is not None
        return JobStats(
            finish_reason=answer.finish_reason,
            matched_stop=answer.matched_stop,
            prompt_tokens=len(self.job.tokens),
            completion_tokens=count,
            cached_tokens=self.cached_tokens,
            selection=None if self.selection is None else self.selection.hash,
            selector=DENSE if self.selection is None else self.selection.selector,
            density=1.0 if self.selection is None else self.selection.density,
            overlap=self.overlap,
            queue_s=max(self.started - self.arrived - self.select_s - self.switch_s, 0.0),
            select_s=self.select_s,
            switch_s=self.switch_s,
            prefill_s=self.first - self.started,
            decode_s=decode_s,
            tokens_per_s=(count - 1) / decode_s if count > 1 and decode_s > 0 else 0.0,
            batch=self.batch,
        )


class Engine:
    """Answers jobs with one model.

    While it has work, the model is its own, and other uses of it raise ModelBusyError or wait. No job is computed under
    another selection than its own, and a KV cache serves only jobs of the selection that computed it. Jobs that are
    decoded together do not change each other's tokens but by rounding.

    Args:
        model, tokenizer: from `ifprune_mlx.load`.
        concurrency: the most jobs that are decoded together.
        queue: the most jobs that wait beside them.
        prompt_cache_bytes: what the KV caches of finished jobs may take; 0 keeps none.
        patience: seconds that jobs of the live selection go first while one of another selection waits.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: TokenizerWrapper,
        *,
        concurrency: int = 8,
        queue: int = 64,
        prompt_cache_bytes: int = 1 << 30,
        patience: float = 2.0,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._concurrency, self._queue, self._patience = concurrency, queue, patience
        config = model.config
        self._vocabulary: int | None = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
        self._lock = threading.Lock()  # of what the event loops' threads and the worker share, the next five
        self._waiting: list[_Ticket] = []
        self._place: Future[object] | None = None
        self._closed = self._working = False
        self._counts = {"requests": 0, "failed": 0, "cancelled": 0, "switches": 0}
        self._sums = dict.fromkeys(_SUMS, 0.0)
        self._idle = threading.Event()
        self._idle.set()
        # The worker's own.
        self._running: dict[int, _Ticket] = {}
        self._lane: Lane | None = None
        self._active: Selection | None = None  # what jobs are, or were last, computed under
        self._live, self._live_since = DENSE, 0.0  # its owner, or ALONE
        self._certain = False  # False when a switch or a call has failed: who knows what is active then
        self._batches: bool | None = None
        self._prefixes = Prefixes(prompt_cache_bytes)

    async def stream(self, job: Job) -> AsyncGenerator[Piece, None]:
        """Answer one job; may be called in any event loop of any thread.

        The answer is computed whether or not its pieces are read. Ending the generator early (`aclose`, cancelling its
        task) ends the job after the token in work, and nothing of it is kept but its KV cache.

        Raises:
            EngineFullError: if too many jobs wait.
            EngineClosedError: if the engine is, or is being, closed.
            GenerationFailedError: if the model fails.
            IfpruneError: if the job cannot be answered: PromptError, BudgetError, SelectionError, CheckpointError, ...
        """
        self._check(job)
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Piece | BaseException] = asyncio.Queue()

        def tell(news: Piece | BaseException) -> None:
            try:
                loop.call_soon_threadsafe(inbox.put_nowait, news)
            except RuntimeError:  # the event loop is gone, and its job with it
                ticket.left = True

        ticket = _Ticket(job, tell)
        self._enter(ticket)
        try:
            while True:
                news = await inbox.get()
                if isinstance(news, BaseException):
                    raise news
                yield news
                if news.stats is not None:
                    return
        finally:
            self._leave(ticket)

    def counters(self) -> Counters:
        """What has been done so far; from any thread."""
        with self._lock:
            live = self._model.selection
            sums = self._sums
            return Counters(
                **self._counts,
                running=len(self._running),
                waiting=len(self._waiting),
                prompt_tokens=int(sums["prompt_tokens"]),
                cached_tokens=int(sums["cached_tokens"]),
                completion_tokens=int(sums["completion_tokens"]),
                selection=None if live is None else live.hash,
                select_s=sums["select_s"],
                switch_s=sums["switch_s"],
                prefill_s=sums["prefill_s"],
                decode_s=sums["decode_s"],
                prompt_cache_bytes=self._prefixes.nbytes,
                active_bytes=mx.get_active_memory(),
                spare_bytes=mx.get_cache_memory(),
            )

    def close(self) -> None:
        """End every job with EngineClosedError and give the model back; returns when the token in work is done."""
        with self._lock:
            self._closed = True
            place = self._place
        if place is not None and place.cancel():
            self._call_off()
        self._idle.wait()
        self._prefixes.clear()

    # In the threads of the event loops.

    def _check(self, job: Job) -> None:
        check_prompt(self._model, job.tokens)
        if self._vocabulary is not None and not 0 <= min(job.tokens) <= max(job.tokens) < self._vocabulary:
            raise PromptError("the prompt holds token ids that the model does not have; encode it with its tokenizer")
        if job.max_tokens < 1:
            raise PromptError(f"max tokens is {job.max_tokens}; give a number above 0")
        if job.logprobs is not None and not 0 <= job.logprobs <= _MOST_LOGPROBS:
            raise IfpruneError(f"{job.logprobs} log-probabilities a token; give a number from 0 to {_MOST_LOGPROBS}")
        if "" in job.stop:
            raise IfpruneError("a stop string is empty; leave it out")
        if job.choice.policy not in POLICIES:
            raise IfpruneError(f"unknown policy {job.choice.policy!r}; choose one of {', '.join(POLICIES)}")
        check_sampling(job.sampling, self._vocabulary)

    def _enter(self, ticket: _Ticket) -> None:
        with self._lock:
            if self._closed:
                raise EngineClosedError(_CLOSED)
            if len(self._waiting) >= self._queue:
                raise EngineFullError(f"{self._queue} requests wait already; try again in a few seconds")
            self._waiting.append(ticket)
            if self._working:
                return
            self._working = True
            self._idle.clear()
        self._begin()

    def _begin(self) -> None:
        """Get in line for the model."""
        place = self._model.ownership.in_turn(self._work, self._after)
        with self._lock:
            self._place = place
            closed = self._closed
        if closed and place.cancel():
            self._call_off()

    def _call_off(self) -> None:
        """Closed before the turn came."""
        self._end_all(lambda: EngineClosedError(_CLOSED))
        self._working = False
        self._idle.set()

    def _leave(self, ticket: _Ticket) -> None:
        with self._lock:
            ticket.left = True
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self._count("cancelled")

    # In the worker.

    def _work(self) -> None:
        if _owner(self._active) != _owner(self._model.selection):  # used by others meanwhile
            self._active = self._model.selection
            self._live = _owner(self._active)
        try:
            while self._advance():
                pass
        except BaseException as exc:
            reason = f"the server failed ({_reason(exc)}); ask again"
            self._certain = False
            self._prefixes.clear()
            self._end_all(lambda: GenerationFailedError(reason))

    def _after(self) -> None:
        """The model has been given on. Get in line again for what came meanwhile."""
        with self._lock:
            self._working = bool(self._waiting)
            if not self._working:
                self._idle.set()
                return
        self._begin()

    def _advance(self) -> bool:
        """One round: select, start what may start, one token of everything. False when there is nothing left to do."""
        with self._lock:
            working, closed = bool(self._waiting or self._running), self._closed
        if closed:
            self._end_all(lambda: EngineClosedError(_CLOSED))
            return False
        if not working:
            self._end_lane()
            mx.clear_cache()
            return False
        for uid in [uid for uid, ticket in self._running.items() if ticket.left]:
            self._abandon(uid)
        self._select_waiting()
        self._start_waiting()
        if self._running:
            self._decode()
        return True

    def _select_waiting(self) -> None:
        """Find the selections of the next jobs that have none; the live one is active again afterwards."""
        with self._lock:
            unknown = [ticket for ticket in self._waiting if ticket.owner is None][: self._concurrency]
        for ticket in unknown:
            try:
                self._select(ticket)
            except Exception as exc:
                self._refuse(ticket, exc)
        # A predictor that reads with the model's own layers has left it dense.
        if self._running and _owner(self._model.selection) != _owner(self._active):
            try:
                self._model.switch(self._active)
            except Exception as exc:
                self._fail_running(exc)

    def _select(self, ticket: _Ticket) -> None:
        choice, model, live = ticket.job.choice, self._model, self._active
        if choice.selection is not None:
            model.check(choice.selection)
            ticket.selection, ticket.owner = choice.selection, choice.selection.hash
            return
        name = choice.selector or default_selector(model)
        keep = model.keep(choice.density, choice.active_parameters)
        if choice.dense or name == _ACTIVATION:
            if model.residency == SSD:
                raise BudgetError("not all neurons are in memory; load the model with residency ram to use it dense")
            # `activation` reads the prompt to select, and is to be answered from what it has read.
            ticket.owner = DENSE if choice.dense else ALONE
            return
        start = time.monotonic()
        selected = make_selector(model, name).select(Instruction(ticket.job.instruction, ticket.job.tokens), keep)
        ticket.selection = selected.selection
        stays = live if choice.policy == "auto" and live is not None and live.keep == keep else None
        if stays is not None and ticket.selection.agreement(stays) >= SWITCH_BELOW:
            ticket.selection = stays
        ticket.select_s = time.monotonic() - start
        ticket.owner = ticket.selection.hash

    def _start_waiting(self) -> None:
        """Start the jobs whose turn it is."""
        while len(self._running) < (self._concurrency if isinstance(self._lane, BatchLane) else 1):
            with self._lock:
                ticket = next_job(
                    self._waiting,
                    self._live,
                    self._live_since,
                    bool(self._running),
                    self._patience,
                    time.monotonic(),
                )
                if ticket is None:
                    return
                self._waiting.remove(ticket)
            try:
                sequence = self._prepare(ticket)
                if sequence is None:
                    continue
                assert self._lane is not None
                uid = self._lane.insert(sequence)
            except Exception as exc:
                self._refuse(ticket, exc)
                continue
            with self._lock:
                self._running[uid] = ticket

    def _prepare(self, ticket: _Ticket) -> Sequence | None:
        """Make a job's selection active and find what of its prompt has been read; None if nobody waits for it."""
        job, model = ticket.job, self._model
        cache: list[Any] | None
        if ticket.owner == ALONE:
            self._end_lane()
            history = self._read_densely(ticket)
            if history is None:
                return None
            self._switch(ticket, ALONE)
            cache, read = history.kv, len(history.tokens)
        else:
            assert ticket.owner is not None
            self._switch(ticket, ticket.owner)
            cache, read = self._prefixes.fetch(ticket.owner, job.tokens)
            ticket.cached_tokens = read
        if self._lane is None:
            end = self._tokenizer.eos_token_ids
            if self._batches is None:
                self._batches = can_batch(model)
            batched = self._batches and ticket.owner != ALONE
            self._lane = BatchLane(model, end, self._concurrency) if batched else SoloLane(model, end)
        ticket.answer = Answer(job, self._tokenizer)
        ticket.started = time.monotonic()
        left = job.max_tokens
        if model.context_length is not None:
            left = min(left, model.context_length - len(job.tokens))
        return Sequence(
            tokens=list(job.tokens[read:]),
            cache=cache,
            read=list(job.tokens[:read]),
            max_tokens=left,
            sampler=make_sampler(job.sampling),
            processors=make_processors(job.sampling),
            stopped=lambda: self._given_up(ticket),
        )

    def _read_densely(self, ticket: _Ticket) -> History | None:
        """The activation selector's dense reading of the prompt, which finds the selection; None if nobody waits."""
        choice, model, job = ticket.job.choice, self._model, ticket.job

        def check(done: int, total: int) -> None:
            if self._given_up(ticket):
                raise _Left

        start = time.monotonic()
        keep = model.keep(choice.density, choice.active_parameters)
        instruction = Instruction(job.instruction, job.tokens, History.empty(model), check)
        try:
            selected = make_selector(model, _ACTIVATION).select(instruction, keep)
        except _Left:
            self._refuse(ticket, EngineClosedError(_CLOSED))
            return None
        ticket.selection = selected.selection
        ticket.select_s = time.monotonic() - start
        assert selected.history is not None
        return selected.history

    def _switch(self, ticket: _Ticket, owner: str) -> None:
        """Make a ticket's selection active, if it is not; `owner` is then the live one."""
        model, before = self._model, self._active
        if owner != self._live or not self._certain:
            assert not self._running
            self._end_lane()
            self._live, self._live_since = owner, time.monotonic()
        if _owner(ticket.selection) == _owner(model.selection) and self._certain:
            return
        self._certain = False
        try:
            ticket.switch_s = model.switch(ticket.selection).seconds
        except CheckpointError as exc:  # an earlier switch was cut off: no job is at fault
            raise GenerationFailedError(f"the model failed ({_reason(exc)})") from exc
        self._certain, self._active = True, ticket.selection
        if _owner(before) != _owner(ticket.selection):
            with self._lock:
                self._counts["switches"] += 1
            if before is not None and ticket.selection is not None:
                ticket.overlap = ticket.selection.overlap(before)

    def _decode(self) -> None:
        """One step of the lane, and the news of it."""
        assert self._lane is not None
        for ticket in self._running.values():
            assert self._certain
            assert _owner(self._model.selection) == _owner(ticket.selection)
            ticket.batch = max(ticket.batch, len(self._running))
        try:
            tokens = self._lane.step()
        except Exception as exc:
            self._fail_running(exc)
            return
        for token in tokens:
            self._give(token)

    def _give(self, token: Token) -> None:
        ticket = self._running[token.uid]
        answer, now = ticket.answer, time.monotonic()
        assert answer is not None
        if answer.completion_tokens == 0:
            ticket.first = now
        text, logprobs = answer.add(token.id, token.logprobs, token.finish_reason)
        if answer.finish_reason is None:
            if text or logprobs:
                ticket.tell(Piece(text, logprobs))
            return
        assert self._lane is not None
        self._keep(ticket, token.read if token.read is not None else self._lane.remove(token.uid))
        stats = ticket.stats(answer, now)
        with self._lock:
            del self._running[token.uid]
            self._counts["requests"] += 1
            for name in _SUMS:
                self._sums[name] += getattr(stats, name)
        ticket.tell(Piece(text, logprobs, stats, ticket.selection))

    def _keep(self, ticket: _Ticket, read: Read) -> None:
        if ticket.owner is not None and ticket.owner != ALONE:
            self._prefixes.store(ticket.owner, read.tokens, read.cache)

    def _abandon(self, uid: int) -> None:
        """Drop a running job that nobody listens to."""
        assert self._lane is not None
        with self._lock:
            ticket = self._running.pop(uid)
            self._count("cancelled")
        if ticket.answer is not None and ticket.answer.completion_tokens:
            self._keep(ticket, self._lane.remove(uid))
        else:
            self._lane.drop(uid)

    def _refuse(self, ticket: _Ticket, exc: Exception) -> None:
        """Fail one job; the others know nothing of it."""
        with self._lock:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            self._count("cancelled" if ticket.left else "failed")
        if not isinstance(exc, (IfpruneError, GenerationFailedError)):
            exc = GenerationFailedError(f"the model failed ({_reason(exc)}); ask again")
        ticket.tell(exc)

    def _fail_running(self, exc: Exception) -> None:
        """The model failed in the middle of a batch: its jobs fail, and no cache is trusted any more."""
        with self._lock:
            failed = list(self._running.values())
            self._running.clear()
            self._count("failed", len(failed))
        reason = f"the model failed ({_reason(exc)}); ask again"
        self._prefixes.clear()
        self._end_lane()
        self._certain = False
        mx.clear_cache()
        for ticket in failed:
            ticket.tell(GenerationFailedError(reason))

    def _end_lane(self) -> None:
        if self._lane is not None:
            self._lane.close()
            self._lane = None

    def _end_all(self, news: Callable[[], Exception]) -> None:
        """Every job that there is ends with an error, and the lane with them. What is active stays so."""
        with self._lock:
            tickets = [*self._running.values(), *self._waiting]
            self._running.clear()
            self._waiting.clear()
            self._count("failed", len(tickets))
        self._end_lane()
        mx.clear_cache()
        for ticket in tickets:
            ticket.tell(news())

    def _given_up(self, ticket: _Ticket) -> bool:
        return ticket.left or self._closed

    def _count(self, outcome: str, jobs: int = 1) -> None:
        self._counts["requests"] += jobs
        self._counts[outcome] += jobs


_CLOSED = "the server is shutting down; ask again when it is back"


class _Left(Exception):
    """Nobody waits for the job whose prompt is being read; never leaves this module."""


def _owner(selection: Selection | None) -> str:
    return DENSE if selection is None else selection.hash


def _reason(exc: BaseException) -> str:
    return " ".join(str(exc).split())[:200] or type(exc).__name__
