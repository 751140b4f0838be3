"""Sampling with mlx-lm's filters and penalties, and a random key for every request.

mlx-lm's `make_sampler` uses one random state per thread, so that a request's tokens depend on the rest of its batch.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from functools import partial

import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, make_logits_processors

from ifprune_mlx.constraint import Constraint
from ifprune_mlx.errors import IfpruneError
from ifprune_mlx.generation import usable_temperature
from ifprune_mlx.serving.engine.request import SamplingParams

Sampler = Callable[[mx.array], mx.array]  # log-probabilities `[1, vocabulary]` -> the token drawn `[1]`
Processor = Callable[[mx.array, mx.array], mx.array]  # tokens read so far `[n]`, logits `[1, vocabulary]` -> logits

_MOST_BIAS = 1000.0


def check_sampling(sampling: SamplingParams, vocabulary: int | None) -> None:
    """Raise IfpruneError if a setting is out of its range (see `SamplingParams`) or a biased token is unknown."""
    ranges = {
        "temperature": (0.0, math.inf),
        "top_p": (0.0, 1.0),
        "top_k": (0.0, math.inf),
        "min_p": (0.0, 1.0),
        "repetition_penalty": (0.01, 100.0),  # others overflow, or leave nothing of the logits
        "presence_penalty": (-2.0, 2.0),
        "frequency_penalty": (-2.0, 2.0),
    }
    for name, (low, high) in ranges.items():
        value = getattr(sampling, name)
        open_ended = name == "top_p"  # 0 would leave nothing to sample from
        if not math.isfinite(value) or value < low or value > high or (open_ended and value == low):
            bounds = f"{'above' if open_ended else 'from'} {low:g}" + (f" to {high:g}" if high < math.inf else "")
            raise IfpruneError(f"{name} is {value:g}; give a number {bounds}")
    for token, bias in sampling.logit_bias.items():
        if not abs(bias) <= _MOST_BIAS:
            raise IfpruneError(
                f"logit_bias of token {token} is {bias:g}; give a number from -{_MOST_BIAS:g} to {_MOST_BIAS:g}"
            )
        if token < 0 or (vocabulary is not None and token >= vocabulary):
            raise IfpruneError(f"logit_bias names token {token}, which the model does not have")


def make_sampler(sampling: SamplingParams) -> Sampler:
    """The sampler of one request. Make and use it in the thread that decodes."""
    temperature = usable_temperature(sampling.temperature, sampling.top_p)
    if temperature == 0:
        return partial(mx.argmax, axis=-1)
    key = mx.random.key(secrets.randbits(63) if sampling.seed is None else sampling.seed % 2**63)

    def draw(logprobs: mx.array) -> mx.array:
        nonlocal key
        logprobs = logprobs.astype(mx.float32)  # then the filters in mlx-lm's order
        if sampling.top_p < 1:
            logprobs = apply_top_p(logprobs, sampling.top_p)
        if sampling.min_p > 0:
            logprobs = apply_min_p(logprobs, sampling.min_p)
        if 0 < sampling.top_k < logprobs.shape[-1]:
            logprobs = apply_top_k(logprobs, sampling.top_k)
        key, now = mx.random.split(key)
        return mx.random.categorical(logprobs / temperature, key=now)

    return draw


def make_processors(sampling: SamplingParams, constraint: Constraint | None = None) -> list[Processor]:
    """The penalties and biases of one request, then its constraint; at least one processor."""
    processors: list[Processor] = make_logits_processors(
        dict(sampling.logit_bias) or None,
        sampling.repetition_penalty if sampling.repetition_penalty != 1 else None,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
    )
    if constraint is not None:
        processors.append(constraint)
    # mlx-lm 0.31 cannot decode a sequence without processors together with one that has some.
    return processors or [lambda tokens, logits: logits]
