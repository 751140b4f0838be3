"""The cache of selections: what is kept, what is thrown out first, and files that others share or damage."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from ifprune_mlx import Selection, SelectionError
from ifprune_mlx.selection.cache import SelectionCache
from tests.conftest import ROOT
from tests.ifprune_mlx.reference import random_selection

WIDTHS, KEEP = (128, 96), (40, 32)


def key(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def made(number: int) -> Selection:
    return random_selection(WIDTHS, KEEP, seed=number)


def look(cache: SelectionCache, number: int) -> str | None:
    found = cache.get(key(number), WIDTHS, KEEP)
    return None if found is None else found.hash


def filled(cache: SelectionCache, count: int) -> SelectionCache:
    for number in range(count):
        cache.put(key(number), made(number))
    return cache


def test_what_was_put_is_found_and_counted() -> None:
    cache = SelectionCache()
    assert look(cache, 1) is None
    cache.put(key(1), made(1))
    assert cache.get(key(1), WIDTHS, KEEP) is cache.get(key(1), WIDTHS, KEEP)
    assert look(cache, 1) == made(1).hash
    assert look(cache, 2) is None
    assert (cache.hits, cache.misses, len(cache)) == (3, 2, 1)


def test_the_one_used_longest_ago_goes_first() -> None:
    cache = filled(SelectionCache(entries=3), 3)
    look(cache, 0)
    cache.put(key(1), made(1))
    cache.put(key(3), made(3))
    assert [number for number in range(4) if look(cache, number)] == [0, 1, 3]


def test_entries_are_bounded_in_bytes_too() -> None:
    each = 4 * sum(KEEP)
    cache = filled(SelectionCache(size=5 * each), 20)
    assert [number for number in range(20) if look(cache, number)] == [15, 16, 17, 18, 19]
    for _ in range(9):  # replacing counts once
        cache.put(key(19), made(19))
    assert len(cache) == 5
    assert len(filled(SelectionCache(size=each - 1), 3)) == 0


# On disk.


def test_another_process_finds_what_this_one_put(tmp_path: Path) -> None:
    folder = tmp_path / "of" / "selections"
    filled(SelectionCache(folder), 3)
    code = (
        "import sys; from ifprune_mlx.selection.cache import SelectionCache; cache = SelectionCache(sys.argv[1])\n"
        f"print([cache.get(key, {WIDTHS}, {KEEP}).hash for key in sys.argv[2:]], cache.hits, cache.misses)"
    )
    command = [sys.executable, "-c", code, str(folder), *(key(number) for number in range(3))]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == f"{[made(number).hash for number in range(3)]} 3 0"
    assert sorted(file.name for file in folder.iterdir()) == sorted(f"{key(n)}.safetensors" for n in range(3))


def test_the_selector_stays_known(tmp_path: Path) -> None:
    cache = SelectionCache(tmp_path)
    cache.put(key(1), Selection(made(1).ids, WIDTHS, "learned"))
    found = SelectionCache(tmp_path).get(key(1), WIDTHS, KEEP)
    assert found is not None
    assert found.selector == "learned"


def spoil_bytes(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "empty": lambda file: file.write_bytes(b""),
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-5]),
    "no safetensors": lambda file: file.write_text("hello" * 99),
    "an id changed": spoil_bytes,
    "another shape": lambda file: random_selection((64, 96), KEEP, seed=1).save(file),
    "another budget": lambda file: random_selection(WIDTHS, (40, 40), seed=1).save(file),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "gone": lambda file: file.unlink(),
    "a link to nothing": lambda file: (file.unlink(), file.symlink_to("nothing")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_counts_as_none_and_is_written_anew(tmp_path: Path, damage: str) -> None:
    filled(SelectionCache(tmp_path), 2)
    DAMAGE[damage](tmp_path / f"{key(1)}.safetensors")
    cache = SelectionCache(tmp_path)
    assert (look(cache, 1), look(cache, 0)) == (None, made(0).hash)
    cache.put(key(1), made(1))
    assert look(cache, 1) == made(1).hash
    if damage != "a folder":  # which nothing may replace
        assert look(SelectionCache(tmp_path), 1) == made(1).hash


def test_the_files_used_longest_ago_go_first_and_no_others(tmp_path: Path) -> None:
    for name in ("notes.txt", "mine.safetensors", f"{key(9)}.json"):
        (tmp_path / name).write_text("keep")
        os.utime(tmp_path / name, (1, 1))
    cache = filled(SelectionCache(tmp_path, files=4), 4)
    for number in range(4):
        os.utime(tmp_path / f"{key(number)}.safetensors", (1000 + number, 1000 + number))
    half = tmp_path / f".{key(8)}-x1.safetensors"  # as a killed process leaves it
    half.write_bytes(b"")
    os.utime(half, (10, 10))
    assert look(SelectionCache(tmp_path), 0) == made(0).hash  # read from the file, which is then the newest
    cache.put(key(4), made(4))
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {f"{key(n)}.safetensors" for n in (0, 2, 3, 4)} | {"notes.txt", "mine.safetensors", f"{key(9)}.json"}


def test_the_folder_is_scanned_when_it_is_opened_and_when_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(SelectionCache(tmp_path), 5)
    scans, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: scans.append(folder) or scandir(folder))
    cache = SelectionCache(tmp_path, files=32)
    for number in (*range(32), *range(32)):
        cache.put(key(number), made(number))
    assert len(scans) == 1
    for number in range(32, 35):
        cache.put(key(number), made(number))
    assert len(scans) == 2
    assert len(list(tmp_path.iterdir())) == 32


@pytest.mark.parametrize("under", [False, True], ids=["a file", "under a file"])
def test_a_folder_that_cannot_be_is_refused_in_one_line(tmp_path: Path, under: bool) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "x" if under else tmp_path / "file"
    with pytest.raises(SelectionError, match="cannot be a cache of selections") as caught:
        SelectionCache(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


def test_a_folder_that_goes_away_is_done_without(tmp_path: Path) -> None:
    cache = SelectionCache(tmp_path / "cache")
    (tmp_path / "cache").rmdir()
    cache.put(key(1), made(1))
    assert look(cache, 1) == made(1).hash
    assert look(cache, 2) is None


def test_a_key_cannot_name_another_file(tmp_path: Path) -> None:
    cache = SelectionCache(tmp_path / "cache")
    for bad in ("../x", "", key(1).upper(), key(1) + "\n"):
        with pytest.raises(ValueError, match="no key"):
            cache.get(bad, WIDTHS, KEEP)


def test_threads_share_one(tmp_path: Path) -> None:
    cache, wrong = SelectionCache(tmp_path, entries=5, files=7), []

    def work(start: int) -> None:
        for step in range(60):
            number = (start + step * 7) % 12
            found = look(cache, number)
            if found is None:
                cache.put(key(number), made(number))
            elif found != made(number).hash:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache.hits + cache.misses == 240
    assert len(cache) == 5


def test_processes_share_a_folder(tmp_path: Path) -> None:
    """They write, read and throw out the same few files at once; nobody sees a wrong selection, and nobody fails."""
    code = """
import sys
from ifprune_mlx.selection.cache import SelectionCache
from tests.ifprune_mlx.selection.test_cache import key, look, made
expected = [made(number) for number in range(6)]
for round_ in range(8):
    cache = SelectionCache(sys.argv[1], files=3)
    for number in range(6):
        found = look(cache, number)
        assert found in (None, expected[number].hash), number
        if found is None:
            cache.put(key(number), expected[number])
print("done")
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    for process in running:
        out, errors = process.communicate(timeout=120)
        assert (out, process.returncode) == ("done\n", 0), errors
    left = [file for file in tmp_path.iterdir() if not file.name.startswith(".")]
    assert 0 < len(left) <= 5  # the last to write left 3 at most, and two others may have been writing
    for file in left:
        assert np.array_equal(Selection.load(file).keep, KEEP)
