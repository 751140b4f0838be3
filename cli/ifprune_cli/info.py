"""`ifprune info`: what an IFP checkpoint holds, read from its headers alone."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import gigabytes, kernel_lines, one_line, parameters, progress, result_json, show, size
from .loading import open_checkpoint
from .options import JsonOption, ModelOption

if TYPE_CHECKING:
    from ifprune_mlx import Checkpoint
    from ifprune_mlx.checkpoint.format import Quantization

_DENSITIES = (0.27, 0.5, 0.7, 0.9, 1.0)
_LABEL = 13
_SELECTORS = {
    "learned": "a trained predictor reads the instruction",
    "activation": "all neurons read the prompt; those that it moves most answer",
    "static": "the same neurons for every instruction",
    "random": "any, as a control",
}

VerifyOption = Annotated[bool, typer.Option("--verify", help="Check the sha256 of every file.")]


RanksOption = Annotated[
    int, typer.Option("--ranks", min=1, help="Show what each of so many processes holds, under mlx.launch.")
]


def info(
    model: ModelOption = None, verify: VerifyOption = False, ranks: RanksOption = 1, json: JsonOption = False
) -> None:
    """Show a checkpoint's shape, size, selectors, tasks, and what each density activates."""
    from ifprune_mlx import CheckpointError, TaskStore
    from ifprune_mlx.checkpoint.budget import RAM, RESIDENCIES, SSD, resident_bytes, resolve_keep, way_to_load
    from ifprune_mlx.device import this_device
    from ifprune_mlx.model import default_dtype
    from ifprune_mlx.sparse.down_product import choose

    checkpoint = replace(open_checkpoint(model), ranks=ranks)
    damaged: list[str] = []
    if verify:
        with progress("verify", "files") as update:
            damaged = checkpoint.verify(update)
    if damaged:
        raise CheckpointError(
            f"{checkpoint.path}: {', '.join(damaged)}: sha256 is not the manifest's; "
            "copy or convert the checkpoint again"
        )
    selectors = (["learned"] if checkpoint.has_predictor else []) + ["activation", "static", "random"]
    tasks = TaskStore(checkpoint).tasks()
    curve = checkpoint.curve
    shown = (*(_DENSITIES if curve is None else curve.densities), checkpoint.layout.density, 1.0)
    keeps = {density: resolve_keep(checkpoint, density=density) for density in sorted({*shown})}
    dial = _dial(checkpoint, keeps)
    slow = _slow_paths(checkpoint)
    kernels = {str(n): asdict(choice) for n, choice in choose(checkpoint, default_dtype(checkpoint)).items()}
    device = this_device()
    told, command = way_to_load(checkpoint, device)
    resident = {
        (residency, density): resident_bytes(checkpoint, residency, keep)
        for residency in RESIDENCIES
        for density, keep in keeps.items()
    }
    if json:
        result_json(
            {
                "format_version": checkpoint.manifest["format_version"],
                "model_type": checkpoint.config["model_type"],
                "parameters": checkpoint.parameters,
                "ffn_parameters": checkpoint.ffn_parameters,
                "density": checkpoint.layout.density,
                "selectors": selectors,
                "tasks": [task.name for task in tasks],
                "slow_paths": sorted(slow),
                "down_kernels": kernels,
                "fits": [
                    {"residency": at, "density": x, "resident": needed, "fits": needed <= device.usable}
                    for (at, x), needed in resident.items()
                ],
                "default_selector": checkpoint.default_selector,
                "curve": None if curve is None else curve.to_dict(),
                "dial": dial,
                "ranks": ranks,
                "usable_memory": device.usable,
                "command": command,
            }
        )
        return
    names = ", ".join(f"{task.name} (shipped)" if task.shipped else task.name for task in tasks)
    rows = _rows(checkpoint, selectors, names or "none yet; `ifprune select --save NAME` saves a selection as one")
    tight = {key: ", which does not fit" if needed > device.usable else "" for key, needed in resident.items()}
    whole, usable, have = size(resident[RAM, 1.0]), gigabytes(device.usable), gigabytes(device.memory)
    each = "" if ranks == 1 else f" on each of {ranks} ranks"
    where = f"{whole}{each} with all neurons{tight[RAM, 1.0]}; weights may take {usable} of this machine's {have}"
    rows.append(("memory", where))
    if model is None and not told:
        command = "ifprune chat"  # without --model it is this one
    rows.append(("try it", f"{told}: {command}" if told else command))
    rows.append(("slow here", "; ".join(f"{name}: {reason}" for name, reason in slow.items()) or "nothing"))
    rows.append(("GPU kernel", "; ".join(kernel_lines(kernels))))
    if verify:
        rows.append(("verified", "every file is as it was written (sha256)"))
    for name, value in rows:
        show(f"{name:<{_LABEL}}{one_line(value)}")
    for line in _table(checkpoint, dial, {density: resident[SSD, density] for density in keeps}, device.usable):
        show(line)


