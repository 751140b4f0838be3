"""A job on its way through the engine: what is known of it so far, and how whoever waits for it is told."""

from __future__ import annotations

import time
from collections.abc import Callable

from ifprune_mlx.prompt_cache import DENSE
from ifprune_mlx.selection.selection import Selection
from ifprune_mlx.serving.engine.output_processor import OutputProcessor
from ifprune_mlx.serving.engine.request import Request, RequestOutput, RequestStats


class RequestState:
    """A job on its way. The worker thread owns it, but for `left` and `counted`, which any thread may set.

    Attributes:
        tell: takes the pieces of the answer, or the error that ends it.
        left: nobody listens any more.
        counted: its end is in the books, though something still works on it.
        owner: as in `queueing.Waiting`.
        selection: what it is computed under; None if dense, or not known yet.
        answer: None before its prompt is read.
        started, first: when reading its prompt began, and when its first token came, by `time.monotonic`.

    The others are those of `RequestStats`.
    """

    def __init__(self, job: Request, tell: Callable[[RequestOutput | BaseException], None]) -> None:
        self.job, self.tell = job, tell
        self.arrived = time.monotonic()
        self.left = self.counted = False
        self.owner: str | None = None
        self.selection: Selection | None = None
        self.answer: OutputProcessor | None = None
        self.overlap: float | None = None
        self.cached_tokens = self.batch = 0
        self.select_s = self.switch_s = 0.0
        self.started = self.first = 0.0

    def stats(self, answer: OutputProcessor, now: float) -> RequestStats:
        """What it took, at its end."""
        count, decode_s = answer.completion_tokens, now - self.first
        assert answer.finish_reason is not None
        return RequestStats(
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


def owner_of(selection: Selection | None) -> str:
    """Whose KV caches those are that are computed under a selection: its hash, or `dense` for None."""
    return DENSE if selection is None else selection.hash


def reason_of(exc: BaseException) -> str:
    """What an error says, short and in one line, to be told within another."""
    return " ".join(str(exc).split())[:200] or type(exc).__name__
