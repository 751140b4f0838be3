"""What is written atomically is old or new, never half, and a killed process leaves what the next one repairs."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ifprune_mlx import Checkpoint, History, Model, Session, TaskStore
from ifprune_mlx.checkpoint.atomic_write import new_folder, restore_folder, write_atomic
from ifprune_mlx.checkpoint.hub import resolve
from ifprune_mlx.errors import IfpruneError
from ifprune_mlx.selection.cache import SelectionCache
from tests.cli.process import environment
from tests.ifprune_mlx.reference import random_selection
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


def test_the_umask_is_not_touched_by_importing_or_writing(tmp_path: Path) -> None:
    code = (
        "import os, sys; seen = []; os.umask = seen.append; import ifprune_mlx, ifprune_mlx.session; "
        "from pathlib import Path; from ifprune_mlx.checkpoint.atomic_write import new_folder, write_atomic; "
        "write_atomic(Path(sys.argv[1], 'file'), lambda file: file.write_text('x'))\n"
        "with new_folder(Path(sys.argv[1], 'folder'), overwrite=False): pass\n"
        "assert seen == [], seen"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment(tmp_path))


KILLED_WRITING = """
import os, signal, sys
from pathlib import Path
from ifprune_mlx.checkpoint.atomic_write import write_atomic

def killing(file):
    file.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
write_atomic(Path(sys.argv[1]), killing)
"""


def killed_while_writing(path: Path) -> Path:
    """What a process leaves that is killed while it writes a file."""
    done = subprocess.run([sys.executable, "-c", KILLED_WRITING, str(path)], check=False, env=environment(path.parent))
    assert done.returncode == -9
    (left,) = (file for file in path.parent.iterdir() if file.name.startswith(f".{path.stem}."))
    return left


def test_temporary_files_of_killed_processes_are_swept_by_the_next_write(
    tmp_path: Path, tiny: tuple[Model, Any]
) -> None:
    selection = random_selection((128, 128), (16, 16), seed=1)
    store = TaskStore(tiny[0].checkpoint, tmp_path / "data")
    store.save("other", selection)
    cache = SelectionCache(tmp_path / "cache")
    history = History.empty(tiny[0]).read(tiny[0], [40, 41])
    (tmp_path / "mine").mkdir()
    saves: dict[Path, Callable[[], object]] = {
        store.folder / "task.safetensors": lambda: store.save("other", selection),
        tmp_path / "cache" / f"{'a' * 64}.safetensors": lambda: cache.put("b" * 64, selection),
        tmp_path / "mine" / "picked.safetensors": lambda: selection.save(tmp_path / "mine" / "picked.safetensors"),
        tmp_path / "mine" / "chat.json": lambda: Session(*tiny).save(tmp_path / "mine" / "chat.json"),
        tmp_path / "mine" / "kv.safetensors": lambda: history.save(tmp_path / "mine" / "kv.safetensors", tiny[0]),
    }
    for path, save in saves.items():
        left = killed_while_writing(path)
        others = [
            left.with_name(name)
            for name in (".mine", ".x.partial-notes.json", f".x.partial-{os.getpid()}-0a1b2c3d.json")
        ]
        for other in others:
            other.write_text("not abandoned")
        save()
        assert not left.exists()
        assert all(other.exists() for other in others)


def test_a_long_name_can_be_written(tmp_path: Path) -> None:
    for name in ("x" * 250 + ".json", "\U0001f600" * 62 + ".json"):
        write_atomic(tmp_path / name, lambda file: file.write_text("x"))
        assert (tmp_path / name).read_text() == "x"


@pytest.mark.parametrize("has", [True, False])
def test_the_drive_itself_is_made_to_keep_the_bytes_on_macos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has: bool
) -> None:
    """`fsync` leaves them in the drive's cache there; network drives have the other call not."""
    flushed: list[tuple[str, int]] = []

    def stand_in(descriptor: int, command: int) -> None:
        flushed.append((f"command {command}", os.fstat(descriptor).st_size))
        if not has:
            raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", stand_in)
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(("fsync", os.fstat(descriptor).st_size)))
    write_atomic(tmp_path / "file", lambda file: file.write_text("four"))
    assert flushed == [("command 51", 4), *([] if has else [("fsync", 4)])]
    assert (tmp_path / "file").read_text() == "four"
