"""Turns a user's budget into *k* per FFN, and computes which weights stay in memory, and whether they fit."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ifprune_mlx.checkpoint.neuron_layout import MOST_PADDING
from ifprune_mlx.device import Device, this_device
from ifprune_mlx.errors import BudgetError

if TYPE_CHECKING:
    from ifprune_mlx.checkpoint.format import Checkpoint, Layout

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


@dataclass(frozen=True)
class Fit:
    """How a checkpoint fits into memory.

    Attributes:
        residency: `ram` or `ssd`.
        density: the highest, in hundredths, at most the wanted one; None is the checkpoint's own, or any in `ram`.
        selector: what selects, where the checkpoint's default selector needs all neurons; else None.
    """

    residency: str
    density: float | None = None
    selector: str | None = None

    def command(self, model: str | Path, memory: int | None = None) -> str:
        """The command that loads it so, to be copied; `memory` is the user's own budget in bytes."""
        given = {"model": model, "memory": memory, "density": self.density, "selector": self.selector}
        given["residency"] = None if self.residency == RAM else self.residency
        words = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
        return shlex.join(["ifprune", "chat", *words])


def room(memory: int | None, device: Device | None = None) -> int:
    """Bytes that weights may take: a user's budget, and no more than the device (None: this one) has for them."""
    usable = (device or this_device()).usable
    return usable if memory is None else min(memory, usable)


