"""A predictor that PyTorch wrote in the layout of the paper's authors: converted, it selects as PyTorch does.

`IFPRUNE_TORCH_PYTHON` names an interpreter that has torch and transformers; by default it is this one.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ifprune_convert.pipeline import Options
from ifprune_mlx import SparsityPredictor, load, stream_generate
from ifprune_mlx.selection.selection import top_k
from tests.heavy.outside import run_torch
from tests.tiny import write_checkpoint, write_tokenizer

pytestmark = pytest.mark.heavy

TEXTS = [
    "Write a Python function that reverses a string.",
    "What is 17 times 23? Explain step by step.",
    "Name three rivers in Europe and one fact about each.",
]


@pytest.mark.parametrize("kind", ["whole", "inner", "untied"])
def test_scores_and_selections_are_those_of_pytorch(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "torch"
    folder.mkdir()
    write_tokenizer(folder)
    run_torch("torch_predictor.py", "transformers", [str(folder), kind], json.dumps(TEXTS))
    theirs = np.load(folder / "scores.npz")
    checkpoint = write_checkpoint(tmp_path / "checkpoint", options=Options(predictor=folder))
    predictor = SparsityPredictor.load(checkpoint / "predictor")
    model, tokenizer = load(checkpoint)
    for index, text in enumerate(TEXTS):
        expected = theirs[f"scores_{index}"]
        assert predictor.tokens(text) == theirs[f"tokens_{index}"].tolist()
        found = predictor.scores(text)
        assert np.abs(np.stack(found) - expected).max() < 1e-3
        assert expected.std() > 0.05
        chosen = top_k(found, [40, 40], "learned")
        assert np.array_equal(np.stack(chosen.ids), theirs[f"top_{index}"])
        answer = list(stream_generate(model, tokenizer, text, density=40 / 128, max_tokens=2))
        assert answer[-1].stats is not None
        assert answer[-1].stats.selection == chosen.hash
    model.close()
