"""Writes a checkpoint's weights: a neurons file for each FFN, everything else in shards, one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from mlx import nn

from ifprune_mlx.checkpoint.ffn_spec import FFNSpec, split_fused
from ifprune_mlx.checkpoint.format import neurons_file
from ifprune_mlx.errors import SourceError
from ifprune_mlx.selection.selection import Scores

from . import layout
from .adapter import Adapter
from .fusing import all_finite
from .packing import Packing
from .source import PackedSource, Source
from .weight_files import Shards, write_neurons

if TYPE_CHECKING:
    from .pipeline import Options, Report

_FLOATS = (mx.float32, mx.float16, mx.bfloat16)
_ROWS = 4096


@dataclass
class WeightWriter:
    """Moves tensors from the source into the new folder and keeps count."""

    source: Source
    skeleton: nn.Module
    adapter: Adapter | None
    folder: Path
    options: Options
    packing: Packing
    report: Report
    remaining: dict[str, tuple[int, ...]] = field(init=False)
    done: int = 0

    def __post_init__(self) -> None:
        # Some arrays, such as the bias of a router, must keep their type.
        self.may_cast: Callable[[str], bool] = getattr(self.skeleton, "cast_predicate", lambda _: True)
        self.remaining = dict(self.source.shapes)
        self.total = sum(math.prod(shape) for shape in self.remaining.values())

    def write_ffn(self, index: int, spec: FFNSpec, count: int) -> tuple[Scores, Scores]:
        """Write one neurons file.

        Returns:
            The prior from the weights and the norms of the down rows, float32 `[d_ffn]` each.
        """
        gate, up, tensors = self._gate_up(spec)
        mx.eval(tensors)
        down = layout.down_rows(self._take(f"{spec.path}.{spec.down}.weight"))
        norms = layout.row_norms(down)
        self.options.check_neurons(index, norms)
        prior = layout.weight_prior(gate, up, norms)
        del gate, up
        if not np.isfinite(prior).all():
            raise SourceError(
                f"{self.source.path}: the weights of {spec.path} are too large to multiply; get them again"
            )
        tensors |= layout.packed("down", down, self.packing.down)
        del down
        if spec.bias:
            names = [f"{spec.path}.{leaf}.bias" for leaf in spec.leaves if leaf != spec.down]
            tensors["gate_up.bias"] = layout.gate_up_rows(*_apart(spec, [self._take(name) for name in names]))
        if spec.down_bias:
            tensors["down.bias"] = self._take(f"{spec.path}.{spec.down}.bias")
        write_neurons(self.folder / neurons_file(index, count), tensors)
        del tensors
        mx.clear_cache()
        return prior, norms

    def write_rest(self) -> None:
        """Write everything but the sliced FFNs, in shards."""
        shards = Shards(self.folder)
        for name in list(self.remaining):
            stem, _, leaf = name.rpartition(".")
            if leaf == "weight" and self._kept_packed(stem):
                arrays = self._take_packed(stem)
                tensors = {f"{stem}.{part}": array for part, array in arrays.items()}
                del arrays
            elif leaf == "weight":
                tensors = layout.packed(stem, self._take(name), self.packing.other(stem))
            else:
                tensors = {name: self._take(name)}
            shards.add(tensors)
            del tensors
        shards.finish()

    def _gate_up(self, spec: FFNSpec) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        """Rows of gate and up as floats, and the tensors that hold them in the file."""
        quantization = self.packing.gate_up
        stems = [f"{spec.path}.{leaf}" for leaf in spec.leaves if leaf != spec.down]
        if quantization is not None and all(self._kept_packed(stem) for stem in stems):
            both = [self._take_packed(stem) for stem in stems]
            gate, up = _apart(spec, [layout.unpacked(arrays, quantization, mx.float32) for arrays in both])
            parts = {part: _apart(spec, [arrays[part] for arrays in both]) for part in both[0]}
            return gate, up, {f"gate_up.{part}": layout.gate_up_rows(*rows) for part, rows in parts.items()}
        gate, up = _apart(spec, [self._take(f"{stem}.weight") for stem in stems])
        return gate, up, layout.packed("gate_up", layout.gate_up_rows(gate, up), quantization)

    def _kept_packed(self, path: str) -> bool:
        """Whether the bytes of a module's weight stay as they are."""
        source = self.source
        changed = self.adapter is not None and f"{path}.weight" in self.adapter
        return isinstance(source, PackedSource) and path in source.packed and not changed

    def _take_packed(self, path: str) -> dict[str, mx.array]:
        assert isinstance(self.source, PackedSource)
        arrays = self.source.take_packed(path)
        dtype = self.options.dtype
        if dtype is not None:
            arrays = {part: array.astype(dtype) if array.dtype in _FLOATS else array for part, array in arrays.items()}
            mx.eval(arrays)
        for part, array in arrays.items():
            self._check_finite(f"{path}.{part}", array)
        # A scale of one byte has a NaN too, and a finite scale may give numbers that are too large.
        packing = self.source.packed[path]
        step = max(_ROWS // math.prod(arrays["weight"].shape[1:-1]), 1)
        for start in range(0, len(arrays["weight"]), step):
            rows = {part: array[start : start + step] for part, array in arrays.items()}
            self._check_finite(path, layout.unpacked(rows, packing, dtype or mx.float32))
        self._count(f"{path}.weight")
        return arrays

    def _check_finite(self, name: str, array: mx.array) -> None:
        """Raise SourceError if an array of a source holds NaN or infinity, once it is cast."""
        if array.dtype not in _FLOATS or all_finite(array):
            return
        what = f"{self.source.path}: {name} contains NaN or infinity"
        if self.options.dtype is not None or (self.source.dequantizes and array.dtype == mx.float16):
            cast = str(array.dtype).removeprefix("mlx.core.")
            raise SourceError(f"{what} as {cast}; choose another --dtype, or get the weights again")
        raise SourceError(f"{what}; get the weights again")

    def _take(self, name: str) -> mx.array:
        array = self.source.take(name)
        dtype = self.options.dtype if self.may_cast(name) else None
        if dtype is None and self.source.dequantizes and array.dtype == mx.float32:
            dtype = mx.float16
        if self.adapter is not None and name in self.adapter:
            array = self.adapter.fuse(name, array, dtype or array.dtype)
        elif dtype is not None and array.dtype in _FLOATS:
            array = array.astype(dtype)
        mx.eval(array)
        self._check_finite(name, array)
        self._count(name)
        return array

    def _count(self, name: str) -> None:
        self.done += math.prod(self.remaining.pop(name))
        self.report("convert", self.done, self.total)


def _apart(spec: FFNSpec, arrays: list[mx.array]) -> tuple[mx.array, mx.array]:
    """The rows of gate and up, from two leaves or from one fused leaf."""
    if spec.fused is not None:
        return split_fused(arrays[0], spec.fused)
    return arrays[0], arrays[1]
