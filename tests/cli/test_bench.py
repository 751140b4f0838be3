"""`ifprune bench` from end to end, on noise of a tiny shape."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.process import run_here
from tests.tiny import CONFIGS


def test_a_shape_is_measured_drawn_and_written(tmp_path: Path) -> None:
    shape = tmp_path / "config.json"
    shape.write_text(json.dumps(CONFIGS["llama"]))
    out, plot = tmp_path / "bench.json", tmp_path / "rates.svg"
    given = ("--shape", str(shape), "-p", "16", "-g", "3", "-n", "1", "--work", str(tmp_path), "--json", str(out))
    done = run_here("bench", *given, "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["shape"] == str(shape)
    assert len(result["rows"]) == 5
    assert "sliced decoding / a plain model of that size" in done.stdout
    assert "bytes of weights moved while decoding: 0" in done.stdout
    assert "down product, 1 " in done.stdout
    assert plot.read_text().lstrip().startswith("<?xml")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bench.json", "config.json", "rates.svg"]
