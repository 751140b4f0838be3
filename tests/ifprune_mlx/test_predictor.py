"""The sparsity predictor against a reference in plain numpy, and every way in which its files can be wrong."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ifprune_convert.pipeline import Options
from ifprune_mlx import PredictorError, SparsityPredictor, load, make_selector, stream_generate
from ifprune_mlx.predictor import Head
from ifprune_mlx.selection import top_k
from ifprune_mlx.selectors import Instruction, LearnedSelector
from tests.ifprune_mlx.predictor_reference import Array, reference_hidden, reference_tokens
from tests.tiny import CONFIGS, write_checkpoint, write_source

WIDTHS = (128, 128)
TEXT = "Write a haiku about C++ pointers.\nBe brief, 12 words!"


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "none": lambda x: x,
    "relu": lambda x: np.where(x > 0, x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: np.array([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x]),
}


def reference_scores(folder: Path, text: str, pooling: str, activation: str) -> list[Array]:
    hidden = reference_hidden(folder, reference_tokens(text))
    last, mean = hidden[-1], hidden.mean(axis=0)
    pooled = {"last": last, "mean": mean, "both": np.concatenate([last, mean])}[pooling]
    w = {name: np.array(array).astype(np.float64) for name, array in mx.load(str(folder / "head.safetensors")).items()}
    inner = ACTIVATIONS[activation](w["head1.weight"] @ pooled + w.get("head1.bias", 0))
    scores = w["head2.weight"] @ inner + w.get("head2.bias", 0)
    return [scores[: WIDTHS[0]], scores[WIDTHS[0] :]]


def make_head(
    pooling: str = "last", activation: str = "none", bias: bool = False, widths: tuple[int, ...] = WIDTHS, d: int = 64
) -> Head:
    generator = np.random.default_rng(5)

    def draw(*shape: int) -> mx.array:
        return mx.array(generator.normal(size=shape).astype(np.float32) / math.sqrt(shape[-1]))

    inputs = d * (2 if pooling == "both" else 1)
    first, second = draw(16, inputs), draw(sum(widths), 16)
    biases = (draw(16), draw(sum(widths))) if bias else (None, None)
    return Head(first, biases[0], second, biases[1], widths, pooling, activation)


def write_predictor(folder: Path, family: str = "llama", **head: Any) -> Path:
    """A predictor folder; the backbone's norms, which mlx-lm starts at 1, are made to differ."""
    write_source(folder, family, seed=11)
    weights = mx.load(str(folder / "model.safetensors"))
    mx.eval(weights)
    mx.random.seed(12)
    for name in weights:
        if name.endswith("norm.weight"):
            weights[name] = mx.random.uniform(0.5, 1.5, weights[name].shape)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    make_head(**head).save(folder / "head.safetensors")
    return folder


