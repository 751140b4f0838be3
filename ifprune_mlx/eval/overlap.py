"""How much the selections of different prompts have in common, within domains and across (the paper's Figure 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ifprune_mlx.selection.selection import Selection

Layers = npt.NDArray[np.float64]
"""One value per FFN, `[FFNs]`."""


@dataclass(frozen=True)
class Overlap:
    """How much the selections that a selector makes for different prompts have in common.

    Attributes:
        domains: for every two domains, mean overlap over the pairs of different prompts, per FFN; None where
            there is no such pair.
        chance: what two arbitrary selections share.
    """

    domains: dict[str, dict[str, Layers | None]]
    chance: float

    @property
    def within_by_layer(self) -> list[float] | None:
        """Per FFN, mean over domains of the overlap of two prompts of that domain; None if no domain has two."""
        return _mean([row[name] for name, row in self.domains.items()])

    @property
    def across_by_layer(self) -> list[float] | None:
        """Per FFN, mean over pairs of different domains; None if there is one domain only."""
        return _mean([layers for name, row in self.domains.items() for other, layers in row.items() if other != name])

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


def mean_overlaps(selections: Mapping[str, Sequence[Selection]]) -> Overlap:
    """Mean pairwise overlap of the selections of different prompts.

    Args:
        selections: by domain; all of the same widths and the same *k* per FFN.
    """
    counts = [len(chosen) for chosen in selections.values()]
    flat = [selection for chosen in selections.values() for selection in chosen]
    ends = np.cumsum(counts)
    slices = {name: slice(end - count, end) for name, end, count in zip(selections, ends, counts, strict=True)}
    domains: dict[str, dict[str, Layers | None]] = {
        name: {
            other: np.zeros(len(flat[0].widths)) if name != other or counts[index] > 1 else None for other in selections
        }
        for index, name in enumerate(selections)
    }
    for layer, (width, k) in enumerate(zip(flat[0].widths, flat[0].keep, strict=True)):
        chosen = np.zeros((len(flat), width), np.float32)
        for row, selection in zip(chosen, flat, strict=True):
            row[selection.ids[layer]] = 1
        shares = (chosen @ chosen.T).astype(np.float64) / k
        for name, row_of in domains.items():
            for other, layers in row_of.items():
                if layers is None:
                    continue
                block = shares[slices[name], slices[other]]
                same = len(block) if name == other else 0  # a selection with itself is no pair
                layers[layer] = (block.sum() - same) / (block.size - same)
    widths, keep = flat[0].widths, flat[0].keep
    return Overlap(domains, sum(k / width for k, width in zip(keep, widths, strict=True)) / len(widths))


def _mean(layers: Sequence[Layers | None]) -> list[float] | None:
    known = [values for values in layers if values is not None]
    return np.mean(known, axis=0).tolist() if known else None
