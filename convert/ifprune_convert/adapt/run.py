"""`adapt`: a model goes in, a sliced checkpoint that is worth running comes out, with a report that says what it is
worth. Every stage goes on where it was stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from ifprune_convert.folder_lock import alone
from ifprune_convert.pipeline import check_output
from ifprune_convert.readers import open_source
from ifprune_convert.readers.hub import locate_source
from ifprune_convert.upload import check_upload
from ifprune_mlx.checkpoint.hub import hub_name
from ifprune_mlx.device import this_device
from ifprune_mlx.errors import DataError, IfpruneError, SourceError
from ifprune_mlx.train.evaluation import ProgressDisplay

from .config import AdaptConfig, Stage
from .evaluation import evaluate
from .job import StageRecord
from .plan import duration, machine_rate, plan_lines
from .result import Adaptation, finish, published, result
from .training import answers, calibrate, convert, distill, heal, select
from .workspace import Workspace

_DO: Mapping[Stage, Callable[[Workspace, StageRecord], None]] = {
    "convert": convert,
    "answers": answers,
    "calibrate": calibrate,
    "distill": distill,
    "select": select,
    "heal": heal,
    "evaluate": evaluate,
}


def adapt(
    config: AdaptConfig,
    *,
    progress: ProgressDisplay,
    note: Callable[[str], object] = print,
    now: Callable[[], float] = time.monotonic,
    sizes: Mapping[Stage, int] | None = None,
) -> Adaptation:
    """Make the checkpoint, or go on where an earlier call with the same config was stopped.

    Args:
        progress: called as `with progress(label, unit) as update:`, and then `update(done, total)`.
        note: receives lines for a person.
        now: seconds that only grow.
        sizes: what stages do, instead of what the time allows.

    Raises:
        IfpruneError: naming what cannot be used or written. What is done is kept.
    """
    ws = Workspace(config, progress, note, now, sizes or {})
    done = published(ws)
    if not done:
        check_output(config.output, config.overwrite)
    if config.upload_repo is not None:
        check_upload(config.upload_repo)
    if done:
        return result(ws)

    def busy() -> None:
        raise DataError(f"{config.work}: another process works on it; wait for it, or end it")

    with alone(config.work, busy):
        return _go_on(ws)


def _go_on(ws: Workspace) -> Adaptation:
    """Do what is left."""
    job = ws.job
    _locate(ws)
    _check_source(ws)
    if job.stage("convert").done:
        ws.note(f"{ws.config.work}: goes on after {duration(job.seconds)} of work")
    else:
        _print_plan(ws)
    for stage in ws.config.stages:
        if not job.stage(stage).done:
            with job.working(stage) as record:
                _DO[stage](ws, record)
            ws.note(f"{stage}: done in {duration(record.seconds)} ({duration(job.seconds)} so far)")
    return finish(ws)


def _locate(ws: Workspace) -> None:
    """Find the source, and download it if it is of the hub."""
    config = ws.config
    with ws.progress("download", "B") as update:
        ws.source = locate_source(
            str(config.model),
            config.revision,
            out=config.output,
            bits=ws.options.bits,
            trust_remote_code=config.trust_remote_code,
            progress=update,
        )


def _check_source(ws: Workspace) -> None:
    """Refuse to go on with another source than the job began with."""
    now: object = hub_name(ws.source)  # with the commit
    if now is None:
        files = [ws.source] if ws.source.is_file() else sorted(ws.source.glob("*"))
        now = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()}
    figures = ws.job.stage("convert").figures
    if figures.setdefault("source", now) != now:
        raise SourceError(
            f"{ws.source}: has changed since {ws.config.work} was begun; remove that folder to begin again, "
            "or give the source as it was (for a model of the hub: --revision)"
        )


def _print_plan(ws: Workspace) -> None:
    """Say what will be done, or that it does not fit."""
    source = open_source(ws.source, trust_remote_code=ws.config.trust_remote_code)
    sizes = [math.prod(shape) for shape in source.shapes.values()]
    per_weight = (ws.options.bits or 16) / 8
    weights = sum(sizes) * per_weight
    room = this_device().usable
    # Weights, two arms with moments and gradients of adapters, logits and activations of a few hundred tokens.
    memory = weights + 0.05 * sum(sizes) * 16 + 2e9 * min(1.0, sum(sizes) / 1e9)
    most = min(room, ws.config.memory or room)
    if memory > most:
        raise IfpruneError(
            f"{ws.source}: training needs about {memory / 1e9:.3g} GB, and {most / 1e9:.3g} GB may be used; "
            "quantize with -q, or take a smaller model"
        )
    lines = plan_lines(
        ws.config.hours,
        ws.config.stages,
        machine_rate(ws.now),
        sum(sizes),
        3 * weights + 2e8,
        memory,
        room,
    )
    for line in lines:
        ws.note(line)
    ws.note(f"stages lie in {ws.config.work}; the same command goes on after Ctrl-C")
