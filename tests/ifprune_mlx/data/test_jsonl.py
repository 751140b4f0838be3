"""JSON lines are read whole or not at all."""

from __future__ import annotations

import bz2
import gzip
from pathlib import Path

import pytest

from ifprune_mlx import DataError
from ifprune_mlx.data.jsonl import parse_json_lines

TEXT = '\ufeff{"a": 1}\n\n  \n{"a": "line\u2028separator"}'


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2"])
def test_plain_and_packed_files(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"x.jsonl{suffix}"
    file.write_bytes({"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress}[suffix](TEXT.encode()))
    assert parse_json_lines(file, lambda value: value["a"], "a") == [1, "line\u2028separator"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x", b"", "holds no lines; give JSON lines with a"),
        ("x", b"{}\n{", "line 2: no JSON object; expected a"),
        ("x", b"[" * 100_000, "line 1: no JSON object"),
        ("x", b"{}\n\xff", "line 2: not UTF-8"),
        ("x.gz", gzip.compress(b"{}\n" * 999, mtime=0)[:-12], "damaged after line"),
        ("x.gz", b"{}", "cannot be read"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        parse_json_lines(file, lambda value: value, "a")
    assert str(caught.value).startswith(str(file))
    assert words in str(caught.value)


def test_no_such_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        parse_json_lines(tmp_path / "none", lambda value: value, "a")
    with pytest.raises(DataError, match="no ordinary file"):
        parse_json_lines(tmp_path, lambda value: value, "a")
