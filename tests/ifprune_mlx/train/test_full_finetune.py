"""Whole weights on chosen neurons equal the masked dense model's, forwards and backwards, and go through `convert`."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten

from ifprune_convert.packing import quantization_of
from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx import DataError
from ifprune_mlx.checkpoint.format import Checkpoint
from ifprune_mlx.model import load_checkpoint
from ifprune_mlx.train.full_finetune import FullModel
from ifprune_mlx.train.gradients import recomputed
from ifprune_mlx.train.lora import LoRAModel
from ifprune_mlx.train.trainable import Parameters
from tests.ifprune_mlx.reference import TOLERANCE, logits, mask_ffns, open_model, random_selection
from tests.tiny import write_checkpoint

TOKENS = [1, 40, 9, 77, 250, 13, 8]
FAMILIES = ("llama", "llama-bias", "qwen2", "gemma2")
DOWN = "model.layers.0.mlp.down_proj.weight"
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Writes each family's checkpoint once; its dense source lies beside it."""
    made: dict[str, Path] = {}

    def write(family: str) -> Path:
        if family not in made:
            made[family] = write_checkpoint(tmp_path_factory.mktemp(family) / "checkpoint", family)
        return made[family]

    return write


def trained(full: FullModel, seed: int = 3) -> Parameters:
    """Weights that all differ from the base's."""
    mx.random.seed(seed)
    return {name: array + 0.05 * mx.random.normal(array.shape) for name, array in full.initial.items()}


def chosen(keep: tuple[int, ...], seed: int) -> list[mx.array]:
    """The neurons of `random_selection((128, 128), keep, seed)`, in arbitrary order."""
    generator = np.random.default_rng(seed + 1)
    return [mx.array(generator.permutation(ids)) for ids in random_selection((128, 128), keep, seed).ids]


def source_of(folder: Path) -> Path:
    return folder.with_name(f"source-of-{folder.name}")


def reference(folder: Path, adapter: Path) -> Any:
    """The stock dense model with mlx-lm's own full adapter."""
    model, _ = mlx_lm.load(str(source_of(folder)), adapter_path=str(adapter))
    model.eval()
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_chosen_neurons_equal_the_masked_reference(family: str, checkpoint: Write, tmp_path: Path) -> None:
    """Ids in any order, and switches that permute the slots: one result, mlx-lm's."""
    folder = checkpoint(family)
    model = open_model(folder)
    full = FullModel(model)
    parameters = trained(full)
    full.save(tmp_path, parameters)
    full.use(parameters)
    dense = logits(reference(folder, tmp_path), TOKENS)
    np.testing.assert_allclose(logits(model, TOKENS), dense, atol=TOLERANCE)
    selection = random_selection((128, 128), (32, 96), 0)
    wanted = logits(mask_ffns(reference(folder, tmp_path), selection), TOKENS)
    assert np.abs(wanted - dense).max() > 10 * TOLERANCE
    full.choose(chosen((32, 96), 0))
    for other in (7, 8):
        np.testing.assert_allclose(logits(model, TOKENS), wanted, atol=TOLERANCE)
        model.switch(random_selection((128, 128), (64, 40), other))
    full.choose(None)
    model.switch(selection)
    np.testing.assert_allclose(logits(model, TOKENS), wanted, atol=TOLERANCE)
    full.in_order()
    np.testing.assert_allclose(logits(model, TOKENS), dense, atol=TOLERANCE)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_the_masked_reference(family: str, again: bool, checkpoint: Write, tmp_path: Path) -> None:
    """Of every weight, bias and norm of the layers, activations kept or computed again; neurons that do not run get
    none."""
    folder = checkpoint(family)
    model = open_model(folder)
    full = FullModel(model)
    parameters = trained(full)
    full.save(tmp_path, parameters)
    model.switch(random_selection((128, 128), (64, 40), 7))
    full.choose(chosen((32, 96), 0))
    weights = mx.random.normal((len(TOKENS), 320), key=mx.random.key(1))

    def loss(given: Parameters) -> mx.array:
        full.use(given)
        return (model.module(mx.array([TOKENS]))[0] * weights).sum()

    with recomputed(model.layers) if again else nullcontext():
        ours = mx.grad(loss)(parameters)
        mx.eval(ours)
    selection = random_selection((128, 128), (32, 96), 0)
    dense = mask_ffns(reference(folder, tmp_path), selection)
    found = nn.value_and_grad(dense, lambda m: (m(mx.array([TOKENS]))[0] * weights).sum())(dense)[1]
    theirs = {
        name.replace("down_proj.down.", "down_proj."): array.T if name.endswith("down.weight") else array
        for name, array in tree_flatten(found)
        if ".layers." in name
    }
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        largest = float(mx.abs(wanted).max())
        # A bias of keys moves all scores of a query alike, so its gradient is 0 but for rounding.
        np.testing.assert_allclose(np.array(ours[name]), np.array(wanted), atol=1e-4 * largest + 1e-5, err_msg=name)
    gone = np.setdiff1d(np.arange(128), selection.ids[0])
    for name in (DOWN, "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"):
        assert not np.array(ours[name])[gone].any()
        assert np.array(ours[name])[selection.ids[0]].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_without_trained_weights_it_is_the_base_model(family: str, checkpoint: Write) -> None:
    """`use(None)` and the first values change no logit, to the last bit, dense or switched, whatever ran before."""
    plain, model = open_model(checkpoint(family)), open_model(checkpoint(family))
    model.switch(random_selection((128, 128), (64, 40), 7))
    full = FullModel(model)
    for parameters in (full.initial, None):
        for active in (None, random_selection((128, 128), (32, 96), 0)):
            full.use(trained(full))
            model.switch(active)
            plain.switch(active)
            assert not np.array_equal(logits(model, TOKENS), logits(plain, TOKENS))
            full.use(parameters)
            np.testing.assert_array_equal(logits(model, TOKENS), logits(plain, TOKENS))


