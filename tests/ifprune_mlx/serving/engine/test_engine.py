"""The serving engine on real tiny models: what comes out of a crowd equals what each request gets alone."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlx_lm.sample_utils import make_logits_processors

from ifprune_mlx import BudgetError, load, make_selector, stream_generate
from ifprune_mlx.selection.selectors import Instruction
from ifprune_mlx.serving.engine.engine import Engine
from ifprune_mlx.serving.engine.request import RequestOutput, SamplingParams, SelectionParams
from tests.family_configs import tiny_config
from tests.ifprune_mlx.reference import random_selection
from tests.ifprune_mlx.serving.engine.engines import (
    CHOICES,
    END,
    A,
    Tiny,
    alone,
    ask,
    make_request,
    outputs_of,
    prompt,
    serving,
    stats_of,
    text_of,
    together,
    use_first_layers_predictor,
)
from tests.tiny import VOCABULARY, write_checkpoint


def test_a_batch_equals_each_request_alone(tiny: Tiny) -> None:
    requests = [make_request(prompt(seed, length), max_tokens=16) for seed, length in enumerate((20, 7, 1, 33, 2))]
    expected = [alone(tiny, one) for one in requests]
    with serving(tiny) as engine:
        answers = together(engine, *requests)
    assert [text_of(outputs) for outputs in answers] == expected
    assert {stats_of(outputs).batch for outputs in answers} == {5}
    assert {stats_of(outputs).selection for outputs in answers} == {A.hash}


def test_sixteen_requests_over_three_selections_and_dense(tiny: Tiny) -> None:
    names = ["A", "B", "dense", "A", "C", "B", "B", "A", "dense", "C", "A", "A", "C", "B", "dense", "A"]
    requests = [
        make_request(prompt(seed, 5 + 3 * seed % 11), CHOICES[name], max_tokens=6 + seed)
        for seed, name in enumerate(names)
    ]
    expected = [alone(tiny, one) for one in requests]
    tiny[0].switch(None)
    with serving(tiny, concurrency=4, patience=60) as engine:
        answers = together(engine, *requests)
        counters = engine.counters()
    for name, outputs, text in zip(names, answers, expected, strict=True):
        selection, stats = CHOICES[name], stats_of(outputs)
        assert text_of(outputs) == text
        assert stats.selection == (None if selection is None else selection.hash)
        assert stats.density == (1.0 if selection is None else selection.density)
        assert stats.finish_reason == "length"
    # From dense: to A, and to each other one once.
    assert counters.switches == 4
    assert (counters.requests, counters.failed, counters.cancelled) == (16, 0, 0)
    assert (counters.running, counters.waiting) == (0, 0)
    assert counters.completion_tokens == sum(one.max_tokens for one in requests)
    assert counters.prompt_tokens == sum(len(one.tokens) for one in requests)


def test_event_loops_of_several_threads_share_an_engine(tiny: Tiny) -> None:
    requests = [make_request(prompt(seed), CHOICES[name]) for seed, name in enumerate(["A", "B", "A", "dense", "B"])]
    expected = [alone(tiny, one) for one in requests]
    with serving(tiny) as engine, ThreadPoolExecutor(5) as threads:
        answers = list(threads.map(lambda one: ask(engine, one)[0], requests))
    assert answers == expected


@pytest.mark.parametrize("selector", ["static", "random", "activation"])
def test_selectors_select_as_generate_does(tiny: Tiny, selector: str) -> None:
    requests = [
        make_request(
            prompt(seed),
            selection_params=SelectionParams(selector=selector, density=density),
            instruction=f"instruction {seed}",
        )
        for seed, density in enumerate((0.5, 0.25, 0.5))
    ]
    expected = []
    for one in requests:
        options = {"selector": selector, "density": one.selection_params.density, "instruction": one.instruction}
        processors = make_logits_processors({END: -1000.0})
        responses = list(
            stream_generate(*tiny, list(one.tokens), max_tokens=12, logits_processors=processors, **options)
        )
        expected.append(("".join(r.text for r in responses), responses[-1].stats))
    with serving(tiny) as engine:
        answers = together(engine, *requests)
    for outputs, (text, wanted) in zip(answers, expected, strict=True):
        stats = stats_of(outputs)
        assert wanted is not None
        assert text_of(outputs) == text
        assert (stats.selection, stats.selector, stats.density) == (wanted.selection, selector, wanted.density)
        assert stats.batch == (1 if selector == "activation" else stats.batch)


# lfm2 has a cache of arrays beside those of keys and values, gemma2 and mistral mask in their own way.
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "lfm2", "qwen3_5"])
def test_other_families(tmp_path: Path, family: str) -> None:
    if family in ("lfm2", "qwen3_5"):
        config = tiny_config(family)
        assert config is not None
        path = write_checkpoint(tmp_path / "checkpoint", **(config | {"vocab_size": VOCABULARY}))
    else:
        path = write_checkpoint(tmp_path / "checkpoint", family)
    tiny = load(path)
    widths = [spec.d_ffn for spec in tiny[0].checkpoint.layout.ffns]
    some = [random_selection(widths, [width // 2 for width in widths], seed) for seed in range(2)]
    requests = [make_request(prompt(seed, length), some[seed % 2]) for seed, length in enumerate((12, 5, 9, 3))]
    expected = [alone(tiny, one) for one in requests]
    with serving(tiny) as engine:
        assert [text_of(outputs) for outputs in together(engine, *requests)] == expected
        # Once more, and on: from caches where they are kept.
        assert [text_of(outputs) for outputs in together(engine, *requests)] == expected
    tiny[0].close()


def test_a_family_that_does_not_batch_is_served_one_by_one(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ifprune_mlx.serving.engine.engine.can_batch", lambda model: False)
    penalties = SamplingParams(logit_bias={END: -1000.0}, repetition_penalty=1.3, frequency_penalty=0.5)
    requests = [
        make_request(prompt(seed), CHOICES[name], sampling=penalties) for seed, name in enumerate(["A", "B", "A", "A"])
    ]
    with serving(tiny, patience=60) as engine:
        single = together(engine, *requests)
        assert {stats_of(outputs).batch for outputs in single} == {1}
        assert engine.counters().switches == 2
        again, stats = ask(engine, requests[1])
        assert stats.cached_tokens == 18
    monkeypatch.undo()
    with serving(tiny) as engine:
        batched = together(engine, *requests)
    assert [text_of(outputs) for outputs in single] == [text_of(outputs) for outputs in batched]
    assert again == text_of(batched[1])


# Selectors and residencies that touch the model while others are decoded.


def test_selecting_with_the_models_own_layers_disturbs_no_running_job(tiny: Tiny) -> None:
    model = tiny[0]
    use_first_layers_predictor(tiny)
    learned = [
        make_request(
            prompt(seed),
            selection_params=SelectionParams(selector="learned", density=0.5),
            instruction=f"{seed} instruction {seed}",
        )
        for seed in range(4)
    ]
    expected = []
    for one in learned:
        model.switch(None)
        selection = make_selector(model, "learned").select(
            Instruction(one.instruction, one.tokens), model.keep(density=0.5)
        )
        expected.append((selection.selection.hash, alone(tiny, make_request(one.tokens, selection.selection))))
    assert len({selected for selected, _ in expected}) > 1
    running = make_request(prompt(9), A, max_tokens=150)
    whole = alone(tiny, running)

    async def crowd(engine: Engine) -> tuple[str, list[list[RequestOutput]]]:
        stream = engine.stream(running)
        said = (await stream.__anext__()).text
        others = asyncio.gather(*(outputs_of(engine, one) for one in learned))
        async for output in stream:
            said += output.text
        return said, await others

    with serving(tiny, patience=60) as engine:
        said, others = asyncio.run(crowd(engine))
    assert said == whole
    assert [(stats_of(outputs).selection, text_of(outputs)) for outputs in others] == expected
    assert {stats_of(outputs).selector for outputs in others} == {"learned"}


def test_a_model_on_ssd_is_served_but_never_dense(tiny: Tiny, tiny_checkpoint: Path) -> None:
    requests = [make_request(prompt(seed), CHOICES[name]) for seed, name in enumerate("ABAC")]
    expected = [alone(tiny, one) for one in requests]
    streamed = load(tiny_checkpoint, residency="ssd")
    with serving(streamed) as engine:
        assert [text_of(outputs) for outputs in together(engine, *requests)] == expected
        for choice in (SelectionParams(dense=True), SelectionParams(selector="activation")):
            with pytest.raises(BudgetError, match="residency ram"):
                ask(engine, make_request(selection_params=choice))
    streamed[0].close()
