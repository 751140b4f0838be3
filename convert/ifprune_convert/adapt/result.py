"""Puts what a job made in its place: the finished checkpoint with its report, or what the stages so far gave."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ifprune_convert.card import CARD, write_card
from ifprune_convert.pipeline import Options, check_output
from ifprune_convert.upload import check_upload, upload
from ifprune_mlx.checkpoint.atomic_write import new_folder
from ifprune_mlx.checkpoint.format import Checkpoint
from ifprune_mlx.checkpoint.format_writer import write_manifest
from ifprune_mlx.data.tokenize import encode_all
from ifprune_mlx.errors import IfpruneError, SourceError
from ifprune_mlx.eval.density_curve import measure_curve, set_curve

from .answers import held_out
from .report import PLOT, REPORT
from .workspace import Workspace

_CURVE_SECONDS = 300.0  # what measuring a result that stops early may take


@dataclass(frozen=True)
class Adaptation:
    """What came out.

    Attributes:
        checkpoint: the finished checkpoint.
        report: its Markdown file; None where the job ended before the last stage.
        seconds: working time of the whole job.
        page: of the uploaded checkpoint.
    """

    checkpoint: Checkpoint
    report: Path | None
    seconds: float
    page: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        layout = self.checkpoint.layout
        return {
            "path": str(self.checkpoint.path),
            "density": layout.density,
            "selector": layout.selector,
            "curve": None if layout.curve is None else layout.curve.to_dict(),
            "report": None if self.report is None else str(self.report),
            "seconds": self.seconds,
        } | ({} if self.page is None else {"uploaded": self.page})


def finish(ws: Workspace) -> Adaptation:
    """Put the result in its place."""
    evaluated = ws.job.stage("evaluate")
    _publish(ws, ws.config.work / str(evaluated.figures["chosen"]) if evaluated.done else _early(ws))
    return result(ws)


def published(ws: Workspace) -> bool:
    """Whether the result of this very job is in its place already."""
    record = ws.job.stage(ws.config.until)
    known = record.figures.get("id")
    if record.done and record.figures.get("tolerance", ws.config.tolerance) != ws.config.tolerance:
        record.done = False  # the default is chosen anew, from what was measured
        return False
    try:
        return known is not None and Checkpoint.open(ws.config.output).id == known
    except IfpruneError:
        return False


def result(ws: Workspace) -> Adaptation:
    """What is in its place now, uploaded if it is to be."""
    config, page = ws.config, None
    checkpoint = Checkpoint.open(config.output)
    figures = ws.job.stage(config.until).figures
    if config.upload_repo is not None and figures.get("uploaded") == [config.upload_repo, checkpoint.id]:
        page = figures["page"]
    elif config.upload_repo is not None:
        ws.note(f"uploading {checkpoint.disk_bytes / 1e6:.0f} MB to {config.upload_repo}")
        check_upload(config.upload_repo)
        page = upload(checkpoint, config.upload_repo)
        figures |= {"uploaded": [config.upload_repo, checkpoint.id], "page": page}
        ws.job.save()
    report = config.output / REPORT
    return Adaptation(checkpoint, report if report.is_file() else None, ws.job.seconds, page)


def _halfway(ws: Workspace) -> Options:
    """How to convert what the stages so far gave."""
    job = ws.job
    if job.stage("heal").done:
        run = ws.healed
        adapter: Path | None = run / "adapters" / "learned"
    else:
        run, adapter = ws.selected, None
    if job.stage("select").done:
        return replace(ws.options, adapter=adapter, predictor=run / "predictor", prior=run / "prior.safetensors")
    prior = ws.measured / "prior.safetensors"
    if job.stage("distill").done:
        return replace(ws.options, predictor=ws.measured / "predictor", prior=prior)
    if job.stage("calibrate").done:
        return replace(ws.options, prior=prior)
    return replace(ws.options, calibration=ws.first_chats())


def _early(ws: Workspace) -> Path:
    """A checkpoint of what the stages so far gave, with its curve, where answers are held out, and defaults from it."""
    if not ws.job.stage("answers").done:
        return ws.base
    folder = ws.config.work / "early"
    ws.convert_to(folder, _halfway(ws))
    with ws.loaded(folder) as (model, tokenizer):
        examples = encode_all(tokenizer, held_out(ws.answers), ws.length, lambda line: None)
        with ws.progress("densities", "tokens") as update:
            curve = measure_curve(model, examples, seconds=_CURVE_SECONDS, progress=update)
    set_curve(folder, curve, *curve.choose(ws.config.tolerance))
    return folder


def _publish(ws: Workspace, chosen: Path) -> None:
    """The chosen checkpoint with its report and card, in one renaming."""
    config = ws.config
    with new_folder(config.output, overwrite=config.overwrite, error=SourceError) as folder:
        shutil.copytree(chosen, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(CARD))
        for name in (REPORT, PLOT):
            if ws.job.stage("evaluate").done and (config.work / name).is_file():
                shutil.copyfile(config.work / name, folder / name)
        manifest = Checkpoint.open(chosen).manifest
        write_manifest(folder, source=manifest["source"], licence=manifest["licence"])
        finished = Checkpoint.open(folder)
        write_card(finished, config.output.absolute().name)
        ws.job.stage(config.until).figures["id"] = finished.id
        ws.job.save()
        if config.overwrite:
            check_output(config.output, True)
