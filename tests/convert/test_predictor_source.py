"""Predictors in the layout of the authors' PyTorch code: converted, they score as a plain reference does."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ifprune_convert import predictor as module
from ifprune_convert.pipeline import Options
from ifprune_convert.predictor import open_predictor
from ifprune_mlx import PredictorError, SparsityPredictor, load, stream_generate
from ifprune_mlx.selection.predictor import hidden_states, load_backbone
from ifprune_mlx.selection.selection import top_k
from tests.cli.process import run, run_here
from tests.ifprune_mlx.selection.predictor_reference import Array, reference_hidden, reference_tokens
from tests.tiny import write_checkpoint, write_source

WIDTHS = (128, 128)
TEXT = "Name three rivers in Europe."
Tensors = dict[str, mx.array]


def read(file: Path) -> Tensors:
    loaded = mx.load(str(file))
    assert isinstance(loaded, dict)
    mx.eval(loaded)
    return loaded


def write_torch(
    folder: Path, family: str = "qwen2", *, naming: str = "whole", bias: bool = True, files: int = 1, **changes: Any
) -> Path:
    """A predictor folder of PyTorch, and beside it `plain-NAME`, its backbone as a model of mlx-lm.

    Args:
        naming: the backbone's names are those of the `whole` model or of the `inner` one.
        files: how many the tensors are spread over.
    """
    plain = write_source(folder.with_name(f"plain-{folder.name}"), family, seed=21, **changes)
    weights = read(plain / "model.safetensors")
    mx.random.seed(22)
    for name in weights:  # mlx-lm starts norms at 1
        if name.endswith("norm.weight"):
            weights[name] = mx.random.uniform(0.5, 1.5, weights[name].shape)
    mx.save_safetensors(str(plain / "model.safetensors"), weights, {"format": "mlx"})
    shutil.copytree(plain, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    named = weights if naming == "whole" else {n.removeprefix("model."): a for n, a in weights.items()}
    tensors = {f"feature_extractor.{name}": array for name, array in named.items()}
    tensors |= {
        "prediction_head1.weight": mx.random.normal((16, 64)) / 8,
        "prediction_head2.weight": mx.random.normal((sum(WIDTHS), 16)) / 4,
    }
    if bias:
        tensors |= {"prediction_head1.bias": mx.random.normal((16,))}
        tensors |= {"prediction_head2.bias": mx.random.normal((sum(WIDTHS),))}
    names = list(tensors)
    for index in range(files):
        part = {name: tensors[name] for name in names[index::files]}
        file = "predictor.safetensors" if files == 1 else f"predictor-{index + 1:05d}-of-{files:05d}.safetensors"
        mx.save_safetensors(str(folder / file), part, {"format": "pt"})
    return folder


def heads(folder: Path, hidden: Array) -> list[Array]:
    """The scores, from the last token's state, in NumPy."""
    w: dict[str, Array] = {}
    for file in folder.glob("*.safetensors"):
        w |= {n: np.array(a).astype(np.float64) for n, a in read(file).items() if n.startswith("prediction")}
    inner = w["prediction_head1.weight"] @ hidden[-1] + w.get("prediction_head1.bias", 0)
    scores = w["prediction_head2.weight"] @ inner + w.get("prediction_head2.bias", 0)
    return [scores[: WIDTHS[0]], scores[WIDTHS[0] :]]


def converted(folder: Path) -> Path:
    target = folder.with_name(f"converted-{folder.name}")
    open_predictor(folder, WIDTHS)(target)
    return target


def check(found: list[Any], expected: list[Array]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours - theirs).max() < 1e-4
        assert np.abs(theirs).max() > 0.1
    chosen = top_k(found, [40, 32], "learned")
    for ids, theirs in zip(chosen.ids, expected, strict=True):
        assert ids.tolist() == sorted(np.argsort(-theirs)[: len(ids)].tolist())


