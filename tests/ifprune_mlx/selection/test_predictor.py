"""The sparsity predictor against a reference in plain numpy, and every way in which its files can be wrong."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from ifprune_convert.pipeline import Options
from ifprune_mlx import PredictorError, SparsityPredictor, load, make_selector, stream_generate
from ifprune_mlx.checkpoint.format import Quantization
from ifprune_mlx.selection.predictor import Head
from ifprune_mlx.selection.selection import top_k
from ifprune_mlx.selection.selectors import Instruction
from tests.ifprune_mlx.selection.predictor_reference import Array, reference_hidden, reference_tokens
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


def without_template(folder: Path) -> Path:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_without_a_chat_template_the_words_alone_are_read(tmp_path: Path) -> None:
    predictor = SparsityPredictor.load(without_template(write_predictor(tmp_path / "predictor")))
    assert predictor.tokens("Hi") == reference_tokens("Hi")[6:8]
    with pytest.raises(PredictorError, match="at least one token"):
        predictor.scores("")


# A long instruction. Around a message the template has 6 tokens before, and 13 after it.

BEFORE, AFTER = len("<user\n"), len(">\n<assistant\n")


@pytest.mark.parametrize("text", ["a" * 700 + "b" * 700, "x" * 1400, "y\n" * 700 + "x", "x\n<|im_start|>" * 400])
@pytest.mark.parametrize(("window", "limit"), [(None, 256), (41, 41), (BEFORE + AFTER + 1, 20), (9999, 512)])
def test_a_long_instruction_keeps_its_head_its_tail_and_all_of_its_template(
    tmp_path: Path, text: str, window: int | None, limit: int
) -> None:
    predictor = SparsityPredictor.load(write_predictor(tmp_path / "predictor"))
    if window is not None:
        predictor.window = window
    whole = predictor.tokenizer.apply_chat_template(messages(text), add_generation_prompt=True)
    assert len(whole) > 1000
    message, room = whole[BEFORE:-AFTER], limit - BEFORE - AFTER
    cut = message[: room // 2] + message[-(room - room // 2) :]
    assert predictor.tokens(text) == whole[:BEFORE] + cut + whole[-AFTER:]
    assert len(predictor.tokens(text)) == limit
    assert np.isfinite(predictor.scores(text)[0]).all()


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("size", [20, 40, 80])
def test_an_instruction_that_just_fits_is_read_whole(tmp_path: Path, size: int) -> None:
    folder = write_predictor(tmp_path / "predictor")
    text = "abcde" * (size // 5)
    fits = SparsityPredictor.load(folder, select_window=size + BEFORE + AFTER)
    assert fits.tokens(text) == reference_tokens(text)
    assert len(fits.tokens(text + "f")) == fits.window
    assert fits.with_head(make_head(bias=True)).window == fits.window


def test_words_alone_are_cut_evenly(tmp_path: Path) -> None:
    predictor = SparsityPredictor.load(without_template(write_predictor(tmp_path / "predictor")), select_window=10)
    assert predictor.tokens("abcdefghijklmno") == reference_tokens("abcdeklmno")[BEFORE:-AFTER]


@pytest.mark.parametrize("window", [1, BEFORE + AFTER])
def test_a_window_without_room_for_the_instruction_is_refused(tmp_path: Path, window: int) -> None:
    predictor = SparsityPredictor.load(write_predictor(tmp_path / "predictor"), select_window=window)
    with pytest.raises(PredictorError, match=rf"reads {window} tokens, .* alone has 19; give --select-window 51"):
        predictor.scores(TEXT)


def test_what_lies_outside_the_window_does_not_matter(tmp_path: Path) -> None:
    predictor = SparsityPredictor.load(write_predictor(tmp_path / "predictor"), select_window=99)  # room for 80
    head, tail = "Sort these numbers, please, in place: 123", "4 5 6. Answer in one line, with commas!!"
    assert (len(head), len(tail)) == (41, 40)
    one, other, near = (
        predictor.scores(text)[0] for text in (head + "1 " * 99 + tail, head + "2 " * 70 + tail, head + "1 " * 99)
    )
    assert np.array_equal(one, other)
    assert not np.array_equal(one, near)
    predictor.window = 9999
    assert not np.array_equal(one, predictor.scores(head + "1 " * 99 + tail)[0])


# What a forward pass costs.


def test_an_output_layer_is_not_even_loaded(tmp_path: Path) -> None:
    folder = write_predictor(tmp_path / "predictor", "llama-untied")
    predictor = SparsityPredictor.load(folder)
    held = sum(array.nbytes for _, array in tree_flatten(predictor.backbone.parameters()))
    weights = mx.load(str(folder / "model.safetensors"))
    assert held == sum(array.nbytes for name, array in weights.items() if name != "lm_head.weight")
    assert "lm_head.weight" in weights
    assert_close_and_same_choice(predictor.scores(TEXT), reference_scores(folder, TEXT, "last", "none"))


def test_scores_are_read_back_at_once(tmp_path: Path) -> None:
    one, other = SparsityPredictor.load(write_predictor(tmp_path / "predictor")).scores(TEXT)
    assert one.base is not None
    assert one.base is other.base


def test_a_backbone_that_mlx_lm_quantized(tmp_path: Path) -> None:
    """Its scores are those of the weights that it stands for."""
    folder, plain = write_predictor(tmp_path / "packed"), write_predictor(tmp_path / "plain")
    model, config = load_model(folder)
    nn.quantize(model, group_size=32, bits=8)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config | {"quantization": {"group_size": 32, "bits": 8}}))
    weights = mx.load(str(plain / "model.safetensors"))
    mx.eval(weights)
    for name, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            weights[f"{name}.weight"] = mx.dequantize(module.weight, module.scales, module.biases, 32, 8)
    mx.save_safetensors(str(plain / "model.safetensors"), weights, {"format": "mlx"})
    assert_close_and_same_choice(
        SparsityPredictor.load(folder).scores(TEXT), reference_scores(plain, TEXT, "last", "none")
    )


# A quantized head.


def wide_head(rank: int = 64, **settings: Any) -> Head:
    generator = np.random.default_rng(6)
    first, second = generator.normal(size=(rank, 64)) / 8, generator.normal(size=(sum(WIDTHS), rank)) / 8
    bias = mx.array(generator.normal(size=sum(WIDTHS)).astype(np.float32))
    return Head(mx.array(first.astype(np.float32)), None, mx.array(second.astype(np.float32)), bias, WIDTHS, **settings)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize(("bits", "rank", "group"), [(8, 64, 64), (4, 64, 64), (8, 96, 32), (4, 128, 64)])
def test_a_quantized_head_scores_as_the_weights_that_it_stands_for(
    tmp_path: Path, bits: int, rank: int, group: int, dtype: mx.Dtype
) -> None:
    plain = wide_head(rank, layers=2)
    plain = replace(plain, second=plain.second.astype(dtype))
    plain.quantized(bits).save(tmp_path / "head.safetensors")
    packed = Head.load(tmp_path / "head.safetensors")
    assert packed.quantization == Quantization(group, bits, "affine")
    assert (packed.second.dtype, packed.layers) == (mx.uint32, 2)
    hidden = mx.random.normal((5, 64), key=mx.random.key(3))
    second = mx.dequantize(*mx.quantize(plain.second, group, bits), group, bits)
    inner = np.array(plain.first).astype(np.float64) @ np.array(hidden[-1])
    expected = np.array(second.astype(mx.float32)).astype(np.float64) @ inner + np.array(plain.second_bias)
    tolerance = 1e-5 if dtype == mx.float32 else 2e-2
    assert packed(hidden).dtype == mx.float32
    assert np.abs(np.array(packed(hidden)) - expected).max() < tolerance
    assert np.abs(np.array(packed.unpacked()(hidden)) - expected).max() < tolerance
    assert packed.unpacked().quantization is None
    assert plain.unpacked() is plain


def test_a_head_is_never_packed_anew_with_more_bits() -> None:
    head = wide_head().quantized(4)
    assert head.quantized(8) is head
    assert head.quantized(4) is head
    again = wide_head().quantized(8).quantized(4)
    assert again.quantization == Quantization(64, 4, "affine")


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.02), (4, 0.15)])
def test_how_much_quantization_changes_what_is_selected(bits: int, limit: float) -> None:
    head, shares = wide_head(128), []
    for seed in range(20):
        hidden = mx.random.normal((5, 64), key=mx.random.key(seed))
        chosen = [
            top_k(np.split(np.array(each(hidden)), [128]), (40, 32), "learned") for each in (head, head.quantized(bits))
        ]
        shares.append(1 - chosen[0].overlap(chosen[1]))
    assert np.mean(shares) < limit


@pytest.mark.parametrize(("rank", "bits"), [(16, 8), (48, 4), (64, 3), (64, 16)])
def test_a_head_that_cannot_be_packed_is_refused(rank: int, bits: int) -> None:
    with pytest.raises(PredictorError, match=f"inner layer of {rank} values cannot be packed with {bits} bits"):
        wide_head(rank).quantized(bits)


def test_a_float_head_is_written_as_earlier_releases_read_it(tmp_path: Path) -> None:
    make_head(bias=True).save(tmp_path / "head.safetensors")
    tensors, metadata = mx.load(str(tmp_path / "head.safetensors"), return_metadata=True)
    assert set(tensors) == {"head1.weight", "head1.bias", "head2.weight", "head2.bias"}
    settings = json.loads(metadata["ifprune_predictor"])
    assert set(settings) == {"format_version", "widths", "pooling", "activation", "layers"}
    assert settings["format_version"] == 1
    settings_with(layers=None)(tmp_path)  # as the first release wrote it
    assert Head.load(tmp_path / "head.safetensors").layers is None


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
    "a newer format": (settings_with(format_version=3), "predictor format 3, this release reads 1 and 2; update"),
    "a format with a quantization": (settings_with(format_version=2), "no predictor settings"),
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


PACKED_DEFECTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no scales": (head_with(head2_scales=None), "must hold .* head2.scales"),
    "no offsets": (head_with(head2_biases=None), "must hold .* head2.biases"),
    "scales of another group": (head_with(head2_scales=mx.ones((256, 2))), r"must both be \[256, 1\]"),
    "rows as floats": (head_with(head2_weight=mx.ones((256, 16))), "does not fit the quantization"),
    "rows of another width": (head_with(head2_weight=mx.ones((256, 8))), r"need head2 \[256, 16\]"),
    "a mode without offsets": (
        settings_with(quantization={"group_size": 32, "bits": 8, "mode": "mxfp8"}),
        "cannot have the quantization",
    ),
    "a group that does not divide": (
        settings_with(quantization={"group_size": 128, "bits": 8, "mode": "affine"}),
        "cannot have the quantization",
    ),
    "an unknown mode": (
        settings_with(quantization={"group_size": 32, "bits": 8, "mode": "new"}),
        "no predictor settings",
    ),
    "an unknown setting": (
        settings_with(quantization={"group_size": 32, "bits": 8, "mode": "affine", "x": 1}),
        "no predictor settings",
    ),
    "no quantization": (settings_with(quantization=None), "no predictor settings"),
    "an older format": (settings_with(format_version=1), "must hold head1.weight and head2.weight"),
}


@pytest.mark.parametrize("defect", PACKED_DEFECTS)
def test_a_defective_quantized_head_is_refused(tmp_path: Path, defect: str) -> None:
    file = tmp_path / "head.safetensors"
    wide_head().quantized(8).save(file)
    spoil, reason = PACKED_DEFECTS[defect]
    spoil(tmp_path)
    with pytest.raises(PredictorError, match=reason) as caught:
        Head.load(file)
    assert str(caught.value).startswith(str(file))
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
    assert selector.name == "learned"
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
