"""Turns a user's budget into *k* per FFN, and computes which weights stay in memory."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ifprune_mlx.checkpoint.neuron_layout import MOST_PADDING
from ifprune_mlx.errors import BudgetError

if TYPE_CHECKING:
    from ifprune_mlx.checkpoint.format import Checkpoint

RAM, SSD = "ram", "ssd"
RESIDENCIES = (RAM, SSD)
_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}


def keep_multiple(d_ffn: int) -> int:
    """*k* is a multiple of this: 64, since Metal's fastest kernels ask for it, or 8 for the tiny FFNs of tests."""
    return 64 if d_ffn >= 512 else 8


def keep_count(density: float, d_ffn: int) -> int:
    """*k* for a density: the nearest multiple of `keep_multiple`, at least one multiple; all neurons at density 1.

    Raises:
        BudgetError: unless 0 < density <= 1.
    """
    if not (math.isfinite(density) and 0 < density <= 1):
        raise BudgetError(f"density {density:g} is not usable; give a number above 0 and at most 1, such as 0.5")
    multiple = keep_multiple(d_ffn)
    if density == 1 or d_ffn <= multiple:
        return d_ffn
    return min(max(round(density * d_ffn / multiple), 1) * multiple, d_ffn)


def parse_quantity(text: str, what: str) -> int:
    """A number with an optional suffix: `3B`, `250M`, `6GB`, `1.5e9`.

    Raises:
        BudgetError: if it is not a positive number.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([KMBGT]?)B?\s*", text, re.IGNORECASE)
    value = float(match.group(1)) * _FACTORS[match.group(2).upper()] if match else 0.0
    if not 1 <= value < math.inf:
        raise BudgetError(f"{what} {text!r} is not a positive quantity; write it like 3B, 250M or 6GB")
    return int(value)


def physical_memory() -> int:
    """This machine's memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def resident_bytes(checkpoint: Checkpoint, residency: str, keep: Sequence[int], float_bytes: int | None = None) -> int:
    """Bytes of weights that stay in memory, the predictor's included.

    Args:
        residency: `ram` keeps every neuron; `ssd` keeps `keep[l]` of each FFN, and all of the predictor's FFNs.
        float_bytes: size of each of the model's floats once it is cast; None keeps the size on disk.
    """
    total = checkpoint.loaded_bytes(float_bytes) + checkpoint.predictor_bytes
    if residency == RAM:
        return total
    for index, (spec, k) in enumerate(zip(checkpoint.layout.ffns, keep, strict=True)):
        if index >= checkpoint.predictor_layers:
            total -= (spec.d_ffn - k) * checkpoint.neuron_bytes(index, float_bytes)
    return total


def choose_residency(
    checkpoint: Checkpoint, residency: str | None, memory: int | None, float_bytes: int | None = None
) -> str:
    """The given residency; else `ram`, or `ssd` where a memory budget leaves no room for every neuron.

    Raises:
        BudgetError: if the resident weights are larger than this machine's memory: it would swap without end.
    """
    whole, have = resident_bytes(checkpoint, RAM, checkpoint.widths, float_bytes), physical_memory()
    residency = _residency(residency, memory, whole)
    keep = resolve_keep(checkpoint, memory=memory, residency=residency, float_bytes=float_bytes)
    part = resident_bytes(checkpoint, SSD, keep, float_bytes)
    needed = whole if residency == RAM else part
    if needed > have:
        advice = "convert the source with -q, or with fewer --q-bits"
        if residency == RAM and part <= have:
            advice = f"load it with --residency ssd, which keeps {part / 1e9:.1f} GB of it in memory, or {advice}"
        raise BudgetError(
            f"{checkpoint.path}: its weights take {needed / 1e9:.1f} GB, and this machine has "
            f"{have / 1e9:.1f} GB of memory; {advice}"
        )
    return residency


def check_files(
    name: str, sizes: Mapping[str, int], residency: str | None, memory: int | None, *, ordered: bool = False
) -> None:
    """Raise BudgetError if the weights in files that are not downloaded yet do not fit into this machine's memory.

    Args:
        sizes: bytes of every file of a checkpoint, by its path.
        residency, memory: as in `choose_residency`.
        ordered: the checkpoint's neurons are reordered, so their files may contain padding.
    """
    weights = {file: size for file, size in sizes.items() if file.endswith(".safetensors")}
    if ordered:
        weights |= {file: int(size / MOST_PADDING) for file, size in weights.items() if file.startswith("neurons-")}
    needed, have = sum(weights.values()), physical_memory()
    streamed = sum(size for file, size in weights.items() if file.startswith("neurons-"))
    residency = _residency(residency, memory, needed)
    if residency == SSD:
        needed -= streamed  # a lower bound: the files do not say how many of these are active
    if needed > have:
        advice = "" if residency == SSD or needed - streamed > have else "; try --residency ssd"
        raise BudgetError(
            f"{name}: with residency {residency} {needed / 1e9:.1f} GB of its weights would stay in memory, and this "
            f"machine has {have / 1e9:.1f} GB; nothing was downloaded{advice}"
        )


