"""mlx-lm's options in every family: bounded and quantized KV caches, and sampling values at the edge of numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import QuantizedKVCache, RotatingKVCache

from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx import History, IfpruneError, Session, load
from ifprune_mlx.generation import make_sampler, usable_temperature
from tests.family_configs import write_family
from tests.ifprune_mlx.generating import TOKENS, A, Tiny, answer, tokens_of
from tests.tiny import write_checkpoint

GEMMA3 = {"model_type": "gemma3_text", "sliding_window": 8, "sliding_window_pattern": 2, "head_dim": 32}


def family(folder: Path, name: str) -> Tiny:
    """A tiny model: of `tests.tiny`, a gemma 3 with layers of both kinds, or of `tests.family_configs`."""
    if name == "gemma3":
        return load(write_checkpoint(folder / "checkpoint", "gemma2", **GEMMA3))
    if name in ("llama", "mistral", "qwen2", "gemma2"):
        return load(write_checkpoint(folder / "checkpoint", name, head_dim=32))
    write_family(folder / "source", name)
    convert(open_source(folder / "source"), folder / "checkpoint", Options())
    return load(folder / "checkpoint")


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gemma3", "ministral3", "olmo3", "lfm2"])
@pytest.mark.parametrize("size", [3, 16])
def test_the_kv_cache_is_bounded_in_families_with_caches_of_their_own(tmp_path: Path, name: str, size: int) -> None:
    tiny = family(tmp_path, name)
    history = History.empty(tiny[0], size)
    bounded = answer(tiny, TOKENS + TOKENS, dense=True, max_tokens=12, prompt_cache=history, prefill_step_size=4)
    rotating = [cache for cache in history.kv if hasattr(cache, "keys")]
    assert rotating
    for cache in rotating:
        assert type(cache) is RotatingKVCache
        assert cache.max_size <= size
        assert cache.keys.shape[2] <= size
    assert len(bounded) > 0
    for start in (History.empty(tiny[0], 64), None):  # a bound that is not reached changes nothing
        wide = answer(tiny, TOKENS, dense=True, max_tokens=4, prompt_cache=start, max_kv_size=64)
        assert tokens_of(wide) == tokens_of(answer(tiny, TOKENS, dense=True, max_tokens=4))


def test_a_bound_is_what_a_conversation_reads_under_too(tmp_path: Path) -> None:
    chat = Session(*family(tmp_path, "llama"), selector="static", max_kv_size=24)
    for text in ("One", "Two", "Three"):
        chat.ask(text, max_tokens=4)
        assert [cache.keys.shape[2] <= 24 + 1 for cache in chat.history.kv] == [True, True]


@pytest.mark.parametrize("name", ["falcon_h1", "baichuan_m1"])
def test_families_whose_caches_cannot_be_bounded_say_so(tmp_path: Path, name: str) -> None:
    tiny = family(tmp_path, name)
    with pytest.raises(IfpruneError, match=r"max_kv_size 16: this model's caches \(CacheList\) cannot be bounded"):
        answer(tiny, TOKENS, dense=True, max_kv_size=16)
    with pytest.raises(IfpruneError, match="cannot be bounded"):
        Session(*tiny, max_kv_size=16)


@pytest.mark.parametrize("size", [0, -1])
def test_a_bound_below_one_is_refused(tiny: Tiny, size: int) -> None:
    with pytest.raises(IfpruneError, match=f"max_kv_size is {size}"):
        answer(tiny, TOKENS, dense=True, max_kv_size=size)


@pytest.mark.parametrize("own", [None, 16])
def test_a_bound_beside_a_cache_with_another_is_refused(tiny: Tiny, own: int | None) -> None:
    with pytest.raises(IfpruneError, match=f"max_kv_size 8: the given prompt_cache has its own bound, {own}"):
        answer(tiny, TOKENS, dense=True, prompt_cache=History.empty(tiny[0], own), max_kv_size=8)


QUANTIZED: dict[str, Any] = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}


def test_plain_caches_are_quantized_beside_those_that_rotate(tmp_path: Path) -> None:
    tiny = family(tmp_path, "gemma3")
    history = History.empty(tiny[0])
    answer(tiny, TOKENS, dense=True, max_tokens=6, prompt_cache=history, **QUANTIZED)
    assert [type(cache) for cache in history.kv] == [RotatingKVCache, QuantizedKVCache]
    chat = Session(*tiny, selector="static", **QUANTIZED)
    for text in ("One", "Two"):
        chat.ask(text, max_tokens=4)
        assert QuantizedKVCache in {type(cache) for cache in chat.history.kv}


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("llama", {"max_kv_size": 16}, "every layer has a RotatingKVCache"),
        ("falcon_h1", {}, "every layer has a CacheList"),
        ("llama", {"kv_group_size": 64}, "in groups of 64"),  # heads of 32
        ("llama", {"kv_bits": 7}, "kv_bits 7"),
    ],
)
def test_a_cache_that_cannot_be_quantized_is_one_line(
    tmp_path: Path, name: str, options: dict[str, Any], reason: str
) -> None:
    tiny = family(tmp_path, name)
    history = History.empty(tiny[0], options.get("max_kv_size"))
    with pytest.raises(IfpruneError, match=reason) as caught:
        answer(tiny, TOKENS, dense=True, max_tokens=4, prompt_cache=history, **(QUANTIZED | options))
    assert "\n" not in str(caught.value)
    assert history.tokens == []


# Sampling.


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1e-40},
        {"temperature": 5e-324},
        {"temperature": 1e-6},
        {"temperature": 1.0, "top_p": 1e-300},
        {"temperature": 1.0, "top_p": 1e-40},
        {"temperature": 1e4, "top_p": 5e-324},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 1e300, "top_k": 1},
    ],
    ids=str,
)
def test_values_that_leave_one_token_take_the_likeliest(values: dict[str, float], dtype: mx.Dtype) -> None:
    mx.random.seed(0)
    logprobs = mx.random.normal((1, 4000), key=mx.random.key(1)).astype(mx.float32) * 4
    logprobs = (logprobs - mx.logsumexp(logprobs)).astype(dtype)
    # Of equal ones, which float16 and bfloat16 have, any will do.
    found = [float(logprobs[0, make_sampler(**values)(logprobs).item()]) for _ in range(20)]
    assert found == [float(logprobs.max())] * 20


def test_a_huge_temperature_still_draws_among_what_the_filters_leave() -> None:
    mx.random.seed(0)
    logprobs = mx.log(mx.array([[0.6, 0.3, 0.06, 0.04]]))
    drawn = {make_sampler(1e300, top_k=2)(logprobs).item() for _ in range(60)}
    assert drawn == {0, 1}


@pytest.mark.parametrize("temperature", [-1.0, float("inf"), float("nan")])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    with pytest.raises(IfpruneError, match="out of range"):
        make_sampler(temperature)


def test_ordinary_temperatures_are_left_alone() -> None:
    assert [usable_temperature(value, 0.9) for value in (0.0, 0.01, 0.7, 2.0)] == [0.0, 0.01, 0.7, 2.0]


# What is not supported.


@pytest.mark.parametrize("name", ["draft_model", "num_draft_tokens"])
def test_a_drafting_model_is_refused_before_anything_is_done(tiny: Tiny, name: str) -> None:
    history = History.empty(tiny[0])
    with pytest.raises(IfpruneError, match=f"{name}: a second model that drafts tokens is not supported"):
        answer(tiny, TOKENS, selection=A, prompt_cache=history, **{name: tiny[0]})
    assert tiny[0].selection is None
    with pytest.raises(IfpruneError, match=name):
        Session(*tiny, **{name: tiny[0]})


@pytest.mark.parametrize("size", [0, -1, 0.5, True, None])
def test_a_prefill_step_of_no_tokens_is_refused(tiny: Tiny, size: object) -> None:
    with pytest.raises(IfpruneError, match="prefill_step_size"):
        answer(tiny, TOKENS, selection=A, prefill_step_size=size)
