"""What is written atomically is old or new, never half, and a killed process leaves what the next one repairs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ifprune_mlx import Checkpoint
from ifprune_mlx.checkpoint.atomic_write import new_folder, restore_folder, write_atomic
from ifprune_mlx.checkpoint.hub import resolve
from ifprune_mlx.errors import IfpruneError
from tests.cli.process import environment
from tests.tiny import write_checkpoint

# Replaces the folder that it is given, and is killed when the old one has been put aside.
KILLED = """
import os, signal, sys
from pathlib import Path
from ifprune_mlx.checkpoint.atomic_write import new_folder

rename = Path.rename
def killing(self, target):
    rename(self, target)
    if ".old-" in str(target):
        os.kill(os.getpid(), signal.SIGKILL)
Path.rename = killing
with new_folder(Path(sys.argv[1]), overwrite=True) as folder:
    (folder / "text").write_text("new")
"""


def make(path: Path, text: str, *, overwrite: bool = False) -> None:
    with new_folder(path, overwrite=overwrite) as folder:
        (folder / "text").write_text(text)


def hidden(path: Path) -> list[str]:
    return [entry.name for entry in path.parent.iterdir() if entry.name.startswith(f".{path.name}.")]


def kill_between_the_renames(path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False, env=environment(path.parent))
    assert done.returncode == -9
    assert not path.exists()
    assert sorted(name.split(".")[2].split("-")[0] for name in hidden(path)) == ["old", "partial"]


def test_a_kill_between_the_renames_is_repaired_by_the_next_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "a [b]*"
    make(path, "old")
    kill_between_the_renames(path)
    with pytest.raises(IfpruneError, match="already exists"):
        make(path, "other")
    assert (path / "text").read_text() == "old"
    make(path, "newer", overwrite=True)
    assert (path / "text").read_text() == "newer"
    assert hidden(path) == []
    # Once something else is there, what was put aside is rubbish.
    kill_between_the_renames(path)
    path.mkdir()
    restore_folder(path)
    assert list(path.iterdir()) == []
    make(path, "newest", overwrite=True)
    assert (path / "text").read_text() == "newest"
    assert hidden(path) == []


def test_a_kill_between_the_renames_is_repaired_by_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_checkpoint(tmp_path / "org" / "name")
    before = Checkpoint.open(path).id
    kill_between_the_renames(path)
    assert Checkpoint.open(path).id == before
    kill_between_the_renames(path)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")  # and not a repository of the hub
    assert Checkpoint.open(path).id == before


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder"
    make(path, "old")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if ".partial-" in self.name and not os.path.lexists(target):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(IfpruneError, match=r"No space left on device.*nothing was changed"):
        make(path, "new", overwrite=True)
    assert (path / "text").read_text() == "old"
    assert hidden(path) == []


def test_a_reader_finds_the_old_or_the_new_folder_but_for_an_instant(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    make(path, "0")
    ended = threading.Event()
    seen: list[int] = []
    misses = 0

    def read() -> None:
        nonlocal misses
        while not ended.is_set():
            try:
                seen.append(int((path / "text").read_text()))
            except FileNotFoundError:
                misses += 1

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 101):
        make(path, str(number), overwrite=True)
    ended.set()
    reader.join()
    assert seen == sorted(seen)
    assert misses < len(seen)
    assert (path / "text").read_text() == "100"
    assert hidden(path) == []


def test_the_umask_holds_and_is_never_changed(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.umask(0o027); from pathlib import Path; "
        "from ifprune_mlx.checkpoint.atomic_write import new_folder, write_atomic; os.umask = None; "
        "write_atomic(Path(sys.argv[1], 'file'), lambda file: file.write_text('x'))\n"
        "with new_folder(Path(sys.argv[1], 'folder'), overwrite=False): pass"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment(tmp_path))
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(IfpruneError, match="No space left on device"):
        write_atomic(file, fail)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "old"
