"""Decoding under one selection: several jobs in step with mlx-lm's BatchGenerator, or one with its generate_step.

A lane is made, used and closed in the thread that has the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator, generate_step, generation_stream
from mlx_lm.models.cache import make_prompt_cache

from ifprune_mlx.model import Model
from ifprune_mlx.serving.engine.sampling import Processor, Sampler

# Others wait for their next token while a stretch of a prompt is read.
_PREFILL_STEP = 512
# What mlx-lm's penalties look back at is 20 tokens.
_CONTEXT = 64
# The largest `batch_error` that rounding alone explains, in float32 and in the half-precision types.
_ERROR, _HALF_ERROR = 1e-3, 0.05
_PROMPTS = ((3, 7, 5, 9, 4, 8, 6), (5, 4))


@dataclass(frozen=True)
class Sequence:
    """What a lane is given to decode.

    Attributes:
        tokens: what has to be read, at least one token, after those in `cache`.
        cache: of what was read before; None for nothing. The lane changes it.
        read: the tokens in `cache`.
        stopped: asked while a long prompt is read; True gives up.
    """

    tokens: list[int]
    cache: list[Any] | None
    read: list[int]
    max_tokens: int
    sampler: Sampler
    processors: list[Processor]
    stopped: Callable[[], bool]


@dataclass(frozen=True)
class Read:
    """A finished sequence's cache, and the tokens that it holds."""

    tokens: list[int]
    cache: list[Any]


@dataclass(frozen=True)
class Token:
    """One more token of a sequence.

    Attributes:
        uid: of the sequence, as `insert` gave it.
        logprobs: `[vocabulary]`.
        finish_reason: `stop` for an end-of-text token, `length`, or None.
        read: beside a `finish_reason`.
    """

    uid: int
    id: int
    logprobs: mx.array
    finish_reason: str | None
    read: Read | None


class Decoder(Protocol):
    """Sequences that are decoded under the model's active selection."""

    def insert(self, sequence: Sequence) -> int:
        """Take in a sequence; its uid."""
        ...

    def step(self) -> list[Token]:
        """Read a stretch of the prompts that wait for it, and decode at most one token of each other sequence."""
        ...

    def remove(self, uid: int) -> Read:
        """Drop a sequence that has given a token and has not finished."""
        ...

    def drop(self, uid: int) -> None:
        """Drop a sequence whatever it has done so far."""
        ...

    def close(self) -> None:
        """Drop all."""
        ...


class BatchDecoder:
    """Any number of sequences, decoded together; new ones join between two steps."""

    def __init__(self, model: Model, end: Iterable[int], concurrency: int) -> None:
        self._generator = BatchGenerator(
            model.module,
            stop_tokens=[[token] for token in end],
            completion_batch_size=concurrency,
            prefill_batch_size=concurrency,
            prefill_step_size=_PREFILL_STEP,
        )

    def insert(self, sequence: Sequence) -> int:
        """See `Decoder`."""
        uids = self._generator.insert(
            [sequence.tokens],
            [sequence.max_tokens],
            caches=[sequence.cache],
            all_tokens=[list(sequence.read)],
            samplers=[sequence.sampler],
            logits_processors=[sequence.processors],
        )
        return int(uids[0])

    def step(self) -> list[Token]:
        """See `Decoder`."""
        _, responses = self._generator.next()
        return [
            Token(
                response.uid,
                response.token,
                response.logprobs,
                response.finish_reason,
                None if response.finish_reason is None else Read(response.all_tokens, response.prompt_cache),
            )
            for response in responses
        ]

    def remove(self, uid: int) -> Read:
        """See `Decoder`."""
        cache, tokens = self._generator.remove([uid], return_prompt_caches=True)[uid]
        return Read(tokens, cache)

    def drop(self, uid: int) -> None:
        """See `Decoder`."""
        self._generator.remove([uid])

    def close(self) -> None:
        """See `Decoder`."""
        self._generator.close()
        mx.synchronize(generation_stream)  # the tokens that nobody wants any more are still being computed


