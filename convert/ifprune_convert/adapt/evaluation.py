"""The last stage: what both results are worth on held-out prompts, which of them it is, and the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ifprune_mlx.checkpoint.budget import resolve_keep
from ifprune_mlx.checkpoint.density_curve import DensityCurve
from ifprune_mlx.checkpoint.format import Checkpoint
from ifprune_mlx.data.tokenize import Example, encode_all
from ifprune_mlx.eval.density_curve import LEAST_PROMPTS, dense_losses, measure_curve, set_curve
from ifprune_mlx.eval.evaluation import Evaluation
from ifprune_mlx.eval.losses import compare
from ifprune_mlx.generation import stream_generate
from ifprune_mlx.model import Model
from ifprune_mlx.train.evaluation import collapse_reason
from ifprune_mlx.train.static_prior import load_prior
from ifprune_mlx.train.trainer import LEARNED_PRIOR

from .answers import held_out
from .job import StageRecord
from .plan import sized
from .report import Findings, Sample, write_report
from .workspace import Workspace

_SAMPLES, _SAMPLE_TOKENS = 6, 96
_MEASURED = {"learned": {"learned": "learned", "mismatched": "mismatched"}, "static": {"healed-static": "static"}}
"""Of each result: rows of the report, and what the evaluation of its checkpoint calls them."""
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
    examples = _examples(ws, record)
    by_domain: dict[str, list[Example]] = {}
    for example in examples:
        by_domain.setdefault(example.domain, []).append(example)
    by_domain = {name: chats for name, chats in by_domain.items() if len(chats) > 1}
    with ws.loaded(ws.base) as (model, _):
        dense = dense_losses(model, examples)
        model.prior = load_prior(ws.measured / "prior.safetensors", list(model.checkpoint.widths))
        found = _compare(ws, model, by_domain, ("dense", "static"))
        parameters = model.total_parameters
    curves: dict[str, DensityCurve] = {}
    for name in arms:
        with ws.loaded(ws.config.work / name) as (model, _):
            measured = _compare(ws, model, by_domain, _MEASURED[name].values())
            found = found.with_rows(measured, _MEASURED[name])
            if measured.overlap:
                found = replace(found, matched=measured.matched, overlap=measured.overlap)
            with ws.progress("densities", "tokens") as update:
                curves[name] = measure_curve(model, examples, selectors=[name], dense=dense, progress=update)
    choices = {name: curve.choose(ws.config.tolerance)[0] for name, curve in curves.items()}
    # The lower density wins, then the lower loss.
    best = min(
        choices, key=lambda name: (choices[name], found.nll("learned" if name == "learned" else "healed-static"))
    )
    set_curve(ws.config.work / best, curves[best], choices[best], best)
    samples = _samples(ws, best, by_domain)
    findings = Findings(
        name=ws.config.output.name,
        source=str(ws.config.model),
        evaluation=found,
        curves=curves,
        chosen=best,
        density=choices[best],
        tolerance=ws.config.tolerance,
        collapsed=collapse_reason(found),
        samples=samples,
        seconds={stage: ws.job.stage(stage).seconds for stage in ws.config.stages},
        sizes={stage: ws.job.stage(stage).size for stage in ws.config.stages},
        tokens=ws.job.stage("heal").figures.get("tokens", 0) + ws.job.stage("select").figures.get("tokens", 0),
        parameters=parameters,
        active=_active(ws, best, choices[best]),
        data="the prompts that ship" if not ws.config.data else ", ".join(map(str, ws.config.data.values())),
    )
    write_report(ws.config.work, findings, ws.note)
    record.figures["chosen"] = best


def _examples(ws: Workspace, record: StageRecord) -> list[Example]:
    """The held-out chats that there is time for, all domains mixed."""
    with ws.loaded(ws.base) as (model, tokenizer):
        examples = encode_all(tokenizer, held_out(ws.answers), ws.config.max_seq_length, lambda line: None)
        if record.size is None:
            size = ws.sizes.get("evaluate")
            if size is None:
                start = ws.now()
                dense_losses(model, examples[:LEAST_PROMPTS])
                rate = min(LEAST_PROMPTS, len(examples)) / (ws.now() - start)
                # About 30 passes: three models, seven densities of two, samples, two conversions.
                size = sized("evaluate", ws.seconds("evaluate") - record.seconds, rate / 30)
            ws.decide(record, min(size, len(examples)))
    return examples[: record.size]


def _samples(ws: Workspace, best: str, by_domain: Mapping[str, list[Example]]) -> list[Sample]:
    """Greedy answers to a few held-out prompts, dense as published and sliced."""
    chats = [chat for chats in zip(*by_domain.values(), strict=False) for chat in chats][:_SAMPLES]
    texts: dict[str, list[str]] = {}
    for folder in (ws.base, ws.config.work / best):
        with ws.loaded(folder) as (model, tokenizer):
            texts[folder.name] = [
                "".join(
                    response.text
                    for response in stream_generate(
                        model,
                        tokenizer,
                        [{"role": "user", "content": chat.instruction}],
                        max_tokens=_SAMPLE_TOKENS,
                        dense=folder == ws.base,
                    )
                )
                for chat in chats
            ]
    return [
        Sample(chat.domain, chat.instruction, dense, sliced)
        for chat, dense, sliced in zip(chats, texts[ws.base.name], texts[best], strict=True)
    ]


def _active(ws: Workspace, best: str, density: float) -> int:
    checkpoint = Checkpoint.open(ws.config.work / best)
    return checkpoint.active_parameters(resolve_keep(checkpoint, density=density))


def _compare(ws: Workspace, model: Model, data: Mapping[str, list[Example]], rows: Iterable[str]) -> Evaluation:
    with ws.progress("evaluate", "tokens") as update:
        return compare(model, data, list(rows), model.keep(_COMPARED), progress=update)
