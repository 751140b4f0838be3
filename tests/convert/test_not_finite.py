"""NaN or infinity anywhere in a source is refused, naming the tensor, and nothing is left behind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten

from ifprune_convert.packing import quantization_of
from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx.errors import IfpruneError
from tests.tiny import CONFIGS, make_model, write_source, write_tokenizer
from tests.tiny_gguf import TOKENS, write_gguf

STEMS = ["model.embed_tokens", "model.layers.1.self_attn.o_proj", "model.layers.0.mlp.up_proj"]
GGUF_TENSORS = ["token_embd.weight", "blk.0.attn_q.weight", "blk.1.ffn_norm.weight", "output_norm.weight"]
TENSORS = [
    "model.embed_tokens.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.0.self_attn.v_proj.bias",
    "model.layers.1.post_attention_layernorm.weight",
    "model.norm.weight",
    "lm_head.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.mlp.down_proj.bias",
]
CONFIG = CONFIGS["llama-bias"] | {"tie_word_embeddings": False}


def refused(source: Path, out: Path, name: str, **options: Any) -> str:
    with pytest.raises(IfpruneError, match=f"{name}.* contains NaN or infinity") as caught:
        convert(open_source(source), out, Options(**options))
    assert [entry for entry in out.parent.iterdir() if "out" in entry.name] == []
    return str(caught.value)


def spoil(array: mx.array, value: float) -> mx.array:
    flat = array.reshape(-1)
    flat[flat.size // 2] = value
    return flat.reshape(array.shape)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", TENSORS)
def test_in_a_float_tensor(tmp_path: Path, name: str, value: float) -> None:
    source = write_source(tmp_path / "source", "llama-bias", tie_word_embeddings=False)
    weights = dict(tree_flatten(make_model(CONFIG).parameters()))
    weights[name] = spoil(weights[name], value)
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    assert "get the weights again" in refused(source, tmp_path / "out", name)


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("stem", STEMS)
def test_in_the_scales_of_a_quantized_model(tmp_path: Path, stem: str, mode: str) -> None:
    packing = quantization_of(mode, 32 if mode == "affine" else None, None)
    model = make_model(CONFIG)
    nn.quantize(model, packing.group_size, packing.bits, mode=packing.mode)
    weights = dict(tree_flatten(model.parameters()))
    scales = weights[f"{stem}.scales"]
    not_a_number = 0xFF if mode.startswith("mx") else 0x7F
    weights[f"{stem}.scales"] = spoil(scales, math.nan) if mode == "affine" else spoil(scales, not_a_number)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(CONFIG | {"quantization": packing.to_dict()}))
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    write_tokenizer(source)
    refused(source, tmp_path / "out", stem)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.down_proj.weight"]
)
def test_once_a_number_is_cast(tmp_path: Path, name: str) -> None:
    source = write_source(tmp_path / "source", "llama-untied")
    weights = dict(tree_flatten(make_model(CONFIGS["llama-untied"]).parameters()))
    weights[name] = spoil(weights[name], 1e30).astype(mx.bfloat16)
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    words = refused(source, tmp_path / "out", name, dtype=mx.float16)
    assert "as float16; choose another --dtype" in words


@pytest.mark.parametrize(
    "name", ["token_embd.weight", "blk.0.attn_q.weight", "blk.1.ffn_norm.weight", "output_norm.weight"]
)
def test_in_a_gguf_file(tmp_path: Path, name: str) -> None:
    def edit(_: dict[str, Any], tensors: dict[str, tuple[Any, Any]]) -> None:
        values = np.array(tensors[name][0])
        values.reshape(-1)[3] = np.nan
        tensors[name] = (values, tensors[name][1])

    config = CONFIGS["llama"] | {"vocab_size": len(TOKENS)}
    source = write_gguf(tmp_path / "source.gguf", config, make_model(config), edit=edit)
    with pytest.raises(IfpruneError, match="contains NaN or infinity"):
        convert(open_source(source), tmp_path / "out", Options())
