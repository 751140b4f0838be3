"""The sparsity predictor (paper section 3.1): a small LM reads the instruction, a two-layer head scores every neuron.

    instruction -> chat template -> backbone -> pooled hidden state [d] -> head1 [r, d] -> head2 [neurons, r] -> scores

A predictor folder is an mlx-lm model folder (the backbone and its tokenizer) with `head.safetensors` beside; or that
file alone, if the backbone is the first layers of the model itself. Knows nothing of the model that it selects for but
the widths of its FFNs.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model, load_tokenizer

from .checkpoint import read_json_object, refuse_custom_code
from .errors import PredictorError
from .files import read_safetensors_header, write_atomic
from .selection import Scores

_FORMAT = 1
_METADATA = "ifprune_predictor"
_ROWS = 1 << 16
POOLINGS = ("last", "mean", "both")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "none": lambda x: x,
    "relu": nn.relu,
    "gelu": nn.gelu,
    "silu": nn.silu,
}


@dataclass(frozen=True)
class Head:
    """The two-layer head.

    Attributes:
        first, first_bias: `[r, d]` and `[r]` or None, where d is the backbone's width (twice that for pooling `both`).
        second, second_bias: `[neurons, r]` and `[neurons]` or None; neurons of all FFNs, one FFN after the other.
        widths: `d_ffn` of every FFN.
        pooling: `last` token's hidden state (the paper's), `mean` over tokens, or `both` (last, then mean).
        activation: between the layers; the authors' released code has none.
        layers: the backbone is that many first layers of the model itself, run dense; None for a backbone of its own.
    """

    first: mx.array
    first_bias: mx.array | None
    second: mx.array
    second_bias: mx.array | None
    widths: tuple[int, ...]
    pooling: str = "last"
    activation: str = "none"
    layers: int | None = None

    def __post_init__(self) -> None:
        neurons, rank = sum(self.widths), self.first.shape[0] if self.first.ndim else 0
        if self.pooling not in POOLINGS or self.activation not in _ACTIVATIONS:
            raise PredictorError(
                f"unknown pooling {self.pooling!r} or activation {self.activation!r}; update ifprune-mlx"
            )
        if self.first.ndim != 2 or self.second.shape != (neurons, rank):
            raise PredictorError(
                f"head1 is {list(self.first.shape)} and head2 {list(self.second.shape)}, but {len(self.widths)} FFNs "
                f"with {neurons} neurons need head2 [{neurons}, {rank}]"
            )
        for bias, size in ((self.first_bias, rank), (self.second_bias, neurons)):
            if bias is not None and bias.shape != (size,):
                raise PredictorError(f"a head bias has shape {list(bias.shape)}, expected [{size}]")

    def check_widths(self, widths: Sequence[int], where: Path) -> None:
        """Raise PredictorError unless the head scores FFNs of these widths."""
        if self.widths != tuple(widths):
            ours, theirs = self.widths, tuple(widths)
            raise PredictorError(
                f"{where}: the predictor scores {len(ours)} FFNs ({sum(ours)} neurons), the model has "
                f"{len(theirs)} ({sum(theirs)} neurons); it was trained for another model, "
                "convert with --predictor DIR of this one's"
            )

    def __call__(self, hidden: mx.array) -> mx.array:
        """Hidden states of all tokens `[tokens, d]` -> scores of all neurons, float32 `[neurons]`."""
        hidden = hidden.astype(mx.float32)
        last, mean = hidden[-1], hidden.mean(axis=0)
        pooled = {"last": last, "mean": mean, "both": mx.concatenate([last, mean])}[self.pooling]
        inner = self.first.astype(mx.float32) @ pooled
        if self.first_bias is not None:
            inner = inner + self.first_bias
        inner = _ACTIVATIONS[self.activation](inner)
        # In pieces: of a 9B model, the whole of `second` in float32 is 0.7 GB.
        rows = (self.second[start : start + _ROWS] for start in range(0, self.second.shape[0], _ROWS))
        scores = mx.concatenate([piece.astype(mx.float32) @ inner for piece in rows])
        return scores if self.second_bias is None else scores + self.second_bias

    def save(self, path: Path) -> None:
        """Write `head.safetensors`, its settings as metadata."""
        named = {
            "head1.weight": self.first,
            "head1.bias": self.first_bias,
            "head2.weight": self.second,
            "head2.bias": self.second_bias,
        }
        tensors = {name: array for name, array in named.items() if array is not None}
        settings = {
            "format_version": _FORMAT,
            "widths": list(self.widths),
            "pooling": self.pooling,
            "activation": self.activation,
            "layers": self.layers,
        }
        metadata = {_METADATA: json.dumps(settings)}
        write_atomic(path, lambda file: mx.save_safetensors(str(file), tensors, metadata), PredictorError)

    @classmethod
    def load(cls, path: Path) -> Head:
        """Read what `save` wrote.

        Raises:
            PredictorError: naming the file.
        """
        header = read_safetensors_header(path, PredictorError)
        known = {"head1.weight", "head1.bias", "head2.weight", "head2.bias"}
        unknown = sorted(set(header.tensors) - known)
        if unknown or not {"head1.weight", "head2.weight"} <= set(header.tensors):
            raise PredictorError(f"{path}: must hold head1.weight and head2.weight and their biases only")
        try:
            settings = json.loads(header.metadata[_METADATA])
            version = settings["format_version"]
            widths = tuple(int(width) for width in settings["widths"])
            pooling, activation = str(settings["pooling"]), str(settings["activation"])
            layers = None if settings.get("layers") is None else int(settings["layers"])
        except (KeyError, TypeError, ValueError) as exc:
            raise PredictorError(
                f"{path}: has no predictor settings in its metadata ({exc!r}); export it again"
            ) from None
        if version != _FORMAT:
            raise PredictorError(
                f"{path}: predictor format {version!r}, this release reads {_FORMAT}; update ifprune-mlx"
            )
        arrays = mx.load(str(path))
        assert isinstance(arrays, dict)
        try:
            return cls(
                arrays["head1.weight"],
                arrays.get("head1.bias"),
                arrays["head2.weight"],
                arrays.get("head2.bias"),
                widths,
                pooling,
                activation,
                layers,
            )
        except PredictorError as exc:
            raise PredictorError(f"{path}: {exc}; the predictor's files do not belong together") from None


class SparsityPredictor:
    """Backbone, tokenizer and head."""

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer: TokenizerWrapper,
        head: Head,
        context_length: int | None,
        folder: Path | None = None,
    ) -> None:
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.head = head
        self._context_length = context_length
        self._where = "" if folder is None else f"{folder}: "
        width = hidden_states(backbone, mx.array([[0]]), head.layers).shape[-1]
        if head.first.shape[1] != width * (2 if head.pooling == "both" else 1):
            raise PredictorError(
                f"{self._where}head1 reads {head.first.shape[1]} values, the backbone gives {width} per token "
                f"(pooling {head.pooling}); the predictor's files do not belong together"
            )

    @classmethod
    def load(cls, folder: str | Path) -> SparsityPredictor:
        """Load the folder of a predictor with a backbone of its own.

        Raises:
            PredictorError: naming the file, if something is missing or does not fit.
        """
        folder = Path(folder)
        for name in ("config.json", "head.safetensors"):
            if not (folder / name).is_file():
                raise PredictorError(
                    f"{folder}: has no {name}; a predictor is an mlx-lm model folder with head.safetensors"
                )
        head = Head.load(folder / "head.safetensors")
        backbone, tokenizer, context_length = load_backbone(folder)
        return cls(backbone, tokenizer, head, context_length, folder)

    @classmethod
    def on_first_layers(
        cls, folder: Path, model: nn.Module, tokenizer: TokenizerWrapper, context_length: int | None
    ) -> SparsityPredictor:
        """Load a predictor whose backbone is the first layers of `model`, which must be dense when it is asked.

        Raises:
            PredictorError: naming the file, if it does not fit.
        """
        return cls(model, tokenizer, Head.load(folder / "head.safetensors"), context_length, folder)

    def with_head(self, head: Head) -> SparsityPredictor:
        """The same backbone with another head."""
        other = copy.copy(self)
        other.head = head
        return other

    def tokens(self, text: str) -> list[int]:
        """The instruction as the backbone reads it; see `instruction_tokens`."""
        return instruction_tokens(self.tokenizer, text, self._context_length)

    def scores(self, text: str) -> list[Scores]:
        """Score every neuron for an instruction.

        Returns:
            Per FFN, float32 `[d_ffn]`, in the source's neuron order.

        Raises:
            PredictorError: if the instruction has no tokens or a score is not a number.
        """
        hidden = hidden_states(self.backbone, mx.array([self.tokens(text)]), self.head.layers)[0]
        flat = np.array(self.head(hidden))
        if not np.all(np.isfinite(flat)):
            raise PredictorError(
                f"{self._where}the predictor's scores contain NaN or infinity; its weights are damaged, convert again"
            )
        bounds = np.cumsum(self.head.widths)[:-1]
        return list(np.split(flat, bounds))


def load_predictor(
    folder: Path, model: nn.Module, tokenizer: TokenizerWrapper, context_length: int | None, widths: Sequence[int]
) -> SparsityPredictor:
    """Load a predictor folder of either kind.

    Args:
        model, tokenizer, context_length: of the model it selects for, whose first layers may be its backbone.
        widths: `d_ffn` of that model's FFNs.

    Raises:
        PredictorError: naming the file, if something is missing, damaged, or belongs to another model.
    """
    head = Head.load(folder / "head.safetensors")
    head.check_widths(widths, folder)
    if head.layers is None:
        return SparsityPredictor.load(folder)
    return SparsityPredictor.on_first_layers(folder, model, tokenizer, context_length)


def load_backbone(folder: Path) -> tuple[nn.Module, TokenizerWrapper, int | None]:
    """Load a backbone of its own: an mlx-lm model folder.

    Returns:
        The model, its tokenizer, and the most tokens that it was made for, if its config says so.

    Raises:
        PredictorError: naming the folder or the file, if something is missing or damaged.
    """
    refuse_custom_code(read_json_object(folder / "config.json", PredictorError), folder, PredictorError)
    for file in sorted(folder.glob("model*.safetensors")):
        read_safetensors_header(file, PredictorError)
    # transformers makes up an empty tokenizer where there is none.
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise PredictorError(f"{folder}: has no tokenizer ({', '.join(_TOKENIZERS)}); copy it there")
    try:
        backbone, config = load_model(folder)
        tokenizer = load_tokenizer(folder, {"trust_remote_code": False}, eos_token_ids=config.get("eos_token_id"))
    except Exception as exc:  # mlx-lm and transformers raise whatever their parsers do
        reason = " ".join(str(exc).split())[:300]
        raise PredictorError(
            f"{folder}: the backbone cannot be loaded ({reason}); download or export its folder again"
        ) from None
    context = config.get("max_position_embeddings")
    return backbone, tokenizer, int(context) if context else None


def instruction_tokens(tokenizer: TokenizerWrapper, text: str, context_length: int | None) -> list[int]:
    """An instruction as a backbone reads it: in its chat template, if it has one.

    An instruction longer than the context keeps its head and its tail.

    Raises:
        PredictorError: if it has no tokens.
    """
    if tokenizer.has_chat_template:
        messages = [{"role": "user", "content": text}]
        ids = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    else:
        ids = list(tokenizer.encode(text))
    if not ids:
        raise PredictorError("the instruction is empty; the predictor needs at least one token")
    if context_length is not None and len(ids) > context_length:
        ids = ids[: context_length // 2] + ids[-(context_length - context_length // 2) :]
    return ids


def hidden_states(backbone: nn.Module, tokens: mx.array, layers: int | None = None) -> mx.array:
    """What the family's inner model returns, after its final norm: hidden states `[B, L, d]` for tokens `[B, L]`.

    Args:
        layers: run only that many first layers (then the final norm, which keeps the scale of the states in hand).

    Raises:
        PredictorError: if the family does not expose its hidden states, or has no more than `layers` layers.
    """
    inner = inner_model(backbone)
    if layers is not None:
        if not 0 < layers <= len(inner.layers):
            raise PredictorError(f"the predictor reads {layers} layers, the model has {len(inner.layers)}")
        inner = copy.copy(inner)  # shares every weight
        inner.layers = inner.layers[:layers]
    hidden: mx.array = inner(tokens)
    return hidden


def inner_model(module: nn.Module) -> Any:
    """The part of an mlx-lm model that gives hidden states `[B, L, d]`: all but the output layer.

    Raises:
        PredictorError: if the family does not expose it.
    """
    inner: Any = module
    while not isinstance(inner.get("embed_tokens"), nn.Module):
        inner = inner.get("model") or inner.get("language_model")
        if inner is None:
            raise PredictorError("the model's family does not expose its hidden states; use a llama or qwen kind")
    return inner
