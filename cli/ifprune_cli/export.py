"""`ifprune export`: one selection of a checkpoint as a plain model for mlx-lm."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from .console import note, parameters, progress, result_json
from .generate import as_messages, check_exclusive, read_prompt
from .loading import check_selection, load_model, open_checkpoint
from .options import (
    ActiveParamsOption,
    Budget,
    DensityOption,
    DtypeName,
    DtypeOption,
    ModelOption,
    SeedOption,
    SelectionOption,
    SelectorName,
    SelectorOption,
    SystemPromptOption,
    TrustOption,
)

if TYPE_CHECKING:
    from ifprune_mlx import Checkpoint, Selection


def export(
    mlx_path: Annotated[Path, typer.Option("--mlx-path", metavar="FOLDER", help="Where to write.")],
    model: ModelOption = None,
    selection: SelectionOption = None,
    prompt: Annotated[
        Optional[str], typer.Option("--prompt", "-p", help="Select for this instruction; - reads it from stdin.")
    ] = None,
    system_prompt: SystemPromptOption = None,
    selector: SelectorOption = None,
    density: DensityOption = None,
    active_params: ActiveParamsOption = None,
    requantize_down: Annotated[
        bool,
        typer.Option(
            "--requantize-down",
            help="Of a quantized checkpoint, pack the down projections too, which rounds them once more; "
            "else they become floats.",
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    seed: SeedOption = 0,
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write the neurons of one selection as a plain model, which mlx-lm runs without ifprune."""
    check_exclusive(
        {"--selection": selection, "--prompt": prompt},
        {"--selection": selection, "--system-prompt": system_prompt},
        {"--selection": selection, "--selector": selector},
        {"--selection": selection, "--density": density, "--active-params": active_params},
    )
    text = None if prompt is None else read_prompt(prompt)
    import mlx.core as mx

    from ifprune_convert.export import check_output, export_selection
    from ifprune_mlx import IfpruneError, Selection

    check_output(mlx_path, overwrite)
    if selection is not None:
        chosen = Selection.load(selection)
        checkpoint = open_checkpoint(model)
        check_selection(checkpoint, chosen, selection)
    elif text is not None:
        budget = Budget(density, active_params, None)
        checkpoint, chosen = _select(model, text, system_prompt, selector, budget, seed, dtype, trust_remote_code)
    else:
        raise IfpruneError("nothing says which neurons to keep; give --selection FILE or --prompt TEXT")
    with progress("export", "bytes") as update:
        exported = export_selection(
            checkpoint,
            chosen,
            mlx_path,
            dtype=None if dtype is None else getattr(mx, dtype.value),
            requantize_down=requantize_down,
            overwrite=overwrite,
            report=update,
        )
    quantization = exported.quantization
    packing = None if quantization is None else {key: quantization[key] for key in ("group_size", "bits", "mode")}
    if json:
        result_json(
            {
                "path": str(exported.path),
                "bytes": exported.bytes,
                "seconds": exported.seconds,
                "selection": chosen.hash,
                "selector": chosen.selector,
                "density": chosen.density,
                "k": list(chosen.keep),
                "parameters": exported.parameters,
                "quantization": packing,
                "down_quantized": packing is not None and requantize_down,
            }
        )
        return
    print(exported.path)
    note(
        f"{parameters(exported.parameters)} parameters, {exported.bytes / 1e6:.0f} MB, selection {chosen.hash} "
        f"({chosen.selector}, density {chosen.density:.3f}), in {exported.seconds:.1f} s; "
        f"try: mlx_lm.generate --model {exported.path} --prompt ..."
    )
    if packing is not None and not requantize_down:
        note("the down projections are stored as floats; --requantize-down packs them, at some loss")


def _select(
    model: str | None,
    text: str,
    system_prompt: str | None,
    selector: SelectorName | None,
    budget: Budget,
    seed: int,
    dtype: DtypeName | None,
    trust_remote_code: bool,
) -> tuple[Checkpoint, Selection]:
    """What an instruction selects; the model that this took is given back before anything is written."""
    from ifprune_mlx import Instruction, make_selector
    from ifprune_mlx.chat_template import check_prompt, render_messages

    amount = budget.arguments()
    loaded, tokenizer = load_model(model, dtype, trust_remote_code)
    tokens = render_messages(tokenizer, as_messages(text, system_prompt))
    check_prompt(loaded, tokens)
    chooser = make_selector(loaded, None if selector is None else selector.value, seed=seed)
    chosen = chooser.select(Instruction(text, tuple(tokens)), loaded.keep(**amount)).selection
    loaded.close()
    return loaded.checkpoint, chosen
