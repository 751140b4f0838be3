"""`adapt`: a model goes in, a sliced checkpoint that is worth running comes out, with a report that says what it is
worth. Every stage goes on where it was stopped."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from ifprune_convert.folder_lock import alone
from ifprune_convert.memory_check import least_hub_bytes
from ifprune_convert.model_cache import stamps_of
from ifprune_convert.pipeline import check_output
from ifprune_convert.readers import open_source
from ifprune_convert.readers.hub import locate_source, parse_source
from ifprune_convert.upload import check_upload
from ifprune_mlx.checkpoint.hub import hub_name
from ifprune_mlx.errors import DataError, IfpruneError, SourceError
from ifprune_mlx.train.evaluation import ProgressDisplay

from .answers import prompts
from .config import AdaptConfig, Stage
from .evaluation import evaluate
from .job import StageRecord
from .memory import Need, Shapes, needs
from .plan import Budget, duration, least_seconds, longest_chat, machine_rate, plan_lines, planned
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

    def busy() -> None:
        raise DataError(f"{config.work}: another process works on it; wait for it, or end it")

    with alone(config.work, busy):
        ws = Workspace(config, progress, note, now, sizes or {})
        if published(ws):
            return result(ws)
        check_output(config.output, config.overwrite)
        if config.upload_repo is not None:
            check_upload(config.upload_repo)
        try:
            return _go_on(ws)
        except IfpruneError:
            if not ws.job.stage("convert").done:  # nothing to go on with
                shutil.rmtree(config.work, ignore_errors=True)
            raise


def _go_on(ws: Workspace) -> Adaptation:
    """Do what is left."""
    job = ws.job
    available = len(prompts(ws.config.data, lambda line: None))  # files that hold none are refused before a download
    _check_download(ws)
    _locate(ws)
    job.start_clock()
    _check_source(ws)
    if job.stage("convert").done:
        ws.note(f"{ws.config.work}: goes on after {duration(job.seconds)} of work")
    _plan(ws, available)
    for stage in ws.config.stages:
        if not job.stage(stage).done:
            with job.working(stage) as record:
                _DO[stage](ws, record)
            ws.note(f"{stage}: done in {duration(record.seconds)} ({duration(job.seconds)} so far)")
    return finish(ws)


def _check_download(ws: Workspace) -> None:
    """Raise IfpruneError, before a download, for a model of the hub whose weights alone do not fit."""
    name, _ = parse_source(str(ws.config.model))
    if name is None or Path(ws.config.model).expanduser().exists():
        return
    least = least_hub_bytes(name, ws.config.revision, ws.options.bits)
    if least > ws.room:
        raise IfpruneError(
            f"{name}: its weights would take {least / 1e9:.3g} GB, and {ws.room / 1e9:.3g} GB may be used; quantize "
            "with -q, or take a smaller model"
        )


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
        # One that is not there is refused by the plan.
        now = [list(stamp) for stamp in stamps_of(ws.source)] if ws.source.exists() else []
    begun = ws.job.stage("convert")
    if not begun.done:  # whatever of it there is will be made again
        begun.figures["source"] = now
    if begun.figures["source"] != now:
        raise SourceError(
            f"{ws.source}: has changed since {ws.config.work} was begun; remove that folder to begin again, "
            "or give the source as it was (for a model of the hub: --revision)"
        )


def _plan(ws: Workspace, available: int) -> None:
    """Say what will be done, or that it does not fit.

    Args:
        available: prompts that there are.
    """
    config, job = ws.config, ws.job
    stages = [stage for stage in config.stages if not job.stage(stage).done]
    if not stages:
        return
    source = open_source(ws.source, trust_remote_code=config.trust_remote_code)
    parameters = sum(math.prod(shape) for shape in source.shapes.values())
    rate = machine_rate(ws.now)
    least = least_seconds(rate, parameters)
    ws.budget = Budget(config.hours, least)
    amounts = planned(ws.budget, rate, parameters, available)
    shapes = Shapes.of(source, ws.options)
    if not job.stage("convert").done:
        ws.describe(config.max_seq_length or longest_chat(config.hours, rate, parameters), shapes.layers)
    found = needs(shapes, ws.length, amounts["calibrate"])
    disk = max(found[stage].disk for stage in stages)
    if "evaluate" not in config.stages:  # the result in its place, and before it one of what was trained so far
        disk += shapes.weights * (1 if config.until == "convert" else 2)
    _check_fits(ws, {stage: found[stage] for stage in stages}, disk)
    model = f"{parameters / 1e9:.2g}B parameters, {rate / 1e12:.2g} TFLOP/s in matrix products on this machine"
    for line in plan_lines(ws.budget, stages, amounts, found, disk, model, ws.room):
        ws.note(line)
    needed = sum(least.get(stage, 0.0) for stage in stages)
    if needed > config.hours * 3600 - job.seconds:
        ws.note(f"--hours {config.hours:g} is short: the least that is of use takes about {duration(needed)} here")
    ws.note(f"stages lie in {config.work}; the same command goes on after Ctrl-C")


def _check_fits(ws: Workspace, found: Mapping[Stage, Need], disk: int) -> None:
    """Raise IfpruneError if a stage needs more memory or disk than there is."""
    config = ws.config
    stage = max(found, key=lambda name: found[name].memory)
    memory, most = found[stage].memory, ws.room
    if memory > most:
        raise IfpruneError(
            f"{ws.source}: stage {stage} needs about {memory / 1e9:.3g} GB, and {most / 1e9:.3g} GB may be used; "
            "quantize with -q, or take a smaller model"
        )
    place = next(folder for folder in config.work.absolute().parents if folder.exists())
    there = sum(file.stat().st_size for file in config.work.rglob("*") if file.is_file())
    free = shutil.disk_usage(place).free + there
    if disk > free:
        raise SourceError(
            f"{ws.source}: the stages take up to {disk / 1e9:.3g} GB of disk, and {place} has {free / 1e9:.3g} GB "
            "free; free some space, or give an --mlx-path on another disk"
        )
