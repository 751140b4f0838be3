"""What results are made of: means with their intervals, differences between selectors, overlaps of selections.

A prompt that is hard is hard for every selector. So differences are taken prompt by prompt, and prompts are what the
bootstrap resamples: the same ones for all selectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from ifprune_mlx.selection.selection import Selection

Values = npt.NDArray[np.float64]

RESAMPLES = 10_000
POOLED = "all"
"""The name under which all domains are taken together."""
BASELINE = "static"

_CHUNK = 256


@dataclass(frozen=True)
class Difference:
    """`a` minus `b`, in nats per token where it is of losses: below 0, `a` is better.

    Attributes:
        domain: a domain, or `all` for the mean of the domains' means.
        mean: as measured.
        low, high: the 95 % interval (percentiles of the resampled means).
    """

    a: str
    b: str
    domain: str
    mean: float
    low: float
    high: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Figure:
    """A mean over questions.

    Attributes:
        low, high: the 95 % interval (percentiles of the resampled means); None for a single question.
    """

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class TaskRow:
    """One selector on one task, by one metric.

    Attributes:
        metric: `accuracy` (share of the questions), `margin` (nats per token, see `eval.multiple_choice`), `cut_off`
            (share of the answers that ended at the token limit), or a name of lm-evaluation-harness.
        per_question: one value a question; the rows of a task have the same questions in the same order.
    """

    selector: str
    task: str
    metric: str
    per_question: tuple[float, ...]

    @property
    def value(self) -> float:
        """Mean over questions."""
        return float(np.mean(self.per_question))


@dataclass(frozen=True)
class Summary:
    """A row with its intervals.

    Attributes:
        minus_static: the difference to the static selector, question by question; None if that was not measured.
    """

    row: TaskRow
    figure: Figure
    minus_static: Figure | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "selector": self.row.selector,
            "task": self.row.task,
            "metric": self.row.metric,
            "value": self.figure.mean,
            "n": len(self.row.per_question),
            "low": self.figure.low,
            "high": self.figure.high,
            "minus_static": None if self.minus_static is None else asdict(self.minus_static),
            "per_question": list(self.row.per_question),
        }


def resampled_means(values: Values, seed: Sequence[int], resamples: int = RESAMPLES) -> Values:
    """Means over prompts drawn with replacement, the same prompts in all columns.

    Args:
        values: `[prompts, columns]`.
        seed: as `numpy.random.default_rng` takes it.

    Returns:
        `[resamples, columns]`.
    """
    count = len(values)
    drawn = np.random.default_rng(list(seed)).integers(0, count, (resamples, count))
    means = [values[drawn[start : start + _CHUNK]].mean(axis=1) for start in range(0, resamples, _CHUNK)]
    return np.concatenate(means)


def paired_differences(
    per_prompt: Mapping[str, Mapping[str, Sequence[float]]], *, seed: int = 0, resamples: int = RESAMPLES
) -> list[Difference]:
    """Differences between all selectors, in every domain and over all.

    Over all domains it is the mean of their means, and each domain's prompts are resampled within it: a domain with
    many prompts counts no more than one with few. A domain of a single prompt has no interval and is left out, and
    with it the whole.

    Args:
        per_prompt: by domain, by selector, one value a prompt; the selectors of a domain have the same prompts in the
            same order, and all domains have the same selectors.
        seed: at least 0.

    Returns:
        For each domain and then for `all`, every pair of selectors in the order given, the earlier one as `a`.
    """
    names = list(next(iter(per_prompt.values()), ()))
    found: dict[str, tuple[Values, Values]] = {}
    for index, (domain, columns) in enumerate(per_prompt.items()):
        values = np.array([columns[name] for name in names], dtype=np.float64).T
        if len(values) > 1:
            found[domain] = values.mean(axis=0), resampled_means(values, (seed, index), resamples)
    if len(found) == len(per_prompt) > 1:
        means, resampled = zip(*found.values(), strict=True)
        found[POOLED] = np.mean(means, axis=0), np.mean(resampled, axis=0)
    result = []
    for domain, (mean, drawn) in found.items():
        for a, b in combinations(range(len(names)), 2):
            interval = _interval(drawn[:, a] - drawn[:, b])
            result.append(Difference(names[a], names[b], domain, float(mean[a] - mean[b]), *interval))
    return result


def summarize(rows: Sequence[TaskRow], *, seed: int = 0) -> list[Summary]:
    """Every row with its intervals, in the order given. Every selector of a task gets the same resampled questions.

    Args:
        seed: of the bootstrap, at least 0.
    """
    tasks = list(dict.fromkeys(row.task for row in rows))
    static = {(row.task, row.metric): row for row in rows if row.selector == BASELINE}
    result = []
    for row in rows:
        drawing = (seed, tasks.index(row.task))
        values, baseline = np.array(row.per_question, np.float64), static.get((row.task, row.metric))
        difference = None
        if baseline is not None and row.selector != BASELINE:
            difference = _figure(values - np.array(baseline.per_question, np.float64), drawing)
        result.append(Summary(row, _figure(values, drawing), difference))
    return result


def _figure(values: Values, seed: Sequence[int]) -> Figure:
    if len(values) < 2:
        return Figure(float(values.mean()), None, None)
    return Figure(float(values.mean()), *_interval(resampled_means(values[:, None], seed)[:, 0]))


def _interval(resampled: Values) -> tuple[float, float]:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class Overlap:
    """How much the selections of different prompts have in common, within domains and across (the paper's Figure 4).

    Attributes:
        domains: for every two domains, mean overlap over the pairs of different prompts, float64 `[FFNs]`; None where
            there is no such pair.
        chance: what two arbitrary selections share.
    """

    domains: dict[str, dict[str, Values | None]]
    chance: float

    @property
    def within_by_layer(self) -> list[float] | None:
        """Per FFN, mean over domains of the overlap of two prompts of that domain; None if no domain has two."""
        return self._mean(across=False)

    @property
    def across_by_layer(self) -> list[float] | None:
        """Per FFN, mean over pairs of different domains; None if there is one domain only."""
        return self._mean(across=True)

    @property
    def within(self) -> float | None:
        """Mean of `within_by_layer`."""
        return None if self.within_by_layer is None else float(np.mean(self.within_by_layer))

    @property
    def across(self) -> float | None:
        """Mean of `across_by_layer`."""
        return None if self.across_by_layer is None else float(np.mean(self.across_by_layer))

    def agreement(self, overlap: float | None) -> float | None:
        """Overlap beyond chance, as `Selection.agreement` has it: 1 for the same neurons, 0 for arbitrary ones."""
        if overlap is None:
            return None
        return 1.0 if self.chance == 1 else (overlap - self.chance) / (1 - self.chance)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "within": self.within,
            "across": self.across,
            "agreement_within": self.agreement(self.within),
            "agreement_across": self.agreement(self.across),
            "within_by_layer": self.within_by_layer,
            "across_by_layer": self.across_by_layer,
            "domains": {
                name: {other: None if layers is None else float(layers.mean()) for other, layers in row.items()}
                for name, row in self.domains.items()
            },
        }

    def _mean(self, *, across: bool) -> list[float] | None:
        pairs = [
            layers
            for name, row in self.domains.items()
            for other, layers in row.items()
            if layers is not None and (name != other) == across
        ]
        return np.mean(pairs, axis=0).tolist() if pairs else None


def kept_neurons(selections: Sequence[Selection]) -> Iterator[npt.NDArray[np.float32]]:
    """For one FFN after the other, `[selections, d_ffn]`: 1 where a selection keeps a neuron, else 0.

    Args:
        selections: of the same widths and the same *k* per FFN.
    """
    for layer, width in enumerate(selections[0].widths):
        kept = np.zeros((len(selections), width), np.float32)
        for row, selection in zip(kept, selections, strict=True):
            row[selection.ids[layer]] = 1
        yield kept


def mean_overlaps(selections: Mapping[str, Sequence[Selection]]) -> Overlap:
    """Mean pairwise overlap of the selections of different prompts.

    Args:
        selections: by domain; all of the same widths and the same *k* per FFN.
    """
    flat = [selection for chosen in selections.values() for selection in chosen]
    counts = np.array([len(chosen) for chosen in selections.values()])
    member = np.repeat(np.eye(len(counts)), counts, axis=0)  # [selections, domains]
    pairs = np.outer(counts, counts) - np.diag(counts)  # a selection with itself is no pair
    sums = []
    for kept, k in zip(kept_neurons(flat), flat[0].keep, strict=True):
        shares = (kept @ kept.T).astype(np.float64) / k
        np.fill_diagonal(shares, 0)
        sums.append(member.T @ shares @ member)
    means = np.array(sums) / np.maximum(pairs, 1)
    domains = {
        name: {other: means[:, i, j] if pairs[i, j] else None for j, other in enumerate(selections)}
        for i, name in enumerate(selections)
    }
    widths, keep = flat[0].widths, flat[0].keep
    return Overlap(domains, sum(k / width for k, width in zip(keep, widths, strict=True)) / len(widths))
