"""Named tasks: kept by checkpoint and name, whole or refused, and never outside their folder."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ifprune_mlx import Checkpoint, Selection, TaskError, TaskStore
from ifprune_mlx.selection.presets import check_task_name, data_folder
from tests.ifprune_mlx.reference import random_selection
from tests.tiny import write_checkpoint

WIDTHS = (128, 128)
GOOD_NAMES = ("a", "poetry", "Poetry-2.1_b", "-x", "_", "0", "a..b", "x" * 64)
BAD_NAMES = (
    "", ".", "..", ".hidden", "../x", "a/b", "/etc/passwd", "a\\b", "a\0b", "a b", "a\n", "\u00e9t\u00e9", "caf\udce9",
    "~", "a:b", "*", "x" * 65,
)  # fmt: skip


def selection(seed: int, k: int = 16) -> Selection:
    return random_selection(WIDTHS, (k, k + 8), seed)


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that may be changed: it has the same id."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


@pytest.fixture
def store(copy: Path, tmp_path: Path) -> TaskStore:
    return TaskStore(Checkpoint.open(copy), tmp_path / "data")


def ship(store: TaskStore, name: str, chosen: Selection) -> None:
    store.shipped_folder.mkdir(exist_ok=True)
    chosen.save(store.shipped_folder / f"{name}.safetensors")


def names(store: TaskStore) -> list[tuple[str, bool]]:
    return [(task.name, task.shipped) for task in store.tasks()]


def files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_a_saved_task_is_found_again(store: TaskStore, tmp_path: Path) -> None:
    assert store.tasks() == []
    one, other = selection(1), selection(2, 24)
    file = store.save("poetry", one)
    store.save("code", other)
    again = TaskStore(Checkpoint.open(tmp_path / "copy"), tmp_path / "data")
    for name, wanted in (("poetry", one), ("code", other)):
        found = again.load(name)
        assert (found.hash, found.keep, found.selector) == (wanted.hash, wanted.keep, wanted.selector)
    assert names(again) == [("code", False), ("poetry", False)]
    # A plain selection file, under the checkpoint's id, and nothing beside it.
    identity = Checkpoint.open(tmp_path / "copy").id
    assert file == tmp_path / "data" / "tasks" / identity / "poetry.safetensors"
    assert Selection.load(file).hash == one.hash
    assert files(tmp_path / "data") == [f"tasks/{identity}/{name}.safetensors" for name in ("code", "poetry")]


def test_saving_again_replaces(store: TaskStore) -> None:
    store.save("poetry", selection(1))
    store.save("poetry", selection(2))
    assert store.load("poetry").hash == selection(2).hash
    assert names(store) == [("poetry", False)]


def test_ones_own_task_goes_before_a_shipped_one(store: TaskStore) -> None:
    for name, seed in (("poetry", 1), ("code", 2)):
        ship(store, name, selection(seed))
    store.save("poetry", selection(3))
    assert names(store) == [("code", True), ("poetry", False)]
    assert store.load("poetry").hash == selection(3).hash
    assert store.load("code").hash == selection(2).hash
    store.remove("poetry")
    assert names(store) == [("code", True), ("poetry", True)]
    assert store.load("poetry").hash == selection(1).hash
    assert not store.folder.exists()
    with pytest.raises(TaskError, match=r"comes with the checkpoint .* and stays"):
        store.remove("poetry")
    assert store.load("poetry").hash == selection(1).hash


def test_tasks_belong_to_the_checkpoints_content(store: TaskStore, tiny_checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    store.save("poetry", selection(1))
    assert TaskStore(Checkpoint.open(tiny_checkpoint), data).load("poetry").hash == selection(1).hash
    other = TaskStore(Checkpoint.open(write_checkpoint(tmp_path / "other", family="qwen3")), data)
    assert other.tasks() == []
    with pytest.raises(TaskError, match="has none; another checkpoint has it") as caught:
        other.load("poetry")
    assert str(store.folder / "poetry.safetensors") in str(caught.value)
    other.save("poetry", selection(2))
    assert store.load("poetry").hash == selection(1).hash


def test_an_unknown_name_lists_those_that_exist(store: TaskStore) -> None:
    with pytest.raises(TaskError, match=r"no task poety for .*: it has none; save it with"):
        store.load("poety")
    store.save("poetry", selection(1))
    ship(store, "code", selection(2))
    for act in (store.load, store.remove):
        with pytest.raises(TaskError, match=r"no task poety for .*: it has code, poetry; save it with .* --save poety"):
            act("poety")


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_good_names(store: TaskStore, name: str) -> None:
    store.save(name, selection(1))
    assert names(store) == [(name, False)]
    assert store.load(name).hash == selection(1).hash
    store.remove(name)
    assert store.tasks() == []


def test_names_that_differ_only_by_case_are_one_task(store: TaskStore) -> None:
    """As they are on macOS, where they are one file."""
    ship(store, "Code", selection(5))
    file = store.save("Math", selection(1))
    assert store.save("math", selection(2)) == file
    store.save("code", selection(3))
    assert names(store) == [("Math", False), ("code", False)]
    for name, seed in (("MATH", 2), ("Math", 2), ("CODE", 3)):
        assert store.load(name).hash == selection(seed).hash
    store.remove("CODE")
    assert store.load("code").hash == selection(5).hash
    store.remove("mATH")
    assert names(store) == [("Code", True)]


def test_of_two_files_that_linux_kept_apart_each_is_found_by_its_name(store: TaskStore) -> None:
    store.save("math", selection(1))
    selection(2).save(store.folder / "Math.safetensors")
    assert len(names(store)) == 1
    for name, seed in (("math", 1), ("Math", 2), ("MATH", 2)):
        assert store.load(name).hash == selection(seed).hash


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_could_lead_elsewhere_are_refused(store: TaskStore, tmp_path: Path, name: str) -> None:
    selection(1).save(tmp_path / "data.safetensors")
    before = files(tmp_path)
    acts: tuple[Callable[[str], object], ...] = (
        check_task_name, store.load, store.remove, lambda name: store.save(name, selection(1)),
    )  # fmt: skip
    for act in acts:
        with pytest.raises(TaskError, match="cannot name a task; use letters") as caught:
            act(name)
        assert str(caught.value).isprintable()
    assert files(tmp_path) == before


def test_other_files_are_no_tasks(store: TaskStore) -> None:
    store.save("poetry", selection(1))
    for name in (".poetry-x7.safetensors", "a b.safetensors", "notes.txt", "poetry"):
        (store.folder / name).write_bytes(b"x")
    (store.folder / "folder.safetensors").mkdir()
    assert names(store) == [("poetry", False)]
    with pytest.raises(TaskError, match="no task folder"):
        store.load("folder")


def test_a_selection_of_another_shape_is_refused(store: TaskStore, tmp_path: Path) -> None:
    wide = random_selection((128, 128, 128), (16, 16, 16), 1)
    with pytest.raises(TaskError, match=r"^task wide: .* has 3 FFNs of widths \[128\], the model has 2 of \[128\]"):
        store.save("wide", wide)
    assert not (tmp_path / "data").exists()
    ship(store, "wide", wide)
    with pytest.raises(TaskError, match=r"wide\.safetensors: .* has 3 FFNs .* made for another model") as caught:
        store.load("wide")
    assert str(store.shipped_folder) in str(caught.value)


def flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 0x40])


@pytest.mark.parametrize("damage", [flip, lambda content: content[:-3], lambda content: b"", lambda content: b"x" * 99])
def test_a_damaged_task_is_refused_listed_and_removable(store: TaskStore, damage: Callable[[bytes], bytes]) -> None:
    ship(store, "poetry", selection(2))
    file = store.save("poetry", selection(1))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(TaskError, match=r"^task poetry: .*again") as caught:
        store.load("poetry")
    assert str(file) in str(caught.value)
    assert names(store) == [("poetry", False)]
    store.remove("poetry")
    assert store.load("poetry").hash == selection(2).hash


def test_a_data_folder_that_cannot_be_made(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    store = TaskStore(Checkpoint.open(copy), tmp_path / "file" / "data")
    assert store.tasks() == []
    with pytest.raises(TaskError, match=r"task poetry: .* cannot be made .*; set IFPRUNE_DATA"):
        store.save("poetry", selection(1))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_of_tasks_that_cannot_be_written_keeps_what_it_has(store: TaskStore) -> None:
    store.save("poetry", selection(1))
    (store.folder / "code.safetensors").mkdir()
    with pytest.raises(TaskError, match=r"task code: .* cannot be written.*IFPRUNE_DATA sets the folder") as caught:
        store.save("code", selection(2))
    assert "\n" not in str(caught.value)
    assert files(store.folder) == ["poetry.safetensors"]


def test_the_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("IFPRUNE_DATA", str(tmp_path / "mine"))
    assert data_folder() == tmp_path / "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("IFPRUNE_DATA", "~/mine")
    assert data_folder() == tmp_path / "mine"
    monkeypatch.setenv("IFPRUNE_DATA", "~nobody-of-this-name/mine")
    with pytest.raises(TaskError, match="set IFPRUNE_DATA"):
        data_folder()
    monkeypatch.delenv("IFPRUNE_DATA")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert data_folder() == tmp_path / "Library" / "Application Support" / "ifprune"
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    assert data_folder() == tmp_path / "xdg" / "ifprune"
    monkeypatch.setenv("XDG_DATA_HOME", "")
    assert data_folder() == tmp_path / ".local" / "share" / "ifprune"


def test_the_environment_says_where(copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("IFPRUNE_DATA", str(tmp_path / "mine"))
    assert TaskStore(Checkpoint.open(copy)).save("poetry", selection(1)).is_relative_to(tmp_path / "mine" / "tasks")
