"""Fuses an adapter into a dense checkpoint's weights, one tensor at a time.

Reads the folders that `mlx_lm.lora` writes, of all three kinds: `lora`, `dora` and `full`; those of PEFT through
`peft`. Training may put gains of neurons beside them, which mlx-lm and PEFT do not know.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn

from ifprune_mlx.checkpoint.regular_file import read_json_object
from ifprune_mlx.checkpoint.safetensors_io import TensorInfo
from ifprune_mlx.errors import SourceError

from . import peft
from .fusing import (
    AGAIN,
    LARGEST_SCALE,
    OTHER,
    Gained,
    LowRank,
    Replacement,
    Update,
    adapted_modules,
    all_finite,
    check_numbers,
    read_tensor_infos,
)
from .skeleton import listing
from .weight_files import load_lazily

_CONFIG, _TENSORS, _GAINS = "adapter_config.json", "adapters.safetensors", "gains.safetensors"
# The last is of training that held the model still: there are gains, or nothing.
_KINDS = ("lora", "dora", "full", "none")
_WRITTEN = "give the folder that mlx_lm.lora or PEFT wrote"


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
        if not all_finite(result):
            raise SourceError(
                f"{self.path}: fused into {name}, it gives NaN or infinity as {str(dtype).removeprefix('mlx.core.')}; "
                "choose another --dtype, or give the adapter of this model"
            )
        return result


def open_adapter(folder: Path, skeleton: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """Open an adapter folder of mlx-lm or PEFT, checked as a whole against the model that it is to change.

    Reads every tensor once, to see that it holds numbers; keeps none in memory.

    Args:
        skeleton: mlx-lm's model, its parameters never evaluated.
        shapes: the shape of every tensor of the model, by mlx-lm's parameter name.

    Raises:
        SourceError: naming the file, if one is missing or damaged, or does not belong to this model.
    """
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such adapter folder; {_WRITTEN}")
    if not (folder / _CONFIG).is_file():
        raise SourceError(f"{folder}: has no {_CONFIG}; {_WRITTEN}")
    config, file = read_json_object(folder / _CONFIG, SourceError), folder / _TENSORS
    if peft.is_peft(folder, config):
        return Adapter(folder, peft.read_updates(folder, config, skeleton, shapes))
    # As mlx-lm: the first adapters were all of this kind and do not say so.
    kind = config.get("fine_tune_type", "lora")
    if kind == "none":
        return Adapter(folder, _with_gains(folder, {}, skeleton, shapes))
    if not file.is_file():
        raise SourceError(f"{folder}: has no {_TENSORS}; {_WRITTEN}")
    if kind not in _KINDS:
        raise SourceError(
            f"{folder / _CONFIG}: fine_tune_type {kind!r} is not known here, only {', '.join(_KINDS)} are; "
            "fuse it with `mlx_lm.fuse`, and convert the result"
        )
    tensors = read_tensor_infos(file)
    updates: dict[str, Update] = {}
    if kind == "full":
        _check_replacements(file, tensors, shapes)
        arrays = load_lazily(file, SourceError, AGAIN)
        updates |= {name: Replacement(array) for name, array in arrays.items()}
    else:
        rank, scale = _lora_parameters(folder / _CONFIG, config)
        stems = _check_pairs(file, tensors, ("lora_a", "lora_b", *(("m",) if kind == "dora" else ())))
        modules = adapted_modules(file, stems, skeleton)
        if absent := [stem for stem in modules if f"{stem}.weight" not in shapes]:
            raise SourceError(f"{file}: changes {listing(absent)}, whose weights the model does not have; {OTHER}")
        _check_low_rank(file, tensors, modules, shapes, rank)
        arrays = load_lazily(file, SourceError, AGAIN)
        for stem, module in modules.items():
            first, second, magnitude = (arrays.get(f"{stem}.{leaf}") for leaf in ("lora_a", "lora_b", "m"))
            assert first is not None
            assert second is not None
            # A linear layer multiplies from the right, x @ a @ b; an embedding looks up rows of a.
            left, right = (first, second) if isinstance(module, nn.Embedding) else (second.T, first.T)
            updates[f"{stem}.weight"] = LowRank(left, right, scale, magnitude)
    check_numbers(file)
    return Adapter(folder, _with_gains(folder, updates, skeleton, shapes))


def _with_gains(
    folder: Path, updates: dict[str, Update], skeleton: nn.Module, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Update]:
    """The updates, and the gains of the folder if it has any: `MODULE.gain` `[columns]` for a down projection."""
    file = folder / _GAINS
    if not file.is_file():
        return updates
    stems = _check_pairs(file, read_tensor_infos(file), ("gain",))
    adapted_modules(file, stems, skeleton)
    check_numbers(file)
    arrays = load_lazily(file, SourceError, AGAIN)
    found: dict[str, Update] = {}
    for stem in stems:
        name, gain = f"{stem}.weight", arrays[f"{stem}.gain"]
        if gain.shape != shapes.get(name, ())[1:]:
            raise SourceError(f"{file}: {stem}.gain has shape {list(gain.shape)}, which is not this model's; {OTHER}")
        update = updates.get(name)
        assert update is None or isinstance(update, LowRank | Replacement)
        found[name] = Gained(gain, update)
    return {**updates, **found}


def _lora_parameters(file: Path, config: Mapping[str, Any]) -> tuple[int, float]:
    """Rank and scale, of which mlx-lm's configs always have both."""
    given = config.get("lora_parameters")
    parameters: dict[str, Any] = given if isinstance(given, dict) else {}
    rank, scale = parameters.get("rank", 0), parameters.get("scale", math.nan)
    if type(rank) is not int or rank < 1:
        raise SourceError(f"{file}: its lora_parameters have no whole number `rank` above 0; {AGAIN}")
    if type(scale) not in (int, float) or not abs(scale) <= LARGEST_SCALE:  # NaN is not <= anything
        raise SourceError(f"{file}: its lora_parameters have no finite number `scale`; {AGAIN}")
    return rank, float(scale)


def _check_pairs(file: Path, tensors: Mapping[str, TensorInfo], leaves: tuple[str, ...]) -> list[str]:
    """The modules that are changed, each of them by all of these tensors."""
    stems: dict[str, None] = {}
    for name in tensors:
        stem, _, leaf = name.rpartition(".")
        if leaf not in leaves:
            raise SourceError(
                f"{file}: tensor {name} is none of {', '.join(leaves)}, which {_CONFIG} announces; "
                f"the two files may belong to different adapters, {AGAIN}"
            )
        stems[stem] = None
    missing = [name for stem in stems for leaf in leaves if (name := f"{stem}.{leaf}") not in tensors]
    if missing:
        raise SourceError(f"{file}: lacks {listing(missing)}; {AGAIN}")
    return list(stems)


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
                    f"({_CONFIG}) ask for {list(shape)}; {OTHER}"
                )


def _check_replacements(file: Path, tensors: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]]) -> None:
    if unknown := [name for name in tensors if name not in shapes]:
        raise SourceError(f"{file}: replaces {listing(unknown)}, which the model does not have; {OTHER}")
    for name, info in tensors.items():
        if info.shape != shapes[name]:
            raise SourceError(
                f"{file}: tensor {name} has shape {list(info.shape)}, but the model's is {list(shapes[name])}; {OTHER}"
            )
