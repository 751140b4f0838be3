"""Generation against stock mlx-lm: the same tokens, dense or masked, whatever was read, kept or cancelled before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import QuantizedKVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from ifprune_mlx import (
    BudgetError,
    GenerationResponse,
    History,
    IfpruneError,
    Model,
    PromptError,
    Selection,
    SelectionError,
    generate,
    load,
    make_selector,
    stream_generate,
)
from ifprune_mlx.history import DENSE, Span
from ifprune_mlx.prompts import encode_prompt
from ifprune_mlx.selectors import Instruction, Selected
from tests.tiny import write_checkpoint

from .reference import greedy, mask_ffns, random_selection, source_model

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


# The same tokens as stock mlx-lm.


def test_dense_generation_equals_stock_mlx_lm(tiny: Tiny, tiny_checkpoint: Path) -> None:
    expected = greedy(source_model(tiny_checkpoint), TOKENS, 24)
    responses = answer(tiny, TOKENS, dense=True, max_tokens=24)
    assert tokens_of(responses) == until_end(expected)


@pytest.mark.parametrize("selection", [A, B], ids=["A", "B"])
def test_sliced_generation_equals_the_masked_stock_model(
    tiny: Tiny, tiny_checkpoint: Path, selection: Selection
) -> None:
    expected = greedy(mask_ffns(source_model(tiny_checkpoint), selection), TOKENS, 24)
    assert tokens_of(answer(tiny, TOKENS, selection=selection, max_tokens=24)) == until_end(expected)
    assert expected != greedy(source_model(tiny_checkpoint), TOKENS, 24)  # the mask does make a difference


def test_the_activation_selector_decodes_on_its_selection_from_a_dense_prefill(
    tiny: Tiny, tiny_checkpoint: Path
) -> None:
    history = History.empty(tiny[0])
    responses = answer(tiny, TOKENS, selector="activation", density=0.25, prompt_cache=history, max_tokens=16)
    selection = tiny[0].selection
    assert selection is not None
    assert history.spans == [Span(19, DENSE), Span(17, selection.hash)]

    dense = source_model(tiny_checkpoint)
    cache = make_prompt_cache(dense)
    dense(mx.array([TOKENS[:-1]]), cache=cache)
    expected = greedy(mask_ffns(dense, selection), TOKENS[-1:], 16, prompt_cache=cache)
    assert tokens_of(responses) == until_end(expected)


def test_generate_returns_the_text_that_is_streamed(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"selection": A, "max_tokens": 9, "logits_processors": [letters]}
    streamed = "".join(response.text for response in answer(tiny, "What?", **options))
    assert streamed == generate(*tiny, "What?", **options)
    assert len(streamed) == 9
    assert capsys.readouterr().out == ""
    generate(*tiny, "What?", verbose=True, **options)
    assert capsys.readouterr().out == streamed + "\n"


# What the prompt may be.


def test_text_ids_and_messages_are_the_same_prompt(tiny: Tiny) -> None:
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    messages = [{"role": "user", "content": "Hi"}]
    ids = encode_prompt(tiny[1], text)
    assert encode_prompt(tiny[1], messages) == ids
    assert encode_prompt(tiny[1], tuple(ids)) == ids
    answers = [tokens_of(answer(tiny, p, selection=A, max_tokens=4)) for p in (text, messages, ids)]
    assert answers[0] == answers[1] == answers[2]


def test_the_selector_reads_the_first_user_message(tiny: Tiny) -> None:
    class Spy:
        name = "spy"

        def select(self, instruction: Instruction, keep: tuple[int, ...]) -> Selected:
            seen.append(instruction.text)
            return Selected(A)

    seen: list[str] = []
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two"},
    ]
    answer(tiny, chat, selector=Spy(), max_tokens=1)
    answer(tiny, "Hello", selector=Spy(), max_tokens=1)
    answer(tiny, tiny[1].encode("Hello"), selector=Spy(), max_tokens=1)
    answer(tiny, "Hello", instruction="Other", selector=Spy(), max_tokens=1)
    assert seen == ["One", "Hello", "Hello", "Other"]


@pytest.mark.parametrize("prompt", ["", "   \n", [], ()])
def test_an_empty_prompt_is_refused(tiny: Tiny, prompt: Any) -> None:
    with pytest.raises(PromptError, match="the prompt is empty"):
        answer(tiny, prompt, selection=A)


def test_a_prompt_as_long_as_the_context_is_refused(tiny: Tiny) -> None:
    with pytest.raises(PromptError, match="512 tokens, the model's context holds 512; shorten it"):
        answer(tiny, [5] * 512, selection=A)
    assert tiny[0].selection is None  # refused before anything was switched
    assert answer(tiny, [5] * 511, selection=A, max_tokens=1)[-1].finish_reason == "length"


def test_history_counts_towards_the_context(tiny: Tiny) -> None:
    history = History.empty(tiny[0])
    answer(tiny, [5] * 500, dense=True, prompt_cache=history, max_tokens=2)
    with pytest.raises(PromptError, match="512 tokens"):
        answer(tiny, [5] * 10, dense=True, prompt_cache=history)
    assert_in_step(history)


@pytest.mark.parametrize("count", [0, -2, -100])
def test_a_number_of_tokens_that_makes_no_sense_is_refused(tiny: Tiny, count: int) -> None:
    with pytest.raises(PromptError, match="give a number above 0, or -1 for no limit"):
        answer(tiny, TOKENS, selection=A, max_tokens=count)


def test_one_token_can_be_asked_for(tiny: Tiny) -> None:
    history = History.empty(tiny[0])
    (response,) = answer(tiny, TOKENS, selection=A, max_tokens=1, prompt_cache=history)
    assert response.finish_reason == "length"
    assert response.stats is not None
    assert (response.stats.completion_tokens, response.stats.tokens_per_s) == (1, 0.0)
    assert history.tokens == [*TOKENS, response.token]
    assert_in_step(history)


def test_minus_one_generates_until_the_end_token(tiny: Tiny) -> None:
    history = History.empty(tiny[0])
    responses = answer(tiny, TOKENS, selection=A, max_tokens=-1, sampler=Countdown(30), prompt_cache=history)
    assert responses[-1].finish_reason == "stop"
    assert tokens_of(responses) == [70] * 30 + [END]
    assert history.tokens == TOKENS + [70] * 30 + [END]
    assert_in_step(history)


def test_an_answer_may_be_the_end_token_alone(tiny: Tiny) -> None:
    history = History.empty(tiny[0])
    (response,) = answer(tiny, TOKENS, selection=A, sampler=Countdown(0), prompt_cache=history)
    assert (response.text, response.token, response.finish_reason) == ("", END, "stop")
    assert_in_step(history)


class Countdown:
    """A sampler: the letter with id 70 so many times, then the end token."""

    def __init__(self, letters: int) -> None:
        self._left = letters

    def __call__(self, logprobs: mx.array) -> mx.array:
        self._left -= 1
        return mx.array([70 if self._left >= 0 else END])


def letters(tokens: mx.array, logits: mx.array) -> mx.array:
    """A logits processor that allows letters only, so that text and tokens correspond one to one."""
    ids = mx.arange(logits.shape[-1])
    return mx.where((ids >= 70) & (ids < 94), logits, -mx.inf)


# What mlx-lm's options do.


def test_samplers_and_processors_are_passed_through(tiny: Tiny, tiny_checkpoint: Path) -> None:
    def run(seed: int) -> list[int]:
        mx.random.seed(seed)
        sampler, processors = make_sampler(temp=1.0, top_k=50), make_logits_processors(repetition_penalty=1.5)
        return tokens_of(
            answer(tiny, TOKENS, selection=A, max_tokens=12, sampler=sampler, logits_processors=[*processors, letters])
        )

    reference = mask_ffns(source_model(tiny_checkpoint), A)
    mx.random.seed(3)
    expected = greedy(
        reference,
        TOKENS,
        12,
        sampler=make_sampler(temp=1.0, top_k=50),
        logits_processors=[*make_logits_processors(repetition_penalty=1.5), letters],
    )
    assert run(3) == expected
    assert run(4) != expected
    assert all(70 <= token < 94 for token in expected)


def test_the_kv_cache_can_be_quantized(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", hidden_size=128, num_attention_heads=4, head_dim=32)
    model, tokenizer = load(folder)
    history = History.empty(model)
    options: dict[str, Any] = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    responses = answer((model, tokenizer), TOKENS, selection=A, max_tokens=8, prompt_cache=history, **options)
    assert all(isinstance(cache, QuantizedKVCache) for cache in history.kv)
    assert_in_step(history)
    expected = greedy(mask_ffns(source_model(folder), A), TOKENS, 8, **options)
    assert tokens_of(responses) == until_end(expected)

    more = answer((model, tokenizer), [50, 51], selection=A, max_tokens=4, prompt_cache=history, **options)
    assert more[-1].stats is not None
    assert more[-1].stats.reused_tokens == 28
    history.save(tmp_path / "cache.safetensors", model)
    assert History.load(tmp_path / "cache.safetensors", model).tokens == history.tokens
    # Another selection trims the quantized cache to nothing and reads all of it again.
    responses = answer((model, tokenizer), [52], selection=B, max_tokens=2, prompt_cache=history, **options)
    assert responses[-1].stats is not None
    assert responses[-1].stats.reused_tokens == 0
    assert_in_step(history)


@pytest.mark.parametrize("selector", ["random", "activation"])
def test_a_bounded_kv_cache_stays_bounded_when_it_is_made_anew(tmp_path: Path, selector: str) -> None:
    tiny = load(write_checkpoint(tmp_path / "checkpoint", "qwen2"))  # its caches are mlx-lm's own, so bounds apply
    history = History.empty(tiny[0], max_kv_size=16)
    for prompt in (TOKENS, [50, 51, 52]):
        answer(tiny, prompt, selector=selector, max_tokens=4, prompt_cache=history, max_kv_size=16)
        assert [(type(cache), cache.max_size) for cache in history.kv] == [(RotatingKVCache, 16)] * 2
        assert_in_step(history)
    assert len(history.tokens) == 31


def test_small_prefill_steps_give_the_same_answer(tiny: Tiny) -> None:
    done: list[tuple[int, int]] = []
    options: dict[str, Any] = {"selection": A, "max_tokens": 8}
    stepped = answer(
        tiny, TOKENS, prefill_step_size=4, progress=lambda read, total: done.append((read, total)), **options
    )
    assert tokens_of(stepped) == tokens_of(answer(tiny, TOKENS, **options))
    assert done == [(0, 20), (4, 20), (8, 20), (12, 20), (16, 20), (19, 20), (20, 20)]


# Going on from a history.


@pytest.mark.parametrize("options", [{"dense": True}, {"selection": A}], ids=["dense", "sliced"])
def test_a_prompt_in_two_parts_equals_the_whole(tiny: Tiny, options: dict[str, Any]) -> None:
    history = History.empty(tiny[0])
    first = answer(tiny, TOKENS[:12], max_tokens=3, prompt_cache=history, **options)
    read = TOKENS[:12] + tokens_of(first)
    second = answer(tiny, TOKENS[12:], max_tokens=8, prompt_cache=history, **options)
    whole = answer(tiny, read + TOKENS[12:], max_tokens=8, **options)
    assert tokens_of(second) == tokens_of(whole)
    assert second[-1].stats is not None
    assert (second[-1].stats.reused_tokens, second[-1].stats.prompt_tokens) == (15, 23)
    assert whole[-1].stats is not None
    assert whole[-1].stats.reused_tokens == 0
    assert history.tokens == read + TOKENS[12:] + tokens_of(second)
    assert_in_step(history)


def test_reprefill_answers_as_a_fresh_history_does(tiny: Tiny) -> None:
    history = History.empty(tiny[0])
    answer(tiny, TOKENS, selection=A, max_tokens=6, prompt_cache=history)
    read = [*history.tokens, 50, 51]
    second = answer(tiny, [50, 51], selection=B, max_tokens=8, prompt_cache=history)

    assert tokens_of(second) == tokens_of(answer(tiny, read, selection=B, max_tokens=8))
    assert second[-1].stats is not None
    assert second[-1].stats.reused_tokens == 0
    assert history.spans == [Span(len(read) + 8, B.hash)]
    assert_in_step(history)


@pytest.mark.parametrize("then", [A, B, None], ids=["A", "B", "dense"])
@pytest.mark.parametrize("first", [A, B, None], ids=["A", "B", "dense"])
def test_only_entries_of_the_same_selection_are_gone_on_from(
    tiny: Tiny, first: Selection | None, then: Selection | None
) -> None:
    def options(selection: Selection | None) -> dict[str, Any]:
        return {"dense": True} if selection is None else {"selection": selection}

    history = History.empty(tiny[0])
    answer(tiny, TOKENS, max_tokens=6, prompt_cache=history, **options(first))
    read = [*history.tokens, 50]
    second = answer(tiny, [50], max_tokens=12, prompt_cache=history, **options(then))
    fresh = answer(tiny, read, max_tokens=12, **options(then))
    assert tokens_of(second) == tokens_of(fresh)
    assert [np.array(r.logprobs) for r in second] == [pytest.approx(np.array(r.logprobs), abs=1e-4) for r in fresh]
    assert second[-1].stats is not None
    assert second[-1].stats.reused_tokens == (len(read) - 1 if first is then else 0)
    assert [span.owner for span in history.spans] == [DENSE if then is None else then.hash]


def test_keep_goes_on_from_what_another_selection_computed(tiny: Tiny, tiny_checkpoint: Path) -> None:
    history = History.empty(tiny[0])
    answer(tiny, TOKENS, selection=A, max_tokens=6, prompt_cache=history)
    read = list(history.tokens)
    second = answer(tiny, [50, 51], selection=B, max_tokens=8, prompt_cache=history, on_switch="keep")
    assert history.spans == [Span(26, A.hash), Span(10, B.hash)]
    assert second[-1].stats is not None
    assert second[-1].stats.reused_tokens == 26
    assert_in_step(history)

    one, other = (mask_ffns(source_model(tiny_checkpoint), selection) for selection in (A, B))
    cache = make_prompt_cache(one)
    one(mx.array([read]), cache=cache)
    assert tokens_of(second) == until_end(greedy(other, [50, 51], 8, prompt_cache=cache))


def test_keep_with_the_activation_selector_reads_only_the_news_densely(tiny: Tiny, tiny_checkpoint: Path) -> None:
    history = History.empty(tiny[0])
    answer(tiny, TOKENS, selection=A, max_tokens=6, prompt_cache=history)
    read = list(history.tokens)
    second = answer(
        tiny, [50, 51, 52], selector="activation", density=0.25, max_tokens=6, prompt_cache=history, on_switch="keep"
    )
    selection = tiny[0].selection
    assert selection is not None
    assert history.spans == [Span(26, A.hash), Span(2, DENSE), Span(7, selection.hash)]
    assert_in_step(history)

    dense = source_model(tiny_checkpoint)
    cache = make_prompt_cache(dense)
    mask_ffns(source_model(tiny_checkpoint), A)(mx.array([read]), cache=cache)
    dense(mx.array([[50, 51]]), cache=cache)
    assert tokens_of(second) == until_end(greedy(mask_ffns(dense, selection), [52], 6, prompt_cache=cache))


def test_a_prompt_that_is_in_the_history_to_its_last_token_reads_that_one_again(tiny: Tiny) -> None:
    history = History.empty(tiny[0])
    answer(tiny, TOKENS, selection=A, max_tokens=1, prompt_cache=history)
    read = list(history.tokens)
    second = answer(tiny, [], selection=A, max_tokens=5, prompt_cache=history)
    assert tokens_of(second) == tokens_of(answer(tiny, read, selection=A, max_tokens=5))
    assert_in_step(history)


def test_an_unknown_way_to_switch_is_refused(tiny: Tiny) -> None:
    with pytest.raises(IfpruneError, match="on_switch 'forget' is unknown; choose reprefill or keep"):
        answer(tiny, TOKENS, selection=A, on_switch="forget")


# Cancelling, failing, stopping early.


@pytest.mark.parametrize("on_switch", ["reprefill", "keep"])
@pytest.mark.parametrize("selector", ["random", "activation", "dense"])
@pytest.mark.parametrize("times", range(14))
def test_cancelling_anywhere_leaves_a_history_that_can_be_gone_on_from(
    tiny: Tiny, selector: str, on_switch: str, times: int
) -> None:
    how: dict[str, Any] = {"dense": True} if selector == "dense" else {"selector": selector, "density": 0.25}
    history = History.empty(tiny[0])
    answer(tiny, TOKENS[:5], selection=A, max_tokens=2, prompt_cache=history)
    read = list(history.tokens)
    options = {"prompt_cache": history, "on_switch": on_switch, "prefill_step_size": 4}

    responses = answer(tiny, TOKENS, cancel=asked(times), max_tokens=4, **options, **how)

    stats = responses[-1].stats
    assert stats is not None
    assert stats.finish_reason == responses[-1].finish_reason
    assert stats.completion_tokens == responses[-1].generation_tokens
    if stats.completion_tokens < 4 and END not in tokens_of(responses):
        assert stats.finish_reason == "cancelled"
    assert_in_step(history)
    said = [token for token in tokens_of(responses) if token >= 0]
    assert history.tokens == (read + TOKENS + said)[: len(history.tokens)]
    if said:
        assert history.tokens == read + TOKENS + said

    # Going on under a selection of its own equals a fresh start, so nothing stale is left in any cache.
    tokens = [*history.tokens, 50]
    after = answer(tiny, [50], selection=B, max_tokens=3, prompt_cache=history)
    assert tokens_of(after) == tokens_of(answer(tiny, tokens, selection=B, max_tokens=3))
    assert_in_step(history)


def test_cancelling_at_once_leaves_the_live_selection(tiny: Tiny) -> None:
    tiny[0].switch(A)
    (response,) = answer(tiny, TOKENS, selector="activation", cancel=lambda: True)
    assert response.finish_reason == "cancelled"
    assert (response.text, response.token) == ("", -1)
    assert tiny[0].selection is A


def test_a_consumer_that_stops_listening_leaves_the_history_in_step(tiny: Tiny) -> None:
    history = History.empty(tiny[0])
    stream = stream_generate(*tiny, TOKENS, selection=A, prompt_cache=history, max_tokens=9)
    said = [next(stream).token, next(stream).token]
    stream.close()  # type: ignore[attr-defined]
    assert history.tokens == TOKENS + said
    assert_in_step(history)


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


@pytest.mark.parametrize("where", ["logits_processors", "progress"])
@pytest.mark.parametrize("after", range(9))
@pytest.mark.parametrize("on_switch", ["reprefill", "keep"])
@pytest.mark.parametrize("selector", ["random", "activation"])
def test_a_callback_that_raises_leaves_a_history_that_can_be_gone_on_from(
    tiny: Tiny, selector: str, on_switch: str, after: int, where: str
) -> None:
    history = History.empty(tiny[0])
    answer(tiny, TOKENS[:5], selection=A, max_tokens=2, prompt_cache=history)
    option = {where: [failing(after)] if where == "logits_processors" else failing(after)}
    options = {"prompt_cache": history, "on_switch": on_switch, "prefill_step_size": 4, "max_tokens": 12}
    with suppress(Broken):  # not every selector reports progress nine times
        answer(tiny, TOKENS, selector=selector, **options, **option)
        assert where == "progress"
        assert after >= 3
    assert_in_step(history)
    tokens = [*history.tokens, 50]
    after_it = answer(tiny, [50], selection=B, max_tokens=3, prompt_cache=history)
    assert tokens_of(after_it) == tokens_of(answer(tiny, tokens, selection=B, max_tokens=3))


@pytest.mark.parametrize("after", range(8))
def test_a_model_call_that_dies_between_two_layers_leaves_no_half_read_token(tiny: Tiny, after: int) -> None:
    # As Ctrl-C may: the first layer's cache has the tokens by then, the second layer's has not.
    history = History.empty(tiny[0])
    tiny[0].down_leaves[0].observer = failing(after)
    with pytest.raises(Broken):
        answer(tiny, TOKENS, selection=A, prompt_cache=history, prefill_step_size=4, max_tokens=12)
    tiny[0].down_leaves[0].observer = None
    assert_in_step(history)
    fresh = tokens_of(answer(tiny, [*history.tokens, 50], selection=A, max_tokens=3))
    assert tokens_of(answer(tiny, [50], selection=A, max_tokens=3, prompt_cache=history)) == fresh


def test_a_selection_for_another_model_is_refused_before_anything_is_read(tiny: Tiny) -> None:
    history = History.empty(tiny[0])
    with pytest.raises(SelectionError, match="another model"):
        answer(tiny, TOKENS, selection=random_selection((64,), (8,), seed=1), prompt_cache=history)
    assert history.tokens == []


def test_a_budget_that_cannot_be_met_is_refused(tiny: Tiny) -> None:
    for budget in ({"density": 2}, {"density": 0.5, "active_parameters": 100}, {"memory": 1}):
        with pytest.raises(BudgetError):
            answer(tiny, TOKENS, **budget)


# Figures.


def test_the_last_response_carries_consistent_figures(tiny: Tiny) -> None:
    model = tiny[0]
    history = History.empty(model)
    seen: list[GenerationResponse] = []
    stream: Iterator[GenerationResponse] = stream_generate(
        *tiny, "What?", selector="random", density=0.25, max_tokens=6, prompt_cache=history, logits_processors=[letters]
    )
    seen.extend(stream)
    assert [response.finish_reason for response in seen] == [None] * 5 + ["length"]
    assert [response.stats for response in seen[:-1]] == [None] * 5
    assert [response.generation_tokens for response in seen] == list(range(1, 7))
    assert {response.prompt_tokens for response in seen} == {5}
    stats = seen[-1].stats
    assert stats is not None
    assert model.selection is not None
    assert (stats.selector, stats.selection, stats.density) == ("random", model.selection.hash, 0.25)
    assert (stats.prompt_tokens, stats.completion_tokens, stats.reused_tokens) == (5, 6, 0)
    assert (stats.finish_reason, stats.overlap) == ("length", None)
    per_neuron = 3 * 64
    assert stats.total_parameters - stats.active_parameters == 2 * (128 - 32) * per_neuron
    assert min(stats.select_s, stats.switch_s, stats.prefill_s, stats.decode_s) > 0
    assert stats.tokens_per_s == pytest.approx(5 / stats.decode_s)
    assert stats.peak_memory > 0
    assert all(isinstance(value, int | float | str) or value is None for value in asdict(stats).values())

    first = model.selection
    again = answer(tiny, "Else?", selector="random", density=0.25, max_tokens=1)[-1].stats
    assert again is not None
    assert again.overlap == pytest.approx(model.selection.overlap(first))
    assert 0 < again.overlap < 1

    dense = answer(tiny, "What?", dense=True, max_tokens=1)[-1].stats
    assert dense is not None
    assert (dense.selector, dense.selection, dense.density, dense.overlap) == (DENSE, None, 1.0, None)
    assert dense.active_parameters == dense.total_parameters


def test_the_random_selector_follows_the_seed(tiny: Tiny) -> None:
    hashes = set()
    for seed in (0, 0, 1):
        stats = answer(tiny, "What?", selector="random", seed=seed, max_tokens=1)[-1].stats
        assert stats is not None
        hashes.add(stats.selection)
    assert len(hashes) == 2


def test_a_selector_object_and_its_name_select_the_same(tiny: Tiny) -> None:
    named = answer(tiny, TOKENS, selector="static", density=0.5, max_tokens=4)
    made = answer(tiny, TOKENS, selector=make_selector(tiny[0], "static"), density=0.5, max_tokens=4)
    assert named[-1].stats is not None
    assert made[-1].stats is not None
    assert named[-1].stats.selection == made[-1].stats.selection
    assert tokens_of(named) == tokens_of(made)
