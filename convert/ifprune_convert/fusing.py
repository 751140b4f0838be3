"""What an adapter does to one tensor, computed in float32, a few rows at a time; and what every format must satisfy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx import nn

from ifprune_mlx.checkpoint.neuron_layout import FLOATS
from ifprune_mlx.checkpoint.safetensors_io import TensorInfo, read_safetensors_header
from ifprune_mlx.errors import SourceError

from .skeleton import listing
from .weight_files import load_lazily

OTHER = "the adapter was trained on another model; give the one of this model"
AGAIN = "copy the adapter's folder again, or train it again"
# A scale beyond this is a damaged number, not a choice.
LARGEST_SCALE = 1e30
# Rows are fused, and looked through, in pieces of about this many weights, so that temporary copies stay small.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class LowRank:
    """`weight + scale * left @ right`; with `magnitude`, each row of that is then brought to this norm (DoRA).

    Attributes:
        left, right: `[rows, r]` and `[r, columns]` for a weight `[rows, columns]`, of any float type.
        magnitude: `[rows]`, or None.
        base: `[rows, columns]` to take in place of the model's weight, or None.
    """

    left: mx.array
    right: mx.array
    scale: float
    magnitude: mx.array | None = None
    base: mx.array | None = None

    def fused(self, weight: mx.array, dtype: mx.Dtype) -> mx.array:
        """Computed in float32, `[rows, columns]` of type `dtype`."""
        weight = weight if self.base is None else self.base
        result = mx.zeros(weight.shape, dtype)
        mx.eval(result)
        right = self.right.astype(mx.float32)
        for rows in _pieces(weight):
            delta = self.left[rows].astype(mx.float32) @ right
            piece = weight[rows].astype(mx.float32) + self.scale * delta
            if self.magnitude is not None:
                # A row of zeros stays one, whatever its magnitude.
                norms = mx.maximum(mx.linalg.norm(piece, axis=1), 1e-30)
                piece = (self.magnitude[rows].astype(mx.float32) / norms)[:, None] * piece
            result[rows] = piece.astype(dtype)
            # Evaluated at every step, the buffer is the only one and MLX writes into it; else each step would copy it.
            mx.eval(result)
        return result


@dataclass(frozen=True)
class Offset:
    """`bias + scale * vector`.

    Attributes:
        vector: `[n]`, like the bias, of any float type.
        base: `[n]` to take in place of the model's bias, or None.
    """

    vector: mx.array
    scale: float
    base: mx.array | None = None

    def fused(self, weight: mx.array, dtype: mx.Dtype) -> mx.array:
        """Computed in float32, `[n]` of type `dtype`."""
        weight = weight if self.base is None else self.base
        return (weight.astype(mx.float32) + self.scale * self.vector.astype(mx.float32)).astype(dtype)


@dataclass(frozen=True)
class Replacement:
    """A whole tensor in place of the model's."""

    tensor: mx.array

    def fused(self, weight: mx.array, dtype: mx.Dtype) -> mx.array:
        """The new tensor, of type `dtype`; `weight` does not matter."""
        return self.tensor.astype(dtype)


@dataclass(frozen=True)
class Gained:
    """`(weight after update) * gain`: a down projection whose neurons have gains, which are its columns.

    Attributes:
        gain: `[columns]`, of any float type.
        update: what else is done to the weight, first; or None.
    """

    gain: mx.array
    update: LowRank | Replacement | None

    def fused(self, weight: mx.array, dtype: mx.Dtype) -> mx.array:
        """Computed in float32, `[rows, columns]` of type `dtype`."""
        weight = weight if self.update is None else self.update.fused(weight, mx.float32)
        result = mx.zeros(weight.shape, dtype)
        mx.eval(result)
        gain = self.gain.astype(mx.float32)
        for rows in _pieces(weight):
            result[rows] = (weight[rows].astype(mx.float32) * gain).astype(dtype)
            mx.eval(result)
        return result


Update = LowRank | Offset | Replacement | Gained


def all_finite(array: mx.array) -> bool:
    """Whether there is no NaN or infinity in an array, which is evaluated."""
    mx.eval(array)
    flat = array.reshape(-1)
    return all(bool(mx.all(mx.isfinite(flat[piece]))) for piece in _pieces(flat))


def _pieces(array: mx.array) -> Iterator[slice]:
    """The rows of an array, a few at a time."""
    step = max(_CHUNK // math.prod(array.shape[1:]), 1)
    return (slice(start, start + step) for start in range(0, array.shape[0], step))


def read_tensor_infos(file: Path) -> dict[str, TensorInfo]:
    """The tensors that an adapter's safetensors file holds, from its header.

    Raises:
        SourceError: if the file is damaged or empty, or a tensor's type is not float32, float16 or bfloat16.
    """
    tensors = read_safetensors_header(file, SourceError).tensors
    if not tensors:
        raise SourceError(f"{file}: holds no tensors; {AGAIN}")
    for name, info in tensors.items():
        if info.dtype not in FLOATS:
            raise SourceError(
                f"{file}: tensor {name} has type {info.dtype}, not a float type; {AGAIN} on an unquantized model"
            )
    return tensors


def check_numbers(file: Path) -> None:
    """Raise SourceError if a tensor of the file contains NaN or infinity. Reads all of it, keeps none in memory."""
    arrays = load_lazily(file, SourceError, AGAIN)
    for name in list(arrays):
        # Popped, so that no tensor stays in memory: those of a full adapter are as large as the model.
        if not all_finite(arrays.pop(name)):
            raise SourceError(f"{file}: tensor {name} contains NaN or infinity; train the adapter again")
        mx.clear_cache()


def adapted_modules(file: Path, names: Iterable[str], skeleton: nn.Module) -> dict[str, nn.Module]:
    """The model's modules of these names.

    Raises:
        SourceError: if the model lacks one, or it is neither a linear layer nor an embedding.
    """
    names, modules = list(names), dict(skeleton.named_modules())
    if unknown := [name for name in names if name not in modules]:
        raise SourceError(f"{file}: changes {listing(unknown)}, which the model does not have; {OTHER}")
    for name in names:
        if not isinstance(modules[name], nn.Linear | nn.Embedding):
            raise SourceError(
                f"{file}: changes {name}, a {type(modules[name]).__name__}, and only linear layers and embeddings can "
                "be fused here; fuse it with the library that trained it, and convert the result"
            )
    return {name: modules[name] for name in names}
