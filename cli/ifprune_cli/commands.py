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
from .option_groups import Command, with_groups

app = typer.Typer(
    name="ifprune",
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
    (serve.serve, "Serve a model over HTTP"),
    (convert.convert, "Make an IFP checkpoint of a dense one"),
    (adapt.adapt, "Make a model your own sliced one, in one go"),
    (export.export, "Write a selection as a plain model"),
    (select.select, "Show or save what a prompt selects"),
    (tasks.tasks, "List or remove named tasks"),
    (models.models, "List or remove converted models"),
    (info.info, "Show what a checkpoint holds"),
    (demo.demo, "Three answers, dense beside sliced"),
    (train.train, "Train a sparsity predictor"),
    (bench.bench, "Time dense against sliced"),
    (evaluate.evaluate, "Losses by kind of selection"),
    (atlas.atlas, "Draw what a selector does"),
    (doctor.doctor, "Does the selector follow the prompt?"),
):
    app.command(command.__name__, cls=Command, short_help=short_help)(with_groups(command))
