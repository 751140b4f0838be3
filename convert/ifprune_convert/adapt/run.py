"""`adapt`: a model goes in, a sliced checkpoint that is worth running comes out, with a report that says what it is
worth. Every stage goes on where it was stopped."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_convert.calibrate import shipped_examples
from ifprune_convert.card import CARD, write_card
from ifprune_convert.pipeline import Options, check_output, convert
from ifprune_convert.readers import open_source
from ifprune_convert.readers.hub import locate_source
from ifprune_convert.upload import check_upload, upload
from ifprune_mlx.checkpoint.atomic_write import new_folder
from ifprune_mlx.checkpoint.budget import check_fits, resolve_keep
from ifprune_mlx.checkpoint.density_curve import DensityCurve
from ifprune_mlx.checkpoint.format import Checkpoint, write_manifest
from ifprune_mlx.data.dataset import Record
from ifprune_mlx.data.tokenize import Example, encode_all
from ifprune_mlx.device import this_device
from ifprune_mlx.errors import DataError, IfpruneError, SourceError
from ifprune_mlx.eval.density_curve import LEAST_PROMPTS, dense_losses, measure_curve, set_curve
from ifprune_mlx.eval.losses import Evaluation, compare
from ifprune_mlx.generation import stream_generate
from ifprune_mlx.model import Model, load
from ifprune_mlx.train import TrainConfig, train
from ifprune_mlx.train.evaluation import ProgressDisplay, collapse_reason
from ifprune_mlx.train.static_prior import load_prior
from ifprune_mlx.train.trainer import LEARNED_PRIOR

from .answers import HELD_OUT, Answers, prompts
from .config import STAGES, AdaptConfig, Stage
from .job import Job, StageRecord
from .plan import Budget, duration, machine_rate, plan_lines, sized
from .report import PLOT, REPORT, Findings, Sample, write_report

Note = Callable[[str], object]
_FIRST_CHATS = 64
_PROBE_CHATS, _PROBE_STEPS = 8, 2
_OVERRUN = 1.05  # of the hours: training then stops as it is
_SAMPLES, _SAMPLE_TOKENS = 6, 96
_DENSITIES = "0.5,0.27"
_MEASURED = {"learned": {"learned": "learned", "mismatched": "mismatched"}, "static": {"healed-static": "static"}}
"""Of each result: rows of the report, and what the evaluation of its checkpoint calls them."""
_COMPARED = 0.5  # the density of the report's comparison


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


def adapt(
    config: AdaptConfig,
    *,
    progress: ProgressDisplay,
    note: Note = print,
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
    return _Run(config, progress, note, now, sizes or {}).run()


class _Run:
    def __init__(
        self,
        config: AdaptConfig,
        progress: ProgressDisplay,
        note: Note,
        now: Callable[[], float],
        sizes: Mapping[Stage, int],
    ) -> None:
        self.config, self._show, self._note, self._now, self._sizes = config, progress, note, now, sizes
        self.job = Job(config.work, config.identity, now)
        if not self._published():
            check_output(config.output, config.overwrite)
        if config.upload_repo is not None:
            check_upload(config.upload_repo)
        self._budget = Budget(config.hours, config.stages)
        self.answers = Answers(config.work / "answers")

    def run(self) -> Adaptation:
        """All stages, then the result."""
        config, job = self.config, self.job
        if self._published():
            return self._result()
        self._source = self._locate()
        self._check_source()
        if not job.stage("convert").done:
            self._print_plan()
        else:
            self._note(f"{config.work}: goes on after {duration(job.seconds)} of work")
        for stage in config.stages:
            if job.stage(stage).done:
                continue
            with job.working(stage) as record:
                getattr(self, f"_{stage}")(record)
            self._note(f"{stage}: done in {duration(record.seconds)} ({duration(job.seconds)} so far)")
        return self._finish()

    # --- before the first stage ---

    def _locate(self) -> Path:
        config = self.config
        with self._progress("download", "B") as update:
            return locate_source(
                str(config.model),
                config.revision,
                out=config.output,
                bits=self._options.bits,
                trust_remote_code=config.trust_remote_code,
                progress=update,
            )

    def _check_source(self) -> None:
        """Refuse to go on with another source than the job began with."""
        files = [self._source] if self._source.is_file() else sorted(self._source.glob("*"))
        now = {file.name: file.stat().st_size for file in files if file.is_file()}
        figures = self.job.stage("convert").figures
        if figures.setdefault("source", now) != now:
            raise SourceError(
                f"{self._source}: has changed since {self.config.work} was begun; remove that folder to begin again, "
                "or give the source as it was (for a model of the hub: --revision)"
            )

    def _print_plan(self) -> None:
        source = open_source(self._source, trust_remote_code=self.config.trust_remote_code)
        sizes = [_count(shape) for shape in source.shapes.values()]
        per_weight = (self._options.bits or 16) / 8
        weights = sum(sizes) * per_weight
        room = this_device().usable
        # Weights, two arms with moments and gradients of adapters, logits and activations of a few hundred tokens.
        memory = weights + 0.05 * sum(sizes) * 16 + 2e9 * min(1.0, sum(sizes) / 1e9)
        most = min(room, self.config.memory or room)
        if memory > most:
            raise IfpruneError(
                f"{self._source}: training needs about {memory / 1e9:.3g} GB, and {most / 1e9:.3g} GB may be used; "
                "quantize with -q, or take a smaller model"
            )
        lines = plan_lines(
            self.config.hours,
            self.config.stages,
            machine_rate(self._now),
            sum(sizes),
            3 * weights + 2e8,
            memory,
            room,
        )
        for line in lines:
            self._note(line)
        self._note(f"stages lie in {self.config.work}; the same command goes on after Ctrl-C")

    @cached_property
    def _options(self) -> Options:
        """Of every conversion: no calibration, no curve."""
        config = self.config
        return Options(
            quantization=config.quantization,
            dtype=config.dtype,
            tolerance=None,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )

    # --- stages ---

    def _convert(self, record: StageRecord) -> None:
        self._convert_to(self.base, replace(self._options, calibration=self._first_chats()))
        checkpoint = Checkpoint.open(self.base)
        check_fits(checkpoint, "ram", checkpoint.widths, memory=self.config.memory)

    def _answers(self, record: StageRecord) -> None:
        config = self.config
        wanted = prompts(config.data, shipped_examples, self._note)
        with self._loaded(self.base) as (model, tokenizer):
            if record.size is None:
                size = self._sizes.get("answers")
                if size is None:
                    with tempfile.TemporaryDirectory(dir=config.work) as folder:
                        start = self._now()
                        probe = Answers(Path(folder))
                        probe.write(model, tokenizer, wanted[:16], config.max_seq_length, config.seed, self._ticking)
                        rate = min(16, len(wanted)) / (self._now() - start)
                    size = sized("answers", self._seconds("answers"), rate)
                self._decide(record, min(size, len(wanted)))
            assert record.size is not None
            with self._progress("answers", "answers") as update:
                self.answers.write(model, tokenizer, wanted[: record.size], config.max_seq_length, config.seed, update)
            examples = encode_all(tokenizer, self.answers.held_out(), config.max_seq_length, lambda line: None)
        if len(examples) < LEAST_PROMPTS:  # before the long work
            raise DataError(
                f"of {record.size} answered prompts {len(examples)} are held out, and measuring needs "
                f"{LEAST_PROMPTS}; give more prompts"
            )

    def _calibrate(self, record: StageRecord) -> None:
        if record.size is None:
            size = self._sizes.get("calibrate")
            if size is None:
                marks: list[tuple[int, float]] = []
                self._measure("calibrate", _PROBE_CHATS, lambda done: marks.append((done, self._now())))
                (first, began), (last, ended) = marks[0], marks[-1]
                rate = (last - first) / max(ended - began, 1e-9)
                size = sized("calibrate", self._seconds("calibrate"), rate)
            self._decide(record, size)
        assert record.size is not None
        record.figures |= self._measure("calibrate", record.size)

    def _distill(self, record: StageRecord) -> None:
        size = self.job.stage("calibrate").size
        assert size is not None
        record.figures |= self._measure("distill", size)

    def _measure(self, stage: Any, chats: int, mark: Callable[[int], object] = lambda done: None) -> dict[str, Any]:
        """Train's stages `calibrate` and `distill`, which share what they measure."""
        layers = max(1, len(Checkpoint.open(self.base).layout.ffns) * 2 // 5)
        config = replace(self._training(stage, self.measured), layers=layers, rank=64, chats=chats)

        @contextmanager
        def shown(label: str, unit: str) -> Iterator[Callable[[int, int], None]]:
            with self._progress(label, unit) as update:

                def both(done: int, total: int) -> None:
                    update(done, total)
                    if label == "measure":
                        mark(done)

                yield both

        return dict(train(config, progress=shown, report=lambda line: None).figures)

    def _select(self, record: StageRecord) -> None:
        config = replace(
            self._training("sft", self.selected),
            predictor=self.measured / "predictor",
            fine_tune_type="none",
            teacher=0.5,
            head_learning_rate=3e-4,
            scores_learning_rate=3e-3,
            head_start=0.0,
        )
        record.figures |= self._train("select", record, config)

    def _heal(self, record: StageRecord) -> None:
        config = replace(
            self._training("sft", self.healed),
            start=self.selected,
            teacher=0.5,
            learning_rate=7e-4,
            head_learning_rate=1e-4,
            scores_learning_rate=1e-3,
            head_start=0.02,
        )
        record.figures |= self._train("heal", record, config)

    def _training(self, stage: Any, output: Path) -> TrainConfig:
        """What all stages of training have in common."""
        return TrainConfig(
            output=output,
            data=self.answers.files,
            model=self.base,
            stage=stage,
            selector=("learned", "static-learned"),
            densities=_DENSITIES,
            held_out=HELD_OUT,
            max_seq_length=self.config.max_seq_length,
            eval_prompts=0,
            seed=self.config.seed,
        )

    def _train(self, stage: Stage, record: StageRecord, config: TrainConfig) -> dict[str, Any]:
        """Train arms for as many steps as there is time for."""
        if record.size is None:
            size = self._sizes.get(stage)
            step = 1.0
            if size is None:
                with tempfile.TemporaryDirectory(dir=self.config.work) as folder:
                    probe = replace(config, output=Path(folder) / "probe", iters=_PROBE_STEPS)
                    train(probe, progress=self._progress, report=lambda line: None)
                    lines = (probe.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
                    step = float(json.loads(lines[-1])["seconds"])
                size = sized(stage, self._seconds(stage), 1 / step)
            record.figures["step_seconds"] = step
            self._decide(record, size)
        assert record.size is not None
        step = float(record.figures["step_seconds"])
        config = replace(
            config,
            iters=record.size,
            warmup=min(20, record.size // 5),
            save_every=max(1, int(45 / step)),
            steps_per_report=max(1, int(20 / step)),
        )
        stop = partial(self._late, stage)
        return dict(train(config, progress=self._progress, report=self._ticked_note, stop=stop).figures)

    def _late(self, stage: Stage) -> bool:
        """Whether training has to end at once, since what follows needs the time."""
        if self._sizes:
            return False
        behind = self._budget.stages[self._budget.stages.index(stage) + 1 :]
        whole = sum(self._seconds(name) for name in behind)
        return self.job.seconds + whole > _OVERRUN * self.config.hours * 3600

    def _evaluate(self, record: StageRecord) -> None:
        arms = {
            "learned": replace(
                self._options,
                adapter=self.healed / "adapters" / "learned",
                predictor=self.healed / "predictor",
                prior=self.healed / "prior.safetensors",
            ),
            "static": replace(
                self._options,
                adapter=self.healed / "adapters" / "static-learned",
                prior=self.healed / LEARNED_PRIOR,
            ),
        }
        for name, options in arms.items():
            if not (self.config.work / name).exists():
                self._convert_to(self.config.work / name, options)
        examples = self._held_out(record)
        by_domain: dict[str, list[Example]] = {}
        for example in examples:
            by_domain.setdefault(example.domain, []).append(example)
        by_domain = {name: chats for name, chats in by_domain.items() if len(chats) > 1}
        with self._loaded(self.base) as (model, _):
            dense = dense_losses(model, examples)
            model.prior = load_prior(self.measured / "prior.safetensors", list(model.checkpoint.widths))
            found = self._compare(model, by_domain, ("dense", "static"))
            parameters = model.total_parameters
        curves: dict[str, DensityCurve] = {}
        for name in arms:
            with self._loaded(self.config.work / name) as (model, _):
                measured = self._compare(model, by_domain, _MEASURED[name].values())
                found = found.with_rows(measured, _MEASURED[name])
                if measured.overlap:
                    found = replace(found, matched=measured.matched, overlap=measured.overlap)
                with self._progress("densities", "tokens") as update:
                    curves[name] = measure_curve(model, examples, selectors=[name], dense=dense, progress=update)
        choices = {name: curve.choose(self.config.tolerance)[0] for name, curve in curves.items()}
        # The lower density wins, then the lower loss.
        best = min(
            choices, key=lambda name: (choices[name], found.nll("learned" if name == "learned" else "healed-static"))
        )
        set_curve(self.config.work / best, curves[best], choices[best], best)
        samples = self._samples(best, by_domain)
        findings = Findings(
            name=self.config.output.name,
            source=str(self.config.model),
            evaluation=found,
            curves=curves,
            chosen=best,
            density=choices[best],
            tolerance=self.config.tolerance,
            collapsed=collapse_reason(found),
            samples=samples,
            seconds={stage: self.job.stage(stage).seconds for stage in self.config.stages},
            sizes={stage: self.job.stage(stage).size for stage in self.config.stages},
            tokens=self.job.stage("heal").figures.get("tokens", 0) + self.job.stage("select").figures.get("tokens", 0),
            parameters=parameters,
            active=self._active(best, choices[best]),
            data="the prompts that ship" if not self.config.data else ", ".join(map(str, self.config.data.values())),
        )
        write_report(self.config.work, findings, self._note)
        record.figures["chosen"] = best

    def _held_out(self, record: StageRecord) -> list[Example]:
        """The held-out chats that there is time for, all domains mixed."""
        tokenizer_folder, length = self.base, self.config.max_seq_length
        with self._loaded(tokenizer_folder) as (model, tokenizer):
            examples = encode_all(tokenizer, self.answers.held_out(), length, lambda line: None)
            if record.size is None:
                size = self._sizes.get("evaluate")
                if size is None:
                    start = self._now()
                    dense_losses(model, examples[:LEAST_PROMPTS])
                    rate = min(LEAST_PROMPTS, len(examples)) / (self._now() - start)
                    # About 30 passes: three models, seven densities of two, samples, two conversions.
                    size = sized("evaluate", self._seconds("evaluate") - record.seconds, rate / 30)
                self._decide(record, min(size, len(examples)))
        return examples[: record.size]

    def _samples(self, best: str, by_domain: Mapping[str, list[Example]]) -> list[Sample]:
        """Greedy answers to a few held-out prompts, dense as published and sliced."""
        chats = [chat for chats in zip(*by_domain.values(), strict=False) for chat in chats][:_SAMPLES]
        texts: dict[str, list[str]] = {}
        for folder in (self.base, self.config.work / best):
            with self._loaded(folder) as (model, tokenizer):
                texts[folder.name] = [
                    "".join(
                        response.text
                        for response in stream_generate(
                            model,
                            tokenizer,
                            [{"role": "user", "content": chat.instruction}],
                            max_tokens=_SAMPLE_TOKENS,
                            dense=folder == self.base,
                        )
                    )
                    for chat in chats
                ]
        return [
            Sample(chat.domain, chat.instruction, dense, sliced)
            for chat, dense, sliced in zip(chats, texts[self.base.name], texts[best], strict=True)
        ]

    def _active(self, best: str, density: float) -> int:
        checkpoint = Checkpoint.open(self.config.work / best)
        return checkpoint.active_parameters(resolve_keep(checkpoint, density=density))

    # --- the end ---

    def _finish(self) -> Adaptation:
        """Put the result in its place."""
        config, job = self.config, self.job
        if job.stage("evaluate").done:
            self._publish(config.work / str(job.stage("evaluate").figures["chosen"]))
        else:
            self._convert_to(config.output, self._halfway(), overwrite=config.overwrite)
            if job.stage("answers").done:
                self._measure_halfway()
        return self._result()

    def _published(self) -> bool:
        """Whether the result of this very job is in its place already."""
        published = self.job.stage("evaluate").figures.get("id")
        try:
            return published is not None and Checkpoint.open(self.config.output).id == published
        except IfpruneError:
            return False

    def _result(self) -> Adaptation:
        """What is in its place now, uploaded if it is to be."""
        config, page = self.config, None
        checkpoint = Checkpoint.open(config.output)
        if config.upload_repo is not None:
            self._note(f"uploading {checkpoint.disk_bytes / 1e6:.0f} MB to {config.upload_repo}")
            page = upload(checkpoint, config.upload_repo)
        report = config.output / REPORT
        return Adaptation(checkpoint, report if report.is_file() else None, self.job.seconds, page)

    def _halfway(self) -> Options:
        """How to convert what the stages so far gave."""
        job = self.job
        if job.stage("heal").done:
            run = self.healed
            adapter: Path | None = run / "adapters" / "learned"
        else:
            run, adapter = self.selected, None
        if job.stage("select").done:
            return replace(self._options, adapter=adapter, predictor=run / "predictor", prior=run / "prior.safetensors")
        prior = self.measured / "prior.safetensors"
        if job.stage("distill").done:
            return replace(self._options, predictor=self.measured / "predictor", prior=prior)
        if job.stage("calibrate").done:
            return replace(self._options, prior=prior)
        return replace(self._options, calibration=self._first_chats())

    def _measure_halfway(self) -> None:
        """Give a checkpoint that stops early its curve and the defaults that follow from it."""
        with self._loaded(self.config.output) as (model, tokenizer):
            examples = encode_all(tokenizer, self.answers.held_out(), self.config.max_seq_length, lambda line: None)
            if len(examples) < LEAST_PROMPTS:
                return
            with self._progress("densities", "tokens") as update:
                curve = measure_curve(model, examples, seconds=self._seconds("evaluate") or 60.0, progress=update)
        set_curve(self.config.output, curve, *curve.choose(self.config.tolerance))

    def _publish(self, chosen: Path) -> None:
        """The chosen checkpoint with its report and card, in one renaming."""
        config = self.config
        with new_folder(config.output, overwrite=config.overwrite, error=SourceError) as folder:
            shutil.copytree(chosen, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(CARD))
            for name in (REPORT, PLOT):
                if (config.work / name).is_file():
                    shutil.copyfile(config.work / name, folder / name)
            manifest = Checkpoint.open(chosen).manifest
            write_manifest(folder, source=manifest["source"], licence=manifest["licence"])
            finished = Checkpoint.open(folder)
            write_card(finished, config.output.absolute().name)
            self.job.stage("evaluate").figures["id"] = finished.id
            self.job.save()
            if config.overwrite:
                check_output(config.output, True)

    # --- helpers of the stages ---

    @property
    def base(self) -> Path:
        """The converted model, from which everything is measured and trained."""
        return self.config.work / "base"

    @property
    def measured(self) -> Path:
        """What `calibrate` and `distill` wrote."""
        return self.config.work / "measured"

    @property
    def selected(self) -> Path:
        """The run that trains selections with the weights held still."""
        return self.config.work / "selected"

    @property
    def healed(self) -> Path:
        """The run that heals."""
        return self.config.work / "healed"

    def _seconds(self, stage: str) -> float:
        """What a stage that begins now may take."""
        name = next(known for known in STAGES if known == stage)
        if name not in self._budget.stages:
            return 0.0
        return self._budget.seconds(name, self.job.seconds)

    def _first_chats(self) -> list[Record]:
        """Chats for a first prior, which stands until the model's own answers give a better one: of all sources."""
        chats = sorted(shipped_examples(), key=lambda record: record.key)
        return chats[: self._sizes.get("convert", _FIRST_CHATS)]

    def _decide(self, record: StageRecord, size: int) -> None:
        record.size = size
        self.job.save()

    def _convert_to(self, folder: Path, options: Options, *, overwrite: bool = True) -> None:
        with self._progress("convert", "weights") as update, self._progress("calibrate", "tokens") as calibrating:

            def report(stage: str, done: int, total: int) -> None:
                (update if stage == "convert" else calibrating)(done, total)

            convert(
                self._source,
                folder,
                replace(options, overwrite=overwrite and folder.exists()),
                report,
                lambda line: None,
            )

    @contextmanager
    def _loaded(self, folder: Path) -> Iterator[tuple[Model, TokenizerWrapper]]:
        with self._progress("load", "FFNs") as update:
            model, tokenizer = load(folder, memory=self.config.memory, progress=update)
        try:
            yield model, tokenizer
        finally:
            model.close()

    def _compare(self, model: Model, data: Mapping[str, list[Example]], rows: Iterable[str]) -> Evaluation:
        with self._progress("evaluate", "tokens") as update:
            return compare(model, data, list(rows), model.keep(_COMPARED), progress=update)

    @contextmanager
    def _progress(self, label: str, unit: str) -> Iterator[Callable[[int, int], None]]:
        """A display that keeps the job's clock as well."""
        with self._show(label, unit) as update:

            def both(done: int, total: int) -> None:
                self.job.tick()
                update(done, total)

            yield both

    def _ticking(self, done: int, total: int) -> None:
        self.job.tick()

    def _ticked_note(self, line: str) -> None:
        self.job.tick()
        self._note(line)


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total
