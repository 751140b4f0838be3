"""The stages from the source to healed weights. Each is given its record, and goes on where it was stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ifprune_mlx.checkpoint.budget import check_fits
from ifprune_mlx.checkpoint.format import Checkpoint
from ifprune_mlx.data.dataset import split
from ifprune_mlx.data.own_answers import write_own_answers
from ifprune_mlx.data.tokenize import encode_all
from ifprune_mlx.errors import DataError
from ifprune_mlx.eval.density_curve import LEAST_PROMPTS
from ifprune_mlx.train import TrainConfig, train

from .answers import HELD_OUT, every_answer, first_of_each, held_out, prompts, training_files, write_domains
from .config import Stage, read_layers
from .job import StageRecord
from .memory import HEAD_RANK
from .plan import BATCH, sized
from .workspace import Workspace

_PROBE = 64  # a block of `own_answers`, and a part of what `calibrate` measures
_PROBE_STEPS, _PROBE_BATCH = 2, 2
_HEALING = 1.1  # times as long as a step that trains no adapters
_LEAST_CHATS = 20  # to distil a predictor from
_OVERRUN = 0.05  # of the hours: so much later than planned, training stops as it is
_DENSITIES = "0.5,0.27"
Mark = Callable[[int, int], None]
"""Told (done, in all)."""


def convert(ws: Workspace, record: StageRecord) -> None:
    """Make the base of all that follows, with a first prior."""
    ws.convert_to(ws.base, replace(ws.options, calibration=ws.first_chats()))
    checkpoint = Checkpoint.open(ws.base)
    check_fits(checkpoint, "ram", checkpoint.widths, memory=ws.config.memory)


def answers(ws: Workspace, record: StageRecord) -> None:
    """Let the model answer prompts."""
    wanted, length = prompts(ws.config.data, ws.note), ws.length
    with ws.loaded(ws.base) as (model, tokenizer):
        write = partial(
            write_own_answers,
            module=model.module,
            tokenizer=tokenizer,
            max_length=length,
            seed=ws.config.seed,
            source=model.checkpoint.id,
        )
        file = ws.config.work / "answers.jsonl"
        if record.size is None:
            size = ws.sizes.get("answers")
            if size is None:

                def first(count: int, mark: Mark) -> None:
                    with ws.progress("first answers", "answers") as update:
                        write(file, records=wanted[:count], progress=_both(update, mark))

                size = sized("answers", ws.seconds("answers"), _rate(ws, record, first, len(wanted)))
            ws.decide(record, min(size, len(wanted)))
        with ws.progress("answers", "answers") as update:
            found = first_of_each(write(file, records=wanted[: record.size], progress=update))
        write_domains(ws.answers, found)
        apart = {chat.key for chat in held_out(ws.answers)}
        usable = [example.key for example in encode_all(tokenizer, found, length, lambda line: None)]
    measured = sum(key in apart for key in usable)
    if measured < LEAST_PROMPTS or len(usable) - measured < _LEAST_CHATS:  # before the long work
        asked, record.size = record.size, None  # decided anew when the command comes again, perhaps with more hours
        raise DataError(
            f"of {asked} prompts {len(usable)} have answers that fit; {measured} of them are held out, "
            f"{LEAST_PROMPTS} are needed, and {_LEAST_CHATS} others; give more hours, more prompts, or shorter ones"
        )


def calibrate(ws: Workspace, record: StageRecord) -> None:
    """Measure which neurons the answers need."""
    if record.size is None:
        size = ws.sizes.get("calibrate")
        if size is None:
            most = sum(split(chat, HELD_OUT) == "train" for chat in every_answer(ws.answers))
            rate = _rate(ws, record, lambda count, mark: _measure(ws, "calibrate", count, mark), most)
            size = sized("calibrate", ws.seconds("calibrate"), rate)
        ws.decide(record, size)
    assert record.size is not None
    record.figures |= _measure(ws, "calibrate", record.size)


def _rate(ws: Workspace, record: StageRecord, do: Callable[[int, Mark], object], most: int) -> float:
    """Pieces a second, by doing the first ones; kept, since what was done before a kill is not done again.

    Args:
        do: does so many pieces, or what is left of them, and tells how many are done.
        most: pieces that there are.
    """
    count = 0
    while "rate" not in record.figures:
        count, marks = min(count + _PROBE, most), list[tuple[int, float]]()

        def mark(done: int, total: int, marks: list[tuple[int, float]] = marks) -> None:
            marks.append((done, ws.now()))

        do(count, mark)
        (first, began), (last, ended) = marks[0], marks[-1]
        if 2 * (last - first) >= _PROBE or count == most:
            record.figures["rate"] = (last - first) / max(ended - began, 1e-9) or 1e9  # all are there
    ws.job.save()
    return float(record.figures["rate"])


def _both(update: Mark, mark: Mark) -> Mark:
    """Tells two."""

    def tell(done: int, total: int) -> None:
        update(done, total)
        mark(done, total)

    return tell


def distill(ws: Workspace, record: StageRecord) -> None:
    """Fit a predictor to what `calibrate` measured."""
    size = ws.job.stage("calibrate").size
    assert size is not None
    record.figures |= _measure(ws, "distill", size)


def _measure(ws: Workspace, stage: Any, chats: int, mark: Mark = lambda done, total: None) -> dict[str, Any]:
    """Train's stages `calibrate` and `distill`, which share what they measure."""
    layers = read_layers(ws.layers)
    config = replace(_training(ws, stage, ws.measured), layers=layers, rank=HEAD_RANK, chats=chats)

    @contextmanager
    def shown(label: str, unit: str) -> Iterator[Callable[[int, int], None]]:
        with ws.progress(label, unit) as update:
            yield _both(update, mark) if label == "measure" else update

    return dict(train(config, progress=shown, report=lambda line: None).figures)


