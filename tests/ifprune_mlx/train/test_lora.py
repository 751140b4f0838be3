"""Adapters on chosen neurons equal mlx-lm's own adapters on the masked dense model, forwards and backwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters

from ifprune_convert.packing import quantization_of
from ifprune_convert.pipeline import Options
from ifprune_mlx import DataError
from ifprune_mlx.sparse.ffn import module_at
from ifprune_mlx.train.lora import LoRAModel, Parameters
from tests.ifprune_mlx.reference import TOLERANCE, dequantized_model, logits, mask_ffns, open_model, random_selection
from tests.tiny import write_checkpoint

TOKENS = [1, 40, 9, 77, 250, 13, 8]
FAMILIES = ("llama", "llama-bias", "qwen2", "gemma2")
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


def trained(adapted: LoRAModel, seed: int = 3) -> Parameters:
    """Adapter weights with effect: `lora_b` is not zero."""
    mx.random.seed(seed)
    return {name: array + 0.05 * mx.random.normal(array.shape) for name, array in adapted.initial.items()}


def chosen(widths: tuple[int, ...], keep: tuple[int, ...], seed: int) -> list[mx.array]:
    """The neurons of `random_selection(widths, keep, seed)`, in arbitrary order."""
    generator = np.random.default_rng(seed + 1)
    return [mx.array(generator.permutation(ids)) for ids in random_selection(widths, keep, seed).ids]


def source_of(folder: Path) -> Path:
    return folder.with_name(f"source-of-{folder.name}")


def reference(folder: Path, adapter: Path) -> Any:
    """The stock dense model with mlx-lm's own adapters."""
    model, _ = mlx_lm.load(str(source_of(folder)), adapter_path=str(adapter))
    model.eval()
    return model


@pytest.mark.parametrize(("family", "layers"), [*((family, None) for family in FAMILIES), ("llama", 1)])
def test_chosen_neurons_equal_the_masked_reference(
    family: str, layers: int | None, checkpoint: Write, tmp_path: Path
) -> None:
    """Two densities, ids in any order, before and after switches permuted the slots: one result, mlx-lm's."""
    folder = checkpoint(family)
    model = open_model(folder)
    adapted = LoRAModel(model, rank=4, scale=3.0, layers=layers)
    parameters = trained(adapted)
    assert {int(name.split(".")[2]) for name in parameters} == ({0, 1} if layers is None else {1})
    adapted.save(tmp_path / "adapter", parameters)
    adapted.use(parameters)
    dense = logits(reference(folder, tmp_path / "adapter"), TOKENS)
    np.testing.assert_allclose(logits(model, TOKENS), dense, atol=TOLERANCE)
    for seed, keep in enumerate([(32, 32), (96, 48)]):
        selection = random_selection((128, 128), keep, seed)
        wanted = logits(mask_ffns(reference(folder, tmp_path / "adapter"), selection), TOKENS)
        assert np.abs(wanted - dense).max() > 10 * TOLERANCE
        adapted.choose(chosen((128, 128), keep, seed))
        np.testing.assert_allclose(logits(model, TOKENS), wanted, atol=TOLERANCE)
        for other in (7, 8):
            model.switch(random_selection((128, 128), (64, 40), other))
            np.testing.assert_allclose(logits(model, TOKENS), wanted, atol=TOLERANCE)
        adapted.choose(None)
        model.switch(selection)
        np.testing.assert_allclose(logits(model, TOKENS), wanted, atol=TOLERANCE)
        model.switch(None)
        np.testing.assert_allclose(logits(model, TOKENS), dense, atol=TOLERANCE)


def test_neurons_come_back_in_order(checkpoint: Write) -> None:
    """After switches `in_order` makes the model what it was when loaded, to the last bit."""
    model = open_model(checkpoint("llama-bias"))
    adapted = LoRAModel(model, rank=4, scale=3.0)
    adapted.use(trained(adapted))
    before = logits(model, TOKENS)
    for seed in (7, 8):
        model.switch(random_selection((128, 128), (64, 40), seed))
    adapted.choose(chosen((128, 128), (32, 32), 0))
    adapted.in_order()
    assert model.selection is None
    assert all(slots.order.tolist() == list(range(128)) for slots in model.slots)
    np.testing.assert_array_equal(logits(model, TOKENS), before)


