"""What `ifprune evaluate` shows a person: tables on stdout, notes on stderr."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .console import note

if TYPE_CHECKING:
    from ifprune_mlx.eval.evaluation import Evaluation
    from ifprune_mlx.eval.metrics import Figure, Overlap

_METRICS = {
    "accuracy": "share answered rightly",
    "margin": "nats per token, the right option's mean log likelihood minus the best other one's",
    "cut_off": "share of the answers that ended at --max-tokens",
}
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
    lines = [f"nats per answer token, mean over prompts ({counts}), density {result.density:.3f}"]
    accepted = any(row.accepted is not None for row in result.rows)
    lines.append(_line("", [f"{name:>9}" for name in [*columns, *(["accepted"] if accepted else [])]]))
    for selector in result.selectors:
        cells = [f"{result.nll(selector, name):>{max(9, len(name))}.3f}" for name in columns]
        if (share := result.acceptance(selector)) is not None:
            cells.append(f"{share:>9.3f}")
        lines.append(_line(selector, cells))
    return lines


def _differences(result: Evaluation) -> list[str]:
    """The differences that matter: everything against static, the matched selector against its controls."""
    from ifprune_mlx.eval.metrics import POOLED

    present = result.selectors
    own = {"activation": "activation-sliced"}.get(result.matched or "", result.matched or "")
    pairs = [(name, "static") for name in present if name not in ("dense", "static", "random")]
    pairs += [(own, name) for name in ("healed-static", "mismatched", "cross-domain")]
    columns = [*result.keys, POOLED] if len(result.keys) > 1 else list(result.keys)
    lines = []
    for a, b in pairs:
        if a not in present or b not in present:
            continue
        found = [result.difference(a, b, name) for name in columns]
        cells = ["" if d is None else f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]" for d in found]
        lines.append(_line(f"{a} - {b}", [f"{cell:>24}" for cell in cells], 32))
    if not lines:
        return []
    head = _line("", [f"{name:>24}" for name in columns], 32)
    return ["differences, mean [95 % interval]; below 0 the first is better", head, *lines]


def _tasks(result: Evaluation) -> list[list[str]]:
    """A table for every metric of every task."""
    blocks: dict[tuple[str, str], list[str]] = {}
    for summary in result.summaries:
        row = summary.row
        if (row.task, row.metric) not in blocks:
            head = f"{row.task}, {row.metric.replace('_', '-')} ({len(row.per_question)} questions), "
            head += f"density {result.density:.3f}: {_explained(row.metric)}"
            columns = ["mean [95 % interval]", "minus static"]
            blocks[row.task, row.metric] = [head, _line("", [f"{name:>24}" for name in columns])]
        cells = [_cell(summary.figure, ""), _cell(summary.minus_static, "+")]
        blocks[row.task, row.metric].append(_line(row.selector, [f"{cell:>24}" for cell in cells]).rstrip())
    return list(blocks.values())


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


def _line(label: str, cells: Sequence[str], width: int = 18) -> str:
    return f"{label:<{width}}" + " ".join(cells)
