"""Thoughts in the engine: their budget, and stop strings that do not count in them."""

from __future__ import annotations

import pytest

from ifprune_mlx.serving.engine.engine import Engine
from ifprune_mlx.serving.engine.output_processor import OutputProcessor
from ifprune_mlx.serving.engine.request import Request, ThinkingBudget
from ifprune_mlx.thinking import Thinking
from tests.ifprune_mlx.serving.engine.engines import Tiny, make_request, prompt, serving, together

CLOSING = (70, 71, 72)


def said(engine: Engine, *requests: Request) -> list[list[int]]:
    """The tokens of answers that are computed together."""
    return [[token.id for output in outputs for token in output.tokens] for outputs in together(engine, *requests)]


@pytest.mark.parametrize("batches", [True, False])
def test_a_budget(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, batches: bool) -> None:
    if not batches:
        monkeypatch.setattr("ifprune_mlx.serving.engine.engine.can_batch", lambda model: False)
    with serving(tiny) as engine:
        plain, other = make_request(logprobs=0), make_request(prompt(1), logprobs=0)
        [free], [neighbour] = said(engine, plain), said(engine, other)

        def bounded(tokens: int, start: tuple[int, ...] = (), end: tuple[int, ...] = (71,)) -> Request:
            budget = ThinkingBudget(tokens, start, end, CLOSING)
            return make_request(logprobs=0, thinking_budget=budget)

        for tokens in (1, 4):
            [closed, beside] = said(engine, bounded(tokens), other)
            assert closed[: tokens + 3] == [*free[:tokens], *CLOSING]
            assert beside == neighbour
        [begun] = said(engine, bounded(4, start=(free[0],)))
        assert begun[:7] == [*free[:4], *CLOSING]
        for unbounded in (bounded(4, start=(free[0], 9999)), bounded(4, end=tuple(free[1:3])), bounded(100)):
            assert said(engine, unbounded) == [free]  # no thoughts, thoughts that have ended, enough for all


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    ("text", "answer"),
    [("<think>a STOP b</think>c STOP d", "<think>a STOP b</think>c "), ("<think>a STOP", "<think>a STOP")],
)
def test_stop_strings(tiny: Tiny, begun: bool, text: str, answer: str) -> None:
    _, tokenizer = tiny
    thinking = Thinking("<think>", "</think>", begun=begun)
    processor = OutputProcessor(make_request(stop=("STOP",), thinking=thinking), tokenizer)
    text, answer = (one.removeprefix("<think>") if begun else one for one in (text, answer))
    final, ids = "", tokenizer.encode(text, add_special_tokens=False)
    for at, token in enumerate(ids, 1):
        final += processor.add(token, None, "length" if at == len(ids) else None)[0]  # type: ignore[arg-type]
        if processor.finish_reason is not None:
            break
    assert final == answer
    assert processor.matched_stop == ("STOP" if "d" in text else None)
