"""`ifprune convert`: a dense checkpoint goes in, an IFP checkpoint comes out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from .console import note, parameters, progress, result_json, show, stages
from .options import DtypeName, FolderOption, JsonOption, TrustOption

if TYPE_CHECKING:
    from ifprune_convert.pipeline import Conversion

SHIPPED = "shipped"
# Options under a heading of `--help`.
_source, _weights, _selecting, _output = (
    partial(typer.Option, rich_help_panel=heading) for heading in ("Source", "Weights", "Selecting", "Output")
)


# typer reads these at run time, so they are spelled for Python 3.10.
SourceOption = Annotated[
    str,
    _source(
        "--model",
        "--hf-path",
        metavar="SOURCE",
        help="A GGUF file, a folder of safetensors, or a model of the Hugging Face hub: ORG/NAME, or "
        "ORG/NAME:FILE.gguf.",
    ),
]
RevisionOption = Annotated[
    Optional[str],
    _source("--revision", help="Branch, tag or commit of a model of the hub.  [default: its main branch]"),
]
AdapterOption = Annotated[
    Optional[Path],
    _source("--adapter", metavar="FOLDER", help="An adapter of mlx_lm.lora or PEFT to fuse into the weights."),
]
QuantizeOption = Annotated[bool, _weights("--quantize", "-q", help="Quantize the weights.")]
BitsOption = Annotated[Optional[int], _weights("--q-bits", help="Bits per weight.  [default: 4; mxfp8: 8]")]
GroupSizeOption = Annotated[
    Optional[int], _weights("--q-group-size", help="Weights per scale.  [default: 64; mxfp: 32, nvfp4: 16]")
]
ModeOption = Annotated[
    Literal["affine", "mxfp4", "nvfp4", "mxfp8"], _weights("--q-mode", help="How weights are packed.")
]
FloatDownOption = Annotated[
    bool,
    _weights(
        "--float-down",
        help="Of a model that mlx-lm quantized, keep down projections as floats; their groups run the wrong way, so "
        "they are packed anew at 8 bits otherwise.",
    ),
]
CastOption = Annotated[
    Optional[DtypeName],
    _weights("--dtype", help="Float type of what is not quantized.  [default: the source's; GGUF: float16]"),
]
DefaultDensityOption = Annotated[
    Optional[float],
    _selecting(
        "--density",
        help="The checkpoint's default density.  [default: by --tolerance after --calibrate, else 0.9]",
    ),
]
DefaultToleranceOption = Annotated[
    Optional[float],
    _selecting(
        "--tolerance",
        metavar="NATS",
        help="After --calibrate, measure what each density loses on chats held out, and make the lowest that loses at "
        "most this much per answer token the default.  [default: 0.05]",
    ),
]
PredictorOption = Annotated[
    Optional[str],
    _selecting(
        "--predictor",
        metavar="FOLDER|HUB_ID",
        help="A trained sparsity predictor to put in. Adapter and prior come from there as well, if it has them and "
        "no option says otherwise.",
    ),
]
PredictorBitsOption = Annotated[
    Optional[Literal["8", "4", "none"]],
    _selecting(
        "--predictor-bits",
        help="Bits per weight of the predictor's head; 8 change 0.2 % of what is selected, 4 some 2 %.  "
        "[default: 8 with -q, else none: as it is]",
    ),
]
CalibrateOption = Annotated[
    Optional[str],
    _selecting(
        "--calibrate",
        metavar="[FILE]",
        help="Measure the prior on chats (JSON lines of messages); without FILE, on the small set that ships. "
        "Without this option and --prior, it comes from the weights alone.",
    ),
]
PriorOption = Annotated[
    Optional[Path],
    _selecting(
        "--prior", metavar="FILE", help="A ready prior, such as priors.safetensors of another checkpoint of it."
    ),
]
OrderOption = Annotated[
    Literal["source", "frequency"],
    _selecting(
        "--order",
        help="How neurons lie in the files. frequency: those selected most often on the --calibrate chats (or the "
        "small set that ships) first, one record each, which --residency ssd reads faster.",
    ),
]
OverwriteOption = Annotated[bool, _output("--overwrite", help="Replace an earlier checkpoint.")]
UploadOption = Annotated[
    Optional[str],
    _output(
        "--upload-repo",
        metavar="OWNER/NAME",
        help="Upload the result to this new or empty repository of the Hugging Face hub.",
    ),
]
UploadPredictorOption = Annotated[
    Optional[str],
    _output(
        "--upload-predictor",
        metavar="OWNER/NAME",
        help="Upload predictor, adapter and prior alone, without the weights, for --predictor of others.",
    ),
]


def with_calibrate_value(arguments: Sequence[str]) -> list[str]:
    """Give a bare `--calibrate` its value, as typer has no options with an optional value."""
    result: list[str] = []
    for argument, following in zip(arguments, [*arguments[1:], "-"], strict=True):
        bare = argument == "--calibrate" and following.startswith("-")
        result += [argument, SHIPPED] if bare else [argument]
    return result


def convert(
    context: typer.Context,
    model: SourceOption,
    revision: RevisionOption = None,
    adapter: AdapterOption = None,
    trust_remote_code: TrustOption = False,
    quantize: QuantizeOption = False,
    q_bits: BitsOption = None,
    q_group_size: GroupSizeOption = None,
    q_mode: ModeOption = "affine",
    float_down: FloatDownOption = False,
    dtype: CastOption = None,
    density: DefaultDensityOption = None,
    tolerance: DefaultToleranceOption = None,
    predictor: PredictorOption = None,
    predictor_bits: PredictorBitsOption = None,
    calibrate: CalibrateOption = None,
    prior: PriorOption = None,
    order: OrderOption = "source",
    mlx_path: FolderOption = Path("mlx_model"),
    overwrite: OverwriteOption = False,
    upload_repo: UploadOption = None,
    upload_predictor: UploadPredictorOption = None,
    json: JsonOption = False,
) -> None:
    """Convert a dense checkpoint into an IFP checkpoint, layer by layer."""
    if prior is not None and calibrate is not None:
        raise typer.BadParameter("cannot be given with --calibrate; give one of them", context, param_hint="--prior")
    import mlx.core as mx

    from ifprune_convert import calibrate as chats
    from ifprune_convert.packing import head_bits, quantization_of
    from ifprune_convert.pipeline import Options
    from ifprune_convert.pipeline import convert as run
    from ifprune_convert.share import SharedPredictor, locate_predictor
    from ifprune_mlx import IfpruneError
    from ifprune_mlx.checkpoint.density_curve import TOLERANCE

    if tolerance is not None and calibrate is None:
        raise IfpruneError("--tolerance is about what is measured after calibration; give --calibrate as well")
    if not quantize and (q_bits is not None or q_group_size is not None or q_mode != "affine"):
        raise IfpruneError("--q-bits, --q-group-size and --q-mode need --quantize (-q) as well")
    examples = None if calibrate is None else chats.SHIPPED if calibrate == SHIPPED else Path(calibrate)
    shared = SharedPredictor()
    if predictor is not None:
        with progress("download", "B") as update:
            shared = locate_predictor(predictor, update)
    options = Options(
        quantization=quantization_of(q_mode, q_group_size, q_bits) if quantize else None,
        float_down=float_down,
        dtype=None if dtype is None else getattr(mx, dtype.value),
        density=density,
        tolerance=TOLERANCE if tolerance is None else tolerance,
        adapter=adapter or shared.adapter,
        predictor=shared.predictor,
        predictor_bits=head_bits(shared.predictor, predictor_bits, quantize),
        calibration=examples,
        prior=prior or (shared.prior if examples is None else None),
        check_neurons=shared.check_neurons(),
        order=(examples or chats.SHIPPED) if order == "frequency" else None,
        overwrite=overwrite,
        revision=revision,
        trust_remote_code=trust_remote_code,
        upload_repo=upload_repo,
        upload_predictor=upload_predictor,
    )
    with stages() as report:
        done = run(model, mlx_path, options, report, note)
    _print(done, upload_repo, json)


def _print(done: Conversion, upload_repo: str | None, json: bool) -> None:
    """Print what came out."""
    from ifprune_mlx.checkpoint.budget import way_to_load

    checkpoint = done.checkpoint
    if json:
        from ifprune_mlx.bench.process_memory import most_resident

        result_json(done.to_dict() | {"peak_rss": most_resident()})
        return
    show(checkpoint.path)
    if (curve := checkpoint.curve) is not None:
        density = checkpoint.layout.density
        why = "; every density below it lost more than the tolerance" if density == 1 else ""
        note(
            f"default density {density:g}, selector {checkpoint.default_selector}{why}; `ifprune info` shows what each "
            f"density lost on {len(curve.prompts)} held-out prompts"
        )
    told, command = way_to_load(checkpoint, model=upload_repo)
    note(
        f"{parameters(checkpoint.parameters)} parameters, {len(checkpoint.layout.ffns)} FFNs, "
        f"{checkpoint.disk_bytes / 1e6:.0f} MB, in {done.seconds:.1f} s; {told or 'try'}: {command}"
    )
    if done.page is not None:
        note(f"uploaded to {done.page}")
