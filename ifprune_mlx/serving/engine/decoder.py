"""Decoders: several sequences at once with mlx-lm's BatchGenerator, or one with its generate_step.

All sequences are computed under the model's active selection. A decoder is made, used and closed in the thread that
holds the model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, generate_step, generation_stream
from mlx_lm.models.cache import make_prompt_cache

from ifprune_mlx.errors import reason_of
from ifprune_mlx.model import Model
from ifprune_mlx.serving.engine.request import EngineClosedError, RequestState
from ifprune_mlx.serving.engine.sampling import Processor, Sampler, make_processors, make_sampler
from ifprune_mlx.serving.engine.thinking_budget import ThinkingLimit
from ifprune_mlx.slow_paths import ONE_AT_A_TIME, note_slow_path

_PREFILL_STEP = 512  # other sequences wait meanwhile
_CONTEXT = 64  # mlx-lm's penalties look back at 20 tokens
# The largest `batch_error` that rounding alone explains, in float32 and in half precision.
_ERROR, _HALF_ERROR = 1e-3, 0.05
_PROMPTS = ((3, 7, 5, 9, 4, 8, 6), (5, 4))

_log = logging.getLogger(__name__)

SequenceCache = tuple[list[int], list[Any]]
"""The tokens of an ended sequence, and the KV caches that hold them, one per layer."""


@dataclass(frozen=True)
class Token:
    """The next token of a sequence. After the last one the sequence leaves the decoder."""

    uid: int  # of the sequence, from `insert`
    id: int
    logprobs: mx.array  # `[vocabulary]`
    finish_reason: str | None  # last token only: `stop` for an end-of-text token, or `length`
    cache: SequenceCache | None  # last token only


class BatchDecoder:
    """Decodes several sequences together; new ones join between two steps.

    Args:
        end: the end-of-text tokens.
        capacity: the most sequences at once.
    """

    def __init__(self, model: Model, end: Iterable[int], capacity: int) -> None:
        self.capacity, self._model = capacity, model
        # Those that read their prompts, with the tokens that they need not read.
        self._reading: dict[int, tuple[RequestState, int]] = {}
        self._generator = BatchGenerator(
            model.module,
            stop_tokens=[[token] for token in end],
            completion_batch_size=capacity,
            prefill_batch_size=capacity,
            prefill_step_size=_PREFILL_STEP,
        )

    def insert(self, state: RequestState, cache: list[Any] | None, read: int, max_tokens: int) -> int:
        """Add a request's sequence; returns its uid.

        Args:
            cache: one per layer, changed in place; None if nothing has been read.
            read: how many prompt tokens `cache` holds; at least one must be left.
            max_tokens: the most tokens to generate.
        """
        tokens = list(state.request.tokens)
        uids = self._generator.insert(
            [tokens[read:]],
            [max_tokens],
            caches=[cache],
            all_tokens=[tokens[:read]],
            samplers=[_sampler(self._model, state)],
            logits_processors=[_processors(state)],
        )
        self._reading[uids[0]] = state, read
        return int(uids[0])

    def step(self) -> list[Token]:
        """Read a part of the unread prompts, and decode one token of each other sequence."""
        tokens = []
        prompts, answers = self._generator.next()
        for prompt in prompts:
            state, read = self._reading[prompt.uid]
            state.has_read(read + prompt.progress[0])
            if prompt.end_of_prompt:
                del self._reading[prompt.uid]
        for one in answers:
            cache = (one.all_tokens, one.prompt_cache) if one.finish_reason else None
            tokens.append(Token(one.uid, one.token, one.logprobs, one.finish_reason, cache))
        return tokens

    def remove(self, uid: int, *, with_cache: bool) -> SequenceCache | None:
        """Remove an unfinished sequence; returns its cache if `with_cache`, which needs a generated token."""
        self._reading.pop(uid, None)
        found = self._generator.remove([uid], return_prompt_caches=with_cache)
        return (found[uid][1], found[uid][0]) if with_cache else None

    def close(self) -> None:
        """Drop all sequences."""
        self._generator.close()
        mx.synchronize(generation_stream)  # mlx-lm computes a token ahead


class SingleDecoder:
    """Decodes one sequence: for families that do not batch, and for caches that two selections computed."""

    capacity = 1

    def __init__(self, model: Model, end: Iterable[int]) -> None:
        self._model, self._end = model, frozenset(end)
        self._steps: Generator[tuple[Any, mx.array], None, None] | None = None
        self._cache: list[Any] = []
        self._read: list[int] = []
        self._left = self._uid = 0

    def insert(self, state: RequestState, cache: list[Any] | None, read: int, max_tokens: int) -> int:
        """Add a request's sequence, the only one; see `BatchDecoder.insert`."""
        assert self._steps is None
        tokens = list(state.request.tokens)
        self._cache = make_prompt_cache(self._model.module) if cache is None else cache
        self._read, self._left = tokens, max_tokens
        self._uid += 1

        model = self._model  # not self, which holds the generator that holds this function

        def on_prefill(done: int, total: int) -> None:
            if done < total and model.agreed(state.stopped):
                raise EngineClosedError
            state.has_read(read + done)

        self._steps = generate_step(
            mx.array(tokens[read:]),
            self._model.module,
            max_tokens=max_tokens,
            sampler=_sampler(self._model, state),
            logits_processors=[_SeesAllTokens(one, tokens[:-1]) for one in _processors(state)],
            prompt_cache=self._cache,
            prefill_step_size=_PREFILL_STEP,
            prompt_progress_callback=on_prefill,
        )
        return self._uid

    def step(self) -> list[Token]:
        """Decode one token; the first call reads the whole prompt."""
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
        """Remove the sequence; returns its cache if `with_cache`, which needs a generated token."""
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


