"""Named tasks: saved selections of one checkpoint, found by name.

A user's own lie in the user's data folder, keyed by the checkpoint's id, since a hub's cache is read-only; a checkpoint
may ship some in its `tasks` folder. Each is a plain selection file.
"""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ifprune_mlx.checkpoint.format import Checkpoint
from ifprune_mlx.errors import SelectionError, TaskError, reason_of
from ifprune_mlx.selection.selection import Selection

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")
_SUFFIX = ".safetensors"


def data_folder() -> Path:
    """Where a user's own tasks are kept: `IFPRUNE_DATA`, or the system's folder for application data.

    Raises:
        TaskError: if there is no home folder to look in.
    """
    try:
        if override := os.environ.get("IFPRUNE_DATA"):
            return Path(override).expanduser()
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Application Support" / "ifprune"
        return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "ifprune"
    except RuntimeError as exc:
        raise TaskError("no home folder to keep tasks in; set IFPRUNE_DATA to a folder") from exc


def check_task_name(name: str) -> None:
    """Raise TaskError unless `name` can name a task: such a name is a safe file name on every system."""
    if not _NAME.fullmatch(name):
        shown = name if len(name) <= 64 else f"{name[:61]}..."
        raise TaskError(
            f"{shown!r} cannot name a task; use letters, digits, '-', '_' and '.', at most 64, not beginning with a dot"
        )


@dataclass(frozen=True)
class Task:
    """A named selection.

    Attributes:
        name: what `--task` takes.
        file: where it lies.
        shipped: whether it came with the checkpoint; else it is the user's own.
    """

    name: str
    file: Path
    shipped: bool


@dataclass(frozen=True, eq=False)
class NamedSelection(Selection):
    """A selection that can become a task, since it knows its checkpoint; see `Session.select`."""

    checkpoint: Checkpoint

    def save(self, path: str | Path) -> None:
        """Keep it as the task of this name, or write a file if the name ends in .safetensors.

        Raises:
            TaskError, SelectionError: if it cannot be written.
        """
        if Path(path).suffix == _SUFFIX:
            super().save(path)
        else:
            TaskStore(self.checkpoint).save(str(path), self)


class TaskStore:
    """The named tasks of one checkpoint. A user's own goes before a shipped one of the same name.

    Names that differ only by case are one task, on every system: macOS's file system keeps them in one file.

    Args:
        checkpoint: an opened checkpoint, such as `model.checkpoint`.
        data: the folder of the user's data; None takes `data_folder()`.
    """

    def __init__(self, checkpoint: Checkpoint, data: str | Path | None = None) -> None:
        self._checkpoint = checkpoint
        self._data = data_folder() if data is None else Path(data)

    @property
    def folder(self) -> Path:
        """Where the user's own tasks of this checkpoint lie, once there are any."""
        return self._data / "tasks" / self._checkpoint.id

    @property
    def shipped_folder(self) -> Path:
        """Where tasks that come with the checkpoint lie, if there are any."""
        return self._checkpoint.path / "tasks"

    def tasks(self) -> list[Task]:
        """Every task, by name; their files are not read."""
        found: dict[str, Task] = {}
        for folder, shipped in ((self.shipped_folder, True), (self.folder, False)):
            for file in folder.glob(f"*{_SUFFIX}"):  # the hidden ones are being written
                if _NAME.fullmatch(file.stem) and file.is_file():
                    found[file.stem.lower()] = Task(file.stem, file, shipped)
        return sorted(found.values(), key=lambda task: task.name)

    def load(self, name: str) -> Selection:
        """The selection of a task.

        Raises:
            TaskError: if there is none of this name, or its file is damaged or made for a model of another shape.
        """
        file = self._find(name).file
        try:
            selection = Selection.load(file)
        except SelectionError as exc:
            raise TaskError(f"task {name}: {exc}") from exc
        self._check(selection, f"task {name}: {file}")
        return selection

    def save(self, name: str, selection: Selection) -> Path:
        """Keep a selection under a name, in the place of the user's own task of that name if there is one.

        Returns:
            The file.

        Raises:
            TaskError: if the name cannot be one, the selection is of another shape than the model, or the data folder
                cannot be written.
        """
        check_task_name(name)
        self._check(selection, f"task {name}")
        file = _task_file(self.folder, name) or self.folder / f"{name}{_SUFFIX}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise TaskError(
                f"task {name}: {self.folder} cannot be made ({reason_of(exc)}); set IFPRUNE_DATA to another folder"
            ) from exc
        try:
            Selection.save(selection, file)
        except SelectionError as exc:
            raise TaskError(f"task {name}: {exc} (IFPRUNE_DATA sets the folder)") from exc
        return file

    def remove(self, name: str) -> None:
        """Remove a task of the user's own, damaged or not; a shipped one of that name is then found again.

        Raises:
            TaskError: if there is none, or it cannot be removed.
        """
        task = self._find(name)
        if task.shipped:
            raise TaskError(
                f"task {name} comes with the checkpoint ({task.file}) and stays; one of your own goes before it"
            )
        try:
            task.file.unlink()
        except OSError as exc:
            raise TaskError(f"{task.file}: cannot be removed ({reason_of(exc)}); check permissions") from exc
        with suppress(OSError):  # it holds others
            self.folder.rmdir()

    def _find(self, name: str) -> Task:
        check_task_name(name)
        for folder, shipped in ((self.folder, False), (self.shipped_folder, True)):
            if file := _task_file(folder, name):
                return Task(file.stem, file, shipped)
        known = ", ".join(task.name for task in self.tasks())
        there = f"it has {known}" if known else "it has none"
        # A checkpoint that was converted again has another id, and its user looks for what was saved before.
        elsewhere = sorted(self._data.glob(f"tasks/*/{name}{_SUFFIX}"))
        other = f"; another checkpoint has it ({elsewhere[0]})" if elsewhere else ""
        raise TaskError(
            f"no task {name} for {self._checkpoint.path}: {there}{other}; save it with "
            f"`ifprune select --prompt TEXT --save {name}`"
        )

    def _check(self, selection: Selection, what: str) -> None:
        try:
            self._checkpoint.check(selection)
        except SelectionError as exc:
            raise TaskError(f"{what}: {exc}; make it again for this one") from exc


def _task_file(folder: Path, name: str) -> Path | None:
    """The file of a task in a folder, whatever the case of its name; the exact name first, where there are two."""
    files = [file for file in folder.glob(f"*{_SUFFIX}") if file.stem.lower() == name.lower() and file.is_file()]
    return min(files, key=lambda file: (file.stem != name, file.stem), default=None)
