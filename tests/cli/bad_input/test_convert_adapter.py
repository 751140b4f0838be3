"""Bad input to `ifprune convert --adapter`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from ifprune_mlx.checkpoint.safetensors_io import load_arrays
from tests.cli.bad_input.table import Bad, Check, Place, Table, cut, edit_json
from tests.convert.tiny_adapter import write_adapter
from tests.convert.tiny_peft import write_peft

TABLE = Table()
case = TABLE.case


ADAPTER, ADAPTER_CONFIG = "adapters.safetensors", "adapter_config.json"


def adapter(at: Place, change: Callable[[dict[str, mx.array]], object] = lambda tensors: None, **options: Any) -> Path:
    """An adapter of the sound dense folder, its tensors changed."""
    folder = write_adapter(at / "adapter", at.source, **options)
    arrays = load_arrays(folder / ADAPTER)
    mx.eval(arrays)
    change(arrays)
    mx.save_safetensors(str(folder / ADAPTER), arrays)
    return folder


@case
def missing_adapter(at: Place) -> Bad:
    return Bad(at.convert(at.source, "--adapter", at / "none"), (str(at / "none"), "no such adapter folder", "give"))


@case
def file_as_adapter(at: Place) -> Bad:
    file = adapter(at) / ADAPTER
    return Bad(at.convert(at.source, "--adapter", file), (str(file), "no such adapter folder", "give the folder"))


@case
def adapter_without_its_tensors(at: Place) -> Bad:
    folder = adapter(at)
    (folder / ADAPTER).unlink()
    return Bad(at.convert(at.source, "--adapter", folder), (str(folder), f"has no {ADAPTER}", "give the folder"))


@case
def adapter_without_its_config(at: Place) -> Bad:
    folder = adapter(at)
    (folder / ADAPTER_CONFIG).unlink()
    return Bad(at.convert(at.source, "--adapter", folder), (str(folder), f"has no {ADAPTER_CONFIG}", "give the folder"))


@case
def adapter_config_that_is_not_json(at: Place) -> Bad:
    folder = adapter(at)
    cut(folder / ADAPTER_CONFIG, 5)
    words = (str(folder / ADAPTER_CONFIG), "not valid JSON", "again")
    return Bad(at.convert(at.source, "--adapter", folder), words)


@case
def adapter_config_that_is_a_list(at: Place) -> Bad:
    folder = adapter(at)
    (folder / ADAPTER_CONFIG).write_text("[]")
    words = (str(folder / ADAPTER_CONFIG), "must hold a JSON object", "again")
    return Bad(at.convert(at.source, "--adapter", folder), words)


@case
def adapter_config_without_a_scale(at: Place) -> Bad:
    folder = adapter(at)
    edit_json(folder / ADAPTER_CONFIG, lambda config: config["lora_parameters"].pop("scale"))
    words = (str(folder / ADAPTER_CONFIG), "no finite number `scale`", "again")
    return Bad(at.convert(at.source, "--adapter", folder), words)


@case
def adapter_of_an_unknown_kind(at: Place) -> Bad:
    folder = adapter(at)
    edit_json(folder / ADAPTER_CONFIG, lambda config: config.update(fine_tune_type="ia3"))
    words = (str(folder / ADAPTER_CONFIG), "'ia3'", "lora, dora, full", "mlx_lm.fuse")
    return Bad(at.convert(at.source, "--adapter", folder), words)


@case
def adapter_of_peft(at: Place) -> Bad:
    folder = adapter(at)
    (folder / ADAPTER).rename(folder / "adapter_model.safetensors")
    return Bad(at.convert(at.source, "--adapter", folder), (str(folder), "PEFT adapter", "merge it"))


@case
def adapter_cut_short(at: Place) -> Bad:
    folder = adapter(at)
    cut(folder / ADAPTER)
    return Bad(at.convert(at.source, "--adapter", folder), (str(folder / ADAPTER), "cut short", "again"))


@case
def adapter_of_a_deeper_model(at: Place) -> Bad:
    stem = "model.layers.7.mlp.up_proj"
    pair = {f"{stem}.lora_a": mx.zeros((64, 4)), f"{stem}.lora_b": mx.zeros((4, 128))}
    folder = adapter(at, lambda tensors: tensors.update(pair))
    words = (str(folder / ADAPTER), stem, "does not have", "give the one of this model")
    return Bad(at.convert(at.source, "--adapter", folder), words)


@case
def adapter_of_a_wider_model(at: Place) -> Bad:
    name = "model.layers.1.mlp.up_proj.lora_a"
    folder = adapter(at, lambda tensors: tensors.update({name: mx.zeros((96, 4))}))
    words = (str(folder / ADAPTER), name, "[96, 4]", "[64, 4]", "give the one of this model")
    return Bad(at.convert(at.source, "--adapter", folder), words)


@case
def adapter_with_half_a_pair(at: Place) -> Bad:
    name = "model.layers.1.mlp.up_proj.lora_b"
    folder = adapter(at, lambda tensors: tensors.pop(name))
    return Bad(at.convert(at.source, "--adapter", folder), (str(folder / ADAPTER), f"lacks {name}", "again"))


@case
def adapter_with_a_tensor_of_another_kind(at: Place) -> Bad:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = adapter(at, lambda tensors: tensors.update({name: mx.zeros((128, 64))}))
    words = (str(folder / ADAPTER), name, "none of lora_a, lora_b", "again")
    return Bad(at.convert(at.source, "--adapter", folder), words)


@case
def adapter_with_nan(at: Place) -> Bad:
    name = "model.layers.1.mlp.up_proj.lora_b"
    folder = adapter(at, lambda tensors: tensors.update({name: mx.full((4, 128), mx.nan)}))
    words = (str(folder / ADAPTER), name, "NaN", "train the adapter again")
    return Bad(at.convert(at.source, "--adapter", folder), words)


@case
def full_adapter_of_another_model(at: Place) -> Bad:
    name = "model.layers.1.mlp.up_proj.bias"
    folder = adapter(at, lambda tensors: tensors.update({name: mx.zeros((128,))}), kind="full")
    words = (str(folder / ADAPTER), f"replaces {name}", "does not have", "give the one of this model")
    return Bad(at.convert(at.source, "--adapter", folder), words)


@case
def full_adapter_of_a_wider_model(at: Place) -> Bad:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = adapter(at, lambda tensors: tensors.update({name: mx.zeros((192, 64))}), kind="full")
    words = (str(folder / ADAPTER), name, "[192, 64]", "[128, 64]", "give the one of this model")
    return Bad(at.convert(at.source, "--adapter", folder), words)


# Adapters of PEFT.

UP = "model.layers.1.mlp.up_proj"


def peft(at: Place, name: str = UP, outputs: int = 128, **config: Any) -> Path:
    """A PEFT adapter of one linear layer."""
    return write_peft(at / "peft", {name: (4, 64, outputs)}, **config)


@case
def peft_adapter_of_another_type(at: Place) -> Bad:
    folder = peft(at, peft_type="IA3")
    return Bad(at.convert(at.source, "--adapter", folder), (str(folder), "type 'IA3'", "only LORA", "merge it"))


@case
def peft_adapter_as_a_pickle(at: Place) -> Bad:
    folder = peft(at)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    return Bad(at.convert(at.source, "--adapter", folder), (str(folder), "pickle", "safe_serialization=True"))


@case
def peft_adapter_of_a_deeper_model(at: Place) -> Bad:
    folder = peft(at, "model.layers.7.mlp.up_proj")
    words = (str(folder), "model.layers.7.mlp.up_proj", "does not have as such", "merge it")
    return Bad(at.convert(at.source, "--adapter", folder), words)


@case
def peft_adapter_of_a_wider_model(at: Place) -> Bad:
    folder = peft(at, outputs=192)
    words = (str(folder), UP, "[192, 64]", "[128, 64]", "give the one of this model")
    return Bad(at.convert(at.source, "--adapter", folder), words)


@case
def peft_adapter_cut_short(at: Place) -> Bad:
    folder = peft(at)
    cut(folder / "adapter_model.safetensors")
    words = (str(folder / "adapter_model.safetensors"), "cut short", "again")
    return Bad(at.convert(at.source, "--adapter", folder), words)


@case
def peft_adapter_of_junk(at: Place) -> Bad:
    folder = peft(at)
    (folder / "adapter_model.safetensors").write_bytes(b"\x93" * 5000)
    words = (str(folder / "adapter_model.safetensors"), "not a safetensors file", "again")
    return Bad(at.convert(at.source, "--adapter", folder), words)


@case
def peft_adapter_with_a_setting_that_is_not_read(at: Place) -> Bad:
    folder = peft(at, alora_invocation_tokens=[1, 2])
    words = (str(folder / ADAPTER_CONFIG), "alora_invocation_tokens", "cannot be fused here", "merge it")
    return Bad(at.convert(at.source, "--adapter", folder), words)


@case
def peft_adapter_of_another_model_than_a_gguf(at: Place) -> Bad:
    folder, file = peft(at), at.gguf()
    words = (str(folder), UP, "[128, 64]", "[96, 64]", "give the one of this model")
    return Bad(at.convert(file, "--adapter", folder), words)


@case
def hub_id_as_adapter(at: Place) -> Bad:
    words = ("someone/adapter", "no such adapter folder", "give the folder")
    return Bad(at.convert(at.source, "--adapter", "someone/adapter"), words)


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name: str, check: Check) -> None:
    check(name)
