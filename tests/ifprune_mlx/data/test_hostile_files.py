"""Files of data that are no ordinary files, or that unpack to far more than they are."""

from __future__ import annotations

import bz2
import gzip
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from ifprune_mlx.data.dataset import read_records
from ifprune_mlx.errors import DataError, IfpruneError
from ifprune_mlx.eval.analysis import Quality
from ifprune_mlx.eval.exact_match import read_exact
from ifprune_mlx.eval.multiple_choice import read_choices
from ifprune_mlx.selection.selection import Selection
from ifprune_mlx.train.config import read_yaml

READERS: list[Callable[[Path], object]] = [
    lambda file: read_records(file, "a", report=lambda line: None),
    lambda file: read_records(file, "a", strict=True),
    read_exact,
    read_choices,
    Quality.read,
    read_yaml,
    Selection.load,
]


def make(file: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            before = Path.cwd()
            os.chdir(file.parent)  # a socket's path must be short
            try:
                bound.bind(file.name)
            finally:
                os.chdir(before)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to(kind)


@pytest.mark.parametrize("kind", ["fifo", "socket", "folder", "/dev/zero", "/dev/null", "nowhere", "itself.jsonl.gz"])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.bz2"])
def test_no_reader_opens_what_is_no_file(tmp_path: Path, kind: str, suffix: str) -> None:
    """A pipe would block for ever, and a device need not end."""
    file = tmp_path / f"itself{suffix}"
    make(file, kind)
    for read in READERS:
        with pytest.raises(IfpruneError) as caught:
            read(file)
        assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".jsonl.gz", gzip.compress), (".jsonl.bz2", bz2.compress), (".jsonl", bytes)]
)
def test_one_line_without_an_end(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    file = tmp_path / f"bomb{suffix}"
    file.write_bytes(pack(b'{"text": "a"}\n' + b" " * (1 << 25)))
    if suffix == ".jsonl":
        os.truncate(file, 1 << 36)  # a hole of 64 GB
    for read in READERS[:2]:
        with pytest.raises(DataError, match="line 2: is longer than 16 MB"):
            read(file)


@pytest.mark.parametrize(("suffix", "pack"), [(".jsonl.gz", gzip.compress), (".jsonl.bz2", bz2.compress)])
@pytest.mark.parametrize("line", [b"\n", b" " * 999 + b"\n", b'{"text": "' + b"a" * 9000 + b'"}\n'])
def test_lines_without_an_end(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes], line: bytes) -> None:
    file = tmp_path / f"bomb{suffix}"
    file.write_bytes(pack(line * ((1 << 26) // max(len(line), 8))))
    with pytest.raises(DataError, match=r"unpacks to more than 50 times its size|blank lines"):
        read_records(file, "a", report=lambda line: None)


def test_text_that_packs_well_is_read(tmp_path: Path) -> None:
    file = tmp_path / "sound.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"text": "' + b"the same " * 1000 + b'"}\n'))
    assert len(read_records(file, "a")) == 1
