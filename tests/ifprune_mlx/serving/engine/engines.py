"""Engines on real tiny models: requests for them, how they are asked, and what each request gets alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import make_logits_processors

from ifprune_mlx import Model, Selection, generate
from ifprune_mlx.constraint import Grammar
from ifprune_mlx.selection.predictor import Head, SparsityPredictor
from ifprune_mlx.serving.engine.engine import Engine
from ifprune_mlx.serving.engine.request import Request, RequestOutput, RequestStats, SamplingParams, SelectionParams
from tests.ifprune_mlx.reference import random_selection

Tiny = tuple[Model, Any]
WIDTHS = (128, 128)
A = random_selection(WIDTHS, (48, 32), seed=1)
B = random_selection(WIDTHS, (24, 64), seed=2)
C = random_selection(WIDTHS, (64, 64), seed=3)
CHOICES: dict[str, Selection | None] = {"A": A, "B": B, "C": C, "dense": None}
# The tiny tokenizer has a token for every byte; those of letters make answers that are easy to cut. 2 is <|im_end|>.
END = 2


@contextmanager
def serving(tiny: Tiny, **options: Any) -> Iterator[Engine]:
    engine = Engine(*tiny, **options)
    try:
        yield engine
    finally:
        engine.close()


def prompt(seed: int, length: int = 20) -> tuple[int, ...]:
    generator = np.random.default_rng(seed)
    return tuple(int(token) for token in generator.integers(40, 100, length))


def make_request(tokens: tuple[int, ...] = prompt(0), selection: Selection | None = A, **changes: Any) -> Request:
    """A greedy request of 12 tokens that no end-of-text token ends."""
    choice = SelectionParams(selection=selection, dense=selection is None)
    sampling = SamplingParams(logit_bias={END: -1000.0})
    return replace(Request(tokens, "instruction", choice, sampling, max_tokens=12), **changes)


def accepts(grammar: Grammar, tokenizer: Any, text: str) -> bool:
    """Whether a grammar allows a whole answer."""
    matcher, tokens = grammar.matcher.deep_copy(), tokenizer.encode(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


async def outputs_of(engine: Engine, one: Request) -> list[RequestOutput]:
    return [output async for output in engine.stream(one)]


def text_of(outputs: list[RequestOutput]) -> str:
    return "".join(output.text for output in outputs)


def stats_of(outputs: list[RequestOutput]) -> RequestStats:
    assert [output.stats is None for output in outputs] == [True] * (len(outputs) - 1) + [False]
    stats = outputs[-1].stats
    assert stats is not None
    return stats


def together(engine: Engine, *requests: Request) -> list[list[RequestOutput]]:
    """The answers of requests that are asked for at the same time, in the order given."""

    async def gather() -> list[list[RequestOutput]]:
        return await asyncio.gather(*(outputs_of(engine, one) for one in requests))

    answers = asyncio.run(gather())
    engine._scheduler.idle.wait()  # then the model is free again
    return answers


def ask(engine: Engine, one: Request) -> tuple[str, RequestStats]:
    outputs = together(engine, one)[0]
    return text_of(outputs), stats_of(outputs)


def alone(tiny: Tiny, one: Request) -> str:
    """The same answer from `ifprune_mlx.generate`, under the same selection."""
    processors = make_logits_processors({END: -1000.0})
    return generate(
        *tiny,
        list(one.tokens),
        max_tokens=one.max_tokens,
        selection=one.selection_params.selection,
        dense=one.selection_params.dense,
        logits_processors=processors,
    )


def use_first_layers_predictor(tiny: Tiny) -> None:
    """Give the model a predictor that reads with the model's own first layer, and so leaves the model dense."""
    model, tokenizer = tiny
    mx.random.seed(3)
    first, second = mx.random.normal((16, 64)), mx.random.normal((256, 16))
    mx.eval(first, second)
    head = Head(first, None, second, None, WIDTHS, layers=1)
    model.__dict__["predictor"] = SparsityPredictor(model.module, tokenizer, head, model.context_length)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)
