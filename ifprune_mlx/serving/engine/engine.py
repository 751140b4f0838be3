"""The engine: many jobs on one model, each computed under its own selection, those of one selection together.

The model's worker thread has the model for as long as there is work. Round by round it selects for jobs as they come,
switches when `queueing` says so, decodes a token of the batch, and hands pieces to the event loops that asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.errors import IfpruneError
from ifprune_mlx.model import Model
from ifprune_mlx.serving.engine.active_selection import ActiveSelection
from ifprune_mlx.serving.engine.batch import Batch
from ifprune_mlx.serving.engine.request import (
    EngineClosedError,
    EngineStats,
    GenerationFailedError,
    Request,
    RequestOutput,
)
from ifprune_mlx.serving.engine.request_state import RequestState, reason_of
from ifprune_mlx.serving.engine.request_table import RequestTable
from ifprune_mlx.serving.engine.scheduler import ALONE
from ifprune_mlx.serving.engine.selection_step import choose, read_densely
from ifprune_mlx.serving.engine.validation import check_request


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
        self._model, self._concurrency = model, concurrency
        self._books = RequestTable(queue, patience)
        # The worker's own.
        self._switching = ActiveSelection(model, self._books)
        self._batch = Batch(model, tokenizer, self._books, concurrency, prompt_cache_bytes)

    async def stream(self, job: Request) -> AsyncGenerator[RequestOutput, None]:
        """Answer one job; may be called in any event loop of any thread.

        The answer is computed whether or not its pieces are read. Ending the generator early (`aclose`, cancelling its
        task) ends the job after the token in work, and nothing of it is kept but its KV cache.

        Raises:
            EngineFullError: if too many jobs wait.
            EngineClosedError: if the engine is, or is being, closed.
            GenerationFailedError: if the model fails.
            IfpruneError: if the job cannot be answered: PromptError, BudgetError, SelectionError, CheckpointError, ...
        """
        check_request(self._model, job)
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[RequestOutput | BaseException] = asyncio.Queue()

        def tell(news: RequestOutput | BaseException) -> None:
            try:
                loop.call_soon_threadsafe(inbox.put_nowait, news)
            except RuntimeError:  # the event loop is gone, and its job with it
                ticket.left = True

        ticket = RequestState(job, tell)
        if self._books.enter(ticket):
            self._begin()
        try:
            while True:
                news = await inbox.get()
                if isinstance(news, BaseException):
                    raise news
                yield news
                if news.stats is not None:
                    return
        finally:
            self._books.leave(ticket)

    def counters(self) -> EngineStats:
        """What has been done so far; from any thread."""
        live = self._model.selection
        return EngineStats(
            **self._books.counts(),
            selection=None if live is None else live.hash,
            prompt_cache_bytes=self._batch.prompt_cache_bytes,
            active_bytes=mx.get_active_memory(),
            spare_bytes=mx.get_cache_memory(),
        )

    def close(self) -> None:
        """End every job with EngineClosedError and give the model back; returns when the token in work is done."""
        place = self._books.close()
        if place is not None and place.cancel():
            self._call_off()
        self._books.wait_for_rest()
        self._batch.forget()

    # The model's turns, from whichever thread begins or calls off one.

    def _begin(self) -> None:
        """Get in line for the model."""
        place = self._model.lock.in_turn(self._work, self._after)
        if self._books.line_up(place) and place.cancel():
            self._call_off()

    def _call_off(self) -> None:
        """Closed before the turn came."""
        self._end_all(EngineClosedError)
        self._books.rest()

    def _after(self) -> None:
        """The model has been given on. Get in line again for what came meanwhile."""
        if not self._books.rest():
            self._begin()

    # In the worker.

    def _work(self) -> None:
        self._switching.resume()
        try:
            while self._advance():
                pass
        except BaseException as exc:
            reason = f"the server failed ({reason_of(exc)}); ask again"
            self._switching.distrust()
            self._batch.forget()
            self._end_all(lambda: GenerationFailedError(reason))

    def _advance(self) -> bool:
        """One round: select, start what may start, one token of everything. False when there is nothing left to do."""
        if self._books.closed:
            self._end_all(EngineClosedError)
            return False
        if self._books.empty:
            self._batch.end()
            mx.clear_cache()
            return False
        for uid in [uid for uid, ticket in self._books.running.items() if ticket.left]:
            self._batch.drop(uid)
        self._select_waiting()
        self._start_waiting()
        if self._books.running:
            self._decode()
        return True

    def _select_waiting(self) -> None:
        """Find the selections of the next jobs that have none; the live one is active again afterwards."""
        for ticket in self._books.without_owner(self._concurrency):
            try:
                choose(self._model, ticket, self._switching.active)
            except Exception as exc:
                self._refuse(ticket, exc)
        if self._books.running:
            try:
                self._switching.restore()
            except Exception as exc:
                self._fail_running(exc)

    def _start_waiting(self) -> None:
        """Start the jobs whose turn it is."""
        while self._batch.has_room:
            ticket = self._books.take_next(self._switching.owner, self._switching.since)
            if ticket is None:
                return
            try:
                self._start(ticket)
            except Exception as exc:
                self._refuse(ticket, exc)

    def _start(self, ticket: RequestState) -> None:
        """Make a job's selection active and begin to decode it."""
        owner, history = ticket.owner, None
        assert owner is not None
        if owner == ALONE:
            self._batch.end()
            history = read_densely(self._model, ticket, lambda: self._books.given_up(ticket))
        if not self._switching.stays(owner):
            assert not self._books.running
            self._batch.end()
        self._switching.switch(ticket, owner)
        self._batch.add(ticket, history)

    def _decode(self) -> None:
        """One step of the batch, and the news of it."""
        assert all(self._switching.holds(ticket) for ticket in self._books.running.values())
        try:
            tokens = self._batch.step()
        except Exception as exc:
            self._fail_running(exc)
            return
        for token in tokens:
            self._batch.give(token)

    def _refuse(self, ticket: RequestState, exc: Exception) -> None:
        """Fail one job; the others know nothing of it."""
        self._books.refused(ticket)
        if not isinstance(exc, (IfpruneError, GenerationFailedError)):
            exc = GenerationFailedError(f"the model failed ({reason_of(exc)}); ask again")
        ticket.tell(exc)

    def _fail_running(self, exc: Exception) -> None:
        """The model failed in the middle of a batch: its jobs fail, and no cache is trusted any more."""
        failed = self._books.fail_running()
        reason = f"the model failed ({reason_of(exc)}); ask again"
        self._batch.forget()
        self._batch.end()
        self._switching.distrust()
        mx.clear_cache()
        for ticket in failed:
            ticket.tell(GenerationFailedError(reason))

    def _end_all(self, news: Callable[[], Exception]) -> None:
        """Every job that there is ends with an error, and the batch with them. What is active stays so."""
        tickets = self._books.fail_all()
        self._batch.end()
        mx.clear_cache()
        for ticket in tickets:
            ticket.tell(news())
