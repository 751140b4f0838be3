"""Reads a GGUF file: its tensors under mlx-lm's names, with the config and the tokenizer that its metadata holds.

The package `gguf` supplies the dequantization and the names of tensors; mlx-lm's model says which tensors it needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map
from gguf.quants import dequantize

from ifprune_convert.skeleton import build_skeleton, check_shapes, parameter_shapes
from ifprune_mlx.errors import SourceError, reason_of

from .gguf_config import GEMMAS, architecture_of, build_config
from .gguf_header import AGAIN, ORIGINAL, Metadata, Tensor, read_header
from .gguf_tokenizer import check_tokenizer_kind, write_tokenizer

_QUANTIZED = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"})
_TYPES = _QUANTIZED | {"F32", "F16", "BF16"}
# Rows are read and dequantized in pieces of about this many float32 bytes.
_CHUNK_BYTES = 1 << 25


class GGUFSource:
    """A GGUF file, under mlx-lm's parameter names; see `Source` for the contract."""

    dequantizes = True

    def __init__(self, path: Path) -> None:
        """Check the file's header, tensors and tokenizer kind, without reading a tensor of the model.

        Raises:
            SourceError: if the file is damaged or cut short, or of an architecture, tensor type or tokenizer that
                this reader does not know.
        """
        self.path = path
        self.notes: Sequence[str] = ()
        metadata, self._tensors = read_header(path)
        self._metadata = Metadata(path, metadata)
        self._architecture = architecture = architecture_of(self._metadata)
        check_tokenizer_kind(self._metadata)
        factors = self._tensors.pop("rope_freqs.weight", None) if architecture == "llama" else None
        for tensor in self._tensors.values():
            if tensor.kind.name not in _TYPES:
                raise SourceError(
                    f"{path}: tensor {tensor.name} has type {tensor.kind.name}, which is not supported; "
                    "use a file in F16, BF16, Q8_0 or a K-quant, or the original safetensors folder"
                )
        rope_factors = None if factors is None else _read_rope_factors(path, factors)
        self.config = build_config(self._metadata, self._tensors, rope_factors)
        licence = metadata.get("general.license")
        if licence == "other":  # the hub's way to name a licence that is not on its list
            licence = metadata.get("general.license.name", licence)
        self.licence = licence if isinstance(licence, str) else None

        model: Any = build_skeleton(path, self.config, len(self._tensors))
        if architecture == "gemma3" and self.config["tie_word_embeddings"]:
            model.sanitize({})  # mlx-lm's class drops its own head when it sees that there is none
        parameters = parameter_shapes(model)
        self._names = _gguf_names(architecture, self.config["num_hidden_layers"], parameters)
        expected = {self._names[name]: shape for name, shape in parameters.items()}
        check_shapes(path, expected, {name: tensor.shape for name, tensor in self._tensors.items()})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Source`."""
        return {name: self._tensors[gguf_name].shape for name, gguf_name in self._names.items()}

    def take(self, name: str) -> mx.array:
        """See `Source`; float16 or bfloat16 where it is stored so, else float32. A Gemma's norms are float32 always."""
        tensor = self._tensors[self._names[name]]
        if self._architecture in GEMMAS and name.endswith("norm.weight"):
            # llama.cpp adds the 1 that mlx-lm's norm of this architecture adds by itself.
            shifted = _read_tensor(self.path, tensor).astype(mx.float32) - 1
            mx.eval(shifted)
            return shifted
        if self._architecture != "llama":
            return _read_tensor(self.path, tensor)
        # llama.cpp reorders the query and key rows of this architecture, and of no other that is read here.
        heads = {"q_proj": self.config["num_attention_heads"], "k_proj": self.config["num_key_value_heads"]}
        module = name.split(".")[-2]
        head_dim = tensor.shape[0] // heads[module] if module in heads else None
        return _read_tensor(self.path, tensor, head_dim)

    def write_tokenizer(self, folder: Path) -> None:
        """See `Source`; rebuilt from the metadata, and refused if they contradict each other."""
        write_tokenizer(self._metadata, self.config, folder)


def _gguf_names(architecture: str, layers: int, parameters: Iterable[str]) -> dict[str, str]:
    """The names in a GGUF file of parameters that mlx-lm names as the original model does; an unknown one stays."""
    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(number, layers)
    return {name: names.get_name(name, (".weight", ".bias")) or name for name in parameters}


def _read_rope_factors(path: Path, tensor: Tensor) -> npt.NDArray[np.float32]:
    if tensor.kind is not GGMLQuantizationType.F32 or len(tensor.shape) != 1:
        raise SourceError(f"{path}: tensor {tensor.name} is not a vector of float32; {ORIGINAL}")
    return np.array(_read_tensor(path, tensor))


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
                    # A bias is read as one row, but its items are the rows.
                    inner = 1 if len(tensor.shape) == 1 else width
                    values = values.reshape(-1, head_dim // 2, 2, inner).swapaxes(1, 2).reshape(count, width)
                chunk = mx.array(values)
                yield row, chunk.view(mx.bfloat16) if tensor.kind is GGMLQuantizationType.BF16 else chunk
    except OSError as exc:
        raise SourceError(f"{path}: cannot be read ({reason_of(exc)})") from exc


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
