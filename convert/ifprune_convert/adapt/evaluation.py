"""The last stage: what both results are worth on held-out prompts, which of them it is, and the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.checkpoint.budget import resolve_keep
from ifprune_mlx.checkpoint.density_curve import DensityCurve
from ifprune_mlx.checkpoint.format import Checkpoint
from ifprune_mlx.data.tokenize import Example, encode_all
from ifprune_mlx.eval.density_curve import LEAST_PROMPTS, dense_losses, distinct_keeps, measure_curve, set_curve
from ifprune_mlx.eval.evaluation import Evaluation
from ifprune_mlx.eval.losses import compare
from ifprune_mlx.generation import stream_generate
from ifprune_mlx.model import Model
from ifprune_mlx.train.evaluation import collapse_reason
from ifprune_mlx.train.static_prior import load_prior
from ifprune_mlx.train.trainer import LEARNED_PRIOR

from .answers import held_out
from .config import STAGES, Stage
from .job import StageRecord
from .kept_evaluation import from_json, to_json
from .plan import PASSES, SAMPLES, sized
from .report import Findings, Sample, write_report
from .workspace import Workspace

_SAMPLE_TOKENS = 96
_MEASURED = {"learned": {"learned": "learned", "mismatched": "mismatched"}, "static": {"healed-static": "static"}}
"""Of each result: rows of the report, and what the evaluation of its checkpoint calls them."""
_ROW = {"learned": "learned", "static": "healed-static"}  # of the report, by arm
_COMPARED = 0.5  # the density of the report's comparison


def evaluate(ws: Workspace, record: StageRecord) -> None:
    """Compare both results with what there was before, choose one and its density, and write the report."""
    arms = {
        "learned": replace(
            ws.options,
            adapter=ws.healed / "adapters" / "learned",
            predictor=ws.healed / "predictor",
            prior=ws.healed / "prior.safetensors",
        ),
        "static": replace(
            ws.options,
            adapter=ws.healed / "adapters" / "static-learned",
            prior=ws.healed / LEARNED_PRIOR,
        ),
    }
    for name, options in arms.items():
        if not (ws.config.work / name).exists():
            ws.convert_to(ws.config.work / name, options)
    with ws.loaded(ws.base) as (model, tokenizer):
        examples = encode_all(tokenizer, held_out(ws.answers), ws.length, lambda line: None)
        start = ws.now()
        dense_answers = _answers(ws, model, tokenizer, examples)
        _decide(ws, record, model, examples, ws.now() - start)
    examples = examples[: record.size]
    by_domain: dict[str, list[Example]] = {}
    for example in examples:
        by_domain.setdefault(example.domain, []).append(example)
    by_domain = {name: chats for name, chats in by_domain.items() if len(chats) > 1} or {"prompts": examples}
    with ws.loaded(ws.base) as (model, _):
        dense = dense_losses(model, examples)
        model.prior = load_prior(ws.measured / "prior.safetensors", list(model.checkpoint.widths))
        found = _compare(ws, record, "base", model, by_domain, ("dense", "static"))
        parameters = model.total_parameters
    curves: dict[str, DensityCurve] = {}
    for name in arms:
        with ws.loaded(ws.config.work / name) as (model, _):
            measured = _compare(ws, record, name, model, by_domain, _MEASURED[name].values())
            found = found.with_rows(measured, _MEASURED[name])
            if measured.overlap:
                found = replace(found, matched=measured.matched, overlap=measured.overlap)
            densities = list(distinct_keeps(model).values())
        curves[name] = _curve(ws, record, name, densities, examples[: max(LEAST_PROMPTS, len(examples) // 2)], dense)
    choices = {name: curve.choose(ws.config.tolerance)[0] for name, curve in curves.items()}
    # The lower density wins, then the lower loss. A predictor that has collapsed is none.
    collapsed = collapse_reason(found)
    best = "static" if collapsed is not None else min(choices, key=lambda name: (choices[name], found.nll(_ROW[name])))
    set_curve(ws.config.work / best, curves[best], choices[best], best)
    with ws.loaded(ws.config.work / best) as (model, tokenizer):
        shown = choices[best] if choices[best] < 1 else _COMPARED
        sliced_answers = _answers(ws, model, tokenizer, examples, density=shown)
    samples = [
        Sample(chat.domain, chat.instruction, *texts)
        for chat, *texts in zip(examples, dense_answers, sliced_answers, strict=False)
    ]
    findings = Findings(
        name=ws.config.output.name,
        source=str(ws.config.model),
        evaluation=found,
        curves=curves,
        chosen=best,
        density=choices[best],
        tolerance=ws.config.tolerance,
        collapsed=collapsed,
        samples=samples,
        shown=shown,
        seconds={stage: ws.job.stage(stage).seconds for stage in STAGES},
        sizes=_done(ws),
        tokens=ws.job.stage("heal").figures.get("tokens", 0) + ws.job.stage("select").figures.get("tokens", 0),
        parameters=parameters,
        active=_active(ws, best, choices[best]),
        data="the prompts that ship" if not ws.config.data else ", ".join(map(str, ws.config.data.values())),
    )
    write_report(ws.config.work, findings, ws.note)
    record.figures |= {"chosen": best, "tolerance": ws.config.tolerance}


def _decide(ws: Workspace, record: StageRecord, model: Model, examples: list[Example], sampling: float) -> None:
    """How many of the held-out chats there is time for.

    Args:
        sampling: seconds that the sliced model's answers will take.
    """
    if record.size is None:
        size = ws.sizes.get("evaluate")
        if size is None:
            start = ws.now()
            dense_losses(model, examples[:LEAST_PROMPTS])
            rate = min(LEAST_PROMPTS, len(examples)) / (ws.now() - start)
            size = sized("evaluate", ws.seconds("evaluate") - sampling, rate / PASSES)
        ws.decide(record, min(size, len(examples)))


def _answers(
    ws: Workspace,
    model: Model,
    tokenizer: TokenizerWrapper,
    examples: Sequence[Example],
    density: float | None = None,
) -> list[str]:
    """Greedy answers to the first held-out prompts, of all domains, with all neurons or at a density."""
    texts = []
    with ws.progress("sample answers", "answers") as update:
        for number, chat in enumerate(examples[: SAMPLES // 2]):
            message = [{"role": "user", "content": chat.instruction}]
            budget: dict[str, Any] = {"dense": True} if density is None else {"density": density}
            steps = stream_generate(model, tokenizer, message, max_tokens=_SAMPLE_TOKENS, **budget)
            texts.append("".join(response.text for response in steps))
            update(number + 1, min(SAMPLES // 2, len(examples)))
    return texts


def _curve(
    ws: Workspace,
    record: StageRecord,
    name: str,
    densities: Sequence[float],
    examples: Sequence[Example],
    dense: Sequence[float],
) -> DensityCurve:
    """What an arm loses at each density. Each is kept as soon as it is measured, for a job that is killed."""
    kept = record.figures.setdefault("curves", {}).setdefault(name, {})
    curves = []
    with ws.progress("densities", "densities") as update:
        for number, density in enumerate(densities):
            if str(density) not in kept:
                # Loaded anew: rounding depends on where the selections before have moved the neurons.
                with ws.loaded(ws.config.work / name, shown=False) as (model, _):
                    measured = measure_curve(model, examples, selectors=[name], densities=[density], dense=dense)
                kept[str(density)] = measured.to_dict()
                ws.job.save()
            curves.append(DensityCurve.from_dict(kept[str(density)]))
            update(number + 1, len(densities))
    return replace(curves[0], points=tuple(point for curve in curves for point in curve.points))


def _done(ws: Workspace) -> dict[Stage, int | None]:
    """How much of each stage was done."""
    sizes = {stage: ws.job.stage(stage).size for stage in STAGES}
    sizes["calibrate"] = ws.job.stage("calibrate").figures["chats"]
    sizes["select"], sizes["heal"] = (ws.job.stage(stage).figures["steps"] for stage in ("select", "heal"))
    return sizes


def _active(ws: Workspace, best: str, density: float) -> int:
    checkpoint = Checkpoint.open(ws.config.work / best)
    return checkpoint.active_parameters(resolve_keep(checkpoint, density=density))


def _compare(
    ws: Workspace,
    record: StageRecord,
    name: str,
    model: Model,
    data: Mapping[str, list[Example]],
    rows: Iterable[str],
) -> Evaluation:
    """The report's rows of a model, by their names in an evaluation; kept by the model's name, for a job that is
    killed."""
    kept = record.figures.setdefault("rows", {})
    if name not in kept:
        with ws.progress("evaluate", "tokens") as update:
            kept[name] = to_json(compare(model, data, list(rows), model.keep(_COMPARED), progress=update))
        ws.job.save()
    return from_json(kept[name])
