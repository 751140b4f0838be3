"""`ifprune info`: what an IFP checkpoint holds, read from its headers alone."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import gigabytes, kernel_lines, one_line, parameters, progress, result_json, show
from .loading import open_checkpoint
from .options import JsonOption, ModelOption

if TYPE_CHECKING:
    from ifprune_mlx import Checkpoint
    from ifprune_mlx.checkpoint.format import Quantization

_DENSITIES = (0.27, 0.5, 0.7, 0.9, 1.0)

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
                    {"residency": at, "density": x, "resident": size, "fits": size <= device.usable}
                    for (at, x), size in resident.items()
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
    rows = _rows(checkpoint, selectors, names or "none")
    tight = {key: ", which does not fit" if size > device.usable else "" for key, size in resident.items()}
    whole, usable, have = map(gigabytes, (resident[RAM, 1.0], device.usable, device.memory))
    each = "" if ranks == 1 else f" on each of {ranks} ranks"
    where = f"{whole}{each} with residency ram{tight[RAM, 1.0]}; weights may take {usable} of this machine's {have}"
    rows.append(("memory", where))
    rows.append(("to load it", f"{told}: {command}" if told else command))
    paths = "; ".join(f"{name}: {reason}" for name, reason in slow.items()) or "none on this machine"
    rows.append(("slow paths", f"{paths} (whether answers are batched is tried out when the model is served)"))
    rows.append(("down product", "; ".join(kernel_lines(kernels))))
    if verify:
        rows.append(("verified", "every file has the manifest's sha256"))
    for name, value in rows:
        show(f"{name:<11} {one_line(value)}")
    for line in _table(checkpoint, dial, {density: resident[SSD, density] for density in keeps}, device.usable):
        show(line)


def _rows(checkpoint: Checkpoint, selectors: list[str], tasks: str) -> list[tuple[str, str]]:
    layout, manifest = checkpoint.layout, checkpoint.manifest
    widths = sorted({spec.d_ffn for spec in layout.ffns})
    packed = _packing(layout.gate_up)
    if layout.down != layout.gate_up:
        packed += f" (down projections {_packing(layout.down)}: they were packed across neurons)"
    prior = "calibrated on chats" if checkpoint.prior_method == "calibrated" else "from the weights alone"
    return [
        ("checkpoint", str(checkpoint.path)),
        ("made from", f"{manifest['source']} (licence: {manifest['licence'] or 'not stated'})"),
        ("model type", str(checkpoint.config["model_type"])),
        ("parameters", f"{parameters(checkpoint.parameters)}, {parameters(checkpoint.ffn_parameters)} of them in FFNs"),
        ("FFNs", f"{len(layout.ffns)}, neurons each: {', '.join(map(str, widths))}"),
        ("weights", f"{checkpoint.weight_bytes / 1e6:.0f} MB, {packed}; prior {prior}"),
        ("selectors", f"{', '.join(selectors)} (default: {checkpoint.default_selector})"),
        ("tasks", tasks),
        ("density", f"{layout.density:g} by default"),
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
    lines = ["", "  density  active  a token  up to    on ssd  nats lost (95 %)        selector"]
    for row in dial:
        density, lost = row["density"], "not measured"
        if row["density"] == 1:
            lost = "0"
        elif row["lost"] is not None:
            lost = f"{row['lost']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        own, size = density == checkpoint.layout.density, on_ssd[density]
        lines.append(
            f"{'*' if own else ' '} {density:<7.3g} {parameters(row['active_parameters']):>7} "
            f"{_size(row['bytes_per_token']):>8} {row['speedup']:>5.2f}x {_size(size):>9}"
            f"{'!' if size > usable else ' '} {lost:<23} {row['selector'] or ''}".rstrip()
        )
    about = "* the default. a token: bytes that one reads. up to: so much faster, by these bytes. on ssd: memory there"
    about += "; ! which does not fit." if any(size > usable for size in on_ssd.values()) else "."
    if (curve := checkpoint.curve) is not None:
        about += (
            f" nats lost: loss beyond dense per answer token, with the selector beside it, on {len(curve.prompts)} "
            "held-out prompts."
        )
    return [*lines, *textwrap.wrap(about, 80)]


def _size(count: int) -> str:
    """A number of bytes in at most eight characters."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


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
        return "float"
    return "{mode}, {bits} bit, groups of {group_size}".format(**quantization.to_dict())
