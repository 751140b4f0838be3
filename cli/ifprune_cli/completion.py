"""What the shell offers after `--task`: names of tasks. Commands, options and choices are typer's to complete."""

from __future__ import annotations

from pathlib import Path

import typer


def task_names(context: typer.Context, incomplete: str) -> list[str]:
    """The names that begin so: of the checkpoint that `--model` names so far, else of every checkpoint of the user's.

    Looks at folders only; which checkpoint is meant without `--model` would take a conversion to know.
    """
    from ifprune_mlx import Checkpoint, IfpruneError, TaskStore
    from ifprune_mlx.selection.presets import data_folder

    model = context.params.get("model")
    try:
        if model is not None and Path(model).is_dir():
            names = [task.name for task in TaskStore(Checkpoint.open(model)).tasks()]
        else:
            names = sorted({file.stem for file in data_folder().glob("tasks/*/[!.]*.safetensors")})
    except (IfpruneError, OSError):  # a shell that waits for names can be told of nothing
        return []
    return [name for name in names if name.startswith(incomplete)]