def assert_close_and_same_choice(found: list[Any], expected: list[Array]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == np.float32
        assert np.abs(ours - theirs).max() < 1e-4
        assert np.abs(theirs).max() > 0.1
    keep = [40, 32]
    ours = top_k(found, keep, "learned")
    for ids, theirs, k in zip(ours.ids, expected, keep, strict=True):
        assert ids.tolist() == sorted(np.argsort(-theirs)[:k].tolist())


@pytest.mark.parametrize("family", ["llama", "llama-bias"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("pooling", ["last", "mean", "both"])
def test_scores_equal_those_of_the_numpy_reference(tmp_path: Path, family: str, pooling: str, bias: bool) -> None:
    folder = write_predictor(tmp_path / "predictor", family, pooling=pooling, bias=bias)
    assert_close_and_same_choice(
        SparsityPredictor.load(folder).scores(TEXT), reference_scores(folder, TEXT, pooling, "none")
    )


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_the_activation_between_the_layers_is_applied(tmp_path: Path, activation: str) -> None:
    folder = write_predictor(tmp_path / "predictor", activation=activation, bias=True)
    scores = SparsityPredictor.load(folder).scores(TEXT)
    assert_close_and_same_choice(scores, reference_scores(folder, TEXT, "last", activation))
    assert np.abs(scores[0] - reference_scores(folder, TEXT, "last", "none")[0]).max() > 1e-2


def test_scores_depend_on_the_instruction_and_on_nothing_else(tmp_path: Path) -> None:
    predictor = SparsityPredictor.load(write_predictor(tmp_path / "predictor"))
    first, other, again = (predictor.scores(text) for text in (TEXT, "Prove it.", TEXT))
    assert np.array_equal(first[0], again[0])
    assert np.abs(first[0] - other[0]).max() > 1e-2


def test_the_instruction_is_read_in_the_chat_template(tmp_path: Path) -> None:
    predictor = SparsityPredictor.load(write_predictor(tmp_path / "predictor"))
    assert predictor.tokens(TEXT) == reference_tokens(TEXT)


def test_without_a_chat_template_the_words_alone_are_read(tmp_path: Path) -> None:
    folder = write_predictor(tmp_path / "predictor")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    predictor = SparsityPredictor.load(folder)
    assert predictor.tokens("Hi") == reference_tokens("Hi")[6:8]
    with pytest.raises(PredictorError, match="at least one token"):
        predictor.scores("")


def test_an_instruction_beyond_the_context_keeps_its_head_and_tail(tmp_path: Path) -> None:
    predictor = SparsityPredictor.load(write_predictor(tmp_path / "predictor"))
    text = "a" * 700 + "b" * 700
    whole, cut = reference_tokens(text), predictor.tokens(text)
    assert len(cut) == 512
    assert (cut[:256], cut[-256:]) == (whole[:256], whole[-256:])
    assert np.isfinite(predictor.scores(text)[0]).all()


# Files.


def test_a_head_can_be_saved_and_loaded(tmp_path: Path) -> None:
    head = make_head("both", "gelu", bias=True)
    head.save(tmp_path / "head.safetensors")
    loaded = Head.load(tmp_path / "head.safetensors")
    assert (loaded.widths, loaded.pooling, loaded.activation) == (WIDTHS, "both", "gelu")
    hidden = mx.random.normal((5, 64))
    assert np.array_equal(np.array(head(hidden)), np.array(loaded(hidden)))
    assert make_head().first_bias is None


def head_with(**changes: mx.array | None) -> Callable[[Path], None]:
    """Rewrite the head's tensors; None leaves one out."""

    def spoil(folder: Path) -> None:
        path = folder / "head.safetensors"
        tensors, metadata = mx.load(str(path), return_metadata=True)
        mx.eval(tensors)
        tensors |= {name.replace("_", "."): value for name, value in changes.items()}
        mx.save_safetensors(str(path), {n: a for n, a in tensors.items() if a is not None}, metadata)

    return spoil


def settings_with(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "head.safetensors"
        tensors, metadata = mx.load(str(path), return_metadata=True)
        mx.eval(tensors)
        settings = {k: v for k, v in (json.loads(metadata["ifprune_predictor"]) | changes).items() if v is not None}
        mx.save_safetensors(str(path), tensors, {"ifprune_predictor": json.dumps(settings)})

    return spoil


def without_settings(folder: Path) -> None:
    tensors = mx.load(str(folder / "head.safetensors"))
    mx.eval(tensors)
    mx.save_safetensors(str(folder / "head.safetensors"), tensors)


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9]) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def config_with(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return spoil


DEFECTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no head": (remove("head.safetensors"), "has no head.safetensors"),
    "no config": (remove("config.json"), "has no config.json"),
    "no backbone": (remove("model.safetensors"), "backbone cannot be loaded"),
    "no tokenizer": (remove("tokenizer.json"), "has no tokenizer"),
    "no folder": (shutil.rmtree, "has no config.json"),
    "head cut short": (cut("head.safetensors"), "cut short"),
    "backbone cut short": (cut("model.safetensors"), "cut short"),
    "config no JSON": (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    "config of another width": (config_with(hidden_size=32), "cannot be loaded"),
    "an unknown family": (config_with(model_type="nonesuch"), "cannot be loaded"),
    "head1 missing": (head_with(head1_weight=None), "must hold head1.weight and head2.weight"),
    "head2 missing": (head_with(head2_weight=None), "must hold head1.weight and head2.weight"),
    "an unknown tensor": (head_with(head3_weight=mx.ones(3)), "must hold head1.weight and head2.weight"),
    "head1 of another rank": (head_with(head1_weight=mx.ones((8, 64))), r"need head2 \[256, 8\]"),
    "head1 a vector": (head_with(head1_weight=mx.ones(16)), "do not belong together"),
    "head1 a number": (head_with(head1_weight=mx.array(1.0)), "do not belong together"),
    "head1 for another backbone": (head_with(head1_weight=mx.ones((16, 48))), "head1 reads 48 values, .* gives 64"),
    "head2 of another width": (head_with(head2_weight=mx.ones((255, 16))), "with 256 neurons need head2"),
    "head2 transposed": (head_with(head2_weight=mx.ones((16, 256))), "with 256 neurons need head2"),
    "bias of another length": (head_with(head1_bias=mx.ones(15)), r"bias has shape \[15\], expected \[16\]"),
    "bias a matrix": (head_with(head2_bias=mx.ones((256, 1))), r"bias has shape \[256, 1\], expected \[256\]"),
    "no settings": (without_settings, "no predictor settings"),
    "settings without widths": (settings_with(widths=None), "no predictor settings"),
    "widths no numbers": (settings_with(widths=["wide"]), "no predictor settings"),
    "a newer format": (settings_with(format_version=2), "predictor format 2, this release reads 1; update"),
    "an unknown pooling": (settings_with(pooling="max"), "unknown pooling 'max'"),
    "an unknown activation": (settings_with(activation="tanh"), "unknown .* activation 'tanh'"),
    "another pooling": (settings_with(pooling="both"), "head1 reads 64 values, the backbone gives 64 per token"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defective_predictor_is_refused_with_one_line_that_names_it(tmp_path: Path, defect: str) -> None:
    folder = write_predictor(tmp_path / "predictor")
    spoil, reason = DEFECTS[defect]
    spoil(folder)
    with pytest.raises(PredictorError, match=reason) as caught:
        SparsityPredictor.load(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["head1.weight", "head2.weight", "backbone"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_found_when_scoring(tmp_path: Path, where: str, bad: float) -> None:
    folder = write_predictor(tmp_path / "predictor")
    path = folder / ("model.safetensors" if where == "backbone" else "head.safetensors")
    tensors, metadata = mx.load(str(path), return_metadata=True)
    mx.eval(tensors)
    name = "model.layers.1.mlp.down_proj.weight" if where == "backbone" else where
    tensors[name][3] = bad
    mx.save_safetensors(str(path), tensors, metadata)
    with pytest.raises(PredictorError, match="NaN or infinity"):
        SparsityPredictor.load(folder).scores(TEXT)


@pytest.mark.parametrize("widths", [(128,), (64, 192), (128, 128, 128)])
def test_a_predictor_for_another_model_is_refused(tmp_path: Path, widths: tuple[int, ...]) -> None:
    folder = write_predictor(tmp_path / "predictor", widths=widths)
    predictor = SparsityPredictor.load(folder)
    predictor.head.check_widths(widths, folder)
    with pytest.raises(PredictorError, match="trained for another model") as caught:
        predictor.head.check_widths(WIDTHS, folder)
    assert str(caught.value).startswith(str(folder))
    with pytest.raises(PredictorError, match="trained for another model"):
        write_checkpoint(tmp_path / "checkpoint", options=Options(predictor=folder))
    assert not (tmp_path / "checkpoint").exists()


# In a checkpoint.


@pytest.fixture(scope="module")
def with_predictor(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A predictor folder and a checkpoint that was converted with it."""
    folder = tmp_path_factory.mktemp("learned")
    predictor = write_predictor(folder / "predictor", bias=True)
    return predictor, write_checkpoint(folder / "checkpoint", options=Options(predictor=predictor))


def test_a_checkpoint_with_a_predictor_selects_by_it(with_predictor: tuple[Path, Path]) -> None:
    predictor, checkpoint = with_predictor
    model, tokenizer = load(checkpoint)
    assert model.checkpoint.has_predictor
    assert model.checkpoint.layout.selector == "learned"
    selector = make_selector(model)
    assert (type(selector), selector.name) == (LearnedSelector, "learned")
    keep = model.keep(0.27)
    found = selector.select(Instruction(TEXT, ()), keep).selection
    assert found.hash == top_k(SparsityPredictor.load(predictor).scores(TEXT), keep, "learned").hash
    for ids, scores, k in zip(found.ids, reference_scores(predictor, TEXT, "last", "none"), keep, strict=True):
        assert ids.tolist() == sorted(np.argsort(-scores)[:k].tolist())

    stats = list(stream_generate(model, tokenizer, [{"role": "user", "content": TEXT}], density=0.27, max_tokens=2))
    assert stats[-1].stats is not None
    assert (stats[-1].stats.selector, stats[-1].stats.selection) == ("learned", found.hash)


def test_a_predictor_put_into_a_checkpoint_of_another_shape_is_found(
    with_predictor: tuple[Path, Path], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(with_predictor[1], checkpoint)
    make_head(widths=(128,)).save(checkpoint / "predictor" / "head.safetensors")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    size = (checkpoint / "predictor" / "head.safetensors").stat().st_size
    manifest["files"]["predictor/head.safetensors"]["size"] = size
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    loaded, _ = load(checkpoint)
    with pytest.raises(PredictorError, match="trained for another model"):
        make_selector(loaded)


def test_the_tiny_configs_are_what_the_reference_was_written_for() -> None:
    assert CONFIGS["llama"]["num_key_value_heads"] < CONFIGS["llama"]["num_attention_heads"]  # grouped queries
    assert CONFIGS["llama"]["rope_theta"] == 10000.0
