"""`ifprune select`: which neurons does an instruction select, and which does it share with others?"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from .console import note, result_json, shortened, show, table
from .generate import as_messages, read_prompt
from .loading import Runtime, check_selection, open_runtime
from .options import (
    Budget,
    IgnoreTemplateOption,
    JsonOption,
    ModelOptions,
    PromptArgument,
    PromptOption,
    SeedOption,
    Selecting,
    SelectionOptions,
    SelectorOption,
    SystemPromptOption,
    given_prompt,
    output_option,
)

if TYPE_CHECKING:
    from ifprune_mlx import Instruction, Selection, TaskStore

_NAME_WIDTH = 28


@dataclass(frozen=True)
class _Compared:
    """What the selection is compared with, beside the static one and the tasks."""

    with_prompt: Annotated[
        Optional[list[str]],
        typer.Option("--with-prompt", metavar="TEXT", help="Print the overlap with what TEXT selects; repeatable."),
    ] = None
    compare: Annotated[
        Optional[list[Path]],
        typer.Option("--compare", metavar="FILE", help="Print the overlap with a saved selection; repeatable."),
    ] = None


@dataclass(frozen=True)
class _Outputs:
    """What is printed and written."""

    layers: Annotated[bool, output_option("--layers", help="Print every FFN's neurons and overlaps, too.")] = False
    save: Annotated[
        Optional[str], output_option("--save", metavar="NAME", help="Save the selection as a task, for --task NAME.")
    ] = None
    save_to: Annotated[
        Optional[Path], output_option("--save-to", metavar="FILE", help="Save the selection (.safetensors).")
    ] = None
    plot: Annotated[
        Optional[Path],
        output_option(
            "--plot",
            metavar="FILE",
            help="Draw what is kept here and not by the static selection, or by that of one --with-prompt or "
            "--compare; of several, draw the overlaps (.png or .svg). This needs ifprune-mlx[plots].",
        ),
    ] = None
    json: JsonOption = False

    def check(self) -> None:
        """Raise IfpruneError for a name that a task, a selection file or a chart cannot have."""
        from ifprune_mlx import SelectionError
        from ifprune_mlx.checkpoint.atomic_write import check_replaceable
        from ifprune_mlx.eval.plots import check_plot
        from ifprune_mlx.selection.presets import check_task_name

        if self.save is not None:
            check_task_name(self.save)
        if self.save_to is not None and self.save_to.suffix != ".safetensors":
            raise SelectionError(f"{self.save_to}: a selection file ends in .safetensors")
        if self.save_to is not None:
            check_replaceable(self.save_to, f"--save-to {self.save_to}", SelectionError)
        if self.plot is not None:
            check_plot(self.plot, "--plot")


def select(
    model: ModelOptions,
    budget: Budget,
    selecting: Selecting,
    compared: _Compared,
    outputs: _Outputs,
    words: PromptArgument = None,
    prompt: PromptOption = None,
    selector: SelectorOption = None,
    system_prompt: SystemPromptOption = None,
    ignore_chat_template: IgnoreTemplateOption = False,
    seed: SeedOption = 0,
) -> None:
    """Select neurons for an instruction, compare them with other selections, and show or save them."""
    text = read_prompt(given_prompt(words, prompt))
    texts = dict.fromkeys(read_prompt(other, "--with-prompt") for other in compared.with_prompt or [])
    from ifprune_mlx import Selection, TaskStore, make_selector
    from ifprune_mlx.selection.selection import top_k

    outputs.check()
    files = {file: Selection.load(file) for file in compared.compare or []}
    runtime = open_runtime(model, SelectionOptions(selector), budget, selecting, template=not ignore_chat_template)
    for file, other in files.items():
        check_selection(runtime.model, other, file)
    instruction, *instructions = _instructions(runtime, [text, *texts], system_prompt)
    keep = runtime.model.keep(**runtime.budget)
    chooser = make_selector(runtime.model, runtime.selector, seed=seed)
    start = time.perf_counter()
    selection = chooser.select(instruction, keep).selection
    seconds = time.perf_counter() - start
    store = TaskStore(runtime.model.checkpoint)
    others = _named(
        static={"static": top_k(runtime.model.prior, keep, "static")},
        task=_tasks(store),
        file={str(file): other for file, other in files.items()},
        prompt={other.text: chooser.select(other, keep).selection for other in instructions},
    )
    if outputs.save_to is not None:
        selection.save(outputs.save_to)
    if outputs.save is not None:
        if outputs.save.lower() in {task.name.lower() for task in store.tasks() if not task.shipped}:
            note(f"replaces the task {outputs.save} that there was")
        store.save(outputs.save, selection)
    if outputs.plot is not None:
        _draw(outputs.plot, text, selection, others, [*map(str, files), *texts])
    _print(selection, others, seconds, outputs)


def _instructions(runtime: Runtime, texts: Sequence[str], system_prompt: str | None) -> list[Instruction]:
    """The texts as a selector reads them.

    Raises:
        PromptError: if one is longer than the model's context.
    """
    from ifprune_mlx import Instruction
    from ifprune_mlx.chat_template import check_prompt, render_messages

    instructions = []
    for text in texts:
        tokens = render_messages(runtime.tokenizer, as_messages(text, system_prompt))
        check_prompt(runtime.model, tokens)
        instructions.append(Instruction(text, tuple(tokens)))
    return instructions


def _print(selection: Selection, others: dict[str, Selection], seconds: float, outputs: _Outputs) -> None:
    """The selection and its overlaps as one JSON object, or in words, and its hash alone on stdout."""
    shares = {name: selection.overlap_by_layer(other) for name, other in others.items()}
    if outputs.json:
        result_json(
            {
                "selection": selection.hash,
                "selector": selection.selector,
                "density": selection.density,
                "k": list(selection.keep),
                "overlap_with": {name: selection.overlap(other) for name, other in others.items()},
                **({"overlap_by_layer": shares} if outputs.layers else {}),
                "select_s": seconds,
            }
        )
        return
    widths = selection.widths
    kept = f"{sum(selection.keep)} of {sum(widths)} neurons in {len(widths)} FFNs"
    note(f"{selection.selector}, density {selection.density:.3f}: {kept}, selected in {seconds:.2f} s")
    for name, other in others.items():
        note(f"overlap with {shortened(name, 60)}: {100 * selection.overlap(other):.1f} %")
    show(f"selection {selection.hash}" if sys.stdout.isatty() else selection.hash)
    if outputs.layers:
        show("\n".join(_table(selection, shares)))
    if outputs.save_to is not None:
        note(f"saved to {outputs.save_to}; use it with: ifprune generate --selection {outputs.save_to} --prompt ...")
    if outputs.plot is not None:
        note(f"drawn in {outputs.plot}")
    if outputs.save is not None:
        note(f"saved as task {outputs.save}; use it with: ifprune generate --task {outputs.save} --prompt ...")


def _draw(plot: Path, text: str, selection: Selection, others: dict[str, Selection], asked: Sequence[str]) -> None:
    """The difference to the one selection that was asked for, or to the static one; of more, a matrix of overlaps."""
    from ifprune_mlx.eval.analysis import difference_chart, selections_chart
    from ifprune_mlx.eval.plots import write_figure

    if len(asked) < 2:
        # Those that were asked for come last in `others`, the static one comes first.
        other, name = (list(others.values())[-1], "the other") if asked else (next(iter(others.values())), "static")
        title = " against ".join([*(f'"{shortened(part, _NAME_WIDTH)}"' for part in (text, *asked)), name][:2])
        write_figure(difference_chart(title, selection, other, name), plot)
        return
    short: dict[str, Selection] = {}
    for name, each in {text: selection, **others}.items():
        label = shortened(name, _NAME_WIDTH)
        # Two that begin alike are told apart by their place.
        short[f"{label} ({len(short) + 1})" if label in short else label] = each
    write_figure(selections_chart(f"Neurons in common ({selection.selector})", short), plot)


def _tasks(store: TaskStore) -> dict[str, Selection]:
    """The selections of all named tasks; a note says which cannot be used."""
    from ifprune_mlx import TaskError

    found = {}
    for task in store.tasks():
        try:
            found[task.name] = store.load(task.name)
        except TaskError as exc:
            note(f"not compared with {exc}")
    return found


def _named(**kinds: dict[str, Selection]) -> dict[str, Selection]:
    """All selections by name; one whose name another kind has already is called by its kind as well."""
    others: dict[str, Selection] = {}
    for kind, selections in kinds.items():
        for name, selection in selections.items():
            others[f"{kind} {name}" if name in others else name] = selection
    return others


def _table(selection: Selection, shares: dict[str, list[float]]) -> list[str]:
    """A line per FFN: its neurons, how many are kept, and the share of these that every other selection keeps."""
    ffns = enumerate(zip(selection.widths, selection.keep, strict=True))
    labels = [
        f"{'FFN':>4} {'neurons':>8} {'kept':>8}",
        *(f"{index:>4} {width:>8} {k:>8}" for index, (width, k) in ffns),
    ]
    columns = [
        [f"{shortened(name, _NAME_WIDTH):>9}", *(f"{share:.3f}" for share in of_layer)]
        for name, of_layer in shares.items()
    ]
    return table(labels, columns)