class SingleDecoder:
    """One sequence at a time: for families whose caches do not batch, and for a cache of mixed provenance."""

    def __init__(self, model: Model, end: Iterable[int]) -> None:
        self._model, self._end = model, frozenset(end)
        self._steps: Generator[tuple[Any, mx.array], None, None] | None = None
        self._cache: list[Any] = []
        self._read: list[int] = []
        self._left = self._uid = 0

    def insert(self, sequence: Sequence) -> int:
        """See `Decoder`."""
        assert self._steps is None
        self._cache = make_prompt_cache(self._model.module) if sequence.cache is None else sequence.cache
        self._read = [*sequence.read, *sequence.tokens]
        self._left = sequence.max_tokens
        self._uid += 1

        def on_prefill(done: int, total: int) -> None:
            if done < total and sequence.stopped():
                raise _Stopped

        self._steps = generate_step(
            mx.array(sequence.tokens),
            self._model.module,
            max_tokens=sequence.max_tokens,
            sampler=sequence.sampler,
            logits_processors=[_Seen(processor, self._read[:-1]) for processor in sequence.processors],
            prompt_cache=self._cache,
            prefill_step_size=_PREFILL_STEP,
            prompt_progress_callback=on_prefill,
        )
        return self._uid

    def step(self) -> list[Token]:
        """See `Decoder`."""
        assert self._steps is not None
        try:
            token, logprobs = next(self._steps)
        except _Stopped:
            return []  # whoever stopped it drops it
        self._read.append(int(token))
        self._left -= 1
        reason = "stop" if int(token) in self._end else "length" if self._left == 0 else None
        read = None if reason is None else self.remove(self._uid)
        return [Token(self._uid, int(token), logprobs, reason, read)]

    def remove(self, uid: int) -> Read:
        """See `Decoder`."""
        read = Read(self._read, self._cache)
        self.drop(uid)
        return read

    def drop(self, uid: int) -> None:
        """See `Decoder`."""
        if self._steps is not None:
            self._steps.close()
        self._steps, self._cache, self._read = None, [], []

    def close(self) -> None:
        """See `Decoder`."""
        self.drop(self._uid)
        mx.synchronize(generation_stream)


class _Stopped(Exception):
    """A sequence's `stopped` said so; never leaves this module."""


class _Seen:
    """A processor that sees all that was read, also what generate_step does not know or did not count."""

    def __init__(self, processor: Processor, read: list[int]) -> None:
        self._processor = processor
        self._tokens = mx.array(read[-_CONTEXT:], mx.int32)

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        self._tokens = mx.concatenate([self._tokens, tokens[-1:].astype(mx.int32)])[-_CONTEXT:]
        return self._processor(self._tokens, logits)


def can_batch(model: Model) -> bool:
    """Whether sequences that are decoded together get what each gets alone.

    mlx-lm has caches that do not merge, and families that take no heed of padding or compute something over the whole
    batch; a few tokens show it. To be asked with a selection active that the model is used with.
    """
    return batch_error(model) <= (_ERROR if model.dtype == mx.float32 else _HALF_ERROR)


def batch_error(model: Model) -> float:
    """How far two short sequences of different length, decoded together, are from each alone.

    Returns:
        Mean difference of log-probabilities in units of their spread; infinity where they cannot be decoded together.
    """
    caches = [make_prompt_cache(model.module) for _ in _PROMPTS]
    if not all(hasattr(cache, "merge") for cache in caches[0]):
        return math.inf

    def fixed(logprobs: mx.array) -> mx.array:
        return mx.full(logprobs.shape[:-1], 6, mx.uint32)

    seen: dict[int, list[mx.array]] = {}
    try:
        generator = BatchGenerator(model.module, sampler=fixed, max_tokens=3)
        seen = {uid: [] for uid in generator.insert([list(prompt) for prompt in _PROMPTS])}
        while any(len(rows) < 3 for rows in seen.values()):
            for response in generator.next()[1]:
                seen[response.uid].append(response.logprobs)
        generator.close()
    except (ValueError, TypeError, AttributeError, IndexError, NotImplementedError):
        return math.inf  # a cache or a layer that knows one sequence only
    worst = 0.0
    for rows, prompt, cache in zip(seen.values(), _PROMPTS, caches, strict=True):
        alone = generate_step(mx.array(prompt), model.module, max_tokens=3, sampler=fixed, prompt_cache=cache)
        for together, (_, single) in zip(rows, alone, strict=True):
            difference = mx.abs(together - single).astype(mx.float32).mean()
            spread = mx.abs(single - single.mean()).astype(mx.float32).mean()
            error = float(np.array(difference / spread))
            worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst
