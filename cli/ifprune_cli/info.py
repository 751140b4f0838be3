"""`ifprune info`: what an IFP checkpoint holds, read from its headers alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from .console import gigabytes, kernel_lines, one_line, parameters, progress, result_json, show
from .loading import open_checkpoint
from .options import JsonOption, ModelOption

if TYPE_CHECKING:
    from ifprune_mlx import Checkpoint
    from ifprune_mlx.checkpoint.format import Quantization

_DENSITIES = (0.27, 0.5, 0.7, 0.9, 1.0)

VerifyOption = Annotated[bool, typer.Option("--verify", help="Check the sha256 of every file.")]


def info(model: ModelOption = None, verify: VerifyOption = False, json: JsonOption = False) -> None:
    """Show a checkpoint's shape, size, selectors, tasks, and what each density activates."""
    from ifprune_mlx import CheckpointError, TaskStore
    from ifprune_mlx.checkpoint.budget import RAM, RESIDENCIES, SSD, resident_bytes, resolve_keep, way_to_load
    from ifprune_mlx.device import this_device
    from ifprune_mlx.model import default_dtype
    from ifprune_mlx.sparse.down_product import choose

    checkpoint = open_checkpoint(model)
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
    keeps = {density: resolve_keep(checkpoint, density=density) for density in _DENSITIES}
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
                "usable_memory": device.usable,
                "command": command,
            }
        )
        return
    names = ", ".join(f"{task.name} (shipped)" if task.shipped else task.name for task in tasks)
    rows = _rows(checkpoint, selectors, names or "none")
    tight = {key: ", which does not fit" if size > device.usable else "" for key, size in resident.items()}
    whole, usable, have = map(gigabytes, (resident[RAM, 1.0], device.usable, device.memory))
    where = f"{whole} with residency ram{tight[RAM, 1.0]}; weights may take {usable} of this machine's {have}"
    rows.append(("memory", where))
    for density, keep in keeps.items():
        active, part = parameters(checkpoint.active_parameters(keep)), gigabytes(resident[SSD, density])
        rows.append(
            (f"  at {density:g}", f"{active} active parameters; {part} with residency ssd{tight[SSD, density]}")
        )
    rows.append(("to load it", f"{told}: {command}" if told else command))
    paths = "; ".join(f"{name}: {reason}" for name, reason in slow.items()) or "none on this machine"
    rows.append(("slow paths", f"{paths} (whether answers are batched is tried out when the model is served)"))
    rows.append(("down product", "; ".join(kernel_lines(kernels))))
    if verify:
        rows.append(("verified", "every file has the manifest's sha256"))
    for name, value in rows:
        show(f"{name:<11} {one_line(value)}")


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
        ("selectors", f"{', '.join(selectors)} (default: {selectors[0]})"),
        ("tasks", tasks),
        ("density", f"{layout.density:g} by default"),
    ]


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
