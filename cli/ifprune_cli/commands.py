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
# What `--help` ends with; "" is `ifprune` itself.
_EXAMPLES = {
    "": (
        "ifprune demo",
        "ifprune chat --model Qwen/Qwen2.5-1.5B-Instruct",
        'ifprune generate "Write a haiku about tea."',
    ),
    "chat": (
        "ifprune chat",
        "ifprune chat --model Qwen/Qwen2.5-1.5B-Instruct --density 0.9",
        "ifprune chat --model ~/Downloads/model.gguf --density 0.7",
    ),
    "generate": (
        'ifprune generate "Write a haiku about tea."',
        'ifprune generate "Sort a list in Python." --model my-model --density 0.5',
        "ifprune generate --prompt - --json < prompt.txt",
    ),
    "serve": ("ifprune serve --open", "ifprune serve --model my-model --port 8080"),
    "convert": (
        "ifprune convert --model Qwen/Qwen2.5-1.5B-Instruct -q --calibrate",
        "ifprune convert --model model.gguf --mlx-path my-model",
    ),
    "adapt": (
        "ifprune adapt --model Qwen/Qwen2.5-1.5B-Instruct -q --hours 8",
        "ifprune adapt --model model.gguf --mlx-path my-model --data mail=mail.jsonl",
    ),
    "train": (
        "ifprune train --model my-model --data code=code.jsonl --output distilled",
        "ifprune train -c run.yaml --data code=code.jsonl --output healed",
    ),
    "bench": ("ifprune bench", "ifprune bench --model my-model --plot speed.png"),
}
app = typer.Typer(
    name="ifprune",
    cls=Commands,
    help="Instruction-Following Pruning on MLX: a model reads the instruction and runs on the neurons it needs.",
    epilog="\n".join(_EXAMPLES[""]),
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
    examples = "\n".join(_EXAMPLES.get(name, ()))
    app.command(name, cls=Command, short_help=short_help, rich_help_panel=heading, epilog=examples)(
        with_groups(command)
    )
