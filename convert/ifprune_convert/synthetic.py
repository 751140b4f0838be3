"""Checkpoints of noise in the shapes of real models, to measure speed and memory where there are no weights.

The paper's models are 56 layers of width 2048 with 16 query and 2 KV heads (IFPruning, arXiv 2501.02086, section 4.1);
their FFNs differ in width: 16384 neurons in the 6B, 24576 in the 9B, of which 6656 stay in a 3B. The 12B is ours. Of
the predictor the paper gives the size, 302M, and the head's, width -> 128 -> neurons; a llama of that size is ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ifprune_mlx.checkpoint.regular_file import read_json_object
from ifprune_mlx.errors import SourceError
from ifprune_mlx.selection.predictor import Head

_PAPER: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 56,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "vocab_size": 100352,
    "tie_word_embeddings": True,
}
_KEPT = 6656
_BACKBONE: dict[str, Any] = _PAPER | {
    "hidden_size": 1024,
    "intermediate_size": 3200,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
_RANK = 128
_LLAMA_8B: dict[str, Any] = _PAPER | {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """A model's shape.

    Attributes:
        config: as mlx-lm reads it.
        density: kept / all neurons.
        backbone: config of the predictor's backbone; None for no predictor.
    """

    config: dict[str, Any]
    density: float
    backbone: dict[str, Any] | None

    def scaled(self, layers: int) -> Shape:
        """With that many layers, and vocabulary and predictor in the proportion in which layers went down.

        Raises:
            SourceError: for fewer than one, or more than there are.
        """
        full = int(self.config["num_hidden_layers"])
        if not 1 <= layers <= full:
            raise SourceError(f"{layers} layers: the shape has {full}; give 1 to {full}")
        changes = {"num_hidden_layers": layers, "vocab_size": max(self.config["vocab_size"] * layers // full, 512)}
        backbone = self.backbone
        if backbone is not None:
            deep = max(round(backbone["num_hidden_layers"] * layers / full), 1)
            backbone = backbone | {"num_hidden_layers": deep, "vocab_size": changes["vocab_size"]}
        return Shape(self.config | changes, self.density, backbone)


def _paper(d_ffn: int) -> Shape:
    return Shape(_PAPER | {"intermediate_size": d_ffn}, _KEPT / d_ffn, _BACKBONE)


SHAPES = {
    "paper-6b": _paper(16384),
    "paper-9b": _paper(24576),
    "paper-12b": _paper(32768),
    "llama-8b": Shape(_LLAMA_8B, 3840 / 14336, None),
}


def shape_of(name: str) -> Shape:
    """A shape by name, or the config.json of any dense model, at density 0.27.

    Raises:
        SourceError: if it is neither.
    """
    if name in SHAPES:
        return SHAPES[name]
    file = Path(name)
    if not file.is_file():
        raise SourceError(f"shape {name}: no such file, and none of {', '.join(SHAPES)}")
    config = read_json_object(file, SourceError)
    needed = {"model_type", "num_hidden_layers", "vocab_size"} - set(config)
    if needed:
        raise SourceError(f"{file}: has no {sorted(needed)[0]}; give the config.json of a model that mlx-lm knows")
    return Shape(config, 0.27, None)


class NoiseSource:
    """A source (`ifprune_convert.source.Source`) whose tensors are made when they are taken."""

    licence: str | None = None
    dequantizes = False
    notes: Sequence[str] = ()

    def __init__(self, shape: Shape, dtype: mx.Dtype) -> None:
        self.path = Path("noise")
        self.config = dict(shape.config)
        self._dtype = dtype
        self._tensors = dict(_noise(self.config, dtype))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """As every source has it."""
        return {name: tuple(array.shape) for name, array in self._tensors.items()}

    def take(self, name: str) -> mx.array:
        """As every source has it."""
        array = self._tensors.pop(name)
        mx.eval(array)
        return array

    def write_tokenizer(self, folder: Path) -> None:
        """A tokenizer whose tokens are bytes."""
        write_byte_tokenizer(folder)


def write_predictor(folder: Path, shape: Shape, dtype: mx.Dtype) -> Path:
    """A predictor folder of noise for a shape that has one."""
    assert shape.backbone is not None
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape.backbone), encoding="utf-8")
    weights = dict(_noise(shape.backbone, dtype))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    del weights
    write_byte_tokenizer(folder)
    widths = (int(shape.config["intermediate_size"]),) * int(shape.config["num_hidden_layers"])
    first = mx.random.normal((_RANK, shape.backbone["hidden_size"])).astype(dtype)
    second = mx.random.normal((sum(widths), _RANK)).astype(dtype)
    Head(first, None, second, None, widths).save(folder / "head.safetensors")
    mx.clear_cache()
    return folder


def write_byte_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with ChatML's special tokens and template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _SPECIAL[2], "chat_template": _TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _noise(config: dict[str, Any], dtype: mx.Dtype) -> Iterator[tuple[str, mx.array]]:
    """Every parameter of a model, still to be computed; norms are ones."""
    try:
        model_class, arguments = _get_classes(config)
        model: nn.Module = model_class(arguments.from_dict(config))
    except (ValueError, TypeError, KeyError) as exc:
        raise SourceError(
            f"the shape cannot be built ({exc}); give the config.json of a model that mlx-lm knows"
        ) from exc
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for name, array in parameters.items():
        if array.ndim < 2:
            yield name, mx.ones(array.shape, dtype)
        else:
            yield name, (0.02 * mx.random.normal(array.shape)).astype(dtype)
