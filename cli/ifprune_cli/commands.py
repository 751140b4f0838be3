"""The commands of `ifprune`, in the order of `ifprune --help`.

Heavy imports happen inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import typer

from . import (
    adapt,
    atlas,
    bench,
    chat,
    convert,
    demo,
    doctor,
    evaluate,
    export,
    generate,
    info,
    models,
    select,
    serve,
    tasks,
    train,
)
from .option_groups import Command, Commands, with_groups

_HEADINGS = {
    "Use a model": ("chat", "generate", "serve", "demo"),
    "Look at what is selected": ("select", "tasks", "info", "atlas"),
    "Make a model": ("convert", "adapt", "train", "export", "models"),
    "Measure": ("bench", "evaluate", "doctor"),
}
app = typer.Typer(
    name="ifprune",
    cls=Commands,
    help="Instruction-Following Pruning on MLX: a model reads the instruction and runs on the neurons it needs.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@app.callback(invoke_without_command=True)
def root(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    """Instruction-Following Pruning on MLX: a model reads the instruction and runs on the neurons it needs."""
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("ifprune-mlx"))
        raise typer.Exit


for command, short_help in (
    (chat.chat, "Chat with a model"),
    (generate.generate, "Answer one prompt"),
    (serve.serve, "Serve a model to other apps, over HTTP"),
    (convert.convert, "Make an IFP checkpoint of a dense one"),
    (adapt.adapt, "Make a model your own sliced one, in one go"),
    (export.export, "Write a selection as a plain model"),
    (select.select, "Show, compare or save what a prompt selects"),
    (tasks.tasks, "List or remove saved selections"),
    (models.models, "List or remove converted models"),
    (info.info, "Show what a checkpoint holds"),
    (demo.demo, "See three answers, with all neurons and with some"),
    (train.train, "Train a predictor, and heal what it prunes"),
    (bench.bench, "Measure the speed, with all neurons and with some"),
    (evaluate.evaluate, "Measure what it costs to leave neurons out"),
    (atlas.atlas, "Draw which prompts share which neurons"),
    (doctor.doctor, "Find out whether neurons follow the prompt"),
):
    name = command.__name__
    heading = next((heading for heading, names in _HEADINGS.items() if name in names), "Others")
    app.command(name, cls=Command, short_help=short_help, rich_help_panel=heading)(with_groups(command))
