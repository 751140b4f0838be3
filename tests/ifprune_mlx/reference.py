"""The plain references that fast paths are tested against: stock mlx-lm models, masked by hand, and greedy decoding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes

from ifprune_mlx import Model, Selection
from ifprune_mlx.checkpoint.format import Checkpoint
from ifprune_mlx.model import load_checkpoint
from tests.tiny import make_model

TOLERANCE = 1e-4
"""On logits of tiny float32 models: the order of summation differs, nothing else does (errors seen: below 1e-5)."""


class MaskedDown(nn.Module):
    """A down projection whose input is multiplied by a mask: the dense reference of a sliced FFN.

    Args:
        down: any module that maps `[..., d_ffn]` to `[..., d_model]`.
        mask: float `[d_ffn]`, 1 for kept neurons and 0 for the rest (soft in training).
    """

    def __init__(self, down: nn.Module, mask: mx.array) -> None:
        super().__init__()
        self.down = down
        self._mask = mask

    def __call__(self, x: mx.array) -> mx.array:
        """`[..., d_ffn]` -> `[..., d_model]`."""
        y: mx.array = self.down(x * self._mask.astype(x.dtype))
        return y


def open_model(folder: Path) -> Model:
    """The model of an IFP checkpoint, without its tokenizer."""
    return load_checkpoint(Checkpoint.open(folder))


def source_model(checkpoint: Path) -> Any:
    """The stock mlx-lm model, float32, that `tests.tiny.write_checkpoint` converted."""
    return make_model(json.loads((checkpoint.with_name(f"source-of-{checkpoint.name}") / "config.json").read_text()))


def random_selection(widths: Sequence[int], keep: Sequence[int], seed: int, selector: str = "random") -> Selection:
    """Arbitrary neurons, drawn here and not by the library."""
    generator = np.random.default_rng(seed)
    ids = [np.sort(generator.permutation(width)[:k]).astype(np.int32) for width, k in zip(widths, keep, strict=True)]
    return Selection(tuple(ids), tuple(widths), selector)


def mask_ffns(dense: Any, selection: Selection) -> Any:
    """Wrap every down projection of a stock llama-like model in `MaskedDown`; changes and returns `dense`."""
    for layer, ids, width in zip(dense.model.layers, selection.ids, selection.widths, strict=True):
        mask = np.zeros(width, dtype=np.float32)
        mask[ids] = 1
        layer.mlp.down_proj = MaskedDown(layer.mlp.down_proj, mx.array(mask))
    return dense


def dequantized_model(folder: Path) -> Any:
    """The stock mlx-lm model, float32, with the weights that a quantized checkpoint's own packed tensors stand for."""
    config = json.loads((folder / "config.json").read_text())
    section = config.pop("ifpruning")
    quantization = config.pop("quantization")
    weights: dict[str, mx.array] = {}
    for file in sorted(folder.glob("model-*.safetensors")):
        arrays = mx.load(str(file))
        for name, array in arrays.items():
            stem, _, leaf = name.rpartition(".")
            if leaf == "weight" and f"{stem}.scales" in arrays:
                weights[name] = _dequantize(arrays, stem, quantization)
            elif leaf not in ("scales", "biases"):
                weights[name] = array
    count = len(section["ffns"])
    for index, spec in enumerate(section["ffns"], 1):
        arrays = mx.load(str(folder / f"neurons-{index:05d}-of-{count:05d}.safetensors"))
        gate_up = _dequantize(arrays, "gate_up", section["quantization"]["gate_up"])
        weights[f"{spec['path']}.{spec['gate']}.weight"] = gate_up[:, 0]
        weights[f"{spec['path']}.{spec['up']}.weight"] = gate_up[:, 1]
        weights[f"{spec['path']}.{spec['down']}.weight"] = _dequantize(
            arrays, "down", section["quantization"]["down"]
        ).T
        if spec["bias"]:
            weights[f"{spec['path']}.{spec['gate']}.bias"] = arrays["gate_up.bias"][:, 0]
            weights[f"{spec['path']}.{spec['up']}.bias"] = arrays["gate_up.bias"][:, 1]
        if spec["down_bias"]:
            weights[f"{spec['path']}.{spec['down']}.bias"] = arrays["down.bias"]
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    model.load_weights(list(weights.items()), strict=True)
    mx.eval(model.parameters())
    return model


def _dequantize(arrays: dict[str, mx.array], stem: str, how: dict[str, Any]) -> mx.array:
    packed = (arrays[f"{stem}.{leaf}"] for leaf in ("weight", "scales"))
    return mx.dequantize(*packed, arrays.get(f"{stem}.biases"), **how).astype(mx.float32)


def logits(model: Any, tokens: Sequence[int], steps: Sequence[int] = ()) -> np.ndarray[Any, Any]:
    """Logits of all positions: `tokens` as one prefill, then `steps` one by one through the KV cache."""
    cache = make_prompt_cache(model.module if isinstance(model, Model) else model)
    parts = [model(mx.array([list(tokens)]), cache=cache)]
    parts += [model(mx.array([[token]]), cache=cache) for token in steps]
    return np.array(mx.concatenate(parts, axis=1)[0])


def greedy(model: Any, tokens: Sequence[int], count: int, **options: Any) -> list[int]:
    """The tokens that stock mlx-lm decodes greedily; it does not stop at an end token."""
    steps = generate_step(mx.array(list(tokens)), model, max_tokens=count, **options)
    return [int(token) for token, _ in steps]