def resident_bytes(checkpoint: Checkpoint, residency: str, keep: Sequence[int], float_bytes: int | None = None) -> int:
    """Bytes of weights that stay in memory, the predictor's included; of one rank, where several share the weights.

    Args:
        residency: `ram` keeps every neuron; `ssd` keeps `keep[l]` of each FFN, and all of the predictor's FFNs.
        float_bytes: size of each of the model's floats once it is cast; None keeps the size on disk.
    """
    shared = checkpoint.loaded_bytes(float_bytes)
    for index, (spec, k) in enumerate(zip(checkpoint.layout.ffns, keep, strict=True)):
        if residency == SSD and index >= checkpoint.predictor_layers:
            shared -= (spec.d_ffn - k) * checkpoint.neuron_bytes(index, float_bytes)
    whole = 0 if checkpoint.ranks == 1 else checkpoint.bytes_on_every_rank(float_bytes)
    return whole + -(-(shared - whole) // checkpoint.ranks) + checkpoint.predictor_bytes


def best_fit(checkpoint: Checkpoint, space: int, wanted: float | None = None) -> Fit | None:
    """How the checkpoint fits into so many bytes: in `ram`, else on `ssd` with the most neurons active.

    Args:
        wanted: the density to come as near to as there is room; None is the checkpoint's own.

    Returns:
        None if one neuron in a hundred is too many. Floats are as on disk.
    """

    def part(density: float) -> float:
        return resident_bytes(checkpoint, SSD, [keep_count(density, width) for width in checkpoint.widths])

    whole = resident_bytes(checkpoint, RAM, checkpoint.widths)
    return _best_fit(space, whole, part, checkpoint.layout.density, wanted, checkpoint.layout.selector)


def _best_fit(
    space: int, whole: int, part: Callable[[float], float], own: float, wanted: float | None, selector: str
) -> Fit | None:
    """See `best_fit`; `whole` and `part` of a density are the bytes in `ram` and on `ssd`."""
    if whole <= space:
        return Fit(RAM)
    other = _without_dense(selector)
    if wanted is None and part(own) <= space:
        return Fit(SSD, None, other)
    hundredths = range(math.floor(100 * (own if wanted is None else wanted) + 1e-6), 0, -1)
    return next((Fit(SSD, n / 100, other) for n in hundredths if part(n / 100) <= space), None)


def _without_dense(selector: str) -> str | None:
    """The selector to name where not all neurons are in memory, as the activation selector wants; None: the default."""
    return "static" if selector == "activation" else None


def check_fits(
    checkpoint: Checkpoint,
    residency: str,
    keep: Sequence[int],
    *,
    memory: int | None = None,
    float_bytes: int | None = None,
    device: Device | None = None,
    asked: bool = False,
) -> None:
    """Raise BudgetError, with a command that fits, unless the weights fit into a budget and what the device has for it.

    Args:
        residency, keep, float_bytes: as in `resident_bytes`.
        memory: the user's budget in bytes, if there is one.
        device: None is this one.
        asked: the user asked for that *k*; else the checkpoint's own density is what is wanted.
    """
    needed = resident_bytes(checkpoint, residency, keep, float_bytes)
    if needed <= room(memory, device):
        return
    where = f"{checkpoint.path}: {needed / 1e9:.3g} GB of weights stay in memory with residency {residency}"
    density = sum(keep) / sum(checkpoint.widths)
    if residency == SSD:
        where += f" at density {density:.3g}"

    def fit_into(space: int) -> Fit | None:
        return best_fit(checkpoint, space, density if asked else None)

    raise _refusal(where, needed, residency, checkpoint.path, fit_into, memory, device)


def _refusal(
    where: str,
    needed: int,
    residency: str,
    model: str | Path,
    fit_into: Callable[[int], Fit | None],
    memory: int | None,
    device: Device | None,
) -> BudgetError:
    """The error for weights that do not fit; its message ends in a command that does.

    Args:
        where: the beginning of the message: what would take how much.
        needed: bytes of the weights, with that residency.
        model: what `--model` is to get.
        fit_into: how the model fits into a number of bytes.
        memory, device: as in `check_fits`.
    """
    device, space = device or this_device(), room(memory, device)
    if memory == space:
        why = f"the memory budget is {memory / 1e9:.3g} GB; "
        why += "raise the budget" if residency == RAM else "lower the density, or raise the budget"
    else:
        why = f"weights may take {space / 1e9:.3g} GB of this machine's {device.memory / 1e9:.3g} GB"
        if (limit := device.wired_limit_mb(needed)) is not None:
            why += f" (more after `sudo sysctl iogpu.wired_limit_mb={limit}`)"
    told, command = _way(model, fit_into, memory, device)
    return BudgetError(f"{where}, and {why}; {told or 'this fits'}: {command}")


def _way(
    model: str | Path, fit_into: Callable[[int], Fit | None], memory: int | None, device: Device
) -> tuple[str, str]:
    """What there is to say on how to load a model, nothing as a rule, and the command; see `_refusal`."""
    if fit := fit_into(room(memory, device)):
        return "", fit.command(model, memory)
    if memory is not None and (fit := fit_into(device.usable)):
        return "", fit.command(model)
    if (most := device.most_wired_mb) is not None and (fit := fit_into(device.raised(most).usable)):
        return "", f"sudo sysctl iogpu.wired_limit_mb={most} && {fit.command(model)}"
    return (
        "it is too large even with --residency ssd, convert its source with -q or fewer --q-bits, or take a smaller "
        "model, such as the embedded one",
        "ifprune chat",
    )


def way_to_load(
    checkpoint: Checkpoint, device: Device | None = None, model: str | Path | None = None
) -> tuple[str, str]:
    """What there is to say on how to load a checkpoint here, nothing as a rule, and the command to copy.

    Args:
        device: None is this one.
        model: what `--model` is to get; None is the checkpoint's folder.
    """
    return _way(model or checkpoint.path, lambda space: best_fit(checkpoint, space), None, device or this_device())


def choose_residency(
    checkpoint: Checkpoint,
    residency: str | None,
    memory: int | None,
    float_bytes: int | None = None,
    device: Device | None = None,
) -> str:
    """The given residency; else `ram`, or `ssd` where a memory budget leaves no room for every neuron.

    Raises:
        BudgetError: if the weights that stay in memory at any density are more than the budget, or than the device
            (None: this one) has for them. A selection that needs too much is refused when it is made.
    """
    whole = resident_bytes(checkpoint, RAM, checkpoint.widths, float_bytes)
    residency = _residency(residency, None if memory is None else room(memory, device), whole)
    if memory is not None:  # it lowers the density
        resolve_keep(checkpoint, memory=memory, residency=residency, float_bytes=float_bytes, device=device)
    else:
        check_fits(checkpoint, residency, _least(checkpoint), float_bytes=float_bytes, device=device)
    return residency


def check_files(
    name: str,
    sizes: Mapping[str, int],
    residency: str | None,
    memory: int | None,
    read_layout: Callable[[], Layout | None],
    device: Device | None = None,
) -> None:
    """Raise BudgetError, with a command that fits, if weights that are not downloaded yet do not fit into memory.

    Args:
        sizes: bytes of every file of a checkpoint, by its path.
        residency, memory, device: as in `choose_residency`.
        read_layout: reads what the checkpoint's config says of its FFNs; called only where that decides.
    """
    weights = {file: size for file, size in sizes.items() if file.endswith(".safetensors")}
    streamed = sum(size for file, size in weights.items() if file.startswith("neurons-"))
    rest = sum(weights.values()) - streamed
    residency = _residency(residency, None if memory is None else room(memory, device), rest + streamed)
    space = room(memory, device)
    # On `ssd` a lower bound: how many of the neurons will be active is not known here.
    needed = rest + (streamed if residency == RAM else 0)
    if needed <= space:
        return
    layout = read_layout() if rest <= space else None
    if layout is not None and layout.order is not None:  # their files may be padded, and memory is not
        needed -= int(streamed - streamed / MOST_PADDING)
        if needed <= space:
            return

    def fit_into(space: int) -> Fit | None:
        if layout is None:
            return Fit(RAM) if rest + streamed <= space else None
        widths = [spec.d_ffn for spec in layout.ffns]

        def part(density: float) -> float:
            return rest + streamed * sum(keep_count(density, width) for width in widths) / sum(widths)

        return _best_fit(space, rest + streamed, part, layout.density, None, layout.selector)

    where = (
        f"{name}: with residency {residency} {needed / 1e9:.1f} GB of its weights would stay in memory, nothing was "
        "downloaded"
    )
    raise _refusal(where, needed, residency, name, fit_into, memory, device)


def _residency(given: str | None, space: int | None, whole: int) -> str:
    if given is not None and given not in RESIDENCIES:
        raise BudgetError(f"unknown residency {given!r}; choose {RAM} or {SSD}")
    return given or (SSD if space is not None and space < whole else RAM)


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
    device: Device | None = None,
) -> tuple[int, ...]:
    """*k* for every FFN under the given budget; the checkpoint's own density where none is given.

    Args:
        density: kept / all neurons of each layer.
        active_parameters: the most parameters that one token may use; the largest density that fits is taken.
        memory: bytes that the weights may take. In `ram` residency all neurons stay in memory at any density, so this
            is only checked. In `ssd` residency it lowers the checkpoint's own density if need be.
        residency, float_bytes: see `resident_bytes`. On `ssd`, what is kept must fit into the device too.
        device: None is this one.

    Raises:
        BudgetError: if two budgets contradict each other or nothing fits.
    """
    if density is not None and active_parameters is not None:
        raise BudgetError("give a density or a number of active parameters, not both")
    widths = checkpoint.widths

    def resident(keep: Sequence[int]) -> int:
        return resident_bytes(checkpoint, residency, keep, float_bytes)

    space = None if memory is None else room(memory, device)
    keep, asked = _keep(checkpoint, density, active_parameters), density is not None or active_parameters is not None
    if space is not None and resident(keep) > space:
        least = resident_bytes(checkpoint, SSD, _least(checkpoint), float_bytes)
        if least > space:
            check_fits(checkpoint, SSD, _least(checkpoint), float_bytes=float_bytes, device=device)
            raise _too_small(checkpoint, space, least)
        if residency == SSD and not asked:
            streamed = range(checkpoint.predictor_layers, len(widths))
            fixed = resident([0 if index in streamed else k for index, k in enumerate(keep)])
            neurons = sum(widths[index] * checkpoint.neuron_bytes(index, float_bytes) for index in streamed)
            keep = _share(checkpoint, (space - fixed) * checkpoint.ranks, neurons)
    if residency == SSD or space is not None:
        check_fits(checkpoint, residency, keep, memory=memory, float_bytes=float_bytes, device=device, asked=asked)
    return keep


def _too_small(checkpoint: Checkpoint, memory: int, least: int) -> BudgetError:
    """The error for a budget of `memory` bytes, which no neurons fit into; on `ssd` the fewest take `least` in all."""
    fit = Fit(SSD, selector=_without_dense(checkpoint.layout.selector))
    enough = resident_bytes(checkpoint, SSD, _least(checkpoint))
    return BudgetError(
        f"{checkpoint.path}: memory budget {memory / 1e9:.3g} GB is too small: raise the budget; give at least "
        f"{least / 1e9:.3g} GB, with residency ssd; this fits: {fit.command(checkpoint.path, enough)}"
    )


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
