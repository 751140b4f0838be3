"""`ifprune select`: which neurons does an instruction select, and which does it share with others?"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from .console import note, result_json, shortened
from .generate import as_messages, read_prompt
from .loading import check_selection, load_model
from .options import (
    ActiveParamsOption,
    Budget,
    DensityOption,
    DtypeOption,
    MemoryOption,
    ModelOption,
    ResidencyOption,
    SeedOption,
    Selecting,
    SelectionCacheOption,
    SelectorOption,
    SelectWindowOption,
    SystemPromptOption,
    TrustOption,
)

if TYPE_CHECKING:
    from ifprune_mlx import Selection, TaskStore

_NAME_WIDTH = 28


def select(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The instruction; - reads it from stdin.")],
    model: ModelOption = None,
    system_prompt: SystemPromptOption = None,
    selector: SelectorOption = None,
    select_window: SelectWindowOption = None,
    selection_cache: SelectionCacheOption = None,
    density: DensityOption = None,
    active_params: ActiveParamsOption = None,
    memory: MemoryOption = None,
    residency: ResidencyOption = None,
    with_prompt: Annotated[
        Optional[list[str]],
        typer.Option("--with-prompt", metavar="TEXT", help="Print the overlap with what TEXT selects; repeatable."),
    ] = None,
    compare: Annotated[
        Optional[list[Path]],
        typer.Option("--compare", metavar="FILE", help="Print the overlap with a saved selection; repeatable."),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Print every FFN's neurons and overlaps, too.")] = False,
    save: Annotated[
        Optional[str], typer.Option("--save", metavar="NAME", help="Save the selection as a task, for --task NAME.")
    ] = None,
    save_to: Annotated[
        Optional[Path], typer.Option("--save-to", metavar="FILE", help="Save the selection (.safetensors).")
    ] = None,
    plot: Annotated[
        Optional[Path],
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Draw where the kept neurons lie, or, with --with-prompt or --compare, the overlaps (.png or .svg). "
            "Needs ifprune-mlx[plots].",
        ),
    ] = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Select neurons for an instruction, compare them with other selections, and show or save them."""
    text = read_prompt(prompt)
    texts = dict.fromkeys(read_prompt(other, "--with-prompt") for other in with_prompt or [])
    from ifprune_mlx import Instruction, Selection, TaskStore, make_selector
    from ifprune_mlx.chat_template import check_prompt, render_messages
    from ifprune_mlx.selection.selection import top_k

    _check_outputs(save, save_to, plot)
    files = {file: Selection.load(file) for file in compare or []}
    budget = Budget(density, active_params, memory).arguments()
    loaded, tokenizer = load_model(model, dtype, trust_remote_code, residency=residency, memory=budget["memory"])
    Selecting(select_window, selection_cache).apply(loaded)
    for file, other in files.items():
        check_selection(loaded, other, file)
    instructions = []
    for each in (text, *texts):
        tokens = render_messages(tokenizer, as_messages(each, system_prompt))
        check_prompt(loaded, tokens)
        instructions.append(Instruction(each, tuple(tokens)))
    keep = loaded.keep(**budget)
    chooser = make_selector(loaded, None if selector is None else selector.value, seed=seed)
    start = time.perf_counter()
    selection = chooser.select(instructions[0], keep).selection
    seconds = time.perf_counter() - start
    store = TaskStore(loaded.checkpoint)
    others = _named(
        static={"static": top_k(loaded.prior, keep, "static")},
        task=_tasks(store),
        file={str(file): other for file, other in files.items()},
        prompt={other.text: chooser.select(other, keep).selection for other in instructions[1:]},
    )
    shares = {name: selection.overlap_by_layer(other) for name, other in others.items()}
    if save_to is not None:
        selection.save(save_to)
    if save is not None:
        store.save(save, selection)
    if plot is not None:
        _draw(plot, text, selection, others if texts or files else {})
    if json:
        result_json(
            {
                "selection": selection.hash,
                "selector": selection.selector,
                "density": selection.density,
                "k": list(selection.keep),
                "overlap_with": {name: selection.overlap(other) for name, other in others.items()},
                **({"overlap_by_layer": shares} if layers else {}),
                "select_s": seconds,
            }
        )
        return
    print(selection.hash)
    if layers:
        print("\n".join(_table(selection, shares)), flush=True)
    _notes(selection, others, seconds)
    if save_to is not None:
        note(f"saved to {save_to}; use it with: ifprune generate --selection {save_to} --prompt ...")
    if plot is not None:
        note(f"drawn in {plot}")
    if save is not None:
        note(f"saved as task {save}; use it with: ifprune generate --task {save} --prompt ...")


def _check_outputs(save: str | None, save_to: Path | None, plot: Path | None) -> None:
    """Raise IfpruneError for a name that a task, a selection file or a chart cannot have."""
    from ifprune_mlx import SelectionError
    from ifprune_mlx.eval.plots import check_plot
    from ifprune_mlx.selection.presets import check_task_name

    if save is not None:
        check_task_name(save)
    if save_to is not None and save_to.suffix != ".safetensors":
        raise SelectionError(f"{save_to}: a selection file ends in .safetensors")
    if plot is not None:
        check_plot(plot, "--plot")


def _notes(selection: Selection, others: dict[str, Selection], seconds: float) -> None:
    """How many neurons are kept, and how many of them the others keep, too."""
    widths = selection.widths
    kept = f"{sum(selection.keep)} of {sum(widths)} neurons in {len(widths)} FFNs"
    note(f"{selection.selector}, density {selection.density:.3f}: {kept}, selected in {seconds:.2f} s")
    for name, other in others.items():
        note(f"overlap with {shortened(name, 60)}: {100 * selection.overlap(other):.1f} %")


def _draw(plot: Path, text: str, selection: Selection, others: dict[str, Selection]) -> None:
    """One selection as strips, or it and others as a matrix of overlaps."""
    from ifprune_mlx.eval.analysis import selection_chart, selections_chart
    from ifprune_mlx.eval.plots import write_figure

    if not others:
        title = f"Kept for: {shortened(text, 60)} ({selection.selector}, density {selection.density:.2f})"
        write_figure(selection_chart(title, selection), plot)
        return
    short: dict[str, Selection] = {}
    for name, each in {text: selection, **others}.items():
        label = shortened(name, _NAME_WIDTH)
        # Two that begin alike are told apart by their place.
        short[f"{label} ({len(short) + 1})" if label in short else label] = each
    write_figure(selections_chart(f"Neurons in common ({selection.selector})", short), plot)


def _tasks(store: TaskStore) -> dict[str, Selection]:
    """The selections of all named tasks. One that cannot be used is not what was asked about: it is only noted."""
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
    columns = [shortened(name, _NAME_WIDTH) for name in shares]
    lines = [f"{'FFN':>4} {'neurons':>8} {'kept':>8} " + " ".join(f"{name:>9}" for name in columns)]
    for index, (width, k) in enumerate(zip(selection.widths, selection.keep, strict=True)):
        cells = [
            f"{values[index]:>{max(9, len(name))}.3f}" for name, values in zip(columns, shares.values(), strict=True)
        ]
        lines.append(f"{index:>4} {width:>8} {k:>8} " + " ".join(cells))
    return lines
