"""Reads a GGUF file: config, tensors, and by `gguf_tokenizer` the tokenizer in its metadata.

The package `gguf` supplies the dequantization. Knows the architectures in the tables below and no others; what mlx-lm's
model wants is asked of mlx-lm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from ifprune_convert.skeleton import build_skeleton, check_shapes, parameter_shapes
from ifprune_mlx.errors import SourceError

from .gguf_header import AGAIN, ORIGINAL, Metadata, Tensor, read_header
from .gguf_tokenizer import check_tokenizer_kind, end_ids, special_ids, write_tokenizer

# The class that mlx-lm's config names, by `general.architecture`; model_type is the architecture's own name.
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_QUANTIZED = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"})
_TYPES = _QUANTIZED | {"F32", "F16", "BF16"}
# Metadata that changes what the model computes, in ways that mlx-lm's class for the architecture has no place for.
_UNSUPPORTED = ("expert_count", "attention.sliding_window", "logit_scale", "embedding_scale", "residual_scale")

# GGUF's tensor names, by mlx-lm's; those of a block follow `blk.N.` and `model.layers.N.`.
_TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

# Rows are read and dequantized in pieces of about this many float32 bytes.
_CHUNK_BYTES = 1 << 25


class GGUFSource:
    """A GGUF file, under mlx-lm's parameter names; see `Source` for the contract."""

    def __init__(self, path: Path) -> None:
        """Check the file's header, tensors and tokenizer kind, without reading a tensor of the model.

        Raises:
            SourceError: if the file is damaged or cut short, or of an architecture, tensor type or tokenizer that
                this reader does not know.
        """
        self.path = path
        metadata, self._tensors = read_header(path)
        self._metadata = Metadata(path, metadata)
        architecture = _architecture(self._metadata)
        check_tokenizer_kind(self._metadata)
        factors = self._tensors.pop("rope_freqs.weight", None) if architecture == "llama" else None
        for tensor in self._tensors.values():
            _check_type(path, tensor)
        rope_factors = None if factors is None else _read_rope_factors(path, factors)
        self.config = _build_config(self._metadata, self._tensors, rope_factors)
        licence = metadata.get("general.license")
        if licence == "other":  # the hub's way to name a licence that is not on its list
            licence = metadata.get("general.license.name", licence)
        self.licence = licence if isinstance(licence, str) else None

        parameters = parameter_shapes(build_skeleton(path, self.config, len(self._tensors)))
        self._names = {name: _gguf_name(name) for name in parameters}
        expected = {self._names[name]: shape for name, shape in parameters.items()}
        check_shapes(path, expected, {name: tensor.shape for name, tensor in self._tensors.items()})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by mlx-lm's parameter name."""
        return {name: self._tensors[gguf_name].shape for name, gguf_name in self._names.items()}

    def take(self, name: str) -> mx.array:
        """The tensor of that name, evaluated: float16 or bfloat16 where it is stored so, else float32.

        Raises:
            KeyError: if there is no such tensor.
            SourceError: if the file can no longer be read.
        """
        tensor = self._tensors[self._names[name]]
        if self.config["model_type"] != "llama":
            return _read_tensor(self.path, tensor)
        # llama.cpp reorders the query and key rows of this architecture, and of no other that is read here.
        heads = {"q_proj": self.config["num_attention_heads"], "k_proj": self.config["num_key_value_heads"]}
        module = name.split(".")[-2]
        head_dim = tensor.shape[0] // heads[module] if module in heads else None
        return _read_tensor(self.path, tensor, head_dim)

    def write_tokenizer(self, folder: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and generation_config.json, rebuilt from the metadata.

        Raises:
            SourceError: if the vocabulary, merges or special tokens in the metadata contradict each other.
        """
        write_tokenizer(self._metadata, self.config, folder)


# The config.


def _architecture(metadata: Metadata) -> str:
    name = metadata.values.get("general.architecture")
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise SourceError(
            f"{metadata.path}: has the architecture {name!r}, and this reader knows {', '.join(_ARCHITECTURES)} only; "
            "convert a model of one of these, or the original safetensors folder"
        )
    if metadata.values.get("general.type", "model") != "model":
        raise SourceError(
            f"{metadata.path}: is not a model but a {metadata.values['general.type']}; pass the model's file"
        )
    if metadata.values.get("split.count", 1) not in (0, 1):
        raise SourceError(
            f"{metadata.path}: is one of {metadata.values['split.count']} parts; "
            "join them first with llama.cpp's `llama-gguf-split --merge`"
        )
    return name


def _build_config(
    metadata: Metadata, tensors: dict[str, Tensor], rope_factors: npt.NDArray[np.float32] | None
) -> dict[str, Any]:
    """The config that mlx-lm's model class for this architecture reads."""
    path, values = metadata.path, metadata.values
    architecture = _architecture(metadata)
    for key in _UNSUPPORTED:
        if values.get(f"{architecture}.{key}") not in (None, 0, 1.0):
            raise SourceError(f"{path}: uses {architecture}.{key}, which this reader does not support; {ORIGINAL}")

    def count(key: str) -> int:
        return int(metadata.required(f"{architecture}.{key}", int))

    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise SourceError(f"{path}: lacks the tensor token_embd.weight; {AGAIN}")
    hidden, heads = count("embedding_length"), count("attention.head_count")
    key_heads = metadata.optional(f"{architecture}.attention.head_count_kv", int) or heads
    key_length = metadata.optional(f"{architecture}.attention.key_length", int)
    value_length = metadata.optional(f"{architecture}.attention.value_length", int)
    head_dim = key_length or hidden // heads
    rotated = metadata.optional(f"{architecture}.rope.dimension_count", int) or head_dim
    # What does not divide is caught here, since reordering the query and key rows would stumble over it.
    sound = head_dim > 0 and head_dim % 2 == 0 and key_heads > 0 and heads % key_heads == 0
    separate = architecture != "qwen2" or head_dim * heads == hidden
    if not sound or not separate or rotated != head_dim or (value_length or head_dim) != head_dim:
        raise SourceError(
            f"{path}: has {heads} query and {key_heads} key heads of width {head_dim}, {rotated} of it rotated, "
            f"which mlx-lm's {architecture} cannot express; {ORIGINAL}"
        )
    theta_key = f"{architecture}.rope.freq_base"
    theta = metadata.required(theta_key, float) if theta_key in values else 10000.0
    config: dict[str, Any] = {
        "model_type": architecture,
        "architectures": [_ARCHITECTURES[architecture]],
        "hidden_size": hidden,
        "num_hidden_layers": count("block_count"),
        "intermediate_size": count("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "rms_norm_eps": metadata.required(f"{architecture}.attention.layer_norm_rms_epsilon", float),
        "vocab_size": embedding.shape[0],
        "rope_theta": theta,
        "max_position_embeddings": count("context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if key_length or architecture == "qwen3":
        config["head_dim"] = head_dim
    if architecture == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    scaling = _rope_scaling(metadata, architecture)
    if rope_factors is not None:
        if scaling is not None:
            raise SourceError(f"{path}: scales its rotary embedding in two ways; {ORIGINAL}")
        scaling = _llama3_scaling(path, rope_factors, head_dim, config["rope_theta"])
    if scaling is not None:
        config["rope_scaling"] = scaling
    special = special_ids(metadata, embedding.shape[0])
    if "bos" in special:
        config["bos_token_id"] = special["bos"]
    if ends := end_ids(metadata, special, embedding.shape[0]):
        config["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return config


def _rope_scaling(metadata: Metadata, architecture: str) -> dict[str, Any] | None:
    """The context extension in mlx-lm's words, where the file names one."""
    prefix = f"{architecture}.rope.scaling"
    kind = metadata.optional(f"{prefix}.type", str)
    old_factor = metadata.optional(f"{architecture}.rope.scale_linear", float)
    if kind is None and old_factor not in (None, 0.0, 1.0):
        return {"rope_type": "linear", "factor": old_factor}
    if kind in (None, "none"):
        return None
    if kind not in ("linear", "yarn") or metadata.optional(f"{prefix}.attn_factor", float) not in (None, 1.0):
        raise SourceError(f"{metadata.path}: scales its rotary embedding by {kind!r}, not supported; {ORIGINAL}")
    scaling = {"rope_type": kind, "factor": metadata.required(f"{prefix}.factor", float)}
    if kind == "yarn":
        if metadata.optional(f"{prefix}.yarn_log_multiplier", float):
            raise SourceError(
                f"{metadata.path}: scales its rotary embedding by a kind of yarn not supported; {ORIGINAL}"
            )
        length = metadata.required(f"{prefix}.original_context_length", int)
        scaling["original_max_position_embeddings"] = length
        for key in ("beta_fast", "beta_slow"):
            if f"{prefix}.yarn_{key}" in metadata.values:
                scaling[key] = metadata.required(f"{prefix}.yarn_{key}", float)
    return scaling


def _read_rope_factors(path: Path, tensor: Tensor) -> npt.NDArray[np.float32]:
    if tensor.kind is not GGMLQuantizationType.F32 or len(tensor.shape) != 1:
        raise SourceError(f"{path}: tensor {tensor.name} is not a vector of float32; {ORIGINAL}")
    return np.array(_read_tensor(path, tensor))


def _llama3_scaling(path: Path, factors: npt.NDArray[np.float32], head_dim: int, theta: float) -> dict[str, Any] | None:
    """Llama 3's scaling, of which the file keeps the resulting divisor of each frequency alone.

    Meta's models differ in the largest divisor only; the published bounds must give back the whole vector.
    """
    if factors.shape == (head_dim // 2,) and np.isfinite(factors).all() and factors.min() > 0:
        if (factors == 1).all():
            return None
        factor, low, high, context = float(factors.max()), 1.0, 4.0, 8192
        turns = context / (2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim))
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        if np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": context,
            }
    raise SourceError(f"{path}: scales its rotary embedding by factors that are not Llama 3's; {ORIGINAL}")


# Tensors.


def _gguf_name(name: str) -> str:
    """The name in a GGUF file of the parameter that mlx-lm calls `name`."""
    module, suffix = name.rsplit(".", 1)
    if module in _TOP_NAMES:
        return f"{_TOP_NAMES[module]}.{suffix}"
    layer, part = module.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{_BLOCK_NAMES[part]}.{suffix}"


def _check_type(path: Path, tensor: Tensor) -> None:
    if tensor.kind.name not in _TYPES:
        raise SourceError(
            f"{path}: tensor {tensor.name} has type {tensor.kind.name}, which is not supported; "
            "use a file in F16, BF16, Q8_0 or a K-quant, or the original safetensors folder"
        )


def _read_tensor(path: Path, tensor: Tensor, head_dim: int | None = None) -> mx.array:
    """Read a tensor, dequantized a few rows at a time; `head_dim` where llama.cpp's order of rows is to be undone."""
    chunks = _read_chunks(path, tensor, head_dim)
    _, result = next(chunks)
    if result.shape[0] < math.prod(tensor.shape[:-1]):
        first, result = result, mx.zeros((math.prod(tensor.shape[:-1]), tensor.shape[-1]), dtype=result.dtype)
        mx.eval(result)
        result[: first.shape[0]] = first
        for row, chunk in chunks:
            result[row : row + chunk.shape[0]] = chunk
            # Evaluated at every step, the buffer is the only one and MLX writes into it; else each step would copy it.
            mx.eval(result)
    result = result.reshape(tensor.shape)
    mx.eval(result)
    return result


def _read_chunks(path: Path, tensor: Tensor, head_dim: int | None) -> Iterator[tuple[int, mx.array]]:
    """The first row of each chunk, and its rows as an array [n, width]; whole heads where `head_dim` is given."""
    rows, width = math.prod(tensor.shape[:-1]), tensor.shape[-1]
    row_bytes = tensor.size // rows
    unit = head_dim or 1
    step = max(_CHUNK_BYTES // (4 * width * unit), 1) * unit
    try:
        with path.open("rb") as file:
            file.seek(tensor.start)
            for row in range(0, rows, step):
                count = min(step, rows - row)
                raw = np.frombuffer(file.read(count * row_bytes), dtype=np.uint8)
                if raw.size != count * row_bytes:
                    raise SourceError(f"{path}: was cut short while it was read, in tensor {tensor.name}; {AGAIN}")
                values = _decode(raw.reshape(count, row_bytes), tensor.kind)
                if head_dim is not None:
                    inner = (
                        1 if len(tensor.shape) == 1 else width
                    )  # a bias is read as one row, but its items are the rows
                    values = values.reshape(-1, head_dim // 2, 2, inner).swapaxes(1, 2).reshape(count, width)
                chunk = mx.array(values)
                yield row, chunk.view(mx.bfloat16) if tensor.kind is GGMLQuantizationType.BF16 else chunk
    except OSError as exc:
        raise SourceError(f"{path}: cannot be read ({exc.strerror or exc})") from None


def _decode(raw: npt.NDArray[np.uint8], kind: GGMLQuantizationType) -> npt.NDArray[Any]:
    """Rows of bytes as float32; as float16 where stored so, and bfloat16 as uint16, which numpy lacks a type for."""
    stored: dict[GGMLQuantizationType, npt.DTypeLike] = {
        GGMLQuantizationType.F32: np.float32,
        GGMLQuantizationType.F16: np.float16,
        GGMLQuantizationType.BF16: np.uint16,
    }
    if kind in stored:
        return raw.view(stored[kind])
    with np.errstate(all="ignore"):  # a damaged scale is infinite or not a number, which is for the user of the weights
        return np.asarray(dequantize(raw, kind), dtype=np.float32)
