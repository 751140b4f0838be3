"""What `compare` measured: the losses of every row, by prompt, with their differences and intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ifprune_mlx.errors import IfpruneError
from ifprune_mlx.eval.metrics import (
    POOLED,
    Difference,
    Overlap,
    Summary,
    TaskRow,
    paired_differences,
    summarize,
)


@dataclass(frozen=True)
class Row:
    """One selector on one domain; prompts are in the order of the data."""

    selector: str
    domain: str
    per_prompt: tuple[float, ...]  # mean loss of each prompt's answer tokens
    tokens: tuple[int, ...]  # answer tokens of each prompt
    accepted: tuple[float, ...] | None = None  # acceptance by prompt, 0 to 1; None if `dense` was not measured

    @property
    def acceptance(self) -> float | None:
        """Mean over tokens: every answer token counts the same."""
        return None if self.accepted is None else float(np.average(self.accepted, weights=self.tokens))

    @property
    def nll(self) -> float:
        """Mean over prompts: every prompt counts the same."""
        return float(np.mean(self.per_prompt))

    @property
    def nll_tokens(self) -> float:
        """Mean over tokens: every answer token counts the same."""
        return float(np.average(self.per_prompt, weights=self.tokens))

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "selector": self.selector,
            "domain": self.domain,
            "nll": self.nll,
            "nll_tokens": self.nll_tokens,
            "acceptance": self.acceptance,
            "tokens": sum(self.tokens),
            "n": len(self.per_prompt),
            "per_prompt": list(self.per_prompt),
            "acceptance_per_prompt": None if self.accepted is None else list(self.accepted),
        }


@dataclass(frozen=True)
class Evaluation:
    """The result of `compare`."""

    density: float  # kept neurons / all neurons of every row but `dense`
    matched: str | None  # selector behind `mismatched` and `cross-domain`; None if neither was measured
    rows: tuple[Row, ...]  # in the order of the names, each by domain
    overlap: dict[str, Overlap]  # of the selectors that read the instruction, by name
    keys: dict[str, tuple[str, ...]]  # prompt keys by domain, in the order of `Row.per_prompt`
    seed: int = 0  # of the random selector, the pairing with other prompts, and the bootstrap
    tasks: tuple[TaskRow, ...] = ()  # tasks measured at this density

    @property
    def _measured(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """Answer tokens by domain, and the number of questions by task."""
        domains = {("domain", row.domain): row.tokens for row in self.rows}
        return domains | {("task", row.task): (len(row.per_question),) for row in self.tasks}

    @property
    def _names(self) -> set[str]:
        return {*self.selectors, *(row.selector for row in self.tasks)}

    @property
    def selectors(self) -> list[str]:
        """Names of the rows, in order."""
        return list(dict.fromkeys(row.selector for row in self.rows))

    def nll(self, selector: str, domain: str = POOLED) -> float:
        """A row's loss, mean over prompts; for `all`, the mean over domains."""
        rows = [row for row in self.rows if row.selector == selector and domain in (row.domain, POOLED)]
        return float(np.mean([row.nll for row in rows]))

    def acceptance(self, selector: str, domain: str = POOLED) -> float | None:
        """A row's acceptance, mean over tokens; for `all`, the mean over domains; None if it was not measured."""
        found = [row.acceptance for row in self.rows if row.selector == selector and domain in (row.domain, POOLED)]
        known = [share for share in found if share is not None]
        return float(np.mean(known)) if known and len(known) == len(found) else None

    @cached_property
    def differences(self) -> list[Difference]:
        """Differences between all selectors, with intervals; see `paired_differences`."""
        per_prompt: dict[str, dict[str, Sequence[float]]] = {domain: {} for domain in self.keys}
        for row in self.rows:
            per_prompt[row.domain][row.selector] = row.per_prompt
        return paired_differences(per_prompt, seed=self.seed % 2**63)

    @cached_property
    def summaries(self) -> list[Summary]:
        """The task rows with their intervals."""
        return summarize(self.tasks, seed=self.seed % 2**63)

    def difference(self, a: str, b: str, domain: str = POOLED) -> Difference | None:
        """`a` minus `b`; `all` is the only domain where there is just one. None if it has no interval."""
        if domain == POOLED and len(self.keys) == 1:
            domain = next(iter(self.keys))
        for found in self.differences:
            if found.domain == domain and (found.a, found.b) == (a, b):
                return found
            if found.domain == domain and (found.a, found.b) == (b, a):
                return Difference(a, b, domain, -found.mean, -found.high, -found.low)
        return None

    def with_rows(self, other: Evaluation, names: Mapping[str, str]) -> Evaluation:
        """Add rows of another model on the same prompts, such as a healed one.

        Args:
            names: the other's row name by new name.

        Raises:
            IfpruneError: if the two did not see the same answers, or there is no such row, or the new name is taken.
        """
        if self.keys != other.keys or self._measured != other._measured:
            raise IfpruneError("the two evaluations did not measure the same answers; give the same data to both")
        for new, old in names.items():
            if old not in other._names:
                raise IfpruneError(f"the other evaluation has no row {old!r}; measure it, too")
            if new in self._names:
                raise IfpruneError(f"there is a row {new!r} already; add it under another name")
        added = [replace(row, selector=new) for new, old in names.items() for row in other.rows if row.selector == old]
        tasks = [replace(row, selector=new) for new, old in names.items() for row in other.tasks if row.selector == old]
        return replace(self, rows=(*self.rows, *added), tasks=(*self.tasks, *tasks))

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `ifprune evaluate --json`."""
        return {
            "density": self.density,
            "matched": self.matched,
            "seed": self.seed,
            "rows": [row.to_dict() for row in self.rows],
            "tasks": [summary.to_dict() for summary in self.summaries],
            "overlap": {name: overlap.to_dict() for name, overlap in self.overlap.items()},
            "differences": [difference.to_dict() for difference in self.differences],
            "prompts": {domain: list(keys) for domain, keys in self.keys.items()},
        }
