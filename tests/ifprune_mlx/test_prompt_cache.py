"""A history knows what was read, who computed it, and is never half of one and half of another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ifprune_mlx import History, Model, load, stream_generate
from ifprune_mlx.errors import ChatFileError
from ifprune_mlx.prompt_cache import DENSE, Span
from tests.ifprune_mlx.reference import open_model, random_selection
from tests.tiny import write_checkpoint

TOKENS = [40, 41, 42, 43, 44, 45, 46, 47, 48, 49]


def read(model: Model, history: History, tokens: list[int], computed_by: str) -> None:
    model(mx.array([tokens]), cache=history.kv)
    mx.eval([cache.state for cache in history.kv])
    history.append(tokens, computed_by)


@pytest.fixture
def model(tiny_checkpoint: Path) -> Model:
    return open_model(tiny_checkpoint)


@pytest.fixture
def mixed(model: Model) -> History:
    """Four tokens read by `a`, three by `b`, two densely."""
    history = History.empty(model)
    for tokens, name in ((TOKENS[:4], "a"), (TOKENS[4:7], "b"), (TOKENS[7:9], DENSE)):
        read(model, history, tokens, name)
    return history


def test_neighbouring_tokens_of_one_selection_are_one_span(model: Model) -> None:
    history = History.empty(model)
    history.append([1, 2], "a")
    history.append([], "b")
    history.append([3], "a")
    history.append([4], "b")
    history.append([5], "a")
    assert history.tokens == [1, 2, 3, 4, 5]
    assert history.spans == [Span(3, "a"), Span(1, "b"), Span(1, "a")]


def test_appended_tokens_are_copied(model: Model) -> None:
    history, tokens = History.empty(model), [1, 2]
    history.append(tokens, "a")
    history.append([3], "a")
    assert tokens == [1, 2]


@pytest.mark.parametrize(
    ("names", "count"),
    [({"a"}, 4), ({"a", "b"}, 7), ({"a", "b", DENSE}, 9), ({"b"}, 0), ({"a", DENSE}, 4), (set(), 0)],
)
def test_a_prefix_ends_at_the_first_token_that_another_computed(mixed: History, names: set[str], count: int) -> None:
    assert mixed.prefix_computed_by(names) == count


@pytest.mark.parametrize(
    ("tokens", "count"), [(TOKENS, 9), (TOKENS[:5], 5), ([*TOKENS[:5], 7, *TOKENS[6:]], 5), ([7], 0), ([], 0)]
)
def test_a_common_prefix_ends_at_the_first_difference(mixed: History, tokens: list[int], count: int) -> None:
    assert mixed.common_prefix(tokens) == count


@pytest.mark.parametrize(
    ("count", "spans"),
    [
        (9, [Span(4, "a"), Span(3, "b"), Span(2, DENSE)]),
        (12, [Span(4, "a"), Span(3, "b"), Span(2, DENSE)]),
        (8, [Span(4, "a"), Span(3, "b"), Span(1, DENSE)]),
        (7, [Span(4, "a"), Span(3, "b")]),
        (4, [Span(4, "a")]),
        (1, [Span(1, "a")]),
        (0, []),
    ],
)
def test_trimming_cuts_tokens_spans_and_every_layer_alike(mixed: History, count: int, spans: list[Span]) -> None:
    assert mixed.trim_to(count)
    assert mixed.spans == spans
    assert mixed.tokens == TOKENS[: min(count, 9)]
    assert {cache.offset for cache in mixed.kv} == {min(count, 9)}


def test_reading_on_after_trimming_equals_never_having_read_more(model: Model, mixed: History) -> None:
    mixed.trim_to(4)
    plain = History.empty(model)
    read(model, plain, TOKENS[:4], "a")
    found, expected = (np.array(model(mx.array([[77]]), cache=history.kv)) for history in (mixed, plain))
    assert np.abs(found - expected).max() < 1e-5


def test_a_cache_that_cannot_be_trimmed_is_left_alone(tmp_path: Path) -> None:
    model = open_model(write_checkpoint(tmp_path / "checkpoint", "qwen2"))  # its caches are mlx-lm's own
    history = History.empty(model, max_kv_size=6)
    read(model, history, TOKENS[:8], "a")
    assert not history.trim_to(5)
    assert (history.tokens, history.spans) == (TOKENS[:8], [Span(8, "a")])


def test_clearing_forgets_tokens_and_cache_but_not_its_bound(tmp_path: Path) -> None:
    model = open_model(write_checkpoint(tmp_path / "checkpoint", "qwen2"))
    history = History.empty(model, max_kv_size=6)
    read(model, history, TOKENS[:8], "a")
    history.clear(model)
    assert (history.tokens, history.spans) == ([], [])
    assert [(cache.offset, cache.max_size) for cache in history.kv] == [(0, 6)] * 2


def test_a_file_gives_back_tokens_cache_and_provenance(tmp_path: Path, model: Model, mixed: History) -> None:
    mixed.save(tmp_path / "cache.safetensors", model)
    loaded = History.load(tmp_path / "cache.safetensors", model)
    assert (loaded.tokens, loaded.spans) == (mixed.tokens, mixed.spans)
    found, expected = (np.array(model(mx.array([[77]]), cache=history.kv)) for history in (loaded, mixed))
    assert np.array_equal(found, expected)


def test_an_answer_goes_on_from_a_loaded_file(tmp_path: Path, tiny: tuple[Model, Any]) -> None:
    model, tokenizer = tiny
    selection = random_selection((128, 128), (48, 48), seed=1)
    history = History.empty(model)
    options: dict[str, Any] = {"selection": selection, "max_tokens": 5}
    list(stream_generate(model, tokenizer, TOKENS, prompt_cache=history, **options))
    history.save(tmp_path / "cache.safetensors", model)

    loaded = History.load(tmp_path / "cache.safetensors", model)
    answers = [
        list(stream_generate(model, tokenizer, [50, 51], prompt_cache=cache, **options)) for cache in (history, loaded)
    ]
    assert [r.token for r in answers[0]] == [r.token for r in answers[1]]
    assert answers[1][-1].stats is not None
    assert answers[1][-1].stats.reused_tokens == 15


def test_a_history_that_has_read_nothing_is_not_saved(tmp_path: Path, model: Model) -> None:
    with pytest.raises(ChatFileError, match="nothing to save"):
        History.empty(model).save(tmp_path / "cache.safetensors", model)
    assert list(tmp_path.iterdir()) == []


def test_another_suffix_or_folder_is_refused(tmp_path: Path, model: Model, mixed: History) -> None:
    with pytest.raises(ChatFileError, match=r"ends in \.safetensors"):
        mixed.save(tmp_path / "cache", model)
    with pytest.raises(ChatFileError, match="cannot be written"):
        mixed.save(tmp_path / "missing" / "cache.safetensors", model)
    assert list(tmp_path.iterdir()) == []


def edit_metadata(path: Path, old: str, new: str) -> None:
    """Replace text in the header of a safetensors file; it keeps its length."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = json.dumps(header["__metadata__"])
    assert old in text
    header["__metadata__"] = json.loads(text.replace(old, new))
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "cut short": cut,
    "text": lambda path: path.write_text("no cache at all"),
    "another safetensors file": lambda path: mx.save_safetensors(str(path), {"w": mx.ones(3)}),
    "tokens no list": lambda path: edit_metadata(path, "[40, 41, ", "{40, 41, "),
    "a token lost": lambda path: edit_metadata(path, "[40, 41, ", "[41, "),
    "a token lost, spans too": lambda path: (
        edit_metadata(path, "[40, 41, ", "[41, "),
        edit_metadata(path, '"[[4, ', '"[[3, '),
    ),
    "spans too long": lambda path: edit_metadata(path, '"[[4, ', '"[[5, '),
    "key missing": lambda path: edit_metadata(path, "ifprune_spans", "something_else"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_with_one_line_that_names_it(
    tmp_path: Path, model: Model, mixed: History, damage: str
) -> None:
    path = tmp_path / "cache.safetensors"
    mixed.save(path, model)
    DAMAGES[damage](path)
    with pytest.raises(ChatFileError) as caught:
        History.load(path, model)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_file_of_another_checkpoint_is_refused(tmp_path: Path, model: Model, mixed: History) -> None:
    mixed.save(tmp_path / "cache.safetensors", model)
    other, _ = load(write_checkpoint(tmp_path / "other", rope_theta=500.0))
    with pytest.raises(ChatFileError, match="another checkpoint"):
        History.load(tmp_path / "cache.safetensors", other)


# What a file says of its caches is compared with the model's own.


def rewritten(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str]) -> None:
    old, said = mx.load(str(path), return_metadata=True)
    mx.eval(old)
    path.unlink()  # its pages are still mapped
    mx.save_safetensors(str(path), old | arrays, said | metadata)


