"""Fuses an adapter into a dense checkpoint's weights, one tensor at a time.

Reads the folders that `mlx_lm.lora` writes, of all three kinds: `lora`, `dora` and `full`. Another format of adapter
becomes another function that makes `Update`s. Knows a model's modules and shapes; not where the weights come from, nor
what is made of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn

from ifprune_mlx.checkpoint import read_json_object
from ifprune_mlx.errors import SourceError
from ifprune_mlx.files import TensorInfo, read_safetensors_header

from .wording import first_line, listing

_CONFIG, _TENSORS = "adapter_config.json", "adapters.safetensors"
_KINDS = ("lora", "dora", "full")
_FLOATS = ("F32", "F16", "BF16")
_OTHER = "the adapter was trained on another model; give the one of this model"
_AGAIN = "copy the adapter's folder again, or train it again"
_LARGEST_SCALE = 1e30
# Rows are fused, and looked through, in pieces of about this many weights, so that temporary copies stay small.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class LowRank:
    """`weight + scale * left @ right`; with `magnitude`, each row of that is then brought to this norm (DoRA).

    Attributes:
        left, right: `[rows, r]` and `[r, columns]` for a weight `[rows, columns]`, of any float type.
        magnitude: `[rows]`, or None.
    """

    left: mx.array
    right: mx.array
    scale: float
    magnitude: mx.array | None = None

    def fused(self, weight: mx.array, dtype: mx.Dtype) -> mx.array:
        """Computed in float32, `[rows, columns]` of type `dtype`."""
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
class Replacement:
    """A whole tensor in place of the model's."""

    tensor: mx.array

    def fused(self, weight: mx.array, dtype: mx.Dtype) -> mx.array:
        """The new tensor, of type `dtype`; `weight` does not matter."""
        return self.tensor.astype(dtype)


Update = LowRank | Replacement


class Adapter:
    """What an adapter does to each tensor that it changes; every one is to be fused once."""

    def __init__(self, path: Path, updates: dict[str, Update]) -> None:
        """Take updates by mlx-lm's parameter names, their arrays not evaluated; `path` is for messages."""
        self.path = path
        self._updates = updates

    def __contains__(self, name: str) -> bool:
        """Whether a tensor of this name is changed, and was not fused yet."""
        return name in self._updates

    def fuse(self, name: str, weight: mx.array, dtype: mx.Dtype) -> mx.array:
        """The changed tensor, evaluated.

        Args:
            name: mlx-lm's parameter name.
            weight: what the model has there, of any float type.
            dtype: the result's; cast to it only after fusing in float32.

        Raises:
            SourceError: if the result contains NaN or infinity.
        """
        result = self._updates.pop(name).fused(weight, dtype)
        if not _all_finite(result):
            raise SourceError(
                f"{self.path}: fused into {name}, it gives NaN or infinity as {str(dtype).removeprefix('mlx.core.')}; "
                "choose another --dtype, or give the adapter of this model"
            )
        return result


def open_adapter(folder: Path, skeleton: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """Open an adapter folder of mlx-lm, checked as a whole against the model that it is to change.

    Reads every tensor once, to see that it holds numbers; keeps none in memory.

    Args:
        skeleton: mlx-lm's model, its parameters never evaluated.
        shapes: the shape of every tensor of the model, by mlx-lm's parameter name.

    Raises:
        SourceError: naming the file, if one is missing or damaged, or does not belong to this model.
    """
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such adapter folder; give the folder that mlx_lm.lora wrote")
    _refuse_other_formats(folder)
    for name in (_CONFIG, _TENSORS):
        if not (folder / name).is_file():
            raise SourceError(f"{folder}: has no {name}; give the folder that mlx_lm.lora wrote")
    config, file = read_json_object(folder / _CONFIG, SourceError), folder / _TENSORS
    # As mlx-lm: the first adapters were all of this kind and do not say so.
    kind = config.get("fine_tune_type", "lora")
    if kind not in _KINDS:
        raise SourceError(
            f"{folder / _CONFIG}: fine_tune_type {kind!r} is not known here, only {', '.join(_KINDS)} are; "
            "fuse it with `mlx_lm.fuse`, and convert the result"
        )
    tensors = read_safetensors_header(file, SourceError).tensors
    if not tensors:
        raise SourceError(f"{file}: holds no tensors; {_AGAIN}")
    for name, info in tensors.items():
        if info.dtype not in _FLOATS:
            raise SourceError(
                f"{file}: tensor {name} has type {info.dtype}, not a float type; {_AGAIN} on an unquantized model"
            )
    updates: dict[str, Update] = {}
    if kind == "full":
        _check_replacements(file, tensors, shapes)
        arrays = _load_lazily(file)
        updates |= {name: Replacement(array) for name, array in arrays.items()}
    else:
        rank, scale = _lora_parameters(folder / _CONFIG, config)
        stems = _check_pairs(file, tensors, ("lora_a", "lora_b", *(("m",) if kind == "dora" else ())))
        modules = _adapted_modules(file, stems, skeleton)
        _check_low_rank(file, tensors, modules, shapes, rank)
        arrays = _load_lazily(file)
        for stem, module in modules.items():
            first, second, magnitude = (arrays.get(f"{stem}.{leaf}") for leaf in ("lora_a", "lora_b", "m"))
            assert first is not None
            assert second is not None
            # A linear layer multiplies from the right, x @ a @ b; an embedding looks up rows of a.
            left, right = (first, second) if isinstance(module, nn.Embedding) else (second.T, first.T)
            updates[f"{stem}.weight"] = LowRank(left, right, scale, magnitude)
    _check_numbers(file)
    return Adapter(folder, updates)


def _refuse_other_formats(folder: Path) -> None:
    if any((folder / f"adapter_model.{suffix}").exists() for suffix in ("safetensors", "bin")):
        raise SourceError(
            f"{folder}: is a PEFT adapter, which this version does not read; "
            "merge it into its model with PEFT, and convert the result"
        )


def _lora_parameters(file: Path, config: Mapping[str, Any]) -> tuple[int, float]:
    """Rank and scale, of which mlx-lm's configs always have both."""
    given = config.get("lora_parameters")
    parameters: dict[str, Any] = given if isinstance(given, dict) else {}
    rank, scale = parameters.get("rank", 0), parameters.get("scale", math.nan)
    if type(rank) is not int or rank < 1:
        raise SourceError(f"{file}: its lora_parameters have no whole number `rank` above 0; {_AGAIN}")
    if type(scale) not in (int, float) or not abs(scale) <= _LARGEST_SCALE:  # NaN is not <= anything
        raise SourceError(f"{file}: its lora_parameters have no finite number `scale`; {_AGAIN}")
    return rank, float(scale)


def _check_pairs(file: Path, tensors: Mapping[str, TensorInfo], leaves: tuple[str, ...]) -> list[str]:
    """The modules that are changed, each of them by all of these tensors."""
    stems: dict[str, None] = {}
    for name in tensors:
        stem, _, leaf = name.rpartition(".")
        if leaf not in leaves:
            raise SourceError(
                f"{file}: tensor {name} is none of {', '.join(leaves)}, which {_CONFIG} announces; "
                f"the two files may belong to different adapters, {_AGAIN}"
            )
        stems[stem] = None
    missing = [name for stem in stems for leaf in leaves if (name := f"{stem}.{leaf}") not in tensors]
    if missing:
        raise SourceError(f"{file}: lacks {listing(missing)}; {_AGAIN}")
    return list(stems)


def _adapted_modules(file: Path, stems: list[str], skeleton: nn.Module) -> dict[str, nn.Module]:
    """The model's modules of these names."""
    modules: dict[str, nn.Module] = dict(skeleton.named_modules())
    if unknown := [stem for stem in stems if stem not in modules]:
        raise SourceError(f"{file}: changes {listing(unknown)}, which the model does not have; {_OTHER}")
    for stem in stems:
        if not isinstance(modules[stem], nn.Linear | nn.Embedding):
            raise SourceError(
                f"{file}: changes {stem}, a {type(modules[stem]).__name__}, and only linear layers and embeddings can "
                "be fused here; fuse it with `mlx_lm.fuse`, and convert the result"
            )
    return {stem: modules[stem] for stem in stems}


def _check_low_rank(
    file: Path,
    tensors: Mapping[str, TensorInfo],
    modules: Mapping[str, nn.Module],
    shapes: Mapping[str, tuple[int, ...]],
    rank: int,
) -> None:
    for stem, module in modules.items():
        rows, columns = shapes[f"{stem}.weight"]
        inputs, outputs = (rows, columns) if isinstance(module, nn.Embedding) else (columns, rows)
        expected: dict[str, tuple[int, ...]] = {"lora_a": (inputs, rank), "lora_b": (rank, outputs), "m": (rows,)}
        for leaf, shape in expected.items():
            info = tensors.get(f"{stem}.{leaf}")
            if info is not None and info.shape != shape:
                raise SourceError(
                    f"{file}: tensor {stem}.{leaf} has shape {list(info.shape)}, but this model and a rank of {rank} "
                    f"({_CONFIG}) ask for {list(shape)}; {_OTHER}"
                )


def _check_replacements(file: Path, tensors: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]]) -> None:
    if unknown := [name for name in tensors if name not in shapes]:
        raise SourceError(f"{file}: replaces {listing(unknown)}, which the model does not have; {_OTHER}")
    for name, info in tensors.items():
        if info.shape != shapes[name]:
            raise SourceError(
                f"{file}: tensor {name} has shape {list(info.shape)}, but the model's is {list(shapes[name])}; {_OTHER}"
            )


def _check_numbers(file: Path) -> None:
    arrays = _load_lazily(file)
    for name in list(arrays):
        # Popped, so that no tensor stays in memory: those of a full adapter are as large as the model.
        if not _all_finite(arrays.pop(name)):
            raise SourceError(f"{file}: tensor {name} contains NaN or infinity; train the adapter again")
        mx.clear_cache()


def _all_finite(array: mx.array) -> bool:
    """Whether there is no NaN or infinity in an array, which is evaluated."""
    mx.eval(array)
    flat = array.reshape(-1)
    return all(bool(mx.all(mx.isfinite(flat[piece]))) for piece in _pieces(flat))


def _pieces(array: mx.array) -> Iterator[slice]:
    """The rows of an array, a few at a time."""
    step = max(_CHUNK // math.prod(array.shape[1:]), 1)
    return (slice(start, start + step) for start in range(0, array.shape[0], step))


def _load_lazily(file: Path) -> dict[str, mx.array]:
    try:
        arrays = mx.load(str(file))
    except (RuntimeError, ValueError) as exc:
        raise SourceError(f"{file}: cannot be loaded ({first_line(exc)}); {_AGAIN}") from None
    assert isinstance(arrays, dict)
    return arrays
