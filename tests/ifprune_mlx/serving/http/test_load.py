"""The load script, for ten seconds: everything is answered, and selections are kept apart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.cli.process import ROOT, environment
from tests.tiny import write_checkpoint


def test_ten_seconds_of_mixed_load(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    script = [sys.executable, str(ROOT / "scripts" / "serve_load.py"), "--model", str(checkpoint)]
    result = subprocess.run(
        [*script, "--minutes", str(10 / 60)],
        capture_output=True,
        text=True,
        env=environment(tmp_path),
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["errors"] == 0
    assert min(figures[kind] for kind in ("chat", "task", "stream", "given up")) > 0
    assert 0 < figures["switches"] <= figures["jobs"]
    for kind in ("rss", "mlx_active"):
        assert 0 < figures[f"{kind}_mb"]["least"] <= figures[f"{kind}_mb"]["most"]
    assert figures["prompt_cache_mb"]["most"] <= 64
