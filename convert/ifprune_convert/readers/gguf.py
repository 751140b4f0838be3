"""Reads a GGUF file: header, config, tensors, and the tokenizer that lies in its metadata.

The header is walked here and not by the `gguf` package's own reader, which loops without end on a damaged array
length and maps the file into memory; the package supplies the tensor types and their dequantization. Knows the
architectures and tokenizers in the tables below and no others; what mlx-lm's model wants is asked of mlx-lm.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ifprune_mlx.errors import SourceError

from .safetensors import build_skeleton, check_shapes, parameter_shapes

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

_AGAIN = "download or copy the file again"
_ORIGINAL = "convert from the original safetensors folder"

# The struct code of each scalar metadata type, by its number in the file; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
# Far above any real file; they keep a damaged length from claiming gigabytes.
_MAX_STRING_BYTES = 1 << 24
_MAX_ARRAY_ITEMS = 10_000_000
# Rows are read and dequantized in pieces of about this many float32 bytes.
_CHUNK_BYTES = 1 << 25

_CONTROL, _USER_DEFINED = 3, 4
_GPT2_SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False)
_LLAMA3 = "llama-bpe"
# Digits stay single in Qwen's tokens and come in threes in Llama's; the rest of the expression is the same.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split_words(digits: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(_WORDS.format(digits=digits)), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# How text is cut into words before byte pairs are merged, by `tokenizer.ggml.pre`.
_PRE_TOKENIZERS: dict[str, pre_tokenizers.PreTokenizer] = {
    "default": _GPT2_SPLIT,
    "gpt-2": _GPT2_SPLIT,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2_SPLIT]),
    "qwen2": _split_words(""),
    _LLAMA3: _split_words("{1,3}"),
}


class GGUFSource:
    """A GGUF file, under mlx-lm's parameter names; see `Source` for the contract."""

    def __init__(self, path: Path) -> None:
        """Check the file's header, tensors and tokenizer kind, without reading a tensor of the model.

        Raises:
            SourceError: if the file is damaged or cut short, or of an architecture, tensor type or tokenizer that
                this reader does not know.
        """
        self.path = path
        metadata, self._tensors = _read_header(path)
        self._metadata = _Metadata(path, metadata)
        architecture = self._metadata.architecture()
        _check_tokenizer_kind(self._metadata)
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
        tokenizer, special = _build_tokenizer(self._metadata, self.config["vocab_size"])
        (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "add_bos_token": _adds_bos(self._metadata),
            "add_eos_token": _adds_eos(self._metadata),
        }
        settings |= {f"{role}_token": tokenizer.id_to_token(token) for role, token in special.items()}
        if (template := self._metadata.optional("tokenizer.chat_template", str)) is not None:
            settings["chat_template"] = template
        _write_json(folder / "tokenizer_config.json", settings)
        generation = {f"{role}_token_id": special[role] for role in ("bos", "pad") if role in special}
        if "eos_token_id" in self.config:
            generation["eos_token_id"] = self.config["eos_token_id"]
        _write_json(folder / "generation_config.json", generation)


# The header.


@dataclass(frozen=True)
class _Tensor:
    """One entry of the header: name, type, shape with rows first, and the byte range in the file."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    size: int


class _Cursor:
    """Reads the header's values in order, and never beyond the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self.offset = 0

    def _advance(self, size: int) -> int:
        start = self.offset
        if size > len(self._data) - start:
            raise SourceError(f"{self._path}: cut off or damaged in the GGUF header at byte {start}; {_AGAIN}")
        self.offset += size
        return start

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        layout = f"<{count}{code}"
        return struct.unpack_from(layout, self._data, self._advance(struct.calcsize(layout)))

    def integer(self, code: str) -> int:
        return int(self.numbers(code, 1)[0])

    def text(self) -> str:
        length = self.integer("Q")
        if length > _MAX_STRING_BYTES:
            raise self.damaged(f"a text of {length} bytes")
        start = self._advance(length)
        try:
            return self._data[start : self.offset].decode()
        except UnicodeDecodeError:
            raise self.damaged("a text that is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _FLOAT32:
            # The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06.
            return float(str(np.float32(self.numbers("f", 1)[0])))
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind], 1)[0]
        if kind != _ARRAY:
            raise self.damaged(f"a value of the unknown type {kind}")
        kind, count = self.integer("I"), self.integer("Q")
        if count > _MAX_ARRAY_ITEMS:
            raise self.damaged(f"an array of {count} items")
        if kind == _STRING:
            return [self.text() for _ in range(count)]
        if kind not in _SCALARS:
            raise self.damaged(f"an array of the type {kind}")
        return list(self.numbers(_SCALARS[kind], count))

    def damaged(self, what: str) -> SourceError:
        return SourceError(f"{self._path}: the GGUF header has {what} before byte {self.offset}; {_AGAIN}")


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """The metadata and the tensors of a GGUF file, every byte range checked against its length."""
    try:
        size = path.stat().st_size
        if size == 0:
            raise SourceError(f"{path}: is empty; {_AGAIN}")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse_header(path, _Cursor(path, data), size)
    except OSError as exc:
        raise SourceError(f"{path}: cannot be read ({exc.strerror or exc})") from None


