"""`ifprune select`: which neurons does an instruction select?"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from .console import note, result_json
from .generate import as_messages, read_prompt
from .loading import check_selection, load_model
from .options import (
    ActiveParamsOption,
    Budget,
    DensityOption,
    DtypeOption,
    MemoryOption,
    ModelOption,
    SeedOption,
    SelectorOption,
    SystemPromptOption,
    TrustOption,
)


def select(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The instruction; - reads it from stdin.")],
    model: ModelOption = None,
    system_prompt: SystemPromptOption = None,
    selector: SelectorOption = None,
    density: DensityOption = None,
    active_params: ActiveParamsOption = None,
    memory: MemoryOption = None,
    compare: Annotated[
        Optional[list[Path]],
        typer.Option("--compare", metavar="FILE", help="Print the overlap with a saved selection; repeatable."),
    ] = None,
    save_to: Annotated[
        Optional[Path], typer.Option("--save-to", metavar="FILE", help="Save the selection (.safetensors).")
    ] = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Select neurons for an instruction, and show or save the selection."""
    text = read_prompt(prompt)
    from ifprune_mlx import Instruction, Selection, SelectionError, make_selector
    from ifprune_mlx.prompts import check_prompt, render_messages
    from ifprune_mlx.selection import top_k

    if save_to is not None and save_to.suffix != ".safetensors":
        raise SelectionError(f"{save_to}: a selection file ends in .safetensors")
    others = {file: Selection.load(file) for file in compare or []}
    budget = Budget(density, active_params, memory).arguments()
    loaded, tokenizer = load_model(model, dtype, trust_remote_code)
    for file, other in others.items():
        check_selection(loaded, other, file)
    tokens = render_messages(tokenizer, as_messages(text, system_prompt))
    check_prompt(loaded, tokens)
    keep = loaded.keep(**budget)
    chooser = make_selector(loaded, None if selector is None else selector.value, seed=seed)
    start = time.perf_counter()
    selection = chooser.select(Instruction(text, tuple(tokens)), keep).selection
    seconds = time.perf_counter() - start
    static = top_k(loaded.prior, keep, "static")
    overlaps = {"static": selection.overlap(static)}
    overlaps |= {str(file): selection.overlap(other) for file, other in others.items()}
    if save_to is not None:
        selection.save(save_to)
    if json:
        result_json(
            {
                "selection": selection.hash,
                "selector": selection.selector,
                "density": selection.density,
                "k": list(selection.keep),
                "overlap_with": overlaps,
                "select_s": seconds,
            }
        )
        return
    print(selection.hash)
    widths = selection.widths
    kept = f"{sum(selection.keep)} of {sum(widths)} neurons in {len(widths)} FFNs"
    note(f"{selection.selector}, density {selection.density:.3f}: {kept}, selected in {seconds:.2f} s")
    for name, share in overlaps.items():
        note(f"overlap with {name}: {100 * share:.1f} %")
    if save_to is not None:
        note(f"saved to {save_to}; use it with: ifprune generate --selection {save_to} --prompt ...")
