"""`ifprune adapt`: from a model of one's own to a sliced checkpoint that is worth running, in one command."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from .console import note, progress, result_json, show
from .convert import (
    BitsOption,
    CastOption,
    GroupSizeOption,
    OverwriteOption,
    QuantizeOption,
    RevisionOption,
    SourceOption,
    UploadOption,
)
from .options import FolderOption, JsonOption, MemoryOption, TrustOption, named_files

_budget, _data = (partial(typer.Option, rich_help_panel=heading) for heading in ("Budget", "Data"))

HoursOption = Annotated[
    float, _budget("--hours", metavar="X", help="Work this long, all stages together; more hours, a better model.")
]
StagesOption = Annotated[
    Optional[str],
    _budget(
        "--stages",
        metavar="NAMES",
        help="Stop after the last of these: convert, answers, calibrate, distill, select, heal, evaluate. From "
        "calibrate on, the checkpoint is worth having.  [default: all]",
    ),
]
ToleranceOption = Annotated[
    float,
    _budget("--tolerance", metavar="X", help="The default density may lose this many nats per answer token."),
]
PromptsOption = Annotated[
    Optional[list[str]],
    _data(
        "--data",
        metavar="NAME=FILE",
        help="Take the prompts of these chats, a domain a file, instead of those that ship; repeatable. The answers "
        "are the model's own.",
    ),
]
SeedOption = Annotated[int, _data("--seed", min=0, max=2**32 - 1, help="Of every random choice.")]


def adapt(
    model: SourceOption,
    mlx_path: FolderOption = Path("mlx_model"),
    hours: HoursOption = 8.0,
    memory: MemoryOption = None,
    stages: StagesOption = None,
    tolerance: ToleranceOption = 0.05,
    data: PromptsOption = None,
    seed: SeedOption = 0,
    quantize: QuantizeOption = False,
    q_bits: BitsOption = None,
    q_group_size: GroupSizeOption = None,
    q_mode: Annotated[
        Literal["affine", "mxfp4", "nvfp4", "mxfp8"],
        typer.Option("--q-mode", rich_help_panel="Weights", help="How weights are packed."),
    ] = "affine",
    dtype: CastOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    overwrite: OverwriteOption = False,
    upload_repo: UploadOption = None,
    json: JsonOption = False,
) -> None:
    """Convert a model, train a predictor for it, and measure what it is worth.

    It needs no data: the model's own answers to prompts that ship are what it learns from. Stopped or killed, the same
    command goes on. The checkpoint holds a report, REPORT.md.
    """
    import mlx.core as mx

    from ifprune_convert.adapt import AdaptConfig
    from ifprune_convert.adapt import adapt as run
    from ifprune_convert.adapt.config import last_stage
    from ifprune_convert.packing import quantization_of
    from ifprune_mlx.checkpoint.budget import parse_quantity
    from ifprune_mlx.errors import IfpruneError

    if not quantize and (q_bits is not None or q_group_size is not None or q_mode != "affine"):
        raise IfpruneError("--q-bits, --q-group-size and --q-mode need --quantize (-q) as well")
    cast = None if dtype is None else getattr(mx, dtype.value)
    if cast is None and sys.platform != "darwin" and not quantize:
        cast = mx.float32  # MLX's CPU build is slow at half precision
    config = AdaptConfig(
        model=model,
        output=mlx_path,
        data=named_files(data or ()),
        hours=hours,
        memory=None if memory is None else parse_quantity(memory, "--memory"),
        until=last_stage(stages),
        tolerance=tolerance,
        quantization=quantization_of(q_mode, q_group_size, q_bits) if quantize else None,
        dtype=cast,
        revision=revision,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        upload_repo=upload_repo,
        seed=seed,
    )
    try:
        done = run(config, progress=progress, note=note)
    except KeyboardInterrupt:
        note(f"stopped; what is done lies in {config.work}, and the same command goes on")
        raise
    if json:
        result_json(done.to_dict())
        return
    show(done.checkpoint.path)
    layout = done.checkpoint.layout
    note(f"default: {layout.selector} at density {layout.density:g}; try: ifprune chat --model {done.checkpoint.path}")
    if done.report is not None:
        note(f"what it is worth: {done.report}; the stages in {config.work} can be removed")
    if done.page is not None:
        note(f"uploaded to {done.page}")
