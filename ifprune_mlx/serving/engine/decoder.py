"""Decoders: several sequences in step with mlx-lm's BatchGenerator, or one with its generate_step.

All sequences of a decoder are computed under the model's active selection. A decoder is made, used and closed in the
thread that has the model.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, generate_step, generation_stream
from mlx_lm.models.cache import make_prompt_cache

from ifprune_mlx.model import Model
from ifprune_mlx.serving.engine.request import EngineClosedError, RequestState
from ifprune_mlx.serving.engine.sampling import Processor, make_processors, make_sampler

# Other sequences wait for their next token while a stretch of a prompt is read.
_PREFILL_STEP = 512
# mlx-lm's penalties look back at 20 tokens.
_CONTEXT = 64
# The largest `batch_error` that rounding alone explains, in float32 and in the half-precision types.
_ERROR, _HALF_ERROR = 1e-3, 0.05
_PROMPTS = ((3, 7, 5, 9, 4, 8, 6), (5, 4))


SequenceCache = tuple[list[int], list[Any]]
"""The tokens of a sequence that has ended, and the KV cache that holds them, one per layer."""


@dataclass(frozen=True)
class Token:
    """One more token of a sequence. With the last one the sequence leaves the decoder."""

    uid: int  # of the sequence, as `insert` gave it
    id: int
    logprobs: mx.array  # `[vocabulary]`
    finish_reason: str | None  # of the last token: `stop` for an end-of-text token, or `length`
    cache: SequenceCache | None  # of the last token


class BatchDecoder:
    """Several sequences, decoded together; new ones join between two steps.

    Args:
        end: the end-of-text tokens.
        capacity: the most sequences at a time.
    """

    def __init__(self, model: Model, end: Iterable[int], capacity: int) -> None:
        self.capacity = capacity
        self._generator = BatchGenerator(
            model.module,
            stop_tokens=[[token] for token in end],
            completion_batch_size=capacity,
            prefill_batch_size=capacity,
            prefill_step_size=_PREFILL_STEP,
        )

    def insert(self, state: RequestState, cache: list[Any] | None, read: int, max_tokens: int) -> int:
        """Take in the sequence of a request; returns its uid.

        Args:
            cache: one per layer, which the decoder changes; None if nothing has been read.
            read: how many tokens of the prompt are in `cache`; at least one is not.
            max_tokens: the most tokens to generate.
        """
        tokens, sampling = list(state.request.tokens), state.request.sampling
        uids = self._generator.insert(
            [tokens[read:]],
            [max_tokens],
            caches=[cache],
            all_tokens=[tokens[:read]],
            samplers=[make_sampler(sampling)],
            logits_processors=[make_processors(sampling)],
        )
        return int(uids[0])

    def step(self) -> list[Token]:
        """Read a stretch of the prompts that are not read yet, and decode one token of each other sequence."""
        return [
            Token(
                r.uid, r.token, r.logprobs, r.finish_reason, (r.all_tokens, r.prompt_cache) if r.finish_reason else None
            )
            for r in self._generator.next()[1]
        ]

    def remove(self, uid: int, *, with_cache: bool) -> SequenceCache | None:
        """Take out a sequence that has not finished; returns its cache if `with_cache`, once it has given a token."""
        found = self._generator.remove([uid], return_prompt_caches=with_cache)
        return (found[uid][1], found[uid][0]) if with_cache else None

    def close(self) -> None:
        """Drop all sequences."""
        self._generator.close()
        mx.synchronize(generation_stream)  # tokens that nobody wants any more may still be under way


class SingleDecoder:
    """`BatchDecoder` for one sequence: for families that do not batch, and for caches that two selections computed."""

    capacity = 1

    def __init__(self, model: Model, end: Iterable[int]) -> None:
        self._model, self._end = model, frozenset(end)
        self._steps: Generator[tuple[Any, mx.array], None, None] | None = None
        self._cache: list[Any] = []
        self._read: list[int] = []
        self._left = self._uid = 0

    def insert(self, state: RequestState, cache: list[Any] | None, read: int, max_tokens: int) -> int:
        """Take in the sequence of a request, if there is none; see `BatchDecoder.insert`."""
        assert self._steps is None
        tokens = list(state.request.tokens)
        self._cache = make_prompt_cache(self._model.module) if cache is None else cache
        self._read, self._left = tokens, max_tokens
        self._uid += 1

        def on_prefill(done: int, total: int) -> None:
            if done < total and state.stopped:
                raise EngineClosedError

        self._steps = generate_step(
            mx.array(tokens[read:]),
            self._model.module,
            max_tokens=max_tokens,
            sampler=make_sampler(state.request.sampling),
            logits_processors=[_SeesAllTokens(one, tokens[:-1]) for one in make_processors(state.request.sampling)],
            prompt_cache=self._cache,
            prefill_step_size=_PREFILL_STEP,
            prompt_progress_callback=on_prefill,
        )
        return self._uid

    def step(self) -> list[Token]:
        """Decode one token, the first after reading the whole prompt."""
        assert self._steps is not None
        try:
            token, logprobs = next(self._steps)
        except EngineClosedError:
            return []  # the engine removes it
        self._read.append(int(token))
        self._left -= 1
        reason = "stop" if int(token) in self._end else "length" if self._left == 0 else None
        cache = self.remove(self._uid, with_cache=True) if reason else None
        return [Token(self._uid, int(token), logprobs, reason, cache)]

    def remove(self, uid: int, *, with_cache: bool) -> SequenceCache | None:
        """Take out the sequence; returns its cache if `with_cache`, once it has given a token."""
        cache = (self._read, self._cache) if with_cache else None
        if self._steps is not None:
            self._steps.close()
        self._steps, self._cache, self._read = None, [], []
        return cache

    def close(self) -> None:
        """Drop the sequence."""
        self.remove(self._uid, with_cache=False)
        mx.synchronize(generation_stream)


Decoder = BatchDecoder | SingleDecoder


class _SeesAllTokens:
    """A processor that is given all tokens read, also those that generate_step does not know of."""

    def __init__(self, processor: Processor, read: list[int]) -> None:
        self._processor = processor
        self._tokens = mx.array(read[-_CONTEXT:], mx.int32)

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        self._tokens = mx.concatenate([self._tokens, tokens[-1:].astype(mx.int32)])[-_CONTEXT:]
        return self._processor(self._tokens, logits)


def can_batch(model: Model) -> bool:
    """Whether sequences that are decoded together get the tokens that each gets alone.

    mlx-lm has caches that do not merge, and families that ignore padding or compute something over the whole batch; a
    few tokens show it. A selection that the model is used with must be active.
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
    errors: list[Any] = []
    for rows, prompt, cache in zip(seen.values(), _PROMPTS, caches, strict=True):
        alone = generate_step(mx.array(prompt), model.module, max_tokens=3, sampler=fixed, prompt_cache=cache)
        for together, (_, single) in zip(rows, alone, strict=True):
            difference = mx.abs(together - single).astype(mx.float32).mean()
            spread = mx.abs(single - single.mean()).astype(mx.float32).mean()
            errors.append((difference / spread).item())
    return float(max(error if math.isfinite(error) else math.inf for error in errors))