def _parse_header(path: Path, cursor: _Cursor, size: int) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    if size < 4 or cursor.integer("I") != int.from_bytes(b"GGUF", "little"):
        raise SourceError(f"{path}: is not a GGUF file, whatever its name says; {_AGAIN}")
    version = cursor.integer("I")
    if version not in (2, 3):
        # A small number in the upper half is version 3 as a big-endian machine writes it.
        what = "is big-endian" if version and version & 0xFFFF == 0 else f"has GGUF version {version}"
        raise SourceError(f"{path}: {what}, and this reader knows little-endian versions 2 and 3; {_ORIGINAL}")
    tensor_count, value_count = cursor.integer("Q"), cursor.integer("Q")
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.text()
        if key in metadata:
            raise cursor.damaged(f"{key!r} twice")
        metadata[key] = cursor.value(cursor.integer("I"))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise cursor.damaged(f"the alignment {alignment!r}")

    entries: list[tuple[str, GGMLQuantizationType, tuple[int, ...], int, int]] = []
    expected_offset = 0
    for _ in range(tensor_count):
        name = cursor.text()
        dimensions = cursor.integer("I")
        if not 1 <= dimensions <= 4:
            raise cursor.damaged(f"a tensor {name!r} of {dimensions} dimensions")
        shape = tuple(int(length) for length in reversed(cursor.numbers("Q", dimensions)))
        number, offset = cursor.integer("I"), cursor.integer("Q")
        try:
            kind = GGMLQuantizationType(number)
            block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise SourceError(
                f"{path}: tensor {name} has type number {number}, which this reader does not know; {_ORIGINAL}"
            ) from None
        # Tensors follow each other without gaps; a file that says otherwise is damaged, and llama.cpp refuses it too.
        if min(shape) < 1 or shape[-1] % block or offset != expected_offset:
            raise cursor.damaged(f"a tensor {name!r} whose shape or place does not fit its type or its neighbours")
        length = math.prod(shape) // block * block_bytes
        entries.append((name, kind, shape, offset, length))
        expected_offset += _round_up(length, alignment)

    base = _round_up(cursor.offset, alignment)
    tensors = {name: _Tensor(name, kind, shape, base + start, n) for name, kind, shape, start, n in entries}
    if len(tensors) != len(entries):
        raise cursor.damaged("a tensor twice")
    end = max((tensor.start + tensor.size for tensor in tensors.values()), default=base)
    if end > size:
        raise SourceError(f"{path}: cut short ({size} bytes, {end} expected); {_AGAIN}")
    return metadata, tensors


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


# Metadata and config.


@dataclass(frozen=True)
class _Metadata:
    """The file's metadata, each value read with the type that it must have."""

    path: Path
    values: dict[str, Any]

    def architecture(self) -> str:
        name = self.values.get("general.architecture")
        if not isinstance(name, str) or name not in _ARCHITECTURES:
            raise SourceError(
                f"{self.path}: has the architecture {name!r}, and this reader knows {', '.join(_ARCHITECTURES)} only; "
                "convert a model of one of these, or the original safetensors folder"
            )
        if self.values.get("general.type", "model") != "model":
            raise SourceError(f"{self.path}: is not a model but a {self.values['general.type']}; pass the model's file")
        if self.values.get("split.count", 1) not in (0, 1):
            raise SourceError(
                f"{self.path}: is one of {self.values['split.count']} parts; "
                "join them first with llama.cpp's `llama-gguf-split --merge`"
            )
        return name

    def optional(self, key: str, kind: type) -> Any:
        """The value of a key, or None without one; a whole number will do for a float, but a bool for neither."""
        value = self.values.get(key)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if value is None or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
            return value
        raise SourceError(f"{self.path}: metadata {key} is not of type {kind.__name__}; {_ORIGINAL}")

    def required(self, key: str, kind: type) -> Any:
        value = self.optional(key, kind)
        if value is None:
            raise SourceError(f"{self.path}: lacks the metadata {key}; {_ORIGINAL}")
        if kind in (int, float) and not (value > 0 and math.isfinite(value)):
            raise SourceError(f"{self.path}: metadata {key} is {value}; {_ORIGINAL}")
        return value


