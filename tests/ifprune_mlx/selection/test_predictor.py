"""The sparsity predictor against a reference in plain numpy."""

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
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from ifprune_convert.pipeline import Options
from ifprune_mlx import PredictorError, SparsityPredictor, load, make_selector, stream_generate
from ifprune_mlx.selection.selection import top_k
from ifprune_mlx.selection.selectors import Instruction
from tests.ifprune_mlx.selection.predictor_folders import TEXT, WIDTHS, make_head, write_predictor
from tests.ifprune_mlx.selection.predictor_reference import Array, reference_hidden, reference_tokens
from tests.tiny import CONFIGS, write_checkpoint

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
