"""Bad input to `ifprune convert`: GGUF files."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from tests.cli.bad_input.table import Bad, Check, Place, Table, cut

TABLE = Table()
case = TABLE.case


@case
def gguf_cut_in_the_middle(at: Place) -> Bad:
    file = at.gguf()
    cut(file, file.stat().st_size // 2)
    return Bad(at.convert(file), (str(file), "cut short", "again"))


@case
def gguf_with_a_wrong_magic(at: Place) -> Bad:
    file = at.gguf()
    file.write_bytes(b"GGUX" + file.read_bytes()[4:])
    return Bad(at.convert(file), (str(file), "is not a GGUF file", "again"))


@case
def gguf_of_an_unknown_architecture(at: Place) -> Bad:
    file = at.gguf(general__architecture="mamba")
    return Bad(at.convert(file), (str(file), "'mamba'", "llama, qwen2, qwen3"))


@case
def gguf_with_a_tensor_type_that_is_not_read(at: Place) -> Bad:
    name = "blk.0.ffn_up.weight"

    def edit(metadata: dict[str, Any], tensors: dict[str, tuple[Any, Kind]]) -> None:
        tensors[name] = (tensors[name][0], Kind.MXFP4)

    file = at.gguf(edit)
    return Bad(at.convert(file), (str(file), name, "type MXFP4", "use a file in F16"))


@case
def gguf_with_a_tensor_type_of_the_future(at: Place) -> Bad:
    file = at.gguf()
    content = file.read_bytes()
    at_type = content.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 2 * 8
    file.write_bytes(content[:at_type] + struct.pack("<I", 99) + content[at_type + 4 :])
    return Bad(at.convert(file), (str(file), "blk.0.ffn_up.weight", "type number 99", "original safetensors"))


@case
def gguf_without_a_tokenizer(at: Place) -> Bad:
    file = at.gguf(tokenizer__ggml__model=None)
    return Bad(at.convert(file), (str(file), "no tokenizer", "original safetensors"))


@case
def gguf_with_a_tokenizer_of_another_kind(at: Place) -> Bad:
    file = at.gguf(tokenizer__ggml__model="rwkv")
    return Bad(at.convert(file), (str(file), "'rwkv'", "not supported yet", "original safetensors"))


@case
def gguf_that_counts_more_tensors_than_it_has(at: Place) -> Bad:
    file = at.gguf()
    content = file.read_bytes()
    file.write_bytes(content[:8] + struct.pack("<Q", 1 << 60) + content[16:])
    return Bad(at.convert(file), (str(file), "GGUF header", "again"))


@case
def gguf_with_more_layers_than_tensors(at: Place) -> Bad:
    file = at.gguf(llama__block_count=3)
    return Bad(at.convert(file), (str(file), "lacks blk.2.", "again"))


@case
def gguf_of_another_width_than_it_says(at: Place) -> Bad:
    file = at.gguf(llama__feed_forward_length=128)
    return Bad(at.convert(file), (str(file), "[96, 64]", "[128, 64]"))


@case
def gguf_of_an_adapter(at: Place) -> Bad:
    file = at.gguf(general__type="adapter")
    return Bad(at.convert(file), (str(file), "not a model but a adapter", "pass the model's file"))


@case
def gguf_that_is_one_of_several(at: Place) -> Bad:
    file = at.gguf(split__count=2)
    return Bad(at.convert(file), (str(file), "one of 2 parts", "llama-gguf-split --merge"))


@case
def gguf_cut_in_its_header(at: Place) -> Bad:
    file = at.gguf()
    file.write_bytes(file.read_bytes()[:1000])
    return Bad(at.convert(file), (str(file), "GGUF header", "again"))


@case
def gguf_with_nan(at: Place) -> Bad:
    def edit(metadata: dict[str, Any], tensors: dict[str, tuple[Any, Kind]]) -> None:
        tensors["blk.1.ffn_gate.weight"][0][3, 4] = np.nan

    return Bad(at.convert(at.gguf(edit)), (str(at / "model.gguf"), "model.layers.1.mlp", "NaN", "again"))


@case
def folder_of_ggufs(at: Place) -> Bad:
    file = at.gguf()
    return Bad(at.convert(at.folder), (str(at.folder), "holds GGUF files", f"e.g. {file}"))


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name: str, check: Check) -> None:
    check(name)