@pytest.mark.parametrize("bias", [True, False], ids=["biased", "plain"])
@pytest.mark.parametrize("naming", ["whole", "inner"])
@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("qwen2", False), ("llama", True)])
def test_scores_equal_those_of_the_numpy_reference(
    tmp_path: Path, family: str, tied: bool, naming: str, bias: bool
) -> None:
    folder = write_torch(tmp_path / "torch", family, naming=naming, bias=bias, tie_word_embeddings=tied)
    expected = heads(folder, reference_hidden(tmp_path / "plain-torch", reference_tokens(TEXT)))
    target = converted(folder)
    check(SparsityPredictor.load(target).scores(TEXT), expected)
    # An output layer is never used, and not kept.
    names = {name for file in target.glob("model*.safetensors") for name in read(file)}
    assert names == set(read(tmp_path / "plain-torch" / "model.safetensors")) - {"lm_head.weight"}


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 4.0}], ids=["plain", "scaled"])
def test_rotary_settings_as_transformers_5_writes_them(tmp_path: Path, scaling: dict[str, Any] | None) -> None:
    """mlx-lm's qwen2 and llama do not look there, and its qwen2 has another default."""
    changes = {"rope_theta": 300.0} | ({} if scaling is None else {"rope_scaling": scaling})
    folder = write_torch(tmp_path / "torch", "llama" if scaling else "qwen2", **changes)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_theta"]
    config["rope_parameters"] = {"rope_theta": 300.0, **(config.pop("rope_scaling", None) or {"rope_type": "default"})}
    (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": None}))
    plain, _, _ = load_backbone(tmp_path / "plain-torch")
    hidden = np.array(hidden_states(plain, mx.array([reference_tokens(TEXT)]))[0]).astype(np.float64)
    check(SparsityPredictor.load(converted(folder)).scores(TEXT), heads(folder, hidden))
    if scaling is None:
        assert np.abs(hidden - reference_hidden(tmp_path / "plain-torch", reference_tokens(TEXT))).max() < 1e-4


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "mistral"])
def test_backbones_of_other_families(tmp_path: Path, family: str) -> None:
    folder = write_torch(tmp_path / "torch", family, naming="inner", files=3)
    target = converted(folder)
    predictor = SparsityPredictor.load(target)
    plain, _, _ = load_backbone(tmp_path / "plain-torch")
    hidden = hidden_states(plain, mx.array([reference_tokens(TEXT)]))[0]
    check(predictor.scores(TEXT), heads(folder, np.array(hidden).astype(np.float64)))


