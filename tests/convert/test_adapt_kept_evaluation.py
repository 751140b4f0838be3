"""What a killed job measured comes back as it was."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ifprune_convert.adapt.kept_evaluation import from_json, to_json
from ifprune_mlx.eval.evaluation import Evaluation, Row
from ifprune_mlx.eval.metrics import Overlap


@pytest.mark.parametrize("accepted", [None, (0.25, 1 / 3)])
def test_an_evaluation_comes_back_to_the_last_digit(accepted: tuple[float, ...] | None) -> None:
    layers = np.random.default_rng(1).random(4)
    overlap = Overlap({"code": {"code": layers, "maths": None}, "maths": {"code": layers[::-1], "maths": None}}, 0.1)
    rows = tuple(Row(name, "code", (1 / 3, 2.5e-17), (7, 11), accepted) for name in ("learned", "mismatched"))
    found = Evaluation(0.5, "learned", rows, {"learned": overlap}, {"code": ("a", "b")}, seed=3)
    back = from_json(json.loads(json.dumps(to_json(found))))
    assert (back.rows, back.keys, back.density, back.matched, back.seed) == (rows, found.keys, 0.5, "learned", 3)
    assert back.to_dict() == found.to_dict()
    assert back.overlap["learned"].chance == 0.1
    assert np.array_equal(back.overlap["learned"].domains["maths"]["code"], layers[::-1])
    assert back.with_rows(found, {"again": "learned"}).selectors == ["learned", "mismatched", "again"]
