"""Paired bootstrap: how sure is a difference between two selectors that were measured on the same prompts?

A prompt that is hard is hard for every selector, so differences are taken prompt by prompt and prompts are what is
resampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

RESAMPLES = 10_000
POOLED = "all"
"""The name under which all domains are taken together."""

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

    Over all domains it is the mean of their means, each domain's prompts being resampled within it, so that a domain
    with many prompts counts no more than one with few. A domain of a single prompt has no interval and is left out,
    and with it the whole.

    Args:
        per_prompt: by domain, by selector, one value a prompt; the selectors of a domain have the same prompts in the
            same order, and all domains have the same selectors.
        seed: at least 0.

    Returns:
        For each domain and then for `all`, every pair of selectors in the order given, the earlier one as `a`.
    """
    result: list[Difference] = []
    means: list[Values] = []
    resampled: list[Values] = []
    names: list[str] = []
    for index, (domain, columns) in enumerate(per_prompt.items()):
        names = list(columns)
        values = np.array([columns[name] for name in names], dtype=np.float64).T
        if len(values) < 2:
            continue
        means.append(values.mean(axis=0))
        resampled.append(resampled_means(values, (seed, index), resamples))
        result += _pairs(names, domain, means[-1], resampled[-1])
    if len(means) == len(per_prompt) > 1:
        result += _pairs(names, POOLED, np.mean(means, axis=0), np.mean(resampled, axis=0))
    return result


def _pairs(names: Sequence[str], domain: str, means: Values, resampled: Values) -> list[Difference]:
    result = []
    for a, b in combinations(range(len(names)), 2):
        low, high = np.quantile(resampled[:, a] - resampled[:, b], [0.025, 0.975])
        mean = float(means[a] - means[b])
        result.append(Difference(names[a], names[b], domain, mean, float(low), float(high)))
    return result