LIES: dict[str, tuple[dict[str, mx.array], dict[str, str]]] = {
    "keys of two tokens": ({"0.0": mx.zeros((1, 2, 2, 16))}, {}),
    "values of two tokens": ({"1.1": mx.zeros((1, 2, 2, 16))}, {}),
    "keys that are flat": ({"0.0": mx.zeros((300,))}, {}),
    "keys of two sequences": ({"0.0": mx.zeros((2, 2, 256, 16))}, {}),
    "a huge offset": ({"0.2": mx.array(10**9)}, {}),
    "another kind of cache": ({}, {"1.0": "ChunkedKVCache"}),
    "no cache at all": ({}, {"1.0": "KVCache2"}),
    "a bound that the caches have not": ({}, {"0.ifprune_max_kv_size": "16"}),
    "a bound of text": ({}, {"0.ifprune_max_kv_size": '"many"'}),
    "a bound below one": ({}, {"0.ifprune_max_kv_size": "-1"}),
    "negative spans": ({}, {"0.ifprune_spans": '[[19, "a"], [-10, "b"]]'}),
    "spans of anything": ({}, {"0.ifprune_spans": '[[9, "a", ["b"], {}]]'}),
    "tokens of text": ({}, {"0.ifprune_tokens": '["x"]'}),
}


@pytest.mark.parametrize("lie", LIES)
def test_caches_that_are_not_the_models_are_refused(tmp_path: Path, model: Model, mixed: History, lie: str) -> None:
    path = tmp_path / "cache.safetensors"
    mixed.save(path, model)
    rewritten(path, *LIES[lie])
    with pytest.raises(ChatFileError) as caught:
        History.load(path, model)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