def test_an_output_layer_that_the_family_always_has_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No family of the tiny ones is of this kind, so one is made to ignore that it may do without."""
    build = module.build_skeleton
    monkeypatch.setattr(
        module,
        "build_skeleton",
        lambda path, config, count: build(path, config | {"tie_word_embeddings": False}, count),
    )
    opened = open_predictor(write_torch(tmp_path / "torch", tie_word_embeddings=False), WIDTHS)
    assert isinstance(opened, partial)
    _, _, backbone, *_ = opened.args
    assert "lm_head.weight" in backbone
    with pytest.raises(PredictorError, match=r"lacks lm_head\.weight"):
        open_predictor(write_torch(tmp_path / "tied"), WIDTHS)


def test_a_checkpoint_selects_and_generates_by_it(tmp_path: Path) -> None:
    """The predictor reads with its own tokenizer and template, the model with its own."""
    folder = write_torch(tmp_path / "torch")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    checkpoint = write_checkpoint(tmp_path / "checkpoint", options=Options(predictor=folder))
    own = [1, *reference_tokens(TEXT)[6 : 6 + len(TEXT)], 2]
    expected = heads(folder, reference_hidden(tmp_path / "plain-torch", own))
    model, tokenizer = load(checkpoint)
    keep = model.keep(0.25)
    wanted = top_k([scores.astype(np.float32) for scores in expected], keep, "learned")
    last = list(stream_generate(model, tokenizer, [{"role": "user", "content": TEXT}], density=0.25, max_tokens=3))[-1]
    assert last.stats is not None
    assert (last.stats.selector, last.stats.selection) == ("learned", wanted.hash)
    model.close()
    done = run(
        "select", "--model", checkpoint, "--prompt", TEXT, "--density", "0.25", "--json", cache=tmp_path / "cache"
    )
    found = json.loads(done.stdout)
    assert (found["selector"], found["selection"]) == ("learned", wanted.hash)


# What is refused.


def edit(change: Callable[[Tensors], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        tensors = read(folder / "predictor.safetensors")
        change(tensors)
        mx.save_safetensors(str(folder / "predictor.safetensors"), tensors)

    return spoil


def rename(old: str, new: str) -> Callable[[Path], object]:
    return edit(lambda tensors: tensors.update({new: tensors.pop(old)}))


def put(name: str, array: mx.array) -> Callable[[Path], object]:
    return edit(lambda tensors: tensors.update({name: array}))


def config_with(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | changes)
    )


UP = "feature_extractor.model.layers.1.mlp.up_proj.weight"
DEFECTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a pickle": (
        lambda folder: (folder / "predictor.safetensors").rename(folder / "predictor.pt"),
        r"predictor\.pt: is a Python pickle, .* never opened; save it again with safetensors",
    ),
    "no tensors": (lambda folder: (folder / "predictor.safetensors").unlink(), "has neither head.safetensors nor"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json; copy the backbone's"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer"),
    "cut short": (
        lambda folder: (folder / "predictor.safetensors").write_bytes(
            (folder / "predictor.safetensors").read_bytes()[:-9]
        ),
        "cut short",
    ),
    "two of one name": (
        lambda folder: mx.save_safetensors(str(folder / "other.safetensors"), {"prediction_head2.bias": mx.ones(256)}),
        "is in two files, and they differ",
    ),
    "no first head": (rename("prediction_head1.weight", "prediction_head1.0.weight"), "prediction_head1.weight"),
    "a third head": (put("prediction_head3.weight", mx.ones((2, 2))), "holds prediction_head3.weight"),
    "no backbone": (
        edit(lambda tensors: [tensors.pop(n) for n in list(tensors) if n.startswith("feature")]),
        "asks for 2 layers, but there are only 0 tensors",
    ),
    "a missing tensor": (edit(lambda tensors: tensors.pop(UP)), r"lacks model\.layers\.1\.mlp\.up_proj\.weight"),
    "a tensor too many": (
        put("feature_extractor.model.adapter.weight", mx.ones((2, 2))),
        r"has model\.adapter\.weight",
    ),
    "a wrong shape": (put(UP, mx.ones((64, 64))), r"up_proj\.weight has shape \[64, 64\]"),
    "integers": (put(UP, mx.ones((128, 64), mx.int32)), "has type I32"),
    "NaN in the backbone": (put(UP, mx.full((128, 64), math.nan)), r"up_proj\.weight contains NaN"),
    "NaN in a head": (put("prediction_head2.bias", mx.full((256,), math.inf)), r"head2\.bias contains NaN or infinity"),
    "another model's": (put("prediction_head2.weight", mx.ones((255, 16))), "trained for another model"),
    "heads that do not fit": (put("prediction_head1.weight", mx.ones((8, 64))), "do not belong together"),
    "a head of another width": (put("prediction_head1.weight", mx.ones((16, 60))), "head1 reads 60 values"),
    "a quantized backbone": (config_with(quantization_config={"quant_method": "gptq"}), "backbone is quantized"),
    "code of its own": (config_with(model_file="model.py"), "wants to run code"),
    "an unknown family": (config_with(model_type="nonesuch"), "has no model_type 'nonesuch'"),
    "rotary settings by layer": (
        config_with(rope_parameters={"full_attention": {"rope_theta": 5e5}}),
        "has rope_parameters for each kind of layer",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_what_is_refused_in_one_line(tmp_path: Path, defect: str) -> None:
    folder = write_torch(tmp_path / "torch")
    spoil, reason = DEFECTS[defect]
    spoil(folder)
    with pytest.raises(PredictorError, match=reason) as caught:
        converted(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


def test_tensors_that_lie_in_two_files_and_are_equal(tmp_path: Path) -> None:
    folder = write_torch(tmp_path / "torch")
    once = converted(folder)
    shutil.copyfile(folder / "predictor.safetensors", folder / "other.safetensors")
    shutil.move(once, tmp_path / "once")
    assert (converted(folder) / "head.safetensors").read_bytes() == (tmp_path / "once/head.safetensors").read_bytes()


# A quantized head.


def write_wide(folder: Path, kind: str) -> Path:
    """A predictor of either layout whose head has an inner layer of 64 values."""
    write_torch(folder)
    tensors = read(folder / "predictor.safetensors")
    tensors["prediction_head1.weight"] = mx.random.normal((64, 64)) / 8
    tensors["prediction_head1.bias"] = mx.random.normal((64,))
    tensors["prediction_head2.weight"] = mx.random.normal((sum(WIDTHS), 64)) / 8
    mx.save_safetensors(str(folder / "predictor.safetensors"), tensors, {"format": "pt"})
    return folder if kind == "torch" else converted(folder)


@pytest.mark.parametrize("kind", ["torch", "ours"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_head_is_packed_on_the_way(tmp_path: Path, kind: str, bits: int) -> None:
    folder = write_wide(tmp_path / "wide", kind)
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    open_predictor(folder, WIDTHS)(plain)
    open_predictor(folder, WIDTHS, bits)(packed)
    before, after = SparsityPredictor.load(plain), SparsityPredictor.load(packed)
    assert before.head.quantization is None
    assert after.head.quantization is not None
    assert (after.head.quantization.bits, after.head.quantization.group_size) == (bits, 64)
    second = np.array(mx.dequantize(*mx.quantize(before.head.second, 64, bits), 64, bits)).astype(np.float64)
    hidden = np.array(hidden_states(before.backbone, mx.array([before.tokens(TEXT)]))[0, -1]).astype(np.float64)
    inner = np.array(before.head.first) @ hidden + np.array(before.head.first_bias)
    scores = second @ inner + np.array(before.head.second_bias)
    check(after.scores(TEXT), [scores[: WIDTHS[0]], scores[WIDTHS[0] :]])
    # All but the head stays as it is; packed once more, it does too.
    names = {file.name for file in plain.iterdir()}
    assert names == {file.name for file in packed.iterdir()}
    for name in names - {"head.safetensors"}:
        assert (plain / name).read_bytes() == (packed / name).read_bytes()
    open_predictor(packed, WIDTHS, 8)(tmp_path / "again")
    assert (tmp_path / "again" / "head.safetensors").read_bytes() == (packed / "head.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["torch", "ours"])
def test_a_head_that_cannot_be_packed_is_refused_before_anything_is_written(tmp_path: Path, kind: str) -> None:
    folder = write_torch(tmp_path / "torch")
    folder = folder if kind == "torch" else converted(folder)
    with pytest.raises(PredictorError, match=r"inner layer of 16 values .* give --predictor-bits none") as caught:
        write_checkpoint(tmp_path / "checkpoint", options=Options(predictor=folder, predictor_bits=8))
    assert str(caught.value).startswith(str(folder))
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ([], None),
        (["-q", "--q-group-size", "32"], 8),
        (["-q", "--q-group-size", "32", "--predictor-bits", "none"], None),
        (["--predictor-bits", "4"], 4),
    ],
    ids=["floats", "quantized", "quantized but the head", "the head alone"],
)
def test_the_command_packs_the_head_of_a_quantized_model(tmp_path: Path, options: list[str], bits: int | None) -> None:
    source, folder = write_source(tmp_path / "source"), write_wide(tmp_path / "wide", "torch")
    out = tmp_path / "out"
    done = run_here("convert", "--model", source, "--predictor", folder, "--mlx-path", out, *options)
    assert done.returncode == 0, done.stderr
    model, tokenizer = load(out)
    assert model.predictor is not None
    packing = model.predictor.head.quantization
    assert (None if packing is None else packing.bits) == bits
    stats = list(stream_generate(model, tokenizer, [{"role": "user", "content": TEXT}], max_tokens=2))[-1].stats
    assert stats is not None
    assert stats.selector == "learned"


def test_predictor_bits_without_a_predictor_are_refused(tmp_path: Path) -> None:
    done = run_here("convert", "--model", tmp_path, "--mlx-path", tmp_path / "out", "--predictor-bits", "8")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip() == "ifprune: error: --predictor-bits 8 needs --predictor FOLDER as well"
