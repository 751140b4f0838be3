"""Generation against stock mlx-lm: the same tokens, dense or masked, also with mlx-lm's options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import QuantizedKVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from ifprune_mlx import History, Selection, generate, load
from ifprune_mlx.prompt_cache import DENSE, Span
from tests.ifprune_mlx.generating import TOKENS, A, B, Tiny, answer, assert_in_step, letters, tokens_of, until_end
from tests.ifprune_mlx.reference import greedy, mask_ffns, source_model
from tests.tiny import write_checkpoint


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
