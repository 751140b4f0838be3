"""Headers of safetensors files that Python's JSON takes and MLX does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ifprune_mlx import IfpruneError, Selection
from ifprune_mlx.selection.cache import SelectionCache

KEY = "0" * 64


@pytest.mark.parametrize(
    "odd",
    [
        '"odd": ["a"]',
        '"odd": {"a": 1}',
        '"odd": 5',
        '"odd": NaN',
        '"odd": 1e999999',
        '"odd": "\\ud800"',
        '"\\ud800": "a"',
    ],
)
def test_odd_metadata_of_a_selection(tmp_path: Path, odd: str) -> None:
    file = tmp_path / f"{KEY}.safetensors"
    ids = (np.arange(8, dtype=np.int32),)
    Selection(ids, (16,), "static").save(file)
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(b'"__metadata__":{', f'"__metadata__":{{{odd},'.encode())
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    with pytest.raises(IfpruneError) as caught:
        Selection.load(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert SelectionCache(tmp_path).get(KEY, (16,), (8,)) is None
