"""What a Llama or Qwen2 backbone computes, in plain NumPy: float64, one token after the other.

Written from the paper and the Llama architecture alone.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tokenizers import pre_tokenizers

Array = np.ndarray[Any, np.dtype[np.float64]]


def reference_tokens(text: str) -> list[int]:
    """ChatML by hand, a token for every byte; ASCII only."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    shown = {" ": "Ġ", "\n": "Ċ"}

    def encode(part: str) -> list[int]:
        return [3 + alphabet.index(shown.get(char, char)) for char in part]

    start, end = 1, 2
    return [start, *encode(f"user\n{text}"), end, *encode("\n"), start, *encode("assistant\n")]


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def rotate(x: Array, position: int, theta: float) -> Array:
    """Rotary embedding of one head's vector: element i turns with element i + half."""
    half = len(x) // 2
    angle = position * theta ** (-np.arange(half) * 2.0 / len(x))
    first, second = x[:half], x[half:]
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)]
    )


def reference_hidden(folder: Path, tokens: list[int]) -> Array:
    """Final hidden states [tokens, d] of the Llama in a folder."""
    config = json.loads((folder / "config.json").read_text())
    arrays = mx.load(str(folder / "model.safetensors"))
    w = {name: np.array(array).astype(np.float64) for name, array in arrays.items()}
    heads, kv_heads, eps = config["num_attention_heads"], config["num_key_value_heads"], config["rms_norm_eps"]
    size = config["hidden_size"] // heads

    def linear(x: Array, name: str) -> Array:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    h = w["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        x = rms_norm(h, w[f"{at}.input_layernorm.weight"], eps)
        q = linear(x, f"{at}.self_attn.q_proj").reshape(len(tokens), heads, size)
        k = linear(x, f"{at}.self_attn.k_proj").reshape(len(tokens), kv_heads, size)
        v = linear(x, f"{at}.self_attn.v_proj").reshape(len(tokens), kv_heads, size)
        for position in range(len(tokens)):
            for array in (q, k):
                for head in range(array.shape[1]):
                    array[position, head] = rotate(array[position, head], position, config["rope_theta"])
        attended = np.zeros_like(q)
        for head in range(heads):
            keys, values = k[:, head * kv_heads // heads], v[:, head * kv_heads // heads]
            for position in range(len(tokens)):
                scores = keys[: position + 1] @ q[position, head] / math.sqrt(size)
                weights = np.exp(scores - scores.max())
                attended[position, head] = weights @ values[: position + 1] / weights.sum()
        h = h + linear(attended.reshape(len(tokens), -1), f"{at}.self_attn.o_proj")
        x = rms_norm(h, w[f"{at}.post_attention_layernorm.weight"], eps)
        gate = linear(x, f"{at}.mlp.gate_proj")
        h = h + linear(gate / (1 + np.exp(-gate)) * linear(x, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")
    return rms_norm(h, w["model.norm.weight"], eps)
