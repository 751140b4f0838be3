"""Peak memory of a conversion: that of one FFN of the paper's widths, whatever the number of layers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from scripts.make_synthetic import measure, write_checkpoint


@pytest.mark.skipif(sys.platform != "linux", reason="reads anonymous RSS from /proc")
def test_two_layers_of_the_papers_widths(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path / "source", layers=2, vocabulary=1024)
    assert written > 650_000_000
    result = measure(tmp_path / "source", tmp_path / "out")
    # gate, up and both interleaved are 403 MB; a layer that stayed in memory would add 302 MB.
    assert result["peak_anonymous_rss"] < 800_000_000
    assert result["converted"]["ffns"] == 2
    for file in (*(tmp_path / "source").iterdir(), *(tmp_path / "out").iterdir()):
        file.unlink()