def _sampler(model: Model, state: RequestState) -> Sampler:
    sampler = make_sampler(state.request.sampling)
    return sampler if model.ranks is None else model.ranks.same_tokens(sampler)


def _processors(state: RequestState) -> list[Processor]:
    budget = state.request.thinking_budget
    limits = [] if budget is None else [ThinkingLimit(budget)]
    return [*make_processors(state.request.sampling, state.constraint), *limits]


class _SeesAllTokens:
    """Gives a processor all prompt tokens, also those in the cache, which generate_step does not know."""

    def __init__(self, processor: Processor, read: list[int]) -> None:
        self._processor = processor
        self._tokens = mx.array(read[-_CONTEXT:], mx.int32)

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        self._tokens = mx.concatenate([self._tokens, tokens[-1:].astype(mx.int32)])[-_CONTEXT:]
        return self._processor(self._tokens, logits)


def can_batch(model: Model) -> bool:
    """Whether sequences get the same tokens together as alone; computed on a few tokens under the active selection.

    Some of mlx-lm's caches do not merge, and some families ignore padding or compute something over the whole batch.
    """
    error = batch_error(model)
    if error <= (_ERROR if model.dtype == mx.float32 else _HALF_ERROR):
        return True
    apart = f"differ by {error:.2g} from each alone" if math.isfinite(error) else "cannot be decoded together"
    note_slow_path(ONE_AT_A_TIME, f"{model.checkpoint.path} answers one request at a time: sequences {apart}")
    return False


def batch_error(model: Model) -> float:
    """How much decoding two short sequences of different length together differs from decoding each alone.

    Returns:
        Mean difference of log-probabilities in units of their spread; infinity if they cannot be decoded together.
    """
    caches = [make_prompt_cache(model.module) for _ in _PROMPTS]
    if not all(hasattr(cache, "merge") for cache in caches[0]):
        return math.inf

    def fixed(logprobs: mx.array) -> mx.array:
        return mx.full(logprobs.shape[:-1], 6, mx.uint32)

    seen: dict[int, list[mx.array]] = {}
    try:
        with closing(BatchGenerator(model.module, sampler=fixed, max_tokens=3)) as generator:
            seen = {uid: [] for uid in generator.insert([list(prompt) for prompt in _PROMPTS])}
            while any(len(rows) < 3 for rows in seen.values()):
                for response in generator.next()[1]:
                    seen[response.uid].append(response.logprobs)
    except (ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as exc:
        # A cache or a layer for one sequence only, or a mistake, which must not be hidden.
        _log.warning("%s: decoding two sequences together failed: %s", model.checkpoint.path, reason_of(exc))
        _log.debug("the cause", exc_info=exc)
        return math.inf
    errors: list[Any] = []
    for rows, prompt, cache in zip(seen.values(), _PROMPTS, caches, strict=True):
        alone = generate_step(mx.array(prompt), model.module, max_tokens=3, sampler=fixed, prompt_cache=cache)
        for together, (_, single) in zip(rows, alone, strict=True):
            difference = mx.abs(together - single).astype(mx.float32).mean()
            spread = mx.abs(single - single.mean()).astype(mx.float32).mean()
            errors.append((difference / spread).item())
    return float(max(error if math.isfinite(error) else math.inf for error in errors))
