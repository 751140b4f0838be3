"""Refuses, before the long work, a conversion whose calibration would need more memory than weights may take here."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ifprune_mlx.checkpoint.density_curve import TOLERANCE
from ifprune_mlx.checkpoint.ffn_spec import FFNSpec
from ifprune_mlx.checkpoint.format import Quantization
from ifprune_mlx.checkpoint.hub import list_repository
from ifprune_mlx.device import Device, this_device
from ifprune_mlx.errors import BudgetError, SourceError

from .calibrate import SHIPPED
from .packing import Packing, bits_per_weight, quantization_of
from .source import Source

if TYPE_CHECKING:
    from .pipeline import Options

_SMALLEST = Quantization(64, 4, "affine")


def check_calibration(
    source: Source,
    out: Path,
    options: Options,
    specs: Sequence[FFNSpec],
    packing: Packing,
    device: Device | None = None,
) -> None:
    """Raise BudgetError, with a command that fits, if chats are to be read with more weights than there is room for.

    Args:
        specs, packing: of the checkpoint to be.
        device: None is this one.
    """
    # `--order` asks the predictor, if there is one, and that needs no more than the active neurons.
    if options.calibration is None and (options.order is None or options.predictor is not None):
        return
    device = device or this_device()
    needed = converted_bytes(source, options, specs, packing)
    if needed <= device.usable:
        return
    packed = Packing(_SMALLEST, _SMALLEST, lambda _: _SMALLEST, None)
    if packing.section is None and converted_bytes(source, options, specs, packed) <= device.usable:
        command = _command(source.path, out, replace(options, quantization=_SMALLEST))
    else:
        order = options.order if options.predictor else None
        command = _command(source.path, out, replace(options, calibration=None, order=order))
    limit = device.wired_limit_mb(needed)
    more = "" if limit is None else f" (more after `sudo sysctl iogpu.wired_limit_mb={limit}`)"
    raise BudgetError(
        f"{source.path}: chats are read with every neuron, about {needed / 1e9:.3g} GB of weights, and weights may "
        f"take {device.usable / 1e9:.3g} GB of this machine's {device.memory / 1e9:.3g} GB{more}; this fits: {command}"
    )


def converted_bytes(source: Source, options: Options, specs: Sequence[FFNSpec], packing: Packing) -> int:
    """About how many bytes the converted weights take in memory, a predictor's left out."""
    down = {f"{spec.path}.{spec.down}" for spec in specs}
    gate_up = {f"{spec.path}.{leaf}" for spec in specs for leaf in spec.leaves} - down
    kept = source.config.get("dtype", source.config.get("torch_dtype"))
    plain = 8 * options.dtype.size if options.dtype is not None else 32 if kept == "float32" else 16
    total = 0.0
    for name, shape in source.shapes.items():
        stem, _, leaf = name.rpartition(".")
        how = packing.down if stem in down else packing.gate_up if stem in gate_up else packing.other(stem)
        bits = plain if how is None or leaf != "weight" or len(shape) < 2 else bits_per_weight(how)
        total += math.prod(shape) * bits / 8
    return int(total)


def least_hub_bytes(name: str, revision: str | None = None, bits: float | None = None) -> int:
    """Bytes that the weights of a repository of the hub take at least; 0 where the hub says nothing of them.

    Args:
        bits: a weight; None: as few as are chosen where none are asked for.
    """
    with suppress(SourceError):
        repository = list_repository(name, revision, SourceError)
        return int((repository.parameters or 0) * (bits or bits_per_weight(_SMALLEST)) / 8)
    return 0


def _command(source: Path, out: Path, options: Options) -> str:
    """The command of a conversion with these options."""
    packed, bits = options.quantization, options.predictor_bits
    usual = packed is None or packed == quantization_of(packed.mode, None, None)
    given = {
        "model": source,
        "adapter": options.adapter,
        "q-mode": None if packed is None or packed.mode == "affine" else packed.mode,
        "q-bits": None if packed is None or usual else packed.bits,
        "q-group-size": None if packed is None or usual else packed.group_size,
        "dtype": None if options.dtype is None else str(options.dtype).removeprefix("mlx.core."),
        "density": options.density,
        "tolerance": options.tolerance if options.calibration is not None and options.tolerance != TOLERANCE else None,
        "predictor": options.predictor,
        "predictor-bits": None if options.predictor is None else bits or "none",
        "prior": options.prior if isinstance(options.prior, Path) else None,
        "order": options.order and "frequency",
        "mlx-path": out,
        "upload-repo": options.upload_repo,
    }
    words = [word for key, value in given.items() if value is not None for word in (f"--{key}", str(value))]
    flags = {
        "--quantize": packed is not None,
        "--float-down": options.float_down,
        "--overwrite": options.overwrite,
        "--trust-remote-code": options.trust_remote_code,
    }
    words += [flag for flag, on in flags.items() if on]
    if options.calibration is not None:
        words.append("--calibrate")  # last, for it may stand without a value
        if isinstance(options.calibration, Path) and options.calibration != SHIPPED:
            words.append(str(options.calibration))
    return shlex.join(["ifprune", "convert", *words])
