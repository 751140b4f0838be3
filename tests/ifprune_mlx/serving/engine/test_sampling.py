"""How the serving engine draws tokens, and the log-probabilities it gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ifprune_mlx.serving.engine.request import Request, SamplingParams
from tests.ifprune_mlx.serving.engine.engines import (
    END,
    A,
    Tiny,
    alone,
    ask,
    make_request,
    prompt,
    serving,
    text_of,
    together,
)


def test_the_same_seed_draws_the_same_tokens_whoever_is_beside(tiny: Tiny) -> None:
    def drawn(seed: int | None, **settings: Any) -> Request:
        sampling = SamplingParams(temperature=1.0, seed=seed, logit_bias={END: -1000.0}, **settings)
        return make_request(prompt(1), sampling=sampling, max_tokens=20)

    with serving(tiny) as engine:
        for settings in ({}, {"top_p": 0.9}, {"top_k": 40, "min_p": 0.05}, {"top_k": 10**6}):
            text = ask(engine, drawn(7, **settings))[0]
            crowd = [
                drawn(8),
                drawn(7, **settings),
                drawn(None),
                make_request(prompt(3)),
                drawn(7, **settings),
                drawn(None),
            ]
            answers = [text_of(outputs) for outputs in together(engine, *crowd)]
            assert answers[1] == answers[4] == text
            assert len({text, answers[0], answers[2], answers[5]}) == 4
            assert answers[3] == alone(tiny, make_request(prompt(3)))
        assert ask(engine, drawn(-1))[0] == ask(engine, drawn(-1))[0]


def test_a_temperature_draws_by_the_models_own_distribution(tiny: Tiny) -> None:
    bias = {100: 50.0, 101: 50.0 + float(np.log(3.0))}
    with serving(tiny, concurrency=32, queue=400) as engine:
        one = make_request(max_tokens=1, logprobs=2, sampling=SamplingParams(temperature=1.0, logit_bias=bias))
        answers = together(engine, *[replace(one, sampling=replace(one.sampling, seed=seed)) for seed in range(300)])
    tokens = [outputs[-1].tokens[0] for outputs in answers]
    top = {id: np.exp(logprob) for id, _, logprob in tokens[0].top}
    assert set(top) == {100, 101}
    share = np.mean([token.id == 101 for token in tokens])
    assert share == pytest.approx(top[101], abs=4 * np.sqrt(top[100] * top[101] / 300))


def test_logprobs_are_the_models(tiny: Tiny) -> None:
    model, _ = tiny
    one = make_request(logprobs=3, sampling=SamplingParams())
    with serving(tiny) as engine:
        outputs = together(engine, one, make_request(prompt(2)))[0]
    tokens = [token for output in outputs for token in output.tokens]
    assert "".join(token.text for token in tokens) == text_of(outputs)
    model.switch(A)
    read = list(one.tokens)
    for token in tokens:
        logits = model(mx.array([read]))[0, -1]
        logprobs = np.array(logits - mx.logsumexp(logits))
        assert token.logprob == pytest.approx(logprobs[token.id], abs=1e-4)
        assert [id for id, _, _ in token.top] == list(np.argsort(-logprobs)[:3])
        assert [logprob for _, _, logprob in token.top] == pytest.approx(np.sort(logprobs)[::-1][:3], abs=1e-4)
        assert token.top[0][0] == token.id
        read.append(token.id)