def _residency(given: str | None, memory: int | None, whole: int) -> str:
    if given is not None and given not in RESIDENCIES:
        raise BudgetError(f"unknown residency {given!r}; choose {RAM} or {SSD}")
    return given or (SSD if memory is not None and memory < whole else RAM)


def spare_slots(checkpoint: Checkpoint, memory: int | None, keep: Sequence[int], float_bytes: int | None = None) -> int:
    """How many inactive neurons of every FFN fit into a memory budget in `ssd` residency."""
    streamed = range(checkpoint.predictor_layers, len(checkpoint.layout.ffns))
    if memory is None or not streamed:
        return 0
    left = memory - resident_bytes(checkpoint, SSD, keep, float_bytes)
    return max(left // sum(checkpoint.neuron_bytes(index, float_bytes) for index in streamed), 0)


def resolve_keep(
    checkpoint: Checkpoint,
    *,
    density: float | None = None,
    active_parameters: int | None = None,
    memory: int | None = None,
    residency: str = RAM,
    float_bytes: int | None = None,
) -> tuple[int, ...]:
    """*k* for every FFN under the given budget; the checkpoint's own density where none is given.

    Args:
        density: kept / all neurons of each layer.
        active_parameters: the most parameters that one token may use; the largest density that fits is taken.
        memory: bytes that the weights may take. In `ram` residency all neurons stay in memory at any density, so this
            is only checked. In `ssd` residency it lowers the checkpoint's own density if need be.
        residency, float_bytes: see `resident_bytes`.

    Raises:
        BudgetError: if two budgets contradict each other or nothing fits.
    """
    if density is not None and active_parameters is not None:
        raise BudgetError("give a density or a number of active parameters, not both")
    widths = checkpoint.widths

    def resident(keep: Sequence[int]) -> int:
        return resident_bytes(checkpoint, residency, keep, float_bytes)

    if memory is not None and residency == RAM and memory < (size := resident(widths)):
        raise BudgetError(
            f"memory budget {memory / 1e9:.3g} GB: this checkpoint keeps {size / 1e9:.3g} GB of weights in memory at "
            "any density; raise the budget, load it with --residency ssd, or convert the model with -q"
        )
    keep = _keep(checkpoint, density, active_parameters)
    if memory is None or residency == RAM or (size := resident(keep)) <= memory:
        return keep
    if density is not None or active_parameters is not None:
        raise BudgetError(
            f"memory budget {memory / 1e9:.3g} GB: {size / 1e9:.3g} GB of weights stay in memory at density "
            f"{sum(keep) / sum(widths):.3g}; lower the density, or raise the budget"
        )
    streamed = range(checkpoint.predictor_layers, len(widths))
    fixed = resident([0 if index in streamed else k for index, k in enumerate(keep)])
    neurons = sum(widths[index] * checkpoint.neuron_bytes(index, float_bytes) for index in streamed)
    keep = _share(checkpoint, memory - fixed, neurons)
    if min(keep) < 1:
        raise BudgetError(
            f"memory budget {memory / 1e9:.3g} GB is too small: all but the neurons of this checkpoint takes "
            f"{fixed / 1e9:.3g} GB; give at least {resident(_least(checkpoint)) / 1e9:.3g} GB"
        )
    return keep


def _keep(checkpoint: Checkpoint, density: float | None, active_parameters: int | None) -> tuple[int, ...]:
    if active_parameters is None:
        wanted = checkpoint.layout.density if density is None else density
        return tuple(keep_count(wanted, width) for width in checkpoint.widths)
    if active_parameters >= checkpoint.parameters:
        return checkpoint.widths
    neurons = sum(spec.d_ffn * spec.neuron_parameters for spec in checkpoint.layout.ffns)
    fixed = checkpoint.parameters - neurons  # a down bias belongs to no neuron and stays
    keep = _share(checkpoint, active_parameters - fixed, neurons)
    if min(keep) < 1:
        least = checkpoint.active_parameters(_least(checkpoint))
        raise BudgetError(
            f"{active_parameters:,} active parameters are too few: everything but the FFNs takes {fixed:,}; "
            f"give at least {least:,}"
        )
    return keep


def _share(checkpoint: Checkpoint, part: int, whole: int) -> tuple[int, ...]:
    """`part / whole` of each FFN's neurons, rounded down to a multiple of `keep_multiple`; below 1 for too few."""
    multiples = ((width, keep_multiple(width)) for width in checkpoint.widths)
    return tuple(part * width // max(whole, 1) // multiple * multiple for width, multiple in multiples)


def _least(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The smallest *k* of each FFN."""
    return tuple(min(keep_multiple(width), width) for width in checkpoint.widths)
