"""Selectors behind their one protocol: what each reads, what it keeps, and what it leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ifprune_convert.pipeline import Options
from ifprune_mlx import (
    CheckpointError,
    History,
    IfpruneError,
    Instruction,
    Model,
    Selector,
    load,
    make_selector,
)
from ifprune_mlx.generation import stream_generate
from ifprune_mlx.prompt_cache import DENSE, Span
from ifprune_mlx.selection import predictor as predictor_module
from ifprune_mlx.selection.cache import SelectionCache
from ifprune_mlx.selection.predictor import Head
from ifprune_mlx.selection.selection import top_k
from ifprune_mlx.selection.selectors import (
    ActivationSelector,
    CachedSelector,
    LearnedSelector,
    RandomSelector,
    StaticSelector,
)
from ifprune_mlx.session import Session
from tests.ifprune_mlx.reference import open_model, random_selection
from tests.ifprune_mlx.sparse.test_importance import captured, reference
from tests.tiny import write_checkpoint
from tests.tiny_predictor import write_predictor

TOKENS = (1, 40, 300, 7, 7, 99, 250, 3, 18, 120, 64, 201)
KEEP = (40, 32)
PROMPT = Instruction("Write a haiku.", TOKENS)


@pytest.fixture
def model(tiny_checkpoint: Path) -> Model:
    return open_model(tiny_checkpoint)


def ids_of(selector: Selector, instruction: Instruction = PROMPT, keep: tuple[int, ...] = KEEP) -> list[list[int]]:
    return [ids.tolist() for ids in selector.select(instruction, keep).selection.ids]


@pytest.mark.parametrize("name", ["activation", "static", "random"])
def test_every_selector_keeps_as_many_neurons_as_it_is_told(model: Model, name: str) -> None:
    selector = make_selector(model, name)
    assert selector.name == name
    for keep in ((8, 128), (128, 128), (1, 3)):
        selection = selector.select(PROMPT, keep).selection
        assert (selection.keep, selection.widths, selection.selector) == (keep, (128, 128), name)
        model.switch(selection)


@pytest.mark.parametrize("seed", range(8))
def test_top_k_is_what_a_stable_sort_says(seed: int) -> None:
    generator = np.random.default_rng(seed)
    for _ in range(100):
        width = int(generator.integers(1, 300))
        ties = generator.integers(-3, 4, size=width).astype(np.float32)  # and -0.0 beside 0.0
        values = (ties * generator.choice([-1, 1], width) if seed % 2 else generator.normal(size=width)).astype("f4")
        k = int(generator.integers(1, width + 1))
        expected = np.sort(np.argsort(-values, kind="stable")[:k])
        assert top_k([values], [k], "x").ids[0].tolist() == expected.tolist()


# static


def test_static_keeps_the_top_of_the_prior_whatever_is_said(model: Model) -> None:
    selector = make_selector(model, "static")
    assert ids_of(selector) == ids_of(selector, Instruction("Something else", (5,)))
    for ids, prior, k in zip(ids_of(selector), model.prior, KEEP, strict=True):
        assert ids == sorted(np.argsort(-prior)[:k].tolist())
    assert selector.select(PROMPT, KEEP).history is None


def test_static_uses_a_ready_prior(tmp_path: Path) -> None:
    prior = [np.arange(128, dtype=np.float32), np.arange(128, 0, -1, dtype=np.float32)]
    model = open_model(write_checkpoint(tmp_path / "checkpoint", options=Options(prior=prior)))
    assert model.checkpoint.prior_method == "calibrated"
    assert ids_of(make_selector(model, "static"), keep=(8, 8)) == [list(range(120, 128)), list(range(8))]


# random


def test_random_is_the_same_for_the_same_text_and_seed_and_no_other(model: Model) -> None:
    first = ids_of(make_selector(model, "random", seed=1))
    assert ids_of(make_selector(model, "random", seed=1), Instruction(PROMPT.text, (9,))) == first
    assert ids_of(make_selector(model, "random", seed=2)) != first
    assert ids_of(make_selector(model, "random", seed=1), Instruction("Write a poem.", TOKENS)) != first
    assert first[0] != first[1]


def test_random_spares_no_neuron(model: Model) -> None:
    selector = make_selector(model, "random")
    counts = np.zeros(128)
    for number in range(200):
        counts[ids_of(selector, Instruction(str(number), ()), (64, 64))[0]] += 1
    assert counts.min() > 60
    assert counts.max() < 140


# activation


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_activation_ranks_what_the_prompt_uses_and_the_prior(model: Model, tiny_checkpoint: Path, share: float) -> None:
    # The last token is not read ahead: it is what decoding begins with.
    selection = ActivationSelector(model, share).select(PROMPT, KEEP).selection
    scores = []
    for hidden, norms, prior in zip(*captured(tiny_checkpoint, list(TOKENS[:-1])), model.prior, strict=True):
        seen = reference(hidden, norms, np.ones(len(TOKENS) - 1))
        ranks = [np.argsort(np.argsort(values, kind="stable")) / 127 for values in (seen, prior)]
        scores.append((share * ranks[0] + (1 - share) * ranks[1]).astype(np.float32))
    assert [ids.tolist() for ids in selection.ids] == [ids.tolist() for ids in top_k(scores, KEEP, "activation").ids]


def test_activation_is_deterministic_and_reads_the_prompt(model: Model) -> None:
    selector = make_selector(model, "activation")
    first = ids_of(selector)
    model.switch(random_selection((128, 128), (8, 8), seed=3))  # neither slots nor the live selection matter
    assert ids_of(selector) == first
    assert ids_of(selector, Instruction(PROMPT.text, (5, 6, 7, 8))) != first


def test_activation_leaves_a_dense_prefill_and_a_dense_model(model: Model) -> None:
    model.switch(random_selection((128, 128), (8, 8), seed=3))
    selected = make_selector(model, "activation").select(PROMPT, KEEP)
    assert model.selection is None
    history = selected.history
    assert history is not None
    assert (history.tokens, history.spans) == (list(TOKENS[:-1]), [Span(11, DENSE)])
    assert {cache.offset for cache in history.kv} == {11}

    plain = History.empty(model)
    model(mx.array([TOKENS[:-1]]), cache=plain.kv)
    found, expected = (np.array(model(mx.array([TOKENS[-1:]]), cache=h.kv)) for h in (history, plain))
    assert np.abs(found - expected).max() < 1e-5
    assert all(leaf.observer is None for leaf in model.down_leaves)


def test_activation_goes_on_from_a_given_history(model: Model) -> None:
    given = History.empty(model)
    model(mx.array([TOKENS[:6]]), cache=given.kv)
    given.append(list(TOKENS[:6]), "earlier")
    selected = make_selector(model, "activation").select(Instruction("Hi", TOKENS, given), KEEP)
    assert selected.history is given
    assert given.spans == [Span(6, "earlier"), Span(5, DENSE)]
    assert given.tokens == list(TOKENS[:-1])


@pytest.mark.parametrize("read", [0, 5])
def test_activation_selects_by_a_single_new_token_without_reading_it_ahead(model: Model, read: int) -> None:
    given = History.empty(model)
    if read:
        model(mx.array([TOKENS[:read]]), cache=given.kv)
        given.append(list(TOKENS[:read]), DENSE)
    selected = make_selector(model, "activation").select(Instruction("H", TOKENS[: read + 1], given), KEEP)
    assert selected.selection.keep == KEEP
    assert len(given.tokens) == read
    assert {cache.offset for cache in given.kv} == {read}


def test_activation_reports_progress_and_can_be_stopped_there(model: Model) -> None:
    class Stop(Exception):
        pass

    seen: list[Any] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        if done:
            raise Stop

    with pytest.raises(Stop):
        make_selector(model, "activation").select(Instruction("Hi", tuple([5] * 1000), None, progress), KEEP)
    assert seen == [(0, 1000), (512, 1000)]
    assert all(leaf.observer is None for leaf in model.down_leaves)


# By name.


def test_the_default_is_what_the_checkpoint_names(model: Model) -> None:
    assert model.checkpoint.default_selector == "activation"
    assert make_selector(model).name == "activation"


def test_an_unknown_name_is_refused_and_the_known_ones_are_said(model: Model) -> None:
    with pytest.raises(IfpruneError, match="unknown selector 'best'; choose learned, activation, static or random"):
        make_selector(model, "best")


def test_learned_needs_a_predictor_in_the_checkpoint(model: Model) -> None:
    with pytest.raises(CheckpointError, match="has no trained predictor; use --selector activation") as caught:
        make_selector(model, "learned")
    assert str(caught.value).startswith(str(model.checkpoint.path))


# Not asked twice.


@pytest.fixture(scope="module", params=["own backbone", "first layers"])
def with_predictor(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A checkpoint with a predictor of either kind."""
    folder = tmp_path_factory.mktemp("cached")
    if request.param == "own backbone":
        write_predictor(folder / "predictor")
    else:
        (folder / "predictor").mkdir()
        mx.random.seed(4)
        head = Head(mx.random.normal((16, 64)), None, mx.random.normal((256, 16)), None, (128, 128), layers=1)
        head.save(folder / "predictor" / "head.safetensors")
    return write_checkpoint(folder / "checkpoint", options=Options(predictor=folder / "predictor"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the learned selector itself was asked for."""
    seen: list[str] = []
    select = LearnedSelector.select

    def counted(self: LearnedSelector, instruction: Instruction, keep: Any) -> Any:
        seen.append(instruction.text)
        return select(self, instruction, keep)

    monkeypatch.setattr(LearnedSelector, "select", counted)
    return seen


def test_every_selector_but_activation_looks_into_the_models_cache(with_predictor: Path) -> None:
    model, _ = load(with_predictor)
    for name in ("learned", "static", "random"):
        selector = make_selector(model, name)
        assert isinstance(selector, CachedSelector)
        assert selector.cache is model.selection_cache
    assert isinstance(make_selector(model, "activation"), ActivationSelector)
    assert model.selection_cache is not load(with_predictor)[0].selection_cache


def test_what_is_found_is_what_would_be_selected(with_predictor: Path) -> None:
    model, _ = load(with_predictor)
    predictor = model.predictor
    assert predictor is not None
    plain = {
        "learned": LearnedSelector(model, predictor),
        "static": StaticSelector(model),
        "random": RandomSelector(model, 5),
    }
    texts = [f"Question {number}?" for number in range(6)]
    for _ in range(2):
        for name, selector in plain.items():
            for text in texts:
                for keep in (KEEP, (32, 40)):
                    instruction = Instruction(text, ())
                    found = make_selector(model, name, seed=5).select(instruction, keep)
                    expected = selector.select(instruction, keep).selection
                    assert (found.selection.hash, found.selection.selector) == (expected.hash, name)
                    assert found.history is None
    cache = model.selection_cache
    # 6 texts and 2 budgets: static reads no text.
    assert (cache.misses, len(cache)) == (26, 26)
    assert cache.hits == 2 * 3 * 6 * 2 - 26


def test_the_predictor_runs_once_for_what_it_reads(with_predictor: Path, asked: list[str]) -> None:
    model, _ = load(with_predictor)
    predictor = model.predictor
    assert predictor is not None
    predictor.window = 60
    long = ["a" * 99 + middle + "b" * 99 for middle in ("one", "another")]
    for _ in range(3):
        for text in ("Hello", "Hello!", *long):
            make_selector(model).select(Instruction(text, TOKENS), KEEP)
    assert asked == ["Hello", "Hello!", long[0]]
    predictor.window = 300
    for text in long:
        make_selector(model).select(Instruction(text, TOKENS), KEEP)
    assert asked[3:] == long
    make_selector(model).select(Instruction("Hello", ()), KEEP)
    make_selector(model).select(Instruction("Hello", ()), (32, 32))
    assert asked[5:] == ["Hello"]


def test_an_instruction_is_tokenized_once(with_predictor: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[str] = []
    render = predictor_module._rendered

    def counted(tokenizer: Any, text: str) -> list[int]:
        rendered.append(text)
        return render(tokenizer, text)

    monkeypatch.setattr(predictor_module, "_rendered", counted)
    model, _ = load(with_predictor)
    for text in ("Hello", "Hello!"):
        make_selector(model).select(Instruction(text, TOKENS), KEEP)
    assert rendered == ["Hello", "Hello!"]


def test_a_found_selection_leaves_the_model_as_it_is(with_predictor: Path) -> None:
    model, _ = load(with_predictor)
    selector = make_selector(model)
    selector.select(PROMPT, KEEP)
    live = random_selection((128, 128), KEEP, seed=3)
    model.switch(live)
    selector.select(PROMPT, KEEP)
    assert model.selection is live


def test_answers_and_conversations_share_it(with_predictor: Path, asked: list[str]) -> None:
    model, tokenizer = load(with_predictor)
    said = []
    for _ in range(2):
        said += [r.text for r in stream_generate(model, tokenizer, chat("Hi there"), max_tokens=3, density=0.25)]
        said.append(Session(model, tokenizer, density=0.25).ask("Hi there", max_tokens=3))
    assert asked == ["Hi there"]
    assert said[: len(said) // 2] == said[len(said) // 2 :]
    assert (model.selection_cache.hits, model.selection_cache.misses) == (3, 1)


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_folder_of_selections_outlives_the_model(with_predictor: Path, tmp_path: Path, asked: list[str]) -> None:
    hashes = []
    for dtype in (None, None, mx.float16):
        model, _ = load(with_predictor, dtype=dtype)
        model.selection_cache = SelectionCache(tmp_path)
        hashes.append(make_selector(model).select(PROMPT, KEEP).selection.hash)
    assert hashes[0] == hashes[1]
    predictor = model.predictor
    assert predictor is not None
    # Layers of the model itself say something else in another type, a backbone of its own does not know of it.
    assert len(asked) == (1 if predictor.head.layers is None else 2)


def test_another_checkpoint_does_not_find_it(with_predictor: Path, tmp_path: Path, asked: list[str]) -> None:
    write_predictor(tmp_path / "other", poison=False)
    other = write_checkpoint(tmp_path / "checkpoint", seed=5, options=Options(predictor=tmp_path / "other"))
    for path in (with_predictor, other):
        model, _ = load(path)
        model.selection_cache = SelectionCache(tmp_path / "cache")
        make_selector(model).select(PROMPT, KEEP)
    assert len(asked) == 2
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_activation_is_asked_every_time(model: Model, tmp_path: Path) -> None:
    model.selection_cache = SelectionCache(tmp_path)
    for _ in range(2):
        assert make_selector(model, "activation").select(PROMPT, KEEP).history is not None
    assert list(tmp_path.iterdir()) == []
