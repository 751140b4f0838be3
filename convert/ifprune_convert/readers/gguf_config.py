"""What mlx-lm's config says of the model in a GGUF file, from the file's metadata.

Reads no tensor: what a tensor tells is handed in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ifprune_mlx.errors import SourceError

from .gguf_header import AGAIN, ORIGINAL, Metadata, Tensor
from .gguf_tokenizer import end_ids, special_ids

# mlx-lm's model_type and the class that its config names, by `general.architecture`. Mistral's is llama's.
_MODELS = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma": ("gemma", "GemmaForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
GEMMAS = frozenset({"gemma", "gemma2", "gemma3"})
_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")
# Metadata that changes what the model computes, in ways that mlx-lm's class for the architecture has no place for.
_UNSUPPORTED = (
    "expert_count", "attention.sliding_window", "logit_scale", "embedding_scale", "residual_scale",
    "rope.freq_base_swa", *_SOFTCAPS,
)  # fmt: skip
# mlx-lm's gemma2 attends to all of the context in every layer, whoever made the file: within the window it is exact.
_SUPPORTED = {
    "gemma2": frozenset({"attention.sliding_window", *_SOFTCAPS}),
    "gemma3": frozenset({"attention.sliding_window", "rope.freq_base_swa"}),
}
# The 27B models scale queries by width / heads, not by the width of a head. The file does not say so; llama.cpp knows
# them by their number of layers, too.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
_UNSCALED = frozenset({"gemma", "gemma2"})  # mlx-lm's classes cannot scale the rotary embedding
_GEMMA3_PERIOD = 6  # five layers with a sliding window, one without; llama.cpp's default where the file does not say


def architecture_of(metadata: Metadata) -> str:
    """The model's architecture, one of those known here.

    Raises:
        SourceError: if it is another, or the file is not one whole model.
    """
    name = metadata.values.get("general.architecture")
    if not isinstance(name, str) or name not in _MODELS:
        raise SourceError(
            f"{metadata.path}: has the architecture {name!r}, and this reader knows {', '.join(_MODELS)} only; "
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


def build_config(
    metadata: Metadata, tensors: dict[str, Tensor], rope_factors: npt.NDArray[np.float32] | None
) -> dict[str, Any]:
    """The config that mlx-lm's model class for this architecture reads.

    Args:
        metadata: the file's metadata.
        tensors: the file's tensors by name, of which shapes and presence tell what the metadata leaves out.
        rope_factors: divisors of the rotary frequencies, float32 `[head_dim / 2]`, where the file has them.

    Raises:
        SourceError: if something is missing or contradictory, or mlx-lm's class cannot express it.
    """
    path, values = metadata.path, metadata.values
    architecture = architecture_of(metadata)
    supported = _SUPPORTED.get(architecture, frozenset())
    for key in _UNSUPPORTED:
        if key not in supported and values.get(f"{architecture}.{key}") not in (None, 0, 1.0):
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
    model_type, model_class = _MODELS[architecture]
    config: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [model_class],
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
    if key_length or architecture == "qwen3" or architecture in GEMMAS:
        config["head_dim"] = head_dim
    if architecture == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    if architecture in _LAYERS_OF_27B:
        config |= _gemma_settings(metadata, architecture, config)
    scaling = _rope_scaling(metadata, architecture, rope_factors, head_dim, theta)
    if scaling is not None:
        config["rope_scaling"] = scaling
    special = special_ids(metadata, embedding.shape[0])
    if "bos" in special:
        config["bos_token_id"] = special["bos"]
    if ends := end_ids(metadata, special, embedding.shape[0]):
        config["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return config


def _gemma_settings(metadata: Metadata, architecture: str, config: dict[str, Any]) -> dict[str, Any]:
    """What only the later Gemmas have: how queries are scaled, and which layers look back how far."""

    def number(key: str, default: float) -> float:
        name = f"{architecture}.{key}"
        return float(metadata.required(name, float)) if name in metadata.values else default

    is_27b = config["num_hidden_layers"] == _LAYERS_OF_27B[architecture]
    width = config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"]
    settings: dict[str, Any] = {"query_pre_attn_scalar": width}
    if architecture == "gemma2":
        return settings | {cap: number(cap, default) for cap, default in zip(_SOFTCAPS, (50.0, 30.0), strict=True)}
    settings["rope_local_base_freq"] = number("rope.freq_base_swa", 10000.0)
    if not metadata.values.get("gemma3.attention.sliding_window"):
        return settings | {"sliding_window_pattern": 1}
    settings["sliding_window"] = metadata.required("gemma3.attention.sliding_window", int)
    settings["sliding_window_pattern"] = _window_period(metadata, config["num_hidden_layers"])
    return settings


def _window_period(metadata: Metadata, layers: int) -> int:
    """Every how many layers one looks back without a window; the file gives the number, or a flag for each layer."""
    key = "gemma3.attention.sliding_window_pattern"
    flags = metadata.values.get(key, _GEMMA3_PERIOD)
    if not isinstance(flags, list):
        period, fits = int(metadata.required(key, int)) if key in metadata.values else _GEMMA3_PERIOD, True
    else:
        period = next((at for at, windowed in enumerate(flags, 1) if not windowed), layers + 1)
        fits = len(flags) == layers and all(flag == (at % period != 0) for at, flag in enumerate(flags, 1))
    if not fits or period > layers:
        raise SourceError(
            f"{metadata.path}: its windows do not recur within {layers} layers, as mlx-lm's gemma3 needs; {ORIGINAL}"
        )
    return period


def _rope_scaling(
    metadata: Metadata,
    architecture: str,
    factors: npt.NDArray[np.float32] | None,
    head_dim: int,
    theta: float,
) -> dict[str, Any] | None:
    """The context extension in mlx-lm's words, where the file has one."""
    scaling = _named_scaling(metadata, architecture)
    if factors is not None:
        if scaling is not None:
            raise SourceError(f"{metadata.path}: scales its rotary embedding in two ways; {ORIGINAL}")
        scaling = _llama3_scaling(metadata.path, factors, head_dim, theta)
    if scaling is not None and architecture in _UNSCALED:
        raise SourceError(
            f"{metadata.path}: scales its rotary embedding, for which mlx-lm's {architecture} has no place; {ORIGINAL}"
        )
    return scaling


def _named_scaling(metadata: Metadata, architecture: str) -> dict[str, Any] | None:
    """The context extension that the metadata names."""
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
