"""The sparsity predictor (paper section 3.1): a small LM reads the instruction, a two-layer head scores every neuron.

    instruction -> chat template -> backbone -> pooled hidden state [d] -> head1 [r, d] -> head2 [neurons, r] -> scores

A predictor folder is an mlx-lm model folder (the backbone and its tokenizer) that also holds `head.safetensors`; or it
holds only that file, if the backbone is the first layers of the model itself.

A long instruction is cut to a window: the paper's backbone has 302M parameters, and reading 1,000 tokens with it costs
a tenth of their prefill by a sliced model of 3B.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import _get_classes, load_model

from ifprune_mlx.checkpoint.atomic_write import write_atomic
from ifprune_mlx.checkpoint.config_check import check_config, check_names, refuse_custom_code
from ifprune_mlx.checkpoint.context_length import context_length
from ifprune_mlx.checkpoint.format import PREDICTOR_SETTINGS, Quantization
from ifprune_mlx.checkpoint.regular_file import check_ordinary, read_json_object
from ifprune_mlx.checkpoint.safetensors_io import load_arrays, read_safetensors_header
from ifprune_mlx.errors import PredictorError, PromptError, reason_of
from ifprune_mlx.selection.selection import Scores
from ifprune_mlx.tokenizer import embedding_rows, encode_text, load_tokenizer, render_chat

SELECT_WINDOW = 256
"""Default for the most tokens that a predictor reads, including those of its chat template."""
# Format 2 is for heads with a quantized second layer; releases that know only format 1 can read all others.
_FLOAT_FORMAT, _PACKED_FORMAT = 1, 2
_TENSORS = {
    "head1.weight": "first",
    "head1.bias": "first_bias",
    "head2.weight": "second",
    "head2.bias": "second_bias",
    "head2.scales": "second_scales",
    "head2.biases": "second_offsets",
}
_PACKED_TENSORS = {"head2.scales", "head2.biases"}
_GROUPS = (64, 32)
_ROWS = 1 << 16
POOLINGS = ("last", "mean", "both")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_AGAIN = "download or export its folder again"
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
        layers: the backbone is this many first layers of the model itself, run dense; None for a separate backbone.
        quantization: how `second` is packed along r, as uint32 `[neurons, r * bits / 32]`; None for floats.
        second_scales, second_offsets: `[neurons, r / group_size]`, one per group; None for floats. (`mx.quantize` calls
            the offsets biases.)
    """

    first: mx.array
    first_bias: mx.array | None
    second: mx.array
    second_bias: mx.array | None
    widths: tuple[int, ...]
    pooling: str = "last"
    activation: str = "none"
    layers: int | None = None
    quantization: Quantization | None = None
    second_scales: mx.array | None = None
    second_offsets: mx.array | None = None

    def __post_init__(self) -> None:
        neurons, rank = sum(self.widths), self.first.shape[0] if self.first.ndim else 0
        if self.pooling not in POOLINGS or self.activation not in _ACTIVATIONS:
            raise PredictorError(
                f"unknown pooling {self.pooling!r} or activation {self.activation!r}; update ifprune-mlx"
            )
        columns = rank if self.quantization is None else rank * self.quantization.bits // 32
        if self.first.ndim != 2 or self.second.shape != (neurons, columns):
            raise PredictorError(
                f"head1 is {list(self.first.shape)} and head2 {list(self.second.shape)}, but {len(self.widths)} FFNs "
                f"with {neurons} neurons need head2 [{neurons}, {columns}]"
            )
        self._check_packing(neurons, rank)
        for bias, size in ((self.first_bias, rank), (self.second_bias, neurons)):
            if bias is not None and bias.shape != (size,):
                raise PredictorError(f"a head bias has shape {list(bias.shape)}, expected [{size}]")

    def _check_packing(self, neurons: int, rank: int) -> None:
        packing, groups = self.quantization, (self.second_scales, self.second_offsets)
        if (self.second.dtype == mx.uint32) != (packing is not None):
            raise PredictorError(f"head2 is {self.second.dtype}, which does not fit the quantization {packing}")
        if packing is None:
            return
        if packing.mode != "affine" or packing.group_size not in _GROUPS or rank % packing.group_size:
            raise PredictorError(f"head2 of {rank} columns cannot have the quantization {packing.to_dict()}")
        shape = (neurons, rank // packing.group_size)
        if any(array is None or array.shape != shape for array in groups):
            raise PredictorError(f"the scales and biases of a quantized head2 must both be {list(shape)}")

    def quantized(self, bits: int) -> Head:
        """The head with its second layer packed to `bits` (4 or 8), unchanged if it has no more already.

        That layer is nearly the whole head, and every selection reads all of it.

        Raises:
            PredictorError: for other bits, or if r is no multiple of a group.
        """
        if self.quantization is not None and self.quantization.bits <= bits:
            return self
        head, rank = self.unpacked(), self.first.shape[0]
        group = next((size for size in _GROUPS if rank % size == 0), None)
        if group is None or bits not in (4, 8):
            raise PredictorError(
                f"a head with an inner layer of {rank} values cannot be packed with {bits} bits; bits are 4 or 8, and "
                f"the values a multiple of {_GROUPS[-1]}"
            )
        second, scales, offsets = mx.quantize(head.second, group, bits)
        packing = Quantization(group, bits, "affine")
        return replace(head, second=second, quantization=packing, second_scales=scales, second_offsets=offsets)

    def unpacked(self) -> Head:
        """The head with its second layer as floats, for training."""
        if self.quantization is None:
            return self
        assert self.second_scales is not None
        second = mx.dequantize(self.second, self.second_scales, self.second_offsets, **self.quantization.to_dict())
        return replace(self, second=second, quantization=None, second_scales=None, second_offsets=None)

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
        return self.scores(mx.concatenate([hidden[-1], hidden.mean(axis=0)])[None])[0]

    def scores(self, features: mx.array) -> mx.array:
        """The last token's hidden state and their mean `[n, 2 d]` -> scores of all neurons, float32 `[n, neurons]`."""
        width = features.shape[1] // 2
        pooled = {"last": features[:, :width], "mean": features[:, width:], "both": features}[self.pooling]
        # In this order a single instruction takes a matrix-vector product, which OpenBLAS computes faster.
        inner = (self.first.astype(mx.float32) @ pooled.T).T
        if self.first_bias is not None:
            inner = inner + self.first_bias
        inner = _ACTIVATIONS[self.activation](inner)
        scores = self._second(inner)
        return scores if self.second_bias is None else scores + self.second_bias

    def _second(self, inner: mx.array) -> mx.array:
        if self.quantization is not None:
            assert self.second_scales is not None
            packing = self.quantization.to_dict()
            return mx.quantized_matmul(inner, self.second, self.second_scales, self.second_offsets, **packing)
        # In pieces: the whole `second` of a 9B model takes 0.7 GB in float32.
        rows = (self.second[start : start + _ROWS] for start in range(0, self.second.shape[0], _ROWS))
        return mx.concatenate([piece.astype(mx.float32) @ inner.T for piece in rows]).T

    def save(self, path: Path) -> None:
        """Write the tensors as safetensors, with the settings as metadata."""
        named = {name: getattr(self, attribute) for name, attribute in _TENSORS.items()}
        tensors = {name: array for name, array in named.items() if array is not None}
        settings: dict[str, Any] = {
            "format_version": _FLOAT_FORMAT,
            "widths": list(self.widths),
            "pooling": self.pooling,
            "activation": self.activation,
            "layers": self.layers,
        }
        if self.quantization is not None:
            settings |= {"format_version": _PACKED_FORMAT, "quantization": self.quantization.to_dict()}
        metadata = {PREDICTOR_SETTINGS: json.dumps(settings)}
        write_atomic(path, lambda file: mx.save_safetensors(str(file), tensors, metadata), PredictorError)

    @classmethod
    def load(cls, path: Path) -> Head:
        """Read a file of `save`. Raises PredictorError, naming the file."""
        header = read_safetensors_header(path, PredictorError)
        try:
            settings = json.loads(header.metadata[PREDICTOR_SETTINGS])
            version = settings["format_version"]
            if version not in (_FLOAT_FORMAT, _PACKED_FORMAT):
                raise PredictorError(
                    f"{path}: predictor format {version!r}, this release reads {_FLOAT_FORMAT} and {_PACKED_FORMAT}; "
                    "update ifprune-mlx"
                )
            widths = tuple(int(width) for width in settings["widths"])
            pooling, activation = str(settings["pooling"]), str(settings["activation"])
            layers = None if settings.get("layers") is None else int(settings["layers"])
            packing = Quantization(**settings["quantization"]) if version == _PACKED_FORMAT else None
        except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as exc:
            raise PredictorError(
                f"{path}: has no predictor settings in its metadata ({reason_of(exc)}); export it again"
            ) from exc
        known = set(_TENSORS) - (_PACKED_TENSORS if packing is None else set())
        needed = {"head1.weight", "head2.weight"} | (_PACKED_TENSORS if packing is not None else set())
        if not needed <= set(header.tensors) <= known:
            raise PredictorError(f"{path}: must hold {' and '.join(sorted(needed))} and biases of the layers only")
        arrays = load_arrays(path)
        named: dict[str, Any] = {attribute: arrays.get(name) for name, attribute in _TENSORS.items()}
        try:
            return cls(
                **named, widths=widths, pooling=pooling, activation=activation, layers=layers, quantization=packing
            )
        except PredictorError as exc:
            raise PredictorError(f"{path}: {exc}; the predictor's files do not belong together") from exc


class SparsityPredictor:
    """Backbone, tokenizer and head.

    Attributes:
        window: the most tokens that it reads of an instruction; see `instruction_tokens`. May be changed at any time.
    """

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer: TokenizerWrapper,
        head: Head,
        context_length: int | None,
        folder: Path | None = None,
        window: int = SELECT_WINDOW,
    ) -> None:
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.head = head
        self.window = window
        self._last: tuple[str, int, list[int]] | None = None
        self._context_length = context_length
        self._rows = embedding_rows(backbone)
        self._where = "" if folder is None else f"{folder}: "
        width = hidden_states(backbone, mx.array([[0]]), head.layers).shape[-1]
        if head.first.shape[1] != width * (2 if head.pooling == "both" else 1):
            raise PredictorError(
                f"{self._where}head1 reads {head.first.shape[1]} values, the backbone gives {width} per token "
                f"(pooling {head.pooling}); the predictor's files do not belong together"
            )

    @classmethod
    def load(cls, folder: str | Path, *, select_window: int = SELECT_WINDOW) -> SparsityPredictor:
        """Load a predictor folder that holds its backbone; `select_window` becomes `window`.

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
        return cls(backbone, tokenizer, head, context_length, folder, select_window)

    def with_head(self, head: Head) -> SparsityPredictor:
        """The same backbone with another head."""
        other = copy.copy(self)
        other.head = head
        return other

    def tokens(self, text: str) -> list[int]:
        """The instruction as the backbone reads it; see `instruction_tokens`."""
        # A selection cache needs the tokens for its key, and `scores` needs them again on a miss: keep the last ones.
        last, window = self._last, self.window
        if last is None or last[:2] != (text, window):
            tokens = instruction_tokens(self.tokenizer, text, self._context_length, window)
            if self._rows is not None and max(tokens) >= self._rows:
                raise PredictorError(
                    f"{self._where}its tokenizer gives the token id {max(tokens)}, and the backbone has embeddings for "
                    f"{self._rows} tokens; {_AGAIN}"
                )
            self._last = last = (text, window, tokens)
        return last[2]

    def scores(self, text: str) -> list[Scores]:
        """Scores of all neurons for an instruction, per FFN float32 `[d_ffn]`, in the source's neuron order.

        It takes one forward pass, without an output layer or a KV cache.

        Raises:
            PredictorError: if the instruction has no tokens or a score is not a number.
        """
        hidden = hidden_states(self.backbone, mx.array([self.tokens(text)]), self.head.layers)[0]
        flat = np.array(self.head(hidden))
        if not np.all(np.isfinite(flat)):
            raise PredictorError(
                f"{self._where}the predictor's scores contain NaN or infinity; its weights are damaged, convert again"
            )
        return list(np.split(flat, np.cumsum(self.head.widths)[:-1]))


def load_predictor(
    folder: Path, model: nn.Module, tokenizer: TokenizerWrapper, context_length: int | None, widths: Sequence[int]
) -> SparsityPredictor:
    """Load a predictor folder of either kind.

    Args:
        model, tokenizer, context_length: belong to the model it selects for. If that model's first layers are the
            backbone, they must be dense whenever the predictor scores.
        widths: `d_ffn` of that model's FFNs.

    Raises:
        PredictorError: naming the file, if something is missing, damaged, or belongs to another model.
    """
    head = Head.load(folder / "head.safetensors")
    head.check_widths(widths, folder)
    if head.layers is not None:
        return SparsityPredictor(model, tokenizer, head, context_length, folder)
    backbone, own_tokenizer, own_length = load_backbone(folder)
    return SparsityPredictor(backbone, own_tokenizer, head, own_length, folder)


def load_backbone(folder: Path) -> tuple[nn.Module, TokenizerWrapper, int | None]:
    """Load a backbone from an mlx-lm model folder, without its output layer.

    Returns:
        The inner model, its tokenizer, and its context length in tokens, if its config has one.

    Raises:
        PredictorError: naming the folder or the file, if something is missing or damaged.
    """
    check_ordinary(folder, PredictorError)
    config = read_json_object(folder / "config.json", PredictorError)
    refuse_custom_code(config, folder, PredictorError)
    check_names(config, folder, PredictorError)
    for file in sorted(folder.glob("model*.safetensors")):
        read_safetensors_header(file, PredictorError)
    # transformers makes up an empty tokenizer where there is none.
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise PredictorError(f"{folder}: has no tokenizer ({', '.join(_TOKENIZERS)}); copy it there")
    try:
        check_config(config, _get_classes(config)[1], folder, PredictorError)
        model, config = load_model(folder, lazy=True)
        backbone = inner_model(model)
        mx.eval(backbone)
    except PredictorError as exc:
        raise PredictorError(f"{folder}: {exc}") from exc
    except Exception as exc:  # the parsers of mlx-lm and transformers raise many types
        raise PredictorError(f"{folder}: the backbone cannot be loaded ({reason_of(exc)}); {_AGAIN}") from exc
    tokenizer = load_tokenizer(folder, PredictorError, _AGAIN, rows=embedding_rows(backbone))
    return backbone, tokenizer, context_length(config)


def instruction_tokens(
    tokenizer: TokenizerWrapper, text: str, context_length: int | None, window: int = SELECT_WINDOW
) -> list[int]:
    """An instruction as a backbone reads it, at inference and in training: in its chat template, if it has one.

    If it is too long, its middle is cut out. The template's tokens stay, and the beginning and the end of the
    instruction share the room evenly.

    Args:
        context_length, window: limits in tokens, including the template's own; the smaller counts.

    Raises:
        PredictorError: if the instruction has no tokens, or the template leaves no room for any.
    """
    ids = _rendered(tokenizer, text)
    if not ids:
        raise PredictorError("the instruction is empty; the predictor needs at least one token")
    limit = window if context_length is None else min(window, context_length)
    if len(ids) <= limit:
        return ids
    words = text.strip()
    # Rendering a message with another first and last letter shows where the message lies in the template.
    other = next(letter for letter in "xyz" if not words.startswith(letter) and not words.endswith(letter))
    before, after = _shared_ends(ids, _rendered(tokenizer, other))
    room = limit - before - after
    if room < 1:
        raise PredictorError(
            f"the predictor reads {limit} tokens, and its chat template alone has {before + after}; "
            f"give --select-window {before + after + 32} or more"
        )
    return ids[: before + room // 2] + ids[len(ids) - after - (room - room // 2) :]


def _rendered(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    try:
        if not tokenizer.has_chat_template:
            return encode_text(tokenizer, text)
        rendered = render_chat(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)
        return encode_text(tokenizer, rendered, add_special_tokens=False)
    except PromptError as exc:
        raise PredictorError(f"the predictor cannot read the instruction: {exc}") from exc


def _shared_ends(ids: Sequence[int], other: Sequence[int]) -> tuple[int, int]:
    """Lengths of the common beginning and the common end of two renderings: the template around the message."""
    shorter = min(len(ids), len(other))
    before = next((i for i in range(shorter) if ids[i] != other[i]), shorter)
    after = next((i for i in range(shorter - before) if ids[-1 - i] != other[-1 - i]), shorter - before)
    return before, after


def hidden_states(backbone: nn.Module, tokens: mx.array, layers: int | None = None) -> mx.array:
    """Hidden states `[B, L, d]` after the final norm, for tokens `[B, L]`.

    Args:
        layers: run only this many first layers, and the final norm, which bounds the scale of the states.

    Raises:
        PredictorError: if the family does not expose its hidden states, or has no more than `layers` layers.
    """
    inner = inner_model(backbone)
    if layers is None:
        whole: mx.array = inner(tokens)
        return whole
    inner = stack = copy.copy(inner)  # shares every weight
    if isinstance(inner.layers, nn.Module):  # plamo's layers lie one module deeper
        inner.layers = stack = copy.copy(inner.layers)
    if not 0 < layers <= len(stack.layers):
        raise PredictorError(f"the predictor reads {layers} layers, the model has {len(stack.layers)}")
    stack.layers = stack.layers[:layers]
    # With a cache for every layer of the backbone: many families read a later layer's to build the attention mask.
    hidden: mx.array = inner(tokens, cache=make_prompt_cache(backbone))
    return hidden


def features(backbone: nn.Module, texts: Sequence[Sequence[int]], layers: int | None = None) -> mx.array:
    """The head's input for several texts: the last token's hidden state, then the mean over tokens.

    Args:
        texts: token ids of each. Padding is on the right, where a causal model's earlier tokens do not see it.
        layers: see `hidden_states`.

    Returns:
        float32 `[n, 2 d]`.
    """
    lengths = [len(text) for text in texts]
    tokens = mx.array([[*text, *[0] * (max(lengths) - len(text))] for text in texts])
    hidden = hidden_states(backbone, tokens, layers).astype(mx.float32)
    ends = mx.array(lengths)[:, None]
    within = (mx.arange(tokens.shape[1]) < ends)[:, :, None]
    last = mx.take_along_axis(hidden, (ends - 1)[:, :, None], axis=1)[:, 0]
    return mx.concatenate([last, mx.where(within, hidden, 0).sum(axis=1) / ends], axis=1)


def inner_model(module: nn.Module) -> Any:
    """An mlx-lm model without its output layer; it returns hidden states `[B, L, d]`.

    Raises:
        PredictorError: if the family does not expose it, or is falcon_h1 in mlx-lm 0.31.
    """
    inner: Any = module
    while not isinstance(inner.get("embed_tokens"), nn.Module):
        inner = inner.get("model") or inner.get("language_model")
        if inner is None:
            raise PredictorError("the model's family does not expose its hidden states; use a llama or qwen kind")
    if type(inner).__name__ == "FalconH1Model" and version("mlx-lm").startswith("0.31."):
        raise PredictorError("without a cache, mlx-lm 0.31 runs the first layer alone; use Python 3.11 or newer")
    return inner