def select(ws: Workspace, record: StageRecord) -> None:
    """Train the predictor's head and a fixed selection on the loss; the weights are held still."""
    config = replace(
        _training(ws, "sft", ws.selected),
        predictor=ws.measured / "predictor",
        fine_tune_type="none",
        teacher=0.5,
        head_learning_rate=3e-4,
        scores_learning_rate=3e-3,
        head_start=0.0,
    )
    record.figures |= _train(ws, "select", record, config)


def heal(ws: Workspace, record: StageRecord) -> None:
    """Train adapters for both, on the same batches; not in the layers that the predictor reads with, or it would read
    what it was not trained on (docs/log.md, 2026-11-29)."""
    config = replace(
        _training(ws, "sft", ws.healed),
        start=ws.selected,
        num_layers=max(1, ws.layers - read_layers(ws.layers)),
        teacher=0.5,
        learning_rate=7e-4,
        head_learning_rate=1e-4,
        scores_learning_rate=1e-3,
        head_start=0.02,
    )
    record.figures |= _train(ws, "heal", record, config)


def _training(ws: Workspace, stage: Any, output: Path) -> TrainConfig:
    """What all stages of training have in common."""
    return TrainConfig(
        output=output,
        data=training_files(ws.answers),
        model=ws.base,
        stage=stage,
        selector=("learned", "static-learned"),
        densities=_DENSITIES,
        batch_size=BATCH,
        held_out=HELD_OUT,
        max_seq_length=ws.length,
        eval_prompts=0,
        seed=ws.config.seed,
    )


def _train(ws: Workspace, stage: Stage, record: StageRecord, config: TrainConfig) -> dict[str, Any]:
    """Train arms for as many steps as there is time for."""
    if record.size is None:
        size = ws.sizes.get(stage)
        step = 1.0
        if size is None:
            step = _step_seconds(ws, stage, config)
            size = sized(stage, ws.seconds(stage), 1 / step)
        record.figures["step_seconds"] = step
        ws.decide(record, size)
    assert record.size is not None
    step = float(record.figures["step_seconds"])
    config = replace(
        config,
        iters=record.size,
        warmup=min(20, record.size // 5),
        save_every=max(1, int(45 / step)),
        steps_per_report=max(1, int(20 / step)),
    )
    stop = partial(late, ws, stage)
    return dict(train(config, progress=ws.progress, report=ws.ticked_note, stop=stop).figures)


def _step_seconds(ws: Workspace, stage: Stage, config: TrainConfig) -> float:
    """What a step takes: as many seconds as the stage before needed, or by a probe on few chats."""
    if stage == "heal":
        return _HEALING * float(np.median(_seconds(ws.selected)))
    probe = replace(config, output=ws.config.work / "probe", iters=_PROBE_STEPS, batch_size=_PROBE_BATCH)
    shutil.rmtree(probe.output, ignore_errors=True)  # of a probe that was killed
    train(probe, progress=ws.progress, report=lambda line: None)
    seconds = _seconds(probe.output)[-1]
    shutil.rmtree(probe.output)
    return seconds * config.batch_size / _PROBE_BATCH


def _seconds(run: Path) -> list[float]:
    """Of the steps that a run has written."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [float(json.loads(line)["seconds"]) for line in lines]


def late(ws: Workspace, stage: Stage) -> bool:
    """Whether training has to end at once, since what follows needs the time."""
    if ws.sizes:
        return False
    return ws.job.seconds > ws.budget.end(stage) + _OVERRUN * ws.config.hours * 3600
