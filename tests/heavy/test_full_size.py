"""The synthetic 3 GB checkpoint of `scripts/make_synthetic.py`: memory, and a killed conversion. 90 s, 6 GB of disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(sys.platform != "linux", reason="reads anonymous RSS from /proc"),
]


@pytest.mark.parametrize("options", [["--kill"], ["--options", "-q"]], ids=["killed-before", "quantized"])
def test_three_gigabytes_take_little_memory(options: list[str]) -> None:
    script = [sys.executable, str(ROOT / "scripts" / "make_synthetic.py"), "--measure", *options]
    done = subprocess.run(script, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["source_bytes"] > 3_000_000_000
    assert result["peak_anonymous_rss"] < 1_200_000_000
    assert result["converted"]["ffns"] == 7
