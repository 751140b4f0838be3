"""`scripts/paper_9b.py` with its widths divided by 16: every step, and nothing left behind. 15 s."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc"),
]


@pytest.mark.parametrize("keep", [False, True])
def test_all_steps(tmp_path: Path, keep: bool) -> None:
    options = ["--folder", str(tmp_path), "--measure", "--scale", "16", "--layers", "3", *(["--keep"] if keep else [])]
    script = [sys.executable, "-m", "scripts.paper_9b", *options]
    done = subprocess.run(script, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    generated = result["generate"]["answer"]
    assert (generated["selector"], generated["prompt_tokens"], generated["completion_tokens"]) == ("learned", 11, 8)
    assert generated["density"] == pytest.approx(6656 / 24576)
    assert result["convert"]["answer"]["ffns"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == (["converted", "predictor", "source"] if keep else [])
