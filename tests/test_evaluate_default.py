"""The tables of `make quality`, and the whole of it on a few real prompts."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ifprune_mlx.eval.evaluation import Evaluation, Row
from tests.cli.process import ROOT

LOSSES = {
    "dense": (1.0, 0.5), "learned": (2.0, 1.5), "mismatched": (2.5, 1.75), "healed-static": (3.0, 1.25),
    "published": (1.5, 0.75),
}  # fmt: skip
GROUPS = {"seen": ["code", "maths"], "unseen": ["code", "maths"], "own": ["mine"]}


def evaluation() -> Evaluation:
    """Losses as above on seen code, a half more on seen maths, one more on unseen sources, two more on own data."""
    more = {"seen code": 0.0, "seen maths": 0.5, "unseen code": 1.0, "unseen maths": 1.0, "own mine": 2.0}
    rows = [
        Row(name, domain, tuple(loss + plus for loss in losses), (1, 3), (0.5, 0.9))
        for name, losses in LOSSES.items()
        for domain, plus in more.items()
    ]
    return Evaluation(0.27, "learned", tuple(rows), {}, dict.fromkeys(more, ("a", "b")))


def test_seen_unseen_and_own_stand_side_by_side_with_every_control(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module: Any = importlib.import_module("evaluate_default")
    lines = list(module.tables(evaluation(), GROUPS))
    assert [title.strip() for title in lines[1].split("|")] == ["seen sources", "unseen sources", "own sources"]
    assert lines[2].split() == ["code", "maths", "mean", "|", "code", "maths", "mean", "|", "mine", "mean"]
    for name, losses in LOSSES.items():
        (line,) = [line for line in lines if line.split()[0] == name and line.split()[1] != "-"]
        mean = sum(losses) / 2
        shown = [mean, mean + 0.5, mean + 0.25, mean + 1, mean + 1, mean + 1, mean + 2, mean + 2]
        assert [float(cell) for cell in line.split()[1:] if cell != "|"] == pytest.approx(shown, abs=6e-4)
    shares = [line for line in lines if line.startswith("accepted: ")]
    assert [line.split()[1] for line in shares] == ["learned", "mismatched", "healed-static"]
    assert {cell for line in shares for cell in line.split()[2:] if cell != "|"} == {"0.800"}  # by token
    # A block of differences each.
    for title in GROUPS:
        (at,) = [n for n, line in enumerate(lines) if line.startswith(f"{title} sources")]
        below = [" ".join(line.split()[:3]) for line in lines[at + 1 : at + 4]]
        assert below == ["learned - healed-static", "learned - mismatched", "learned - published"]
        assert lines[at + 1].split()[3:6] == ["-0.375", "[-1.000,", "+0.250]"]


@pytest.mark.slow
def test_the_shipped_default_on_data_of_ones_own(smollm2_base: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    asked = [("What is the capital of France?", "The capital of France is Paris."), ("Add 2 and 3.", "2 + 3 = 5")]
    mine.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in asked))
    arguments = ["--sets", "none", "--data", f"mine={mine}", "--limit", "2", "--densities", "0.5,0.27", "--oracle"]
    command = [sys.executable, str(ROOT / "scripts" / "evaluate_default.py"), *arguments, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("density 0.500") < done.stdout.index("density 0.250")  # 0.27 of 1536, in multiples of 64
    points = json.loads((tmp_path / "quality.json").read_text())["curve"]
    names = ["dense", "learned", "mismatched", "oracle", "healed-static", "published"]
    assert [[row["selector"] for row in point["rows"]] for point in points] == [names] * 2
    assert (tmp_path / "quality.svg").is_file()
