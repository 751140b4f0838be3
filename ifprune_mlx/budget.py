"""From what a user can afford to *k* per FFN: a density, a number of active parameters, or bytes of memory.

Arithmetic on a checkpoint's shapes, and on the memory that this machine has.
"""

from __future__ import annotations

import math
import os
import re

from .checkpoint import Checkpoint
from .errors import BudgetError
from .selection import keep_count, keep_multiple

_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}


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
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(checkpoint: Checkpoint) -> None:
    """Raise BudgetError if the weights alone are more than this machine's memory: it would swap without end."""
    have = physical_memory()
    if checkpoint.weight_bytes > have:
        raise BudgetError(
            f"{checkpoint.path}: its weights take {checkpoint.weight_bytes / 1e9:.1f} GB, and this machine has "
            f"{have / 1e9:.1f} GB of memory; convert the source with -q, or with fewer --q-bits"
        )


def resolve_keep(
    checkpoint: Checkpoint,
    *,
    density: float | None = None,
    active_parameters: int | None = None,
    memory: int | None = None,
) -> tuple[int, ...]:
    """*k* for every FFN under the given budget; the checkpoint's own density where none is given.

    Args:
        density: kept / all neurons of each layer.
        active_parameters: the most parameters that may take part in a token; the largest density below it is taken.
        memory: bytes that the weights may take. In `ram` residency all neurons stay in memory whatever the density, so
            this is a check and picks no density.

    Raises:
        BudgetError: if two budgets contradict each other or nothing fits.
    """
    if density is not None and active_parameters is not None:
        raise BudgetError("give a density or a number of active parameters, not both")
    if memory is not None and memory < checkpoint.weight_bytes:
        raise BudgetError(
            f"memory budget {memory / 1e9:.3g} GB: this checkpoint keeps {checkpoint.weight_bytes / 1e9:.3g} GB of "
            "weights in memory at any density; raise the budget, or convert the model with -q"
        )
    ffns = checkpoint.layout.ffns
    if active_parameters is None:
        wanted = checkpoint.layout.density if density is None else density
        return tuple(keep_count(wanted, spec.d_ffn) for spec in ffns)
    if active_parameters >= checkpoint.parameters:
        return tuple(spec.d_ffn for spec in ffns)
    neurons = sum(spec.d_ffn * spec.neuron_parameters for spec in ffns)
    fixed = checkpoint.parameters - neurons  # a down bias belongs to no neuron and stays
    multiples = [keep_multiple(spec.d_ffn) for spec in ffns]
    keep = tuple(
        (active_parameters - fixed) * spec.d_ffn // neurons // multiple * multiple
        for spec, multiple in zip(ffns, multiples, strict=True)
    )
    if min(keep) < 1:
        least = checkpoint.active_parameters(tuple(min(keep_multiple(spec.d_ffn), spec.d_ffn) for spec in ffns))
        raise BudgetError(
            f"{active_parameters:,} active parameters are too few: everything but the FFNs takes {fixed:,}; "
            f"give at least {least:,}"
        )
    return keep
