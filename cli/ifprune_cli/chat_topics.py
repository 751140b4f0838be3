"""Says in words how two selections of a chat differ."""

from __future__ import annotations

from ifprune_mlx import Selection, TaskStore
from ifprune_mlx.errors import TaskError

_NEARLY = 0.75  # agreement from which a selection is called by a task's name


def change(store: TaskStore, old: Selection, new: Selection) -> str:
    """Such as `15 % new (code -> recipe)`; the names are those of the saved tasks that the two are nearly."""
    text = f"{100 * (1 - new.overlap(old)):.0f} % new"
    before, after = _name(store, old), _name(store, new)
    return text if before == after else f"{text} ({before or 'other'} -> {after or 'other'})"


def _name(store: TaskStore, selection: Selection) -> str | None:
    """The task that a selection nearly is, of those that keep as many neurons: a smaller one is part of many."""
    best, name = _NEARLY, None
    for task in store.tasks():
        try:
            saved = store.load(task.name)
        except TaskError:  # a damaged file is told of where it is used
            continue
        if saved.keep == selection.keep and (agreement := selection.agreement(saved)) >= best:
            best, name = agreement, task.name
    return name