@pytest.mark.parametrize("family", FAMILIES)
def test_convert_takes_what_is_saved(family: str, checkpoint: Write, tmp_path: Path) -> None:
    """A checkpoint converted with the saved weights computes what the trained model did, on any selection."""
    folder = checkpoint(family)
    model = open_model(folder)
    full = FullModel(model)
    parameters = trained(full)
    full.save(tmp_path / "adapter", parameters)
    full.use(parameters)
    convert(open_source(source_of(folder)), tmp_path / "ifp", Options(adapter=tmp_path / "adapter"))
    converted = open_model(tmp_path / "ifp")
    for active in (None, random_selection((128, 128), (32, 96), 0)):
        model.switch(active)
        converted.switch(active)
        np.testing.assert_allclose(logits(converted, TOKENS), logits(model, TOKENS), atol=TOLERANCE)


def test_weights_are_kept_finer_than_they_are_used(checkpoint: Write, tmp_path: Path) -> None:
    """A bfloat16 base computes and is saved as such; what is trained is float32, and so are its gradients."""
    model = load_checkpoint(Checkpoint.open(checkpoint("qwen2")), dtype=mx.bfloat16)
    full = FullModel(model)
    assert {array.dtype for array in full.initial.values()} == {mx.float32}

    def loss(given: Parameters) -> mx.array:
        full.use(given)
        said = model.module(mx.array([TOKENS]))
        assert said.dtype == mx.bfloat16
        return said.astype(mx.float32).max()

    assert {array.dtype for array in mx.grad(loss)(full.initial).values()} == {mx.float32}
    full.save(tmp_path, full.initial)
    saved = mx.load(str(tmp_path / "adapters.safetensors"))
    assert isinstance(saved, dict)
    assert {array.dtype for array in saved.values()} == {mx.bfloat16}


def test_what_is_saved_is_read_again(checkpoint: Write, tmp_path: Path) -> None:
    """Bit for bit; on disk it has mlx-lm's names, orientation and config."""
    full = FullModel(open_model(checkpoint("llama-bias")))
    parameters = trained(full)
    full.save(tmp_path / "a" / "b", parameters)
    again = full.read(tmp_path / "a" / "b")
    assert again.keys() == parameters.keys()
    assert all(mx.array_equal(again[name], parameters[name]) for name in parameters)
    saved = mx.load(str(tmp_path / "a" / "b" / "adapters.safetensors"))
    assert isinstance(saved, dict)
    assert (parameters[DOWN].shape, saved[DOWN].shape) == ((128, 64), (64, 128))
    assert not any("embed" in name for name in saved)
    config = json.loads((tmp_path / "a" / "b" / "adapter_config.json").read_text())
    assert (config["fine_tune_type"], config["num_layers"]) == ("full", 2)


def test_a_quantized_base_is_refused(tmp_path: Path) -> None:
    """Packed weights have no gradient."""
    quantized = Options(quantization=quantization_of("affine", 32, 4))
    folder = write_checkpoint(tmp_path / "checkpoint", options=quantized)
    with pytest.raises(DataError, match="checkpoint: its weights are quantized"):
        FullModel(open_model(folder))


def test_what_was_trained_otherwise_is_refused(checkpoint: Write, tmp_path: Path) -> None:
    """Adapters for whole weights, the other way round, and weights of another model."""
    adapted, full = (
        LoRAModel(open_model(checkpoint("llama")), rank=4, scale=3.0),
        FullModel(open_model(checkpoint("llama"))),
    )
    adapted.save(tmp_path / "lora", adapted.initial)
    full.save(tmp_path / "full", full.initial)
    with pytest.raises(DataError, match="trained with --fine-tune-type lora"):
        full.read(tmp_path / "lora")
    with pytest.raises(DataError, match="trained with --fine-tune-type full"):
        adapted.read(tmp_path / "full")
    with pytest.raises(DataError, match="is of another model"):
        FullModel(open_model(checkpoint("qwen2"))).read(tmp_path / "full")
