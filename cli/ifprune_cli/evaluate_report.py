"""What `ifprune evaluate` shows a person: tables on stdout, notes on stderr."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .console import note, shortened, table

if TYPE_CHECKING:
    from ifprune_mlx.eval.evaluation import Evaluation
    from ifprune_mlx.eval.metrics import Figure, Overlap

_METRICS = {
    "accuracy": "share answered rightly",
    "margin": "right option's lead, nats per token",
    "cut_off": "share of answers cut by --max-tokens",
}
_LABEL = 17
_OF_HARNESS = "as lm-evaluation-harness defines it"
_LOWER_IS_BETTER = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter", "wer")


def tables(result: Evaluation) -> list[str]:
    """Lines: losses, their differences, and the tasks, as far as they were measured."""
    parts = [_losses(result), _differences(result), *_tasks(result)]
    return [line for part in parts if part for line in ("", *part)][1:]


def notes(results: Sequence[Evaluation]) -> None:
    """Say what a reader of the tables, one per density, must know."""
    first = results[0]
    selectors = [*first.selectors, *(row.selector for row in first.tasks)]
    if len(first.keys) > 1:
        note("all: the mean of the domains' means")
    if any(row.accepted is not None for row in first.rows):
        note("accepted: the share of a pruned draft's tokens that its own model with all neurons would accept")
    if "activation" in selectors:
        note("activation reads the prompt densely, as it does when generating; every other row computes it pruned")
    if {"mismatched", "cross-domain"} & set(selectors):
        note(f"mismatched, cross-domain: selections that {first.matched} made from another prompt")
    for result in results:
        where = f", density {result.density:.3f}" if len(results) > 1 else ""
        for name, overlap in result.overlap.items():
            if shares := overlap_words(overlap):
                note(f"overlap of {name}'s selections{where}: {shares}")


def overlap_words(overlap: Overlap) -> str:
    """The mean overlaps within and across domains, as far as there are any."""
    shares = {"within a domain": overlap.within, "across domains": overlap.across}
    return ", ".join(
        f"{share:.3f} {where} ({overlap.agreement(share):.3f} beyond chance)"
        for where, share in shares.items()
        if share is not None
    )


def _losses(result: Evaluation) -> list[str]:
    """A line per selector."""
    from ifprune_mlx.eval.metrics import POOLED

    domains = list(result.keys)
    if not domains:
        return []
    columns = [*domains, POOLED] if len(domains) > 1 else domains
    counts = ", ".join(f"{len(keys)} {domain}" for domain, keys in result.keys.items())
    caption = f"nats per answer token, mean over prompts ({counts}), density {result.density:.3f}"
    cells = [
        [_head(name, 9), *(f"{result.nll(selector, name):.3f}" for selector in result.selectors)] for name in columns
    ]
    if any(row.accepted is not None for row in result.rows):
        shares = map(result.acceptance, result.selectors)
        cells.append([_head("accepted", 9), *("" if share is None else f"{share:.3f}" for share in shares)])
    return [*_caption(caption), *table(["", *result.selectors], cells, _LABEL)]


def _differences(result: Evaluation) -> list[str]:
    """The differences that matter: everything against static, the matched selector against its controls."""
    from ifprune_mlx.eval.metrics import POOLED

    present = result.selectors
    own = {"activation": "activation-sliced"}.get(result.matched or "", result.matched or "")
    pairs = [(name, "static") for name in present if name not in ("dense", "static", "random")]
    pairs += [(own, name) for name in ("healed-static", "mismatched", "cross-domain")]
    columns = [*result.keys, POOLED] if len(result.keys) > 1 else list(result.keys)
    pairs = [(a, b) for a, b in pairs if a in present and b in present]
    if not pairs:
        return []
    cells = []
    for name in columns:
        found = [result.difference(a, b, name) for a, b in pairs]
        told = ["" if d is None else f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]" for d in found]
        cells.append([_head(name, 23), *told])
    labels = ["", *(f"{a} - {b}" for a, b in pairs)]
    return ["differences, mean [95 % interval]; below 0 the first is better", *table(labels, cells, 31)]


def _tasks(result: Evaluation) -> list[list[str]]:
    """A table for every metric of every task."""
    blocks: dict[str, list[tuple[str, str, str]]] = {}
    for summary in result.summaries:
        row = summary.row
        caption = f"{row.task}, {row.metric.replace('_', '-')} ({len(row.per_question)} questions), "
        caption += f"density {result.density:.3f}: {_explained(row.metric)}"
        told = (row.selector, _cell(summary.figure, ""), _cell(summary.minus_static, "+"))
        blocks.setdefault(caption, []).append(told)
    heads = ("", "mean [95 % interval]", "minus static")
    found = []
    for caption, rows in blocks.items():
        labels, *columns = zip(heads, *rows, strict=True)
        found.append([*_caption(caption), *table(labels, columns, _LABEL)])
    return found


def _explained(metric: str) -> str:
    told = _METRICS.get(metric, _OF_HARNESS)
    return f"{told}; lower is better" if metric.split(",", maxsplit=1)[0] in _LOWER_IS_BETTER else told


def _cell(figure: Figure | None, sign: str) -> str:
    if figure is None:
        return ""
    text = f"{figure.mean:{sign}.3f}"
    if figure.low is None or figure.high is None:
        return text
    return f"{text} [{figure.low:{sign}.3f}, {figure.high:{sign}.3f}]"


def _head(name: str, width: int) -> str:
    """A column's heading, by which the column has at least this width."""
    return f"{shortened(name, 24):>{width}}"


def _caption(text: str) -> list[str]:
    return textwrap.wrap(text, 80, break_on_hyphens=False)
