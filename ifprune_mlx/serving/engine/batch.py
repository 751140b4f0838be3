"""The batch: tickets that are decoded together, under the selection that is active, and the KV caches they leave.

For the worker alone.
"""

from __future__ import annotations

import time
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.model import Model
from ifprune_mlx.prompt_cache import History
from ifprune_mlx.serving.engine.decoder import BatchDecoder, Decoder, Read, Sequence, SingleDecoder, Token, can_batch
from ifprune_mlx.serving.engine.output_processor import OutputProcessor
from ifprune_mlx.serving.engine.prefix_cache import PrefixCache
from ifprune_mlx.serving.engine.request import RequestOutput
from ifprune_mlx.serving.engine.request_state import RequestState
from ifprune_mlx.serving.engine.request_table import RequestTable
from ifprune_mlx.serving.engine.sampling import make_processors, make_sampler
from ifprune_mlx.serving.engine.scheduler import ALONE


class Batch:
    """The tickets that run.

    Args:
        books: where they are entered and struck out.
        concurrency: the most that are decoded together.
        prompt_cache_bytes: what the KV caches of finished ones may take; 0 keeps none.
    """

    def __init__(
        self, model: Model, tokenizer: TokenizerWrapper, books: RequestTable, concurrency: int, prompt_cache_bytes: int
    ) -> None:
        self._model, self._tokenizer, self._books = model, tokenizer, books
        self._concurrency = concurrency
        self._lane: Decoder | None = None
        self._batches: bool | None = None  # whether the model's sequences can be decoded together, once known
        self._prefixes = PrefixCache(prompt_cache_bytes)

    @property
    def prompt_cache_bytes(self) -> int:
        """What the KV caches of finished tickets take."""
        return self._prefixes.nbytes

    @property
    def has_room(self) -> bool:
        """Whether one more may run."""
        return len(self._books.running) < (self._concurrency if isinstance(self._lane, BatchDecoder) else 1)

    def add(self, ticket: RequestState, history: History | None) -> None:
        """Run a ticket whose selection is active.

        Args:
            history: what of its prompt was read for it; None goes on from a finished ticket's KV cache, if one fits.
        """
        job, model = ticket.job, self._model
        cache: list[Any] | None
        if history is not None:
            cache, read = history.kv, len(history.tokens)
        else:
            assert ticket.owner is not None
            cache, read = self._prefixes.fetch(ticket.owner, job.tokens)
            ticket.cached_tokens = read
        if self._lane is None:
            self._lane = self._new_lane(ticket.owner == ALONE)
        ticket.answer = OutputProcessor(job, self._tokenizer)
        ticket.started = time.monotonic()
        left = job.max_tokens
        if model.context_length is not None:
            left = min(left, model.context_length - len(job.tokens))
        sequence = Sequence(
            tokens=list(job.tokens[read:]),
            cache=cache,
            read=list(job.tokens[:read]),
            max_tokens=left,
            sampler=make_sampler(job.sampling),
            processors=make_processors(job.sampling),
            stopped=lambda: self._books.given_up(ticket),
        )
        self._books.started(self._lane.insert(sequence), ticket)

    def step(self) -> list[Token]:
        """The next tokens; whatever the model raises."""
        assert self._lane is not None
        running = self._books.running
        for ticket in running.values():
            ticket.batch = max(ticket.batch, len(running))
        return self._lane.step()

    def give(self, token: Token) -> None:
        """Tell a ticket of its next token, and end it with the last one."""
        ticket = self._books.running[token.uid]
        answer, now = ticket.answer, time.monotonic()
        assert answer is not None
        if answer.completion_tokens == 0:
            ticket.first = now
        text, logprobs = answer.add(token.id, token.logprobs, token.finish_reason)
        if answer.finish_reason is None:
            if text or logprobs:
                ticket.tell(RequestOutput(text, logprobs))
            return
        assert self._lane is not None
        self._keep(ticket, token.read if token.read is not None else self._lane.remove(token.uid))
        stats = ticket.stats(answer, now)
        self._books.answered(token.uid, stats)
        ticket.tell(RequestOutput(text, logprobs, stats, ticket.selection))

    def drop(self, uid: int) -> None:
        """End a ticket that nobody listens to."""
        assert self._lane is not None
        ticket = self._books.cancelled(uid)
        if ticket.answer is not None and ticket.answer.completion_tokens:
            self._keep(ticket, self._lane.remove(uid))
        else:
            self._lane.drop(uid)

    def end(self) -> None:
        """Decode no more of what has been begun; the next ticket begins anew, whatever its selection."""
        if self._lane is not None:
            self._lane.close()
            self._lane = None

    def forget(self) -> None:
        """Keep none of the KV caches of finished tickets."""
        self._prefixes.clear()

    def _new_lane(self, alone: bool) -> Decoder:
        end = self._tokenizer.eos_token_ids
        if self._batches is None:
            self._batches = can_batch(self._model)
        batched = self._batches and not alone
        return BatchDecoder(self._model, end, self._concurrency) if batched else SingleDecoder(self._model, end)

    def _keep(self, ticket: RequestState, read: Read) -> None:
        if ticket.owner is not None and ticket.owner != ALONE:
            self._prefixes.store(ticket.owner, read.tokens, read.cache)
