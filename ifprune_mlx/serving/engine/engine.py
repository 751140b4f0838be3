"""The engine: computes many requests on one model, those of one selection together.

`Engine.stream` runs in the callers' event loops. The rest runs in the model's worker thread, which holds the model
while there is work. Each round selects, starts the requests whose turn it is, and decodes a token of each running one.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from contextlib import suppress
from itertools import count

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.chat_template import check_prompt
from ifprune_mlx.errors import IfpruneError, PromptError, reason_of
from ifprune_mlx.model import Model
from ifprune_mlx.serving.engine.active_selection import ActiveSelection, check_selecting
from ifprune_mlx.serving.engine.decoder import BatchDecoder, Decoder, SequenceCache, SingleDecoder, Token, can_batch
from ifprune_mlx.serving.engine.output_processor import OutputProcessor
from ifprune_mlx.serving.engine.prefix_cache import PrefixCache
from ifprune_mlx.serving.engine.request import (
    POLICIES,
    EngineClosedError,
    EngineStats,
    GenerationFailedError,
    PromptProgress,
    Request,
    RequestOutput,
    RequestState,
    from_rank,
    to_rank,
)
from ifprune_mlx.serving.engine.sampling import check_sampling
from ifprune_mlx.serving.engine.scheduler import EXCLUSIVE, Scheduler
from ifprune_mlx.sparse.quantized import split


class Engine:
    """Answers requests with one model.

    While it works, it holds the model: other uses raise ModelBusyError or wait. Each request is computed under its own
    selection only, and a KV cache serves only requests of the selection that computed it. Requests that are decoded
    together change each other's tokens by rounding alone.

    Args:
        model, tokenizer: from `ifprune_mlx.load`.
        concurrency: the most requests that are decoded together.
        queue: the most requests that wait beside them.
        prompt_cache_bytes: size of all kept KV caches of finished requests; 0 keeps none.
        patience: seconds that the live selection's requests go first while one of another selection waits.
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
        self._model, self._tokenizer, self._concurrency = model, tokenizer, concurrency
        self._scheduler = Scheduler(queue, patience, concurrency)
        self._turn: Future[object] | None = None  # the engine's place in line for the model
        self._turn_lock = threading.Lock()
        # Only the worker thread uses these.
        self._active = ActiveSelection(model)
        self._prefix_cache = PrefixCache(prompt_cache_bytes, model)
        self._decoder: Decoder | None = None  # None while nothing runs
        self._batches: dict[frozenset[int], bool] = {}
        self._serials = count()

    async def stream(
        self, request: Request, progress: Callable[[PromptProgress], None] | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer one request; may be called in any event loop of any thread.

        The answer is computed even if its outputs are not read. Ending the generator early (`aclose`, cancelling its
        task) ends the request after the current token; its KV cache is kept.

        Args:
            progress: called in this event loop when the request is accepted, and while its prompt is read. What it
                is not called for raises at once.

        Raises:
            EngineFullError: if too many requests wait.
            EngineClosedError: if the engine is closed, or closes before the answer ends.
            GenerationFailedError: if the model fails.
            IfpruneError: if the request cannot be answered: PromptError, BudgetError, SelectionError, ...
        """
        check_request(self._model, request)
        state = RequestState(request, asyncio.get_running_loop(), progress, serial=next(self._serials))
        if self._scheduler.add(state):
            self._ask_for_turn()
        if progress is not None:
            progress(PromptProgress(None, len(request.tokens)))
        try:
            while True:
                output = await state.outputs.get()
                if isinstance(output, Exception):
                    raise output
                yield output
                if output.stats is not None:
                    return
        finally:
            self._scheduler.cancel(state)

    def follow(self) -> None:
        """On a rank that does not lead: compute what the leader's engine computes, until that ends the run."""
        while True:
            self._work()

    def counters(self) -> EngineStats:
        """The engine's counters; may be called in any thread."""
        live = self._model.selection
        return EngineStats(
            **self._scheduler.counters(),
            switches=self._active.switches,
            selection=None if live is None else live.hash,
            prompt_cache_bytes=self._prefix_cache.nbytes,
            active_bytes=mx.get_active_memory(),
            spare_bytes=mx.get_cache_memory(),
        )

    def close(self) -> None:
        """End every request with EngineClosedError, those that wait at once, and release the model.

        Returns after the current token.
        """
        self._scheduler.close()
        self._call_off_turn()
        self._scheduler.idle.wait()
        self._prefix_cache.clear()

    # Waiting for the model, in any thread.

    def _ask_for_turn(self) -> None:
        """Get in line for the model; the worker thread begins when the turn comes."""
        with self._turn_lock:
            self._turn = self._model.lock.in_turn(self._work, self._turn_ended)
        if self._scheduler.closed:  # `close` may have come before this turn was set
            self._call_off_turn()

    def _call_off_turn(self) -> None:
        """If the turn has not come, leave the line and end the requests, as the worker will not run."""
        with self._turn_lock:
            called_off = self._turn is not None and self._turn.cancel()
        if called_off:
            self._fail(None, waiting=True)
            self._scheduler.rest()

    def _turn_ended(self) -> None:
        """After the model was released: ask for it again if new requests wait."""
        if not self._scheduler.rest():
            self._ask_for_turn()

    # In the worker thread.

    def _work(self) -> None:
        """Answer requests until there are none."""
        self._active.resume()
        try:
            while self._round():
                pass
        except BaseException as exc:
            self._fail(exc, waiting=True)

    def _round(self) -> bool:
        """Select, start requests, and decode one token of each. False when there is nothing left to do."""
        closed, idle, waiting = self._model.agreed(self._scheduler.outlook())
        if closed:
            self._fail(None, waiting=True)
            return False
        if self._model.ranks is not None and not self._model.ranks.leads:
            self._scheduler.keep_waiting(waiting)
        if idle:
            self._close_decoder()
            mx.clear_cache()
            return False
        self._select_waiting()
        try:
            self._drop_cancelled()
            self._start_waiting()
            if self._scheduler.running:
                self._decode()
        except Exception as exc:  # in the middle of a batch
            self._fail(exc, waiting=False)
        return True

    def _select_waiting(self) -> None:
        """Find the selections of waiting requests. While others run, run one selector at most, so that they go on."""
        for state in self._unselected():
            if self._model.agreed(state.stopped):
                continue
            try:
                self._active.select(state)
            except Exception as exc:
                self._refuse(state, exc)
            if self._scheduler.running and state.select_s:
                return

    def _unselected(self) -> list[RequestState]:
        """Waiting requests that have not selected. Other ranks hear of them here."""
        states = self._scheduler.unselected(self._concurrency)
        ranks = self._model.ranks
        if ranks is None:
            return states
        told = ranks.share([(state.serial, to_rank(state.request)) for state in states])
        if ranks.leads:
            return states
        return [self._scheduler.hear_of(serial, from_rank(request)) for serial, request in told]

    def _drop_cancelled(self) -> None:
        """End the cancelled requests; keep the KV caches of those that have generated a token."""
        cancelled = self._model.agreed([state.serial for state in self._scheduler.running if state.cancelled])
        for state in [state for state in self._scheduler.running if state.serial in cancelled]:
            assert self._decoder is not None
            self._scheduler.finish(state)
            started = state.output_processor.completion_tokens > 0
            self._store_prefix(state, self._decoder.remove(state.uid, with_cache=started))

    def _start_waiting(self) -> None:
        """Start the requests whose turn it is."""
        while len(self._scheduler.running) < (1 if self._decoder is None else self._decoder.capacity):
            leads = self._model.ranks is None or self._model.ranks.leads
            state = self._scheduler.next(self._active.key, self._active.since) if leads else None
            serial = self._model.agreed(None if state is None else state.serial)
            if not leads and serial is not None:
                state = self._scheduler.start(serial)
            if state is None:
                return
            try:
                self._start(state)
            except Exception as exc:
                self._refuse(state, exc)

    def _start(self, state: RequestState) -> None:
        """Make a request's selection active and hand its prompt to the decoder."""
        request, key = state.request, state.selection_key
        if key == EXCLUSIVE or key != self._active.key:
            self._close_decoder()
        if key != EXCLUSIVE:
            cache, read = self._prefix_cache.fetch(key, request.tokens)
            state.cached_tokens = read
        else:
            cache, read = self._active.prefill_dense(state)
        self._active.activate(state)
        if self._decoder is None:
            end = self._tokenizer.eos_token_ids
            if key != EXCLUSIVE and self._can_batch():
                self._decoder = BatchDecoder(self._model, end, self._concurrency)
            else:
                self._decoder = SingleDecoder(self._model, end)
        state.output_processor = OutputProcessor(request, self._tokenizer)
        state.constraint = None if request.grammar is None else request.grammar.constraint()
        state.started = time.monotonic()
        state.has_read(read, state.selection)
        room = (self._model.context_length or math.inf) - len(request.tokens)
        state.uid = self._decoder.insert(state, cache, read, int(min(request.max_tokens, room)))

    def _can_batch(self) -> bool:
        """Asked once for each set of kernels that numbers of active neurons choose."""
        packed = self._model.checkpoint.layout.down is not None
        kernels = frozenset(split(slots.k) for slots in self._model.slots if packed)
        if kernels not in self._batches:
            self._batches[kernels] = self._model.agreed(can_batch(self._model))
        return self._batches[kernels]

    def _decode(self) -> None:
        """One step of the running requests."""
        running = {state.uid: state for state in self._scheduler.running}
        assert self._decoder is not None
        assert {state.selection_key for state in running.values()} == {self._active.key}
        self._active.restore()
        for state in running.values():
            state.batch = max(state.batch, len(running))
        for token in self._decoder.step():
            self._put_token(running[token.uid], token)

    def _put_token(self, state: RequestState, token: Token) -> None:
        """Pass a token to its request, and end the request with the last one."""
        output, now = state.output_processor, time.monotonic()
        error = None if state.constraint is None else state.constraint.error
        if (error := self._model.agreed(error)) is not None:
            self._scheduler.finish(state)
            state.put(GenerationFailedError(f"the answer's grammar failed ({error}); ask again"))
            if token.finish_reason is None and self._decoder is not None:
                self._decoder.remove(token.uid, with_cache=False)
            return
        if output.completion_tokens == 0:
            state.first_token = now
        text, logprobs = output.add(token.id, token.logprobs, token.finish_reason)
        output.finish_reason = self._model.agreed(output.finish_reason)
        if output.finish_reason is None:
            if text or logprobs:
                state.put(RequestOutput(text, logprobs))
            return
        stats = state.stats(now)
        self._scheduler.finish(state, stats)
        state.put(RequestOutput(text, logprobs, stats, state.selection))
        assert self._decoder is not None
        self._store_prefix(state, token.cache or self._decoder.remove(token.uid, with_cache=True))

    def _store_prefix(self, state: RequestState, cache: SequenceCache | None) -> None:
        """Keep a request's KV cache, unless its prompt was read densely."""
        if cache is not None and state.selection_key != EXCLUSIVE:
            self._prefix_cache.store(state.selection_key, *cache)

    def _tell_ranks(self, exc: BaseException) -> None:
        """What fails on one rank alone ends them all: their requests would no longer be the same."""
        if self._model.ranks is not None:
            self._model.ranks.failed(exc)

    def _close_decoder(self) -> None:
        """Drop the decoder; the next request makes a new one."""
        decoder, self._decoder = self._decoder, None  # first, as closing it may fail
        if decoder is not None:
            decoder.close()

    def _refuse(self, state: RequestState, exc: Exception) -> None:
        """Fail one request that is not running yet; the others go on."""
        self._scheduler.finish(state)
        self._tell_ranks(exc)
        if not isinstance(exc, (IfpruneError, GenerationFailedError)):
            self._active.trusted = False
            exc = GenerationFailedError(f"the model failed ({reason_of(exc)}); ask again")
        state.put(exc)

    def _fail(self, exc: BaseException | None, *, waiting: bool) -> None:
        """End all running requests, and the waiting ones if `waiting`. `exc` is the failure, or None at `close`.

        The requests get their error first, as closing the decoder may fail too. All KV caches are dropped.
        """
        if exc is not None:
            self._tell_ranks(exc)
        reason = None if exc is None else f"the {'server' if waiting else 'model'} failed ({reason_of(exc)}); ask again"
        for state in (*self._scheduler.running, *(self._scheduler.waiting if waiting else ())):
            self._scheduler.finish(state)
            state.put(EngineClosedError() if reason is None else GenerationFailedError(reason))
        self._active.trusted = False
        self._prefix_cache.clear()
        with suppress(Exception):
            self._close_decoder()
        mx.clear_cache()


def check_request(model: Model, request: Request) -> None:
    """Check what can be checked before selecting; raise IfpruneError if `model` cannot answer."""
    check_prompt(model, request.tokens)
    if request.max_tokens < 1:
        raise PromptError(f"max tokens is {request.max_tokens}; give a number above 0")
    if request.logprobs is not None and not 0 <= request.logprobs <= 20:
        raise IfpruneError(f"{request.logprobs} log-probabilities a token; give a number from 0 to 20")
    if "" in request.stop:
        raise IfpruneError("a stop string is empty; leave it out")
    if request.selection_params.policy not in POLICIES:
        raise IfpruneError(f"unknown policy {request.selection_params.policy!r}; choose one of {', '.join(POLICIES)}")
    check_sampling(request.sampling, model.vocabulary)
    check_selecting(model, request.selection_params)
