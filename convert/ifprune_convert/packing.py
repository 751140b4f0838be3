"""Decides how each module's weights are packed: as the user asks, or as the source is packed already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx import nn

from ifprune_mlx.checkpoint.ffn_spec import FFNSpec
from ifprune_mlx.checkpoint.format import Quantization
from ifprune_mlx.errors import SourceError

from .source import PackedSource, Source

QUANTIZATION_MODES = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}
_GROUPS, _BITS = (32, 64, 128), (2, 3, 4, 5, 6, 8)
_DOWN_BITS = 8


@dataclass(frozen=True)
class Packing:
    """How a checkpoint is packed.

    Attributes:
        gate_up, down: of the FFN rows; None for floats.
        other: of any other module, by path.
        section: what `config.json` says of all but the FFN rows, in mlx-lm's words; None if nothing is packed.
    """

    gate_up: Quantization | None
    down: Quantization | None
    other: Callable[[str], Quantization | None]
    section: dict[str, Any] | None


def quantization_of(mode: str, group_size: int | None, bits: int | None) -> Quantization:
    """Parameters of a quantization mode, mlx-lm's defaults where None.

    Raises:
        SourceError: if the mode does not know this group size or number of bits.
    """
    if mode not in QUANTIZATION_MODES:
        raise SourceError(f"quantization mode {mode!r} is unknown; choose one of {', '.join(QUANTIZATION_MODES)}")
    default_group, default_bits = QUANTIZATION_MODES[mode]
    group_size = default_group if group_size is None else group_size
    bits = default_bits if bits is None else bits
    if mode == "affine":
        fits = group_size in _GROUPS and bits in _BITS
        allowed = "groups of 32, 64 or 128 and 2, 3, 4, 5, 6 or 8 bits"
    else:
        fits = (group_size, bits) == (default_group, default_bits)
        allowed = f"groups of {default_group} and {default_bits} bits"
    if not fits:
        raise SourceError(f"{mode} quantization has {allowed}; got groups of {group_size} and {bits} bits")
    return Quantization(group_size, bits, mode)


def bits_per_weight(quantization: Quantization) -> float:
    """Bits that a packed weight takes, its share of the group's scale and bias included."""
    scales = 32 if quantization.has_biases else 8
    return quantization.bits + scales / quantization.group_size


def head_bits(predictor: Path | None, given: str | None, quantize: bool) -> int | None:
    """Bits for `Options.predictor_bits` from what a user says: `8`, `4`, `none`, or nothing.

    Raises:
        SourceError: if there is no predictor to pack.
    """
    if predictor is None:
        if given is not None:
            raise SourceError(f"--predictor-bits {given} needs --predictor FOLDER as well")
        return None
    chosen = given or ("8" if quantize else "none")
    return None if chosen == "none" else int(chosen)


def plan(
    source: Source, skeleton: nn.Module, specs: Sequence[FFNSpec], wanted: Quantization | None, float_down: bool
) -> Packing:
    """How to pack the checkpoint of a source.

    Args:
        wanted: what the user asks for; None keeps what the source has.
        float_down: keep the down projections of a quantized source as floats.

    Raises:
        SourceError: if the source is packed already and is to be packed anew, or its FFNs are packed in several ways,
            or a group size does not divide their rows.
    """
    if isinstance(source, PackedSource) and source.packed:
        if wanted is not None:
            raise SourceError(
                f"{source.path}: is quantized already; leave out --quantize, or convert the unquantized model"
            )
        return _as_packed(source, specs, float_down)
    if float_down:
        raise SourceError(f"{source.path}: is not quantized; leave out --float-down, which is for quantized models")
    if wanted is None:
        return Packing(None, None, lambda _: None, None)
    for spec in specs:
        if spec.d_model % wanted.group_size:
            raise SourceError(
                f"{spec.path}: rows of {spec.d_model} weights do not divide into groups of {wanted.group_size}; "
                "choose another --q-group-size"
            )
    others = _as_mlx_lm(skeleton, specs, wanted)
    section: dict[str, Any] = dict(wanted.to_dict())
    section |= {path: packed.to_dict() for path, packed in others.items() if packed not in (None, wanted)}
    return Packing(wanted, wanted, others.get, section)


def _as_mlx_lm(skeleton: nn.Module, specs: Sequence[FFNSpec], wanted: Quantization) -> dict[str, Quantization | None]:
    """What mlx-lm would make of every module but the FFN leaves that are sliced, by path."""
    predicate = getattr(skeleton, "quant_predicate", None)
    sliced = {f"{spec.path}.{leaf}" for spec in specs for leaf in spec.leaves}
    result: dict[str, Quantization | None] = {}
    for path, module in skeleton.named_modules():
        if path in sliced or not hasattr(module, "to_quantized") or module.weight.shape[-1] % wanted.group_size:
            continue
        verdict = True if predicate is None else predicate(path, module)
        if isinstance(verdict, dict):
            result[path] = from_config(verdict)
        elif verdict:
            result[path] = wanted
    return result


def _as_packed(source: PackedSource, specs: Sequence[FFNSpec], float_down: bool) -> Packing:
    packed = source.packed
    found = {packed.get(f"{spec.path}.{leaf}") for spec in specs for leaf in spec.leaves if leaf != spec.down}
    if len(found) > 1:
        raise SourceError(
            f"{source.path}: its FFNs are not all quantized in the same way; convert the unquantized model"
        )
    down = None
    if not float_down and any(f"{spec.path}.{spec.down}" in packed for spec in specs):
        # Its groups run across neurons: they cannot be kept, and 8 bits lose next to nothing on what 4 have left.
        group = next((size for size in (64, 32) if all(spec.d_model % size == 0 for spec in specs)), None)
        down = None if group is None else Quantization(group, _DOWN_BITS, "affine")
    sliced = {f"{spec.path}.{leaf}" for spec in specs for leaf in spec.leaves}
    section = {name: value for name, value in source.config["quantization"].items() if name not in sliced}
    section.setdefault("mode", "affine")  # which older releases of mlx-lm leave out
    return Packing(found.pop(), down, packed.get, section)


def from_config(entry: dict[str, Any]) -> Quantization:
    """A quantization in the words of mlx-lm's configs.

    Raises:
        KeyError, ValueError, TypeError: if it is none that is known.
    """
    return Quantization(entry["group_size"], entry["bits"], entry.get("mode", "affine"))
