"""Evaluates the arms of a run beside all controls, and finds whether the learned one has collapsed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from ifprune_mlx.data.tokenize import Example
from ifprune_mlx.eval.evaluation import Evaluation
from ifprune_mlx.eval.losses import compare
from ifprune_mlx.model import Progress
from ifprune_mlx.selection.selectors import LearnedSelector
from ifprune_mlx.train.trainer import Trainer

# Rows of the base model, the same at every evaluation.
_BASE_ROWS = ("dense", "static", "activation-sliced", "random")
ProgressDisplay = Callable[[str, str], AbstractContextManager[Callable[[int, int], None]]]
"""Given a label and a unit, a context manager that yields a function of (done, total)."""


class Evaluator:
    """Evaluates a run whenever it is called, and returns whether the learned arm has collapsed, on every process.

    One process measures, writes the losses to the metrics, and reports; the others wait.

    Args:
        valid: held-out examples by domain; without any, nothing is measured.
    """

    def __init__(
        self,
        trainer: Trainer,
        valid: Mapping[str, Sequence[Example]],
        progress: ProgressDisplay,
        report: Callable[[str], object],
    ) -> None:
        self._trainer, self._valid, self._progress, self._report = trainer, valid, progress, report
        config = trainer.config
        middle = sum(config.density_ranges[-1]) / 2
        self._density = middle if config.eval_density is None else config.eval_density
        self._base: Evaluation | None = None

    def __call__(self) -> bool:
        return self._trainer.agreed(self._trainer.leader and bool(self._valid) and self._evaluate())

    def _evaluate(self) -> bool:
        with self._progress("evaluate", "tokens") as update:
            if self._base is None:
                self._trainer.trainable.use(None)
                self._base = self._compare(_BASE_ROWS, update)
                self._trainer.trainable.in_order()
        with self._progress("evaluate", "tokens") as update:
            found = self._evaluate_arms(self._base, update)
        domains, step = list(found.keys), self._trainer.step
        losses = {name: {domain: found.nll(name, domain) for domain in domains} for name in found.selectors}
        self._report(f"evaluation at step {step}, density {self._density:g}, nats per token ({', '.join(domains)}):")
        for name, of_domains in losses.items():
            self._report(f"  {name:18}" + " ".join(f"{loss:8.3f}" for loss in of_domains.values()))
        for control in ("healed-static-learned", "healed-static", "static", "mismatched"):
            if "learned" in losses and control in losses:
                difference = found.difference("learned", control)
                if difference is not None:
                    interval = f"[{difference.low:+.3f}, {difference.high:+.3f}]"
                    self._report(f"  learned - {control}: {difference.mean:+.3f} {interval}")
        overlaps = {name: overlap.to_dict() for name, overlap in found.overlap.items()}
        self._trainer.record({"step": step, "evaluation": losses, "overlap": overlaps})
        reason = collapse_reason(found)
        if reason is not None:
            self._report(f"COLLAPSED: {reason}")
        return reason is not None

    def _evaluate_arms(self, base: Evaluation, progress: Progress) -> Evaluation:
        """The rows of the arms as they are now, beside those of the base model."""
        result, trainer = base, self._trainer
        for arm in trainer.arms:
            trainer.trainable.use(arm.adapter)
            trainer.trainable.multiply(trainer.gains(arm))
            if arm.name == "learned":
                assert trainer.predictor is not None
                head = arm.head(trainer.predictor.head)
                selector = LearnedSelector(trainer.trainable.model, trainer.predictor.with_head(head))
                rows = ["learned", "mismatched", *(["cross-domain"] if len(self._valid) > 1 else [])]
                measured = self._compare(rows, progress, selector)
                result = result.with_rows(measured, {row: row for row in rows})
                result = replace(result, matched="learned", overlap={**base.overlap, **measured.overlap})
            else:
                row = "dense" if arm.name == "none" else "static"
                model, prior = trainer.trainable.model, trainer.trainable.model.prior
                if arm.name == "static-learned":
                    model.prior = trainer.learned_prior(arm)
                try:
                    measured = self._compare([row], progress)
                finally:
                    model.prior = prior
                result = result.with_rows(measured, {f"healed-{'dense' if row == 'dense' else arm.name}": row})
        trainer.trainable.use(None)
        trainer.trainable.multiply(None)
        trainer.trainable.in_order()
        return result

    def _compare(self, rows: Sequence[str], progress: Progress, matched: LearnedSelector | None = None) -> Evaluation:
        """Measure rows under the parameters in use."""
        trainable, seed = self._trainer.trainable, self._trainer.config.seed
        trainable.choose(None)
        keep = trainable.model.keep(self._density)
        return compare(trainable.model, self._valid, list(rows), keep, matched=matched, seed=seed, progress=progress)


def collapse_reason(evaluation: Evaluation) -> str | None:
    """Why the learned arm's selections are no better than those made for another prompt; None if they are better, or if
    there is no such arm.

    The sign alone decides: a handful of prompts has no narrow interval, and a false alarm costs little.
    """
    if "learned" not in evaluation.selectors or "mismatched" not in evaluation.selectors:
        return None
    gap = evaluation.nll("mismatched") - evaluation.nll("learned")
    overlap = evaluation.overlap["learned"]
    agreement = overlap.agreement(overlap.within)
    if agreement is not None and agreement > 0.99:
        return f"any two prompts of a domain select the same neurons (agreement beyond chance {agreement:.3f})"
    if gap <= 0:
        return f"another prompt's selection serves as well as a prompt's own (mismatched - learned {gap:+.3f} nats)"
    return None
