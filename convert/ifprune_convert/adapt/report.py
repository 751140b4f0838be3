"""What an adapted model is worth, as a page in its checkpoint: figures beside their controls, a plot, and answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ifprune_mlx.checkpoint.atomic_write import write_atomic
from ifprune_mlx.checkpoint.density_curve import DensityCurve
from ifprune_mlx.errors import DataError, IfpruneError
from ifprune_mlx.eval.evaluation import Evaluation
from ifprune_mlx.eval.metrics import POOLED, Difference
from ifprune_mlx.eval.plots import Panel, Series, check_library, line_chart, write_figure

from .config import Stage
from .plan import UNITS, duration

REPORT, PLOT = "REPORT.md", "curve.svg"
_ROWS = {
    "dense": "the model as published, all neurons",
    "static": "a fixed selection, measured, nothing trained (before)",
    "healed-static": "the strongest fixed selection: learned, then healed",
    "mismatched": "the predictor's selection for another prompt, healed",
    "learned": "the predictor's selection for the prompt, healed",
}


@dataclass(frozen=True)
class Sample:
    """Greedy answers to one held-out prompt."""

    domain: str
    prompt: str
    dense: str  # of the model as published
    sliced: str  # of the result


@dataclass(frozen=True)
class Findings:
    """All that the report says."""

    name: str
    source: str
    evaluation: Evaluation  # at one density, rows of `_ROWS`
    curves: Mapping[str, DensityCurve]  # of `learned` and `static`, both healed, beyond the published model
    chosen: str  # one of them
    density: float  # its default
    tolerance: float
    collapsed: str | None  # why the predictor has collapsed
    samples: Sequence[Sample]
    shown: float  # the density of their sliced answers
    seconds: Mapping[Stage, float]
    sizes: Mapping[Stage, int | None]
    tokens: int  # answer tokens that each arm was trained on
    parameters: int
    active: int  # at the default density
    data: str


def verdict(found: Findings) -> str:
    """In a few sentences: is it worth it?"""
    gap = found.evaluation.difference("learned", "healed-static")
    other = found.evaluation.difference("learned", "mismatched")
    if found.collapsed is not None:
        judged = f"The predictor has collapsed: {found.collapsed}."
    elif gap is None:
        judged = "There were too few prompts to compare the predictor with a fixed selection."
    elif gap.high < 0:
        judged = f"The predictor beats the strongest fixed selection, by {_interval(gap)} nats a token."
    elif gap.low > 0:
        judged = f"The strongest fixed selection beats the predictor, by {_interval(gap)} nats a token."
    else:
        judged = f"Between predictor and strongest fixed selection there is no clear difference: {_interval(gap)} nats."
    if other is not None and found.collapsed is None:
        follows = "follows" if other.high < 0 else "hardly follows"
        judged += f" It {follows} the instruction: beside another prompt's selection it has {_interval(other)}."
    if found.density == 1:
        return (
            f"{judged} **No density below 1 loses as little as {found.tolerance:g} nats a token**, so the default is "
            "all neurons. A lower `--density` is yours to try; more `--hours` help."
        )
    kind = "its predictor" if found.chosen == "learned" else "the fixed selection, since that serves better here"
    return (
        f"{judged} The default is density {found.density:g} with {kind}: the lowest that loses at most "
        f"{found.tolerance:g} nats a token. A token then takes {found.active / 1e6:.0f}M of "
        f"{found.parameters / 1e6:.0f}M parameters."
    )


def page(found: Findings, *, plot: bool) -> str:
    """The report in Markdown."""
    return "\n".join(_lines(found, plot)) + "\n"


def write_report(folder: Path, found: Findings, note: Callable[[str], object]) -> None:
    """Write the page and its plot; without matplotlib, the page alone."""
    plot = True
    try:
        check_library()
        panel = Panel("held-out prompts", tuple(_series(found.curves)))
        label = "share of the neurons that are active"
        figure = line_chart(f"{found.name}: what it loses", label, "nats a token beyond the published model", [panel])
        write_figure(figure, folder / PLOT)
    except IfpruneError as exc:
        note(f"no plot in the report ({exc})")
        plot = False
    text = page(found, plot=plot)
    write_atomic(folder / REPORT, lambda file: file.write_text(text, encoding="utf-8"), DataError)


def _series(curves: Mapping[str, DensityCurve]) -> Iterator[Series]:
    for name, curve in curves.items():
        points = [(point.density, point.lost) for point in curve.points]
        yield Series(name, tuple(sorted(points)))


def _lines(found: Findings, plot: bool) -> Iterator[str]:
    evaluation = found.evaluation
    domains = list(evaluation.keys)
    prompts = sum(len(keys) for keys in evaluation.keys.values())
    yield from (f"# {found.name}", "", verdict(found), "", f"Made from {found.source} by `ifprune adapt`.", "")
    yield f"## Before and after, at density {evaluation.density:.2f}"
    yield ""
    yield (
        f"Loss of the model's own answers to {prompts} prompts that nothing was trained on; nats per answer token, "
        "less is better."
    )
    yield ""
    yield f"| | {' | '.join(domains)} | mean |"
    yield f"|---|{'---|' * (len(domains) + 1)}"
    for row, words in _ROWS.items():
        if row in evaluation.selectors:
            cells = [f"{evaluation.nll(row, name):.3f}" for name in (*domains, POOLED)]
            yield f"| {words} | {' | '.join(cells)} |"
    for a, b in (("learned", "healed-static"), ("learned", "mismatched"), ("healed-static", "static")):
        gap = evaluation.difference(a, b) if {a, b} <= set(evaluation.selectors) else None
        if gap is not None:
            of_domains = [evaluation.difference(a, b, name) for name in domains] if len(domains) > 1 else [gap]
            cells = ["" if each is None else _interval(each) for each in (*of_domains, gap)]
            yield f"| {a} - {b} [95 % interval] | {' | '.join(cells)} |"
    yield from ("", "## What each density loses", "")
    measured = len(next(iter(found.curves.values())).prompts)
    yield (
        f"Beyond the published model with all neurons, on the first {measured} of these prompts. Below 0, healing has "
        "made up for more."
    )
    yield ""
    names = list(found.curves)
    yield f"| density | {' | '.join(names)} |"
    yield f"|---|{'---|' * len(names)}"
    for density in found.curves[names[0]].densities:
        points = [{p.density: p for p in found.curves[name].points}.get(density) for name in names]
        cells = ["" if p is None else f"{p.lost:+.3f} [{p.low:+.3f}, {p.high:+.3f}]" for p in points]
        yield f"| {density:g} | {' | '.join(cells)} |"
    if plot:
        yield from ("", f"![What each density loses]({PLOT})")
    yield from ("", "## Six answers", "")
    yield f"Greedy, to held-out prompts, cut at one length. *Sliced* is this checkpoint at density {found.shown:g}."
    for sample in found.samples:
        yield from ("", f"**{_flat(sample.prompt, 300)}** ({sample.domain})", "")
        yield from (f"- dense: {_flat(sample.dense)}", f"- sliced: {_flat(sample.sliced)}")
    yield from ("", "## What it cost", "")
    yield from ("| stage | time | what |", "|---|---|---|")
    for stage, seconds in found.seconds.items():
        size = found.sizes.get(stage)
        yield f"| {stage} | {duration(seconds)} | {'' if size is None else f'{size} {UNITS[stage]}'} |"
    yield ""
    yield (
        f"Each arm was trained on {found.tokens:,} answer tokens: the model's own answers to {found.data}. "
        "Predictor and fixed selection saw the same batches."
    )


def _interval(gap: Difference) -> str:
    return f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"


def _flat(text: str, most: int = 600) -> str:
    """Text on one line that Markdown leaves alone."""
    line = " ".join(text.split())
    line = line if len(line) <= most else line[:most] + " ..."
    for mark in "\\`*_[]<>#|":
        line = line.replace(mark, f"\\{mark}")
    return line or "(nothing)"
