"""Evaluates the arms of a paired run beside all controls, and says when the learned one has collapsed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ifprune_mlx.data.tokenize import Encoded
from ifprune_mlx.eval.losses import Evaluation, compare
from ifprune_mlx.model import Progress
from ifprune_mlx.selection.selectors import LearnedSelector
from ifprune_mlx.train.step import Arm
from ifprune_mlx.train.trainer import Run

UNTUNED = ("dense", "static", "activation-sliced", "random")
"""Rows of the base model, the same at every evaluation."""


def base_rows(
    run: Run, data: Mapping[str, Sequence[Encoded]], density: float, progress: Progress | None = None
) -> Evaluation:
    """Measure the base model: dense, static, activation, random."""
    run.adapted.use(None)
    run.adapted.choose(None)
    keep = run.adapted.model.keep(density)
    measured = compare(run.adapted.model, data, UNTUNED, keep, seed=run.settings.seed, progress=progress)
    run.adapted.in_order()
    return measured


def watch(
    run: Run,
    base: Evaluation,
    data: Mapping[str, Sequence[Encoded]],
    density: float,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure the arms as they are now, and put them beside the base model's rows.

    Rows: `learned`, `mismatched` and `cross-domain` of the learned arm, `healed-static`, `healed-dense`.

    Args:
        base: what `base_rows` measured on the same data.
        density: of every row but the dense ones.
        progress: called with (tokens read, tokens to read), arm by arm.
    """
    result, model = base, run.adapted.model
    for arm in run.arms:
        run.adapted.use(arm.adapter)
        run.adapted.choose(None)
        names = {name: name for name in ("learned", "mismatched")}
        if len(data) > 1:
            names["cross-domain"] = "cross-domain"
        if arm.name != "learned":
            names = {"healed-static": "static"} if arm.name == "static" else {"healed-dense": "dense"}
        matched = _selector(run, arm) if arm.name == "learned" else None
        measured = compare(
            model,
            data,
            list(names.values()),
            model.keep(density),
            matched=matched,
            seed=run.settings.seed,
            progress=progress,
        )
        result = result.with_rows(measured, names)
        if arm.name == "learned":
            result = replace(result, matched="learned", overlap={**base.overlap, **measured.overlap})
    run.adapted.use(None)
    run.adapted.in_order()
    return result


def collapse(evaluation: Evaluation) -> str | None:
    """Why the learned arm's selections are no better than those made for another prompt; None if they are, or if there
    is no such arm.

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


def _selector(run: Run, arm: Arm) -> LearnedSelector:
    predictor = run.predictor
    assert predictor is not None
    return LearnedSelector(run.adapted.model, predictor.with_head(arm.head(predictor.head)))
