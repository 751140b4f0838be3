"""`ifprune tasks`: the named tasks of a checkpoint; `ifprune select --save` makes them."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from .console import note, result_json, show
from .loading import open_checkpoint
from .options import JsonOption, ModelOption


def tasks(
    model: ModelOption = None,
    remove: Annotated[
        Optional[str], typer.Option("--remove", metavar="NAME", help="Remove a task of your own, then list the rest.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """List the named tasks of a checkpoint: your own, and those that it ships."""
    from ifprune_mlx import TaskError, TaskStore
    from ifprune_mlx.selection.presets import check_task_name

    if remove is not None:
        check_task_name(remove)
    store = TaskStore(open_checkpoint(model))
    if remove is not None:
        store.remove(remove)
        note(f"removed task {remove}")
    rows: list[dict[str, Any]] = []
    for task in store.tasks():
        row: dict[str, Any] = {"name": task.name, "shipped": task.shipped, "file": str(task.file)}
        try:
            selection = store.load(task.name)
        except TaskError as exc:
            note(str(exc))
            rows.append({**row, "selection": None, "selector": None, "density": None})
            continue
        rows.append({**row, "selection": selection.hash, "selector": selection.selector, "density": selection.density})
    if json:
        result_json({"tasks": rows})
        return
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        whose = "shipped" if row["shipped"] else "own"
        what = "cannot be used"
        if row["selection"] is not None:
            what = f"{row['selection']}, {row['selector']}, density {row['density']:.2f}"
        line = f"{row['name']:<{width}}  {whose:<7}  {what}"
        show(line if len(line) <= 80 else f"{row['name']}\n  {whose:<7}  {what}")
    if not rows and remove is None:
        note("no tasks yet; `ifprune select --prompt TEXT --save NAME` saves one")
