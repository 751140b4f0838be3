"""`ifprune export`: one selection of a checkpoint as a plain model for mlx-lm."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from .console import note, parameters, progress, result_json, show
from .generate import as_messages, read_prompt
from .loading import check_selection, load_model, open_checkpoint
from .options import (
    ActiveParamsOption,
    Budget,
    DialOption,
    DtypeOption,
    FolderOption,
    IgnoreTemplateOption,
    JsonOption,
    ModelOption,
    SeedOption,
    SelectionOption,
    SelectorOption,
    SystemPromptOption,
    TaskOption,
    TrustOption,
    check_exclusive,
)

if TYPE_CHECKING:
    from ifprune_convert.export import Export
    from ifprune_mlx import Selection

# Options under a heading of `--help`.
_selecting, _output = (partial(typer.Option, rich_help_panel=heading) for heading in ("Selection", "Output"))
PromptOption = Annotated[
    Optional[str], _selecting("--prompt", "-p", help="Select for this instruction; - reads it from stdin.")
]
RequantizeOption = Annotated[
    bool,
    _output(
        "--requantize-down",
        help="Of a quantized checkpoint, pack the down projections too, which rounds them once more; "
        "else they become floats.",
    ),
]
OverwriteOption = Annotated[bool, _output("--overwrite", help="Replace an earlier export.")]


def export(
    mlx_path: FolderOption,
    model: ModelOption = None,
    selection: SelectionOption = None,
    task: TaskOption = None,
    prompt: PromptOption = None,
    system_prompt: SystemPromptOption = None,
    ignore_chat_template: IgnoreTemplateOption = False,
    selector: SelectorOption = None,
    density: DialOption = None,
    active_params: ActiveParamsOption = None,
    requantize_down: RequantizeOption = False,
    overwrite: OverwriteOption = False,
    seed: SeedOption = 0,
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Write the neurons of one selection as a plain model, which mlx-lm runs without ifprune."""
    budget = Budget(density, active_params=active_params)
    ways = ({"--prompt": prompt}, {"--system-prompt": system_prompt}, {"--selector": selector})
    amounts = {"--density": density, "--active-params": active_params}
    fixed = {"--selection": selection, "--task": task}
    check_exclusive(*({**fixed, **way} for way in (*ways, amounts)))
    text = None if prompt is None else read_prompt(prompt)
    import mlx.core as mx

    from ifprune_convert.export import check_output, export_selection, select_for
    from ifprune_mlx import IfpruneError, Selection, TaskStore

    check_output(mlx_path, overwrite)
    if selection is not None:
        chosen = Selection.load(selection)
        checkpoint = open_checkpoint(model)
        check_selection(checkpoint, chosen, selection)
    elif task is not None:
        checkpoint = open_checkpoint(model)
        chosen = TaskStore(checkpoint).load(task)
    elif text is not None:
        loaded, tokenizer = load_model(model, dtype, trust_remote_code, template=not ignore_chat_template)
        messages = as_messages(text, system_prompt)
        checkpoint = loaded.checkpoint
        limits, name = budget.on(checkpoint, selector and selector.value)
        chosen = select_for(loaded, tokenizer, text, messages, name, seed, **limits)
        loaded.close()  # before anything is written
    else:
        raise IfpruneError("nothing says which neurons to keep; give --selection FILE, --task NAME or --prompt TEXT")
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
    _print(exported, chosen, requantize_down, json)


def _print(exported: Export, chosen: Selection, requantize_down: bool, json: bool) -> None:
    packed = exported.quantization is not None
    if json:
        result_json(exported.to_dict() | {"down_quantized": packed and requantize_down})
        return
    show(exported.path)
    note(
        f"{parameters(exported.parameters)} parameters, {exported.bytes / 1e6:.0f} MB, selection {chosen.hash} "
        f"({chosen.selector}, density {chosen.density:.3f}), in {exported.seconds:.1f} s; "
        f"try: mlx_lm.generate --model {exported.path} --prompt ..."
    )
    if packed and not requantize_down:
        note("the down projections are stored as floats; --requantize-down packs them, at some loss")
