"""Says in words how two selections of a chat differ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from ifprune_mlx import Selection, TaskStore
from ifprune_mlx.errors import TaskError

_NEARLY = 0.75  # agreement from which a selection is called by a task's name


def change(store: TaskStore, old: Selection, new: Selection) -> str:
    """Such as `15 % new (code -> recipe)`; the names are those of the saved tasks that the two are nearly. If they keep
    different numbers of neurons, the densities are said instead."""
    text = f"{100 * (1 - new.overlap(old)):.0f} % new"
    if new.keep != old.keep:
        return f"{text}, density {old.density:.2f} -> {new.density:.2f}"
    before, after = _name(store, old), _name(store, new)
    return text if before == after else f"{text} ({before or 'other'} -> {after or 'other'})"


def saved_as(store: TaskStore, selection: Selection) -> str | None:
    """The task whose selection this is."""
    return next((name for name, saved in _saved(store) if saved.hash == selection.hash), None)


def _name(store: TaskStore, selection: Selection) -> str | None:
    """The task that a selection nearly is, of those that keep as many neurons: a smaller one is part of many."""
    best, found = _NEARLY, None
    for name, saved in _saved(store):
        if saved.keep == selection.keep and (agreement := selection.agreement(saved)) >= best:
            best, found = agreement, name
    return found


def _saved(store: TaskStore) -> Iterator[tuple[str, Selection]]:
    for task in store.tasks():
        with suppress(TaskError):  # a damaged file is told of where it is used
            yield task.name, store.load(task.name)
