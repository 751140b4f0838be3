"""Asking the tiny model, and callbacks that steer, stop or break an answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ifprune_mlx import GenerationResponse, History, Model, stream_generate
from tests.ifprune_mlx.reference import random_selection

Tiny = tuple[Model, Any]
TOKENS = list(range(40, 60))
END = 2  # <|im_end|>
A = random_selection((128, 128), (48, 32), seed=1)
B = random_selection((128, 128), (24, 64), seed=2)


def tokens_of(responses: list[GenerationResponse]) -> list[int]:
    return [response.token for response in responses]


def answer(tiny: Tiny, prompt: Any, **options: Any) -> list[GenerationResponse]:
    return list(stream_generate(*tiny, prompt, **options))


def until_end(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(END) + 1] if END in tokens else tokens


def assert_in_step(history: History) -> None:
    """Tokens, spans and every layer's cache speak of the same number of tokens."""
    assert {cache.offset for cache in history.kv} == {len(history.tokens)}
    assert sum(span.tokens for span in history.spans) == len(history.tokens)


def asked(times: int) -> Callable[[], bool]:
    """Says no `times` times, and then always yes."""
    left = [times]

    def cancel() -> bool:
        left[0] -= 1
        return left[0] < 0

    return cancel


def letters(tokens: mx.array, logits: mx.array) -> mx.array:
    """A logits processor that allows letters only, so that text and tokens correspond one to one."""
    ids = mx.arange(logits.shape[-1])
    return mx.where((ids >= 70) & (ids < 94), logits, -mx.inf)


class Broken(Exception):
    """Raised by the callbacks below."""


def failing(after: int) -> Callable[..., Any]:
    """A callback that raises at a later call."""
    left = [after]

    def callback(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Broken
        return arguments[-1]

    return callback
