"""The part of `ifprune train` that runs arms side by side: reports, evaluations, states on disk."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import note, progress

if TYPE_CHECKING:
    from ifprune_mlx import Model, SparsityPredictor
    from ifprune_mlx.data.tokenize import Encoded
    from ifprune_mlx.eval.losses import Evaluation
    from ifprune_mlx.train.trainable import Tuned
    from ifprune_mlx.train.trainer import Run

Domains = Mapping[str, Sequence["Encoded"]]


@dataclass(frozen=True)
class Paired:
    """The options of a paired run, as given."""

    output: Path
    predictor: Path | None
    start: Path | None
    arms: tuple[str, ...]
    densities: str
    iterations: int
    batch_size: int
    micro_batch_size: int
    fine_tune_type: str
    learning_rate: float
    head_learning_rate: float
    warmup: int
    rank: int
    scale: float
    grad_checkpoint: bool
    teacher: float
    epsilon: float
    seed: int
    steps_per_report: int
    steps_per_eval: int
    eval_density: float | None
    save_every: int
    stop_on_collapse: bool


def run_paired(
    model: Model, train: Domains, valid: Domains, weights: Mapping[str, float], options: Paired
) -> dict[str, Any]:
    """Train, or go on where an earlier run in the same folder stopped.

    Returns:
        What `--json` prints, with the sentence for people under `told`.
    """
    from ifprune_mlx.data.dataloader import Mixture
    from ifprune_mlx.train.backbone import copy_backbone
    from ifprune_mlx.train.checkpointing import STATE
    from ifprune_mlx.train.static_prior import static_prior
    from ifprune_mlx.train.step import Objective
    from ifprune_mlx.train.trainer import Run, Settings

    settings = Settings(
        arms=options.arms,
        iterations=options.iterations,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        head_learning_rate=options.head_learning_rate,
        warmup=options.warmup,
        densities=density_ranges(options.densities),
        seed=options.seed,
    )
    predictor = _predictor(model, options)
    earlier = [options.output] if (options.output / STATE).is_file() else []
    if options.start is not None:
        earlier.append(options.start)
    with progress("static selection", "instructions") as update:
        prior = static_prior(model, predictor, train, earlier, update)
    model.prior = prior
    mixture = Mixture({name: (items, weights.get(name, 1.0)) for name, items in train.items()}, options.seed)
    run = Run(
        _tuned(model, options),
        predictor,
        prior,
        mixture,
        settings,
        Objective(teacher=options.teacher, epsilon=options.epsilon),
        options.output,
        start=options.start,
        grad_checkpoint=options.grad_checkpoint,
        micro_batch_size=options.micro_batch_size,
    )
    if run.leader and predictor is not None and predictor.head.layers is None and "learned" in options.arms:
        copy_backbone(
            _predictor_folder(model, options) or model.checkpoint.path / "predictor", options.output / "predictor"
        )
    if run.step and run.leader:
        note(f"goes on after step {run.step} of {settings.iterations}")
    collapsed = _Loop(run, valid, options).go()
    path = str(options.output)
    told = f"{run.step} steps, {run.tokens} tokens an arm"
    if "learned" in options.arms:
        told += (
            f"; convert with --predictor {path}/predictor --adapter {path}/adapters/learned --prior "
            f"{path}/prior.safetensors"
        )
    return {"path": path, "steps": run.step, "tokens": run.tokens, "collapsed": collapsed, "told": told}


def density_ranges(text: str) -> tuple[tuple[float, float], ...]:
    """`0.27,0.2-0.8` as ranges.

    Raises:
        DataError: if it cannot be read.
    """
    from ifprune_mlx import DataError

    ranges = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        try:
            ranges.append((float(low), float(high if dash else low)))
        except ValueError:
            raise DataError(f"--densities {text}: expected numbers or ranges, such as 0.27,0.5 or 0.2-0.8") from None
    return tuple(ranges)


class _Loop:
    """Steps until the end, with what must happen in between."""

    def __init__(self, run: Run, valid: Domains, options: Paired) -> None:
        self._run, self._valid, self._options = run, valid, options
        self._base: Evaluation | None = None
        last = sum(run.settings.densities[-1]) / 2
        self._density = last if options.eval_density is None else options.eval_density
        self._since: list[dict[str, Any]] = []

    def go(self) -> bool:
        """Train to the end; whether the learned arm has collapsed."""
        run, options = self._run, self._options
        total = run.settings.iterations
        collapsed = False
        if run.step == 0:
            collapsed = self._evaluate()
        began, begun = time.monotonic(), run.step
        while run.step < total and not (collapsed and options.stop_on_collapse):
            line = run.advance()
            run.record(line)
            self._since.append(line)
            last = run.step == total
            if run.step % options.steps_per_report == 0 or last:
                left = (time.monotonic() - began) / (run.step - begun) * (total - run.step)
                self._report(left)
            if run.step % options.steps_per_eval == 0 or last:
                collapsed = self._evaluate()
            # After the evaluation, so that a resumed run repeats it if the kill came before its line was written.
            if run.step % options.save_every == 0 or last:
                run.save()
        if run.step < total:
            run.save()
        return collapsed

    def _report(self, left: float) -> None:
        """Losses since the last report, and where the arms differ."""
        lines, self._since = self._since, []
        if not self._run.leader:
            return
        tokens = sum(_tokens(line) for line in lines)
        parts = []
        for arm in self._run.arms:
            parts.append(f"{arm.name} {_mean(lines, arm.name, 'ce'):.3f} (kl {_mean(lines, arm.name, 'kl'):.3f})")
        rate = tokens / max(sum(line["seconds"] for line in lines), 1e-9)
        note(
            f"step {self._run.step}/{self._run.settings.iterations}: {', '.join(parts)} nats per token before the "
            f"step; {rate:.0f} answer tokens/s, {_clock(left)} left"
        )

    def _evaluate(self) -> bool:
        """Evaluate on one process, while the others wait; whether the learned arm has collapsed, on all."""
        return self._run.agreed(self._run.leader and bool(self._valid) and self._measure())

    def _measure(self) -> bool:
        from ifprune_mlx.train.evaluation import base_rows, collapse, watch

        with progress("evaluate", "tokens") as update:
            if self._base is None:
                self._base = base_rows(self._run, self._valid, self._density, update)
        with progress("evaluate", "tokens") as update:
            measured = watch(self._run, self._base, self._valid, self._density, update)
        domains = list(measured.keys)
        note(f"evaluation at step {self._run.step}, density {self._density:g}, nats per token ({', '.join(domains)}):")
        for name in measured.selectors:
            note(f"  {name:18}" + " ".join(f"{measured.nll(name, domain):8.3f}" for domain in domains))
        rivals = [name for name in ("healed-static", "static", "mismatched") if name in measured.selectors]
        for other in rivals if "learned" in measured.selectors else []:
            found = measured.difference("learned", other)
            if found is not None:
                note(f"  learned - {other}: {found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]")
        overlaps = {name: overlap.to_dict() for name, overlap in measured.overlap.items()}
        rows = {name: {domain: measured.nll(name, domain) for domain in domains} for name in measured.selectors}
        self._run.record({"step": self._run.step, "evaluation": rows, "overlap": overlaps})
        why = collapse(measured)
        if why is not None:
            note(f"COLLAPSED: {why}")
        return why is not None


def _tuned(model: Model, options: Paired) -> Tuned:
    from ifprune_mlx.train.full_finetune import Full
    from ifprune_mlx.train.lora import Adapted

    if options.fine_tune_type == "full":
        return Full(model)
    return Adapted(model, rank=options.rank, scale=options.scale, seed=options.seed)


def _predictor_folder(model: Model, options: Paired) -> Path | None:
    """The predictor asked for, or the one that an earlier run trained along; None for the checkpoint's."""
    earlier = None if options.start is None else options.start / "predictor"
    return options.predictor or (earlier if earlier is not None and earlier.is_dir() else None)


