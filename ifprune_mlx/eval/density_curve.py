"""Measures what a checkpoint loses at each density on held-out answers, and stores that in the checkpoint."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ifprune_mlx.checkpoint.atomic_write import new_folder
from ifprune_mlx.checkpoint.density_curve import CurvePoint, DensityCurve
from ifprune_mlx.checkpoint.format import Checkpoint
from ifprune_mlx.checkpoint.format_writer import change_section
from ifprune_mlx.data.tokenize import Example
from ifprune_mlx.errors import BudgetError, CheckpointError, DataError
from ifprune_mlx.eval.losses import compare
from ifprune_mlx.eval.metrics import paired_differences
from ifprune_mlx.model import Model, Progress

DENSITIES = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.27)
LEAST_PROMPTS = 8
"""With fewer, an interval says nothing."""
_DOMAIN = "held out"


def measure_curve(
    model: Model,
    examples: Sequence[Example],
    *,
    selectors: Sequence[str] | None = None,
    densities: Sequence[float] = DENSITIES,
    dense: Sequence[float] | None = None,
    seconds: float | None = None,
    seed: int = 0,
    note: Callable[[str], object] = lambda line: None,
    progress: Progress | None = None,
) -> DensityCurve:
    """Measure every selector at every density on the same answers, paired with the dense model prompt by prompt.

    A prompt's loss is the mean over its answer tokens; prompts count the same. Selections are made as when generating:
    `activation` keeps its dense prefill. The last selection stays active.

    Args:
        examples: answers that nothing in the checkpoint was calibrated or trained on, the domains mixed: the first
            are measured where there is no time for all.
        selectors: of `learned`, `activation` and `static`; None is all that the checkpoint has.
        densities: those that keep the same neurons are measured once, and those that keep all are left out.
        dense: loss of every example in nats per answer token, by the model to compare with (see `dense_losses`), such
            as the one before healing; None is this model with all neurons.
        seconds: about how long it may take, at the rate of the first prompts; None measures all examples, and
            `LEAST_PROMPTS` are measured in any case. Not where `dense` is given.
        seed: of the bootstrap.
        note: is told what it will take.
        progress: called with (tokens read, tokens to read).

    Raises:
        DataError: for fewer than `LEAST_PROMPTS` prompts, or a prompt given twice.
        BudgetError: for a density out of range, or if none leaves a neuron out.
        IfpruneError: if a loss is not a number.
    """
    if len(examples) < LEAST_PROMPTS:
        raise DataError(f"{len(examples)} held-out prompts; measuring densities needs {LEAST_PROMPTS}, give more chats")
    names = list(selectors or (["learned"] if model.checkpoint.has_predictor else []) + ["activation", "static"])
    keeps = distinct_keeps(model, densities)
    passes, show = 1 + len(names) * len(keeps), progress or (lambda done, total: None)
    examples, tokens = list(examples), [len(example.tokens) for example in examples]

    baseline = [] if dense is None else list(dense[: len(examples)])
    if dense is None:
        start = time.perf_counter()
        baseline += dense_losses(model, examples[:LEAST_PROMPTS])
        rate = sum(tokens[:LEAST_PROMPTS]) / (time.perf_counter() - start)
        if seconds is not None:
            fitting = int(np.searchsorted(np.cumsum(tokens), seconds * rate / passes, side="right"))
            examples = examples[: max(fitting, LEAST_PROMPTS)]
        note(
            f"measuring what {len(keeps)} densities lose, on {len(examples)} held-out prompts with "
            f"{', '.join(names)}: about {passes * sum(tokens[: len(examples)]) / rate:.0f} s"
        )
        baseline += dense_losses(model, examples[LEAST_PROMPTS:]) if len(examples) > LEAST_PROMPTS else []
    total = passes * sum(tokens[: len(examples)])
    once, points = sum(tokens[: len(examples)]), list[CurvePoint]()
    for number, (keep, density) in enumerate(keeps.items()):
        before = once * (1 + number * len(names))

        def advance(done: int, _: int, before: int = before) -> None:
            show(before + done, total)

        for row in compare(model, {_DOMAIN: examples}, names, keep, seed=seed, progress=advance).rows:
            columns = {row.selector: row.per_prompt, "dense": baseline}
            (lost,) = paired_differences({_DOMAIN: columns}, seed=seed)
            points.append(CurvePoint(row.selector, density, lost.mean, lost.low, lost.high))
    points.sort(key=lambda point: names.index(point.selector))
    answers = sum(int(example.mask.sum()) for example in examples)
    return DensityCurve(tuple(points), tuple(example.key for example in examples), answers)


def distinct_keeps(model: Model, densities: Sequence[float] = DENSITIES) -> dict[tuple[int, ...], float]:
    """The densities that keep different neurons and leave some out, by what they keep, the highest first.

    Raises:
        BudgetError: for a density out of range, or if none leaves a neuron out.
    """
    keeps = {model.keep(density): density for density in sorted(densities)}
    keeps = {keep: keeps[keep] for keep in sorted(keeps, reverse=True) if keep != model.checkpoint.widths}
    if not keeps:
        raise BudgetError(f"{model.checkpoint.path}: no density leaves a neuron out, its FFNs are too narrow")
    return keeps


def dense_losses(model: Model, examples: Sequence[Example]) -> list[float]:
    """The loss of every example with all neurons, nats per answer token."""
    (row,) = compare(model, {_DOMAIN: examples}, ["dense"], model.checkpoint.widths).rows
    return list(row.per_prompt)


def set_curve(folder: str | Path, curve: DensityCurve, density: float, selector: str) -> Checkpoint:
    """Store a curve, a default density and a default selector in a checkpoint, atomically.

    A folder beside it gets the same files, as links where the file system has them, and takes its place. The
    checkpoint's id changes.

    Returns:
        The checkpoint as it is now.

    Raises:
        CheckpointError: if it cannot be opened or written, or has no such selector; it is then as it was.
    """
    checkpoint = Checkpoint.open(folder)
    if selector == "learned" and not checkpoint.has_predictor:
        raise CheckpointError(f"{checkpoint.path}: has no trained predictor, so learned cannot be its default selector")
    path = checkpoint.path.resolve()
    layout = replace(checkpoint.layout, density=density, selector=selector, curve=curve)
    with new_folder(path, overwrite=True, error=CheckpointError) as new:
        shutil.copytree(path, new, copy_function=_link, symlinks=True, dirs_exist_ok=True)
        change_section(new, layout)
        Checkpoint.open(new)
    return Checkpoint.open(folder)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # not every file system has links
        shutil.copy2(source, target, follow_symlinks=False)