def _build_config(
    metadata: _Metadata, tensors: dict[str, _Tensor], rope_factors: npt.NDArray[np.float32] | None
) -> dict[str, Any]:
    """The config that mlx-lm's model class for this architecture reads."""
    path, values = metadata.path, metadata.values
    architecture = metadata.architecture()
    for key in _UNSUPPORTED:
        if values.get(f"{architecture}.{key}") not in (None, 0, 1.0):
            raise SourceError(f"{path}: uses {architecture}.{key}, which this reader does not support; {_ORIGINAL}")

    def count(key: str) -> int:
        return int(metadata.required(f"{architecture}.{key}", int))

    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise SourceError(f"{path}: lacks the tensor token_embd.weight; {_AGAIN}")
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
            f"which mlx-lm's {architecture} cannot express; {_ORIGINAL}"
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
            raise SourceError(f"{path}: scales its rotary embedding in two ways; {_ORIGINAL}")
        scaling = _llama3_scaling(path, rope_factors, head_dim, config["rope_theta"])
    if scaling is not None:
        config["rope_scaling"] = scaling
    special = _special_ids(metadata, embedding.shape[0])
    if "bos" in special:
        config["bos_token_id"] = special["bos"]
    if ends := _end_ids(metadata, special, embedding.shape[0]):
        config["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return config


def _rope_scaling(metadata: _Metadata, architecture: str) -> dict[str, Any] | None:
    """The context extension in mlx-lm's words, where the file names one."""
    prefix = f"{architecture}.rope.scaling"
    kind = metadata.optional(f"{prefix}.type", str)
    old_factor = metadata.optional(f"{architecture}.rope.scale_linear", float)
    if kind is None and old_factor not in (None, 0.0, 1.0):
        return {"rope_type": "linear", "factor": old_factor}
    if kind in (None, "none"):
        return None
    if kind not in ("linear", "yarn") or metadata.optional(f"{prefix}.attn_factor", float) not in (None, 1.0):
        raise SourceError(f"{metadata.path}: scales its rotary embedding by {kind!r}, not supported; {_ORIGINAL}")
    scaling = {"rope_type": kind, "factor": metadata.required(f"{prefix}.factor", float)}
    if kind == "yarn":
        if metadata.optional(f"{prefix}.yarn_log_multiplier", float):
            raise SourceError(
                f"{metadata.path}: scales its rotary embedding by a kind of yarn not supported; {_ORIGINAL}"
            )
        length = metadata.required(f"{prefix}.original_context_length", int)
        scaling["original_max_position_embeddings"] = length
        for key in ("beta_fast", "beta_slow"):
            if f"{prefix}.yarn_{key}" in metadata.values:
                scaling[key] = metadata.required(f"{prefix}.yarn_{key}", float)
    return scaling


def _read_rope_factors(path: Path, tensor: _Tensor) -> npt.NDArray[np.float32]:
    if tensor.kind is not GGMLQuantizationType.F32 or len(tensor.shape) != 1:
        raise SourceError(f"{path}: tensor {tensor.name} is not a vector of float32; {_ORIGINAL}")
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
    raise SourceError(f"{path}: scales its rotary embedding by factors that are not Llama 3's; {_ORIGINAL}")


# Tensors.


def _gguf_name(name: str) -> str:
    """The name in a GGUF file of the parameter that mlx-lm calls `name`."""
    module, suffix = name.rsplit(".", 1)
    if module in _TOP_NAMES:
        return f"{_TOP_NAMES[module]}.{suffix}"
    layer, part = module.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{_BLOCK_NAMES[part]}.{suffix}"


def _check_type(path: Path, tensor: _Tensor) -> None:
    if tensor.kind.name not in _TYPES:
        raise SourceError(
            f"{path}: tensor {tensor.name} has type {tensor.kind.name}, which is not supported; "
            "use a file in F16, BF16, Q8_0 or a K-quant, or the original safetensors folder"
        )


def _read_tensor(path: Path, tensor: _Tensor, head_dim: int | None = None) -> mx.array:
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


def _read_chunks(path: Path, tensor: _Tensor, head_dim: int | None) -> Iterator[tuple[int, mx.array]]:
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
                    raise SourceError(f"{path}: was cut short while it was read, in tensor {tensor.name}; {_AGAIN}")
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


# The tokenizer.


def _check_tokenizer_kind(metadata: _Metadata) -> None:
    """Refuse at opening, and not after all tensors are converted, a tokenizer that cannot be rebuilt."""
    kind = metadata.values.get("tokenizer.ggml.model")
    if kind is None:
        raise SourceError(f"{metadata.path}: has no tokenizer; {_ORIGINAL}")
    before = metadata.values.get("tokenizer.ggml.pre")
    if kind != "gpt2" or not isinstance(before, str) or before not in _PRE_TOKENIZERS:
        name = f"{kind!r} with pre-tokenizer {before!r}" if kind == "gpt2" else repr(kind)
        raise SourceError(f"{metadata.path}: this GGUF's tokenizer kind ({name}) is not supported yet; {_ORIGINAL}")
    for key, item in (("tokens", str), ("merges", str), ("token_type", int)):
        value = metadata.required(f"tokenizer.ggml.{key}", list)
        if not all(isinstance(entry, item) for entry in value):
            raise SourceError(
                f"{metadata.path}: metadata tokenizer.ggml.{key} is not a list of {item.__name__}; {_AGAIN}"
            )


def _special_ids(metadata: _Metadata, vocab_size: int) -> dict[str, int]:
    """The ids of the bos, eos, unk and pad tokens, those of them that the file names."""
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {role: _token_id(metadata, f"{key}_token_id", vocab_size) for role, key in keys.items()}
    return {role: token for role, token in found.items() if token is not None}


def _end_ids(metadata: _Metadata, special: dict[str, int], vocab_size: int) -> list[int]:
    """The ids that end an answer: end of sequence, of turn and of message."""
    ends = [special.get("eos"), *(_token_id(metadata, f"{key}_token_id", vocab_size) for key in ("eot", "eom"))]
    return list(dict.fromkeys(token for token in ends if token is not None))


def _token_id(metadata: _Metadata, key: str, vocab_size: int) -> int | None:
    token = metadata.optional(f"tokenizer.ggml.{key}", int)
    tokens = len(metadata.values["tokenizer.ggml.tokens"])
    if token is not None and not 0 <= token < min(tokens, vocab_size):
        raise SourceError(
            f"{metadata.path}: metadata tokenizer.ggml.{key} is {token}, but there is no such token; {_AGAIN}"
        )
    return None if token is None else int(token)


def _adds_bos(metadata: _Metadata) -> bool:
    """Whether text starts with the bos token; llama.cpp's default where the file does not say."""
    adds = metadata.optional("tokenizer.ggml.add_bos_token", bool)
    return metadata.values["tokenizer.ggml.pre"] == _LLAMA3 if adds is None else bool(adds)


def _adds_eos(metadata: _Metadata) -> bool:
    return bool(metadata.optional("tokenizer.ggml.add_eos_token", bool))


def _build_tokenizer(metadata: _Metadata, vocab_size: int) -> tuple[Tokenizer, dict[str, int]]:
    """The byte-level BPE tokenizer that the metadata describes, and the ids of its special tokens."""
    path, values = metadata.path, metadata.values
    before = values["tokenizer.ggml.pre"]
    tokens: list[str] = values["tokenizer.ggml.tokens"]
    types: list[int] = values["tokenizer.ggml.token_type"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if not len(vocabulary) == len(tokens) == len(types) <= vocab_size:
        raise SourceError(
            f"{path}: the vocabulary has {len(tokens)} tokens, {len(vocabulary)} of them different, {len(types)} types "
            f"and {vocab_size} embeddings; {_AGAIN}"
        )
    # A token may begin with the separator, but is never empty.
    merges = [
        (merge[:cut], merge[cut + 1 :]) for merge in values["tokenizer.ggml.merges"] if (cut := merge.find(" ", 1)) > 0
    ]
    special = _special_ids(metadata, vocab_size)
    try:
        if len(merges) != len(values["tokenizer.ggml.merges"]):
            raise ValueError("a merge that is not two tokens")
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=before == _LLAMA3))
    except Exception as exc:  # tokenizers raises bare Exceptions
        raise SourceError(f"{path}: the vocabulary and merges do not fit together ({exc}); {_AGAIN}") from None
    if before == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[before]
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _post_processor(metadata, tokens, special)
    added = [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    return tokenizer, special


def _post_processor(metadata: _Metadata, tokens: list[str], special: dict[str, int]) -> processors.PostProcessor:
    """Puts bos before and eos after a text, where the file says so."""
    plain = processors.ByteLevel(trim_offsets=False)
    bos = tokens[special["bos"]] if _adds_bos(metadata) and "bos" in special else None
    eos = tokens[special["eos"]] if _adds_eos(metadata) and "eos" in special else None
    if bos is None and eos is None:
        return plain
    single = [token for token in (bos, "$A", eos) if token is not None]
    pair = single + [token if token != "$A" else "$B" for token in single]
    used = {token: special[role] for role, token in (("bos", bos), ("eos", eos)) if token is not None}
    template = processors.TemplateProcessing(single=single, pair=pair, special_tokens=list(used.items()))
    return processors.Sequence([plain, template])


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
