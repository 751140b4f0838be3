"""`ifprune info`: what an IFP checkpoint holds, read from its headers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .console import gigabytes, parameters, progress, result_json
from .loading import open_checkpoint
from .options import ModelOption

if TYPE_CHECKING:
    from ifprune_mlx.checkpoint.format import Quantization

_DENSITIES = (0.27, 0.5, 0.7, 0.9, 1.0)


def info(
    model: ModelOption = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check the sha256 of every file.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a checkpoint's shape, size, selectors, tasks, and what each density activates."""
    from ifprune_mlx import CheckpointError, TaskStore
    from ifprune_mlx.checkpoint.budget import RAM, RESIDENCIES, SSD, physical_memory, resident_bytes, resolve_keep

    checkpoint = open_checkpoint(model)
    if verify:
        damaged: list[str] = []
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
    fits = [
        {"residency": residency, "density": density, "resident": resident_bytes(checkpoint, residency, keep)}
        for residency in RESIDENCIES
        for density, keep in keeps.items()
    ]
    layout = checkpoint.layout
    if json:
        result_json(
            {
                "format_version": checkpoint.manifest["format_version"],
                "model_type": checkpoint.config["model_type"],
                "parameters": checkpoint.parameters,
                "ffn_parameters": checkpoint.ffn_parameters,
                "density": layout.density,
                "selectors": selectors,
                "tasks": [task.name for task in tasks],
                "fits": fits,
            }
        )
        return
    widths = sorted({spec.d_ffn for spec in layout.ffns})
    packed = _packing(layout.gate_up)
    if layout.down != layout.gate_up:
        packed += f" (down projections {_packing(layout.down)}: they were packed across neurons)"
    prior = "calibrated on chats" if checkpoint.prior_method == "calibrated" else "from the weights alone"
    rows = [
        ("checkpoint", str(checkpoint.path)),
        ("made from", f"{checkpoint.manifest['source']} (licence: {checkpoint.manifest['licence'] or 'not stated'})"),
        ("model type", str(checkpoint.config["model_type"])),
        ("parameters", f"{parameters(checkpoint.parameters)}, {parameters(checkpoint.ffn_parameters)} of them in FFNs"),
        ("FFNs", f"{len(layout.ffns)}, neurons each: {', '.join(map(str, widths))}"),
        ("weights", f"{checkpoint.weight_bytes / 1e6:.0f} MB, {packed}; prior {prior}"),
        ("selectors", f"{', '.join(selectors)} (default: {selectors[0]})"),
        ("tasks", ", ".join(f"{task.name} (shipped)" if task.shipped else task.name for task in tasks) or "none"),
        ("density", f"{layout.density:g} by default"),
    ]
    for name, value in rows:
        print(f"{name:<11} {value}")
    whole = resident_bytes(checkpoint, RAM, keeps[1.0])
    print(f"memory      {gigabytes(whole)} with residency ram, of {gigabytes(physical_memory())} in this machine")
    for density, keep in keeps.items():
        active, part = checkpoint.active_parameters(keep), resident_bytes(checkpoint, SSD, keep)
        print(f"  at {density:<4g}   {parameters(active)} active parameters; {gigabytes(part)} with residency ssd")
    if verify:
        print("verified    every file has the manifest's sha256")


def _packing(quantization: Quantization | None) -> str:
    if quantization is None:
        return "float"
    return "{mode}, {bits} bit, groups of {group_size}".format(**quantization.to_dict())