def test_masks_multiply_the_activations(checkpoint: Write, tmp_path: Path) -> None:
    """A mask over chosen neurons is a soft mask over all of them in the reference, 0 for the others."""
    folder = checkpoint("llama-bias")
    model = open_model(folder)
    adapted = LoRAModel(model, rank=4, scale=3.0)
    parameters = trained(adapted)
    adapted.save(tmp_path / "adapter", parameters)
    adapted.use(parameters)
    ids = chosen((128, 128), (48, 80), 5)
    masks = [mx.random.uniform(shape=i.shape) for i in ids]
    adapted.choose(ids, masks)
    dense = reference(folder, tmp_path / "adapter")
    dense = mask_ffns(dense, random_selection((128, 128), (48, 80), 5))
    for layer, i, mask in zip(dense.model.layers, ids, masks, strict=True):
        layer.mlp.down_proj._mask[i] = mask
    np.testing.assert_allclose(logits(model, TOKENS), logits(dense, TOKENS), atol=TOLERANCE)


def test_a_quantized_base_keeps_its_weights(tmp_path: Path) -> None:
    """4-bit rows gathered by id give what the dequantized weights give, under float adapters."""
    folder = write_checkpoint(tmp_path / "checkpoint", options=Options(quantization=quantization_of("affine", 32, 4)))
    model = open_model(folder)
    adapted = LoRAModel(model, rank=4, scale=3.0)
    assert isinstance(module_at(model.module, "model.layers.0.self_attn.q_proj").linear, nn.QuantizedLinear)
    parameters = trained(adapted)
    adapted.save(tmp_path / "adapter", parameters)
    adapted.use(parameters)
    dense = load_adapters(dequantized_model(folder), str(tmp_path / "adapter"))
    dense.eval()
    model.switch(random_selection((128, 128), (64, 40), 7))
    adapted.choose(chosen((128, 128), (32, 96), 0))
    wanted = logits(mask_ffns(dense, random_selection((128, 128), (32, 96), 0)), TOKENS)
    np.testing.assert_allclose(logits(model, TOKENS), wanted, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_the_masked_reference(family: str, checkpoint: Write, tmp_path: Path) -> None:
    """Of every adapter weight; those of neurons that do not run are 0."""
    folder = checkpoint(family)
    model = open_model(folder)
    adapted = LoRAModel(model, rank=4, scale=3.0)
    parameters = trained(adapted)
    adapted.save(tmp_path / "adapter", parameters)
    model.switch(random_selection((128, 128), (64, 40), 7))
    adapted.choose(chosen((128, 128), (32, 96), 0))
    weights = mx.random.normal((len(TOKENS), 320), key=mx.random.key(1))

    def loss(given: Parameters) -> mx.array:
        adapted.use(given)
        return (model.module(mx.array([TOKENS]))[0] * weights).sum()

    ours = mx.grad(loss)(parameters)
    dense = mask_ffns(reference(folder, tmp_path / "adapter"), random_selection((128, 128), (32, 96), 0))
    masked = {
        name: array
        for name, array in tree_flatten(
            nn.value_and_grad(dense, lambda m: (m(mx.array([TOKENS]))[0] * weights).sum())(dense)[1]
        )
        if "lora" in name
    }
    theirs = {name.replace("down_proj.down.", "down_proj."): array for name, array in masked.items()}
    assert ours.keys() == theirs.keys()
    assert len(ours) == 2 * 2 * 7
    for name, wanted in theirs.items():
        largest = float(mx.abs(wanted).max())
        assert largest > 0, name
        np.testing.assert_allclose(np.array(ours[name]), np.array(wanted), atol=1e-4 * largest, err_msg=name)
    gone = np.setdiff1d(np.arange(128), random_selection((128, 128), (32, 96), 0).ids[0])
    assert not np.array(ours["model.layers.0.mlp.up_proj.lora_b"])[:, gone].any()
    assert not np.array(ours["model.layers.0.mlp.down_proj.lora_a"])[gone].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_without_adapter_weights_it_is_the_base_model(family: str, checkpoint: Write) -> None:
    """`use(None)` and the first values change no logit, to the last bit, dense or switched."""
    plain, model = open_model(checkpoint(family)), open_model(checkpoint(family))
    adapted = LoRAModel(model, rank=4, scale=3.0)
    selection = random_selection((128, 128), (32, 96), 0)
    for parameters in (adapted.initial, None):
        for active in (None, selection):
            adapted.use(trained(adapted))
            model.switch(active)
            plain.switch(active)
            assert not np.array_equal(logits(model, TOKENS), logits(plain, TOKENS))
            adapted.use(parameters)
            np.testing.assert_array_equal(logits(model, TOKENS), logits(plain, TOKENS))


def test_first_values_hang_on_the_seed(checkpoint: Write) -> None:
    """The same seed gives the same values, another one others; `lora_b` begins at zero."""
    a, b, c = (LoRAModel(open_model(checkpoint("llama")), rank=4, scale=1.0, seed=seed).initial for seed in (1, 1, 2))
    assert all(mx.array_equal(a[name], b[name]) for name in a)
    different = [name for name in a if not mx.array_equal(a[name], c[name])]
    assert sorted(different) == sorted(name for name in a if name.endswith("lora_a"))


def test_only_the_adapters_are_trainable(checkpoint: Write) -> None:
    """The base weights stay frozen: nothing else is among the trainable parameters."""
    adapted = LoRAModel(open_model(checkpoint("llama-bias")), rank=4, scale=1.0)
    names = [name for name, _ in tree_flatten(adapted.model.module.trainable_parameters())]
    assert sorted(names) == sorted(adapted.initial)
    assert all(name.endswith(("lora_a", "lora_b")) for name in names)


def test_what_is_saved_is_read_again(checkpoint: Write, tmp_path: Path) -> None:
    """Save and read give the same weights, bit for bit; the config names what mlx-lm needs."""
    adapted = LoRAModel(open_model(checkpoint("llama")), rank=4, scale=3.0)
    parameters = trained(adapted)
    adapted.save(tmp_path / "a" / "b", parameters)
    again = adapted.read(tmp_path / "a" / "b")
    assert again.keys() == parameters.keys()
    assert all(mx.array_equal(again[name], parameters[name]) for name in parameters)
    config = json.loads((tmp_path / "a" / "b" / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == 2
    assert config["lora_parameters"]["rank"] == 4
    assert config["lora_parameters"]["scale"] == 3.0
    assert "mlp.down_proj" in config["lora_parameters"]["keys"]


@pytest.mark.parametrize(("rank", "scale"), [(8, 3.0), (4, 2.0)])
def test_another_rank_or_scale_is_refused(checkpoint: Write, tmp_path: Path, rank: int, scale: float) -> None:
    """An adapter of another rank or scale would mean something else; the message names this run's."""
    adapted = LoRAModel(open_model(checkpoint("llama")), rank=4, scale=3.0)
    adapted.save(tmp_path, adapted.initial)
    other = LoRAModel(open_model(checkpoint("llama")), rank=rank, scale=scale)
    with pytest.raises(DataError, match=f"rank {rank}, scale {scale:g}"):
        other.read(tmp_path)


def test_more_layers_than_there_are_is_refused(checkpoint: Write) -> None:
    with pytest.raises(DataError, match="--num-layers 3: the model has 2 layers"):
        LoRAModel(open_model(checkpoint("llama")), rank=4, scale=3.0, layers=3)


def test_another_models_adapter_is_refused(checkpoint: Write, tmp_path: Path) -> None:
    """Shapes of another model are told apart before anything is trained."""
    other = write_checkpoint(tmp_path / "other", intermediate_size=256)
    adapted = LoRAModel(open_model(other), rank=4, scale=3.0)
    adapted.save(tmp_path / "adapter", adapted.initial)
    with pytest.raises(DataError, match="of another model"):
        LoRAModel(open_model(checkpoint("llama")), rank=4, scale=3.0).read(tmp_path / "adapter")


@pytest.mark.parametrize("config", [None, "{", "[]", "{}", '{"lora_parameters": 3}'])
def test_a_damaged_adapter_is_refused(checkpoint: Write, tmp_path: Path, config: str | None) -> None:
    """A config that is missing or not one raises DataError naming it; so do tensors that are missing or cut off."""
    adapted = LoRAModel(open_model(checkpoint("llama")), rank=4, scale=3.0)
    with pytest.raises(DataError, match=r"adapters\.safetensors"):
        adapted.read(tmp_path)
    adapted.save(tmp_path, adapted.initial)
    if config is None:
        (tmp_path / "adapter_config.json").unlink()
    else:
        (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(DataError, match=r"adapter_config\.json"):
        adapted.read(tmp_path)
    file = tmp_path / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match="cut short"):
        adapted.read(tmp_path)
