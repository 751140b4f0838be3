"""Says in words how two selections of a chat differ."""

from __future__ import annotations

from ifprune_mlx import Selection, TaskStore
from ifprune_mlx.errors import TaskError
from ifprune_mlx.session import SWITCH_BELOW


def change(store: TaskStore, old: Selection, new: Selection) -> str:
    """Such as `15 % new (code -> recipe)`; the names are those of the saved tasks that the two are nearly."""
    text = f"{100 * (1 - new.overlap(old)):.0f} % new"
    before, after = _name(store, old), _name(store, new)
    return text if before == after else f"{text} ({before or 'other'} -> {after or 'other'})"


def _name(store: TaskStore, selection: Selection) -> str | None:
    """The task that a selection agrees with best, if it agrees as well as policy `auto` asks."""
    best, name = SWITCH_BELOW, None
    for task in store.tasks():
        try:
            saved = store.load(task.name)
        except TaskError:  # a damaged file is told of where it is used
            continue
        fewer, more = sorted((selection, saved), key=lambda each: each.density)
        if (agreement := fewer.agreement(more)) >= best:
            best, name = agreement, task.name
    return name
