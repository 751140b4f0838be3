"""Makes what `ifprune_mlx.bench.benchmark` compares: an IFP checkpoint and plain mlx-lm models of the same weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ifprune_mlx.checkpoint.budget import RAM, SSD, resident_bytes
from ifprune_mlx.checkpoint.format import Checkpoint, Quantization
from ifprune_mlx.errors import IfpruneError
from ifprune_mlx.selection.selection import Selection

from .export import export_selection
from .pipeline import Options, convert
from .synthetic import NoiseSource, Shape, write_predictor

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Plain:
    """Plain models of a checkpoint: all neurons, and the first *k* of every FFN."""

    dense: Path
    static: Path


def make_noise(
    folder: Path, shape: Shape, dtype: mx.Dtype, quantization: Quantization | None, report: Report
) -> Checkpoint:
    """Write the IFP checkpoint `folder/checkpoint` of a shape, with a predictor if the shape has one."""
    predictor = None if shape.backbone is None else write_predictor(folder / "predictor", shape, dtype)
    options = Options(quantization=quantization, density=shape.density, predictor=predictor)
    source = NoiseSource(shape, dtype)
    made = convert(source, folder / "checkpoint", options, lambda _, done, total: report(done, total))
    if predictor is not None:
        shutil.rmtree(predictor)
    mx.clear_cache()
    return made.checkpoint


def make_plain(folder: Path, checkpoint: Checkpoint, keep: tuple[int, ...], report: Report) -> Plain:
    """Write the plain models `folder/dense` and `folder/static`; the choice of neurons does not affect speed."""
    for name, counts in (("dense", checkpoint.widths), ("static", keep)):
        ids = tuple(np.arange(count, dtype=np.int32) for count in counts)
        # Packed as mlx-lm packs it: a model of that size would be.
        packing = checkpoint.layout.down
        packed = packing is not None and all(count % packing.group_size == 0 for count in counts)
        export_selection(
            checkpoint,
            Selection(ids, checkpoint.widths, "static"),
            folder / name,
            requantize_down=packed,
            report=report,
        )
        mx.clear_cache()
    return Plain(folder / "dense", folder / "static")


def check_room(folder: Path, checkpoint: Checkpoint, keep: tuple[int, ...]) -> None:
    """Raise IfpruneError if `folder` has no room for the plain models."""
    needed = resident_bytes(checkpoint, RAM, checkpoint.widths) + resident_bytes(checkpoint, SSD, keep)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise IfpruneError(
            f"{folder}: has {free / 1e9:.1f} GB left, and the models to compare with take {needed / 1e9:.1f}; give "
            "another folder with --work, or --no-stock"
        )
