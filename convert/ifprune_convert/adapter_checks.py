"""What an adapter must satisfy whatever its format: a file of finite floats, for modules that the model has."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import mlx.core as mx
from mlx import nn

from ifprune_mlx.checkpoint.safetensors_io import TensorInfo, read_safetensors_header
from ifprune_mlx.errors import SourceError

from .fusing import all_finite
from .wording import first_line, listing

OTHER = "the adapter was trained on another model; give the one of this model"
AGAIN = "copy the adapter's folder again, or train it again"
# A scale beyond this is a damaged number, not a choice.
LARGEST_SCALE = 1e30
_FLOATS = ("F32", "F16", "BF16")


def read_tensor_infos(file: Path) -> dict[str, TensorInfo]:
    """The tensors that an adapter's safetensors file holds, from its header.

    Raises:
        SourceError: if the file is damaged or empty, or a tensor's type is not float32, float16 or bfloat16.
    """
    tensors = read_safetensors_header(file, SourceError).tensors
    if not tensors:
        raise SourceError(f"{file}: holds no tensors; {AGAIN}")
    for name, info in tensors.items():
        if info.dtype not in _FLOATS:
            raise SourceError(
                f"{file}: tensor {name} has type {info.dtype}, not a float type; {AGAIN} on an unquantized model"
            )
    return tensors


def load_lazily(file: Path) -> dict[str, mx.array]:
    """The file's tensors, not evaluated.

    Raises:
        SourceError: if MLX cannot load it.
    """
    try:
        arrays = mx.load(str(file))
    except (RuntimeError, ValueError) as exc:
        raise SourceError(f"{file}: cannot be loaded ({first_line(exc)}); {AGAIN}") from None
    assert isinstance(arrays, dict)
    return arrays


def check_numbers(file: Path) -> None:
    """Raise SourceError if a tensor of the file contains NaN or infinity. Reads all of it, keeps none in memory."""
    arrays = load_lazily(file)
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
