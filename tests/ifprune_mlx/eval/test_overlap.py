"""Mean overlaps, from one matrix product per layer, against a loop over pairs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ifprune_mlx.eval.overlap import mean_overlaps
from tests.ifprune_mlx.reference import random_selection

WIDTHS, KEEP = (128, 64), (40, 16)


def test_overlaps_equal_the_mean_over_pairs() -> None:
    chosen = {
        domain: [random_selection(WIDTHS, KEEP, 100 * index + seed) for seed in range(count)]
        for index, (domain, count) in enumerate({"a": 4, "b": 3, "c": 1}.items())
    }
    found = mean_overlaps(chosen)
    for one, other in itertools.product(chosen, repeat=2):
        pairs = [
            (x, y) for i, x in enumerate(chosen[one]) for j, y in enumerate(chosen[other]) if one != other or i != j
        ]
        layers = found.domains[one][other]
        if not pairs:
            assert layers is None
            continue
        assert layers == pytest.approx(np.mean([x.overlap_by_layer(y) for x, y in pairs], axis=0))
    inside = [found.domains[name][name] for name in ("a", "b")]
    assert found.within_by_layer == pytest.approx(np.mean(inside, axis=0))
    assert found.within == pytest.approx(np.mean(inside))
    across = [layers for one, row in found.domains.items() for other, layers in row.items() if one != other]
    assert found.across == pytest.approx(np.mean(across))
    # Beyond chance as `Selection.agreement` has it.
    x, y = chosen["a"][:2]
    assert found.agreement(x.overlap(y)) == pytest.approx(x.agreement(y))
    value = found.to_dict()
    assert value["domains"]["c"]["c"] is None
    assert len(value["within_by_layer"]) == len(value["across_by_layer"]) == 2


def test_one_domain_has_nothing_across_and_equal_selections_agree_fully() -> None:
    same = [random_selection(WIDTHS, KEEP, 1)] * 3
    found = mean_overlaps({"a": same})
    assert (found.within, found.across) == (1.0, None)
    assert (found.agreement(found.within), found.agreement(found.across)) == (1.0, None)
    everything = [random_selection(WIDTHS, WIDTHS, 1)] * 2
    assert mean_overlaps({"a": everything}).agreement(1.0) == 1.0