def _predictor(model: Model, options: Paired) -> SparsityPredictor | None:
    """What the learned arm begins with; also without that arm, since the static one stands on its prior."""
    from ifprune_mlx import DataError
    from ifprune_mlx.selection.predictor import load_predictor

    folder = _predictor_folder(model, options)
    if folder is None:
        if model.predictor is None and "learned" in options.arms:
            raise DataError(
                "the learned arm begins with a predictor; give --predictor FOLDER, as --stage distill makes one, "
                "or leave the arm out with --selector static"
            )
        return model.predictor
    if options.head_learning_rate and folder.resolve() == (options.output / "predictor").resolve():
        raise DataError(
            f"--predictor {folder}: is where this run writes the head that it learns; give another --output"
        )
    widths = [spec.d_ffn for spec in model.checkpoint.layout.ffns]
    assert model.tokenizer is not None
    return load_predictor(folder, model.module, model.tokenizer, model.context_length, widths)


def _tokens(line: dict[str, Any]) -> int:
    arms = line["arms"]
    return sum(domain["tokens"] for domain in next(iter(arms.values())).values())


def _mean(lines: Sequence[dict[str, Any]], arm: str, kind: str) -> float:
    """Mean per token over steps and domains."""
    domains = [domain for line in lines for domain in line["arms"][arm].values()]
    return float(sum(domain[kind] * domain["tokens"] for domain in domains) / sum(d["tokens"] for d in domains))


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