def _rows(checkpoint: Checkpoint, selectors: list[str], tasks: str) -> list[tuple[str, str]]:
    layout, manifest = checkpoint.layout, checkpoint.manifest
    widths = sorted({spec.d_ffn for spec in layout.ffns})
    packed = _packing(layout.gate_up)
    if layout.down != layout.gate_up:
        packed += f" (down projections {_packing(layout.down)}: they were packed across neurons)"
    prior = "measured on chats" if checkpoint.prior_method == "calibrated" else "guessed from the weights"
    default = checkpoint.default_selector
    return [
        ("folder", str(checkpoint.path)),
        ("made from", f"{manifest['source']} (licence: {manifest['licence'] or 'not stated'})"),
        ("model type", str(checkpoint.config["model_type"])),
        (
            "parameters",
            f"{parameters(checkpoint.parameters)}; {parameters(checkpoint.ffn_parameters)} of them in neurons that can "
            "be left out",
        ),
        ("neurons", f"{' or '.join(map(str, widths))} in each of {len(layout.ffns)} layers (FFNs)"),
        ("importance", f"of each neuron: {prior}"),
        ("weights", f"{size(checkpoint.weight_bytes)} on disk, {packed}"),
        *(
            ("" if number else "selectors", f"{name}{' (default)' if name == default else ''}: {_SELECTORS[name]}")
            for number, name in enumerate(selectors)
        ),
        ("tasks", tasks),
        ("density", f"{layout.density:g} by default: this share of the neurons is used"),
    ]


def _dial(checkpoint: Checkpoint, keeps: dict[float, tuple[int, ...]]) -> list[dict[str, Any]]:
    """What each density activates, reads and loses, the highest first; the loss is that of the best selector (of the
    default selector at the default density), or null where it was not measured.
    """
    from ifprune_mlx.bench.benchmark import bytes_per_token

    curve, rows = checkpoint.curve, []
    one = replace(checkpoint, ranks=1)  # each of several reads its part
    whole = bytes_per_token(one, checkpoint.widths) // checkpoint.ranks
    for density, keep in sorted(keeps.items(), reverse=True):
        read = bytes_per_token(one, keep) // checkpoint.ranks
        point = None
        if curve is not None and density in curve.densities:
            by_default = density == checkpoint.layout.density and checkpoint.default_selector in curve.selectors
            point = curve.best(density, [checkpoint.default_selector] if by_default else None)
        dense = keep == checkpoint.widths
        rows.append(
            {
                "density": density,
                "active_parameters": checkpoint.active_parameters(keep),
                "bytes_per_token": read,
                "speedup": whole / read,
                "lost": 0.0 if dense else point and point.lost,
                "low": 0.0 if dense else point and point.low,
                "high": 0.0 if dense else point and point.high,
                "selector": point and point.selector,
            }
        )
    return rows


def _table(checkpoint: Checkpoint, dial: list[dict[str, Any]], on_ssd: dict[float, int], usable: int) -> list[str]:
    """`_dial` for people, at most 80 columns."""
    curve = checkpoint.curve
    loss = "  loss (95 %)             selector" if curve is not None else ""
    lines = ["", f"  density  active    reads  faster   on ssd{loss}"]
    for row in dial:
        density, lost = row["density"], "not measured"
        if row["density"] == 1:
            lost = "0"
        elif row["lost"] is not None:
            lost = f"{row['lost']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        cells = "" if curve is None else f" {lost:<23} {row['selector'] or ''}"
        own, needed = density == checkpoint.layout.density, on_ssd[density]
        lines.append(
            f"{'*' if own else ' '} {density:<7.3g} {parameters(row['active_parameters']):>7} "
            f"{size(row['bytes_per_token']):>8} {row['speedup']:>6.2f}x {size(needed):>8}"
            f"{'!' if needed > usable else ' '} {cells}".rstrip()
        )
    over = "; ! which does not fit" if any(needed > usable for needed in on_ssd.values()) else ""
    measured = "not measured; `ifprune adapt` and `ifprune convert --calibrate` measure it"
    if curve is not None:
        measured = (
            "nats per answer token more than with all neurons, by the selector beside it, on "
            f"{len(curve.prompts)} held-out prompts"
        )
    legend = {
        "density": "share of the neurons that is used, set by --density; * is the default",
        "active": "parameters that take part in writing a token",
        "reads": "bytes of weights that a token reads",
        "faster": "at most, since reading takes the time",
        "on ssd": f"memory with --residency ssd, which leaves the rest on the disk{over}",
        "loss": measured,
    }
    wrapped = (textwrap.wrap(f"{name:<9}{text}", 80, subsequent_indent=9 * " ") for name, text in legend.items())
    return [*lines, "", *(line for one in wrapped for line in one)]


def _slow_paths(checkpoint: Checkpoint) -> dict[str, str]:
    """What this machine computes the slow way with rows like the checkpoint's, and why: it is tried out."""
    from ifprune_mlx.model import default_dtype
    from ifprune_mlx.slow_paths import slow_paths
    from ifprune_mlx.sparse.inplace import shared
    from ifprune_mlx.sparse.quantized import try_products

    shared()
    try_products(checkpoint, default_dtype(checkpoint))
    return slow_paths()


def _packing(quantization: Quantization | None) -> str:
    if quantization is None:
        return "not quantized"
    return "{mode}, {bits} bit, groups of {group_size}".format(**quantization.to_dict())
