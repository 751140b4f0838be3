"""Two domains that need disjoint halves of every FFN, by construction: the distilled predictor finds them.

No static selection can: what it keeps of one half it lacks of the other.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from ifprune_mlx import Instruction
from ifprune_mlx.eval.evaluation import Evaluation
from ifprune_mlx.eval.losses import compare
from ifprune_mlx.selection.selectors import LearnedSelector, Selector, StaticSelector
from tests.planted import Distilled, distil_experts

HALVES = {"a": 0, "b": 1}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Distilled]:
    planted = distil_experts(tmp_path_factory.mktemp("halves"), count=2, named=1, chats=32, held_out=16)
    yield planted
    planted.model.close()


@pytest.fixture(scope="module")
def learned(planted: Distilled) -> LearnedSelector:
    return LearnedSelector(planted.model, planted.predictor)


@pytest.fixture(scope="module")
def measured(planted: Distilled, learned: LearnedSelector) -> Evaluation:
    names = ["dense", "matched", "cross-domain", "static"]
    return compare(planted.model, planted.data, names, planted.keep, matched=learned)


def overlaps(planted: Distilled, selector: Selector) -> dict[str, np.ndarray]:
    """By domain, for every FFN the mean share of its half that a held-out chat's selection keeps."""
    assert planted.keep == (64, 64)
    result = {}
    for domain, half in HALVES.items():
        wanted = planted.experts.selection([half])
        chosen = [
            selector.select(Instruction(chat.instruction, ()), planted.keep).selection for chat in planted.data[domain]
        ]
        result[domain] = np.mean([selection.overlap_by_layer(wanted) for selection in chosen], axis=0)
    return result


def test_learned_finds_the_half_of_each_domain(planted: Distilled, learned: LearnedSelector) -> None:
    found = overlaps(planted, learned)
    assert min(layers.min() for layers in found.values()) > 0.95, found


def test_static_cannot(planted: Distilled) -> None:
    found = overlaps(planted, StaticSelector(planted.model))
    assert min(layers.mean() for layers in found.values()) <= 0.6, found


def test_a_half_is_all_that_its_domain_needs(measured: Evaluation) -> None:
    for domain in HALVES:
        assert measured.nll("matched", domain) == pytest.approx(measured.nll("dense", domain), abs=0.05)


@pytest.mark.parametrize("other", ["static", "cross-domain"])
def test_answers_are_likelier_under_learned(measured: Evaluation, other: str) -> None:
    for domain in (*HALVES, "all"):
        difference = measured.difference("matched", other, domain)
        assert difference is not None
        assert difference.high < -0.3, difference
