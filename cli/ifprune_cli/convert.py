"""`ifprune convert`: a dense checkpoint goes in, an IFP checkpoint comes out."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from .console import note, parameters, progress, result_json
from .options import DtypeName, TrustOption

if TYPE_CHECKING:
    from ifprune_convert.pipeline import Options

SHIPPED = "shipped"
_SLOW_WEIGHTS = 50_000_000


class ModeName(str, Enum):
    """Quantization modes, in mlx-lm's names."""

    affine = "affine"
    mxfp4 = "mxfp4"
    nvfp4 = "nvfp4"
    mxfp8 = "mxfp8"


class OrderName(str, Enum):
    """How neurons lie in their files."""

    source = "source"
    frequency = "frequency"


class PredictorBits(str, Enum):
    """What a predictor's head is packed with."""

    eight = "8"
    four = "4"
    none = "none"


def with_calibrate_value(arguments: Sequence[str]) -> list[str]:
    """Give a bare `--calibrate` its value; typer has no options whose value may be left out."""
    result: list[str] = []
    for index, argument in enumerate(arguments):
        result.append(argument)
        following = arguments[index + 1] if index + 1 < len(arguments) else "-"
        if argument == "--calibrate" and following.startswith("-"):
            result.append(SHIPPED)
    return result


def convert(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "--hf-path",
            metavar="SOURCE",
            help="A GGUF file, a folder of safetensors, or a model of the Hugging Face hub: ORG/NAME, or "
            "ORG/NAME:FILE.gguf.",
        ),
    ],
    revision: Annotated[
        Optional[str],
        typer.Option("--revision", help="Branch, tag or commit of a model of the hub.  [default: its main branch]"),
    ] = None,
    mlx_path: Annotated[Path, typer.Option("--mlx-path", metavar="FOLDER", help="Where to write.")] = Path("mlx_model"),
    quantize: Annotated[bool, typer.Option("--quantize", "-q", help="Quantize the weights.")] = False,
    q_bits: Annotated[Optional[int], typer.Option("--q-bits", help="Bits per weight.  [default: 4; mxfp8: 8]")] = None,
    q_group_size: Annotated[
        Optional[int], typer.Option("--q-group-size", help="Weights per scale.  [default: 64; mxfp: 32, nvfp4: 16]")
    ] = None,
    q_mode: Annotated[ModeName, typer.Option("--q-mode", help="How weights are packed.")] = ModeName.affine,
    float_down: Annotated[
        bool,
        typer.Option(
            "--float-down",
            help="Of a model that mlx-lm quantized, keep down projections as floats; their groups run the wrong way, "
            "so they are packed anew at 8 bits otherwise.",
        ),
    ] = False,
    dtype: Annotated[
        Optional[DtypeName],
        typer.Option("--dtype", help="Float type of what is not quantized.  [default: the source's; GGUF: float16]"),
    ] = None,
    density: Annotated[
        Optional[float], typer.Option("--density", help="The checkpoint's default density.  [default: 0.9]")
    ] = None,
    adapter: Annotated[
        Optional[Path],
        typer.Option("--adapter", metavar="FOLDER", help="An adapter of mlx_lm.lora or PEFT to fuse into the weights."),
    ] = None,
    predictor: Annotated[
        Optional[Path], typer.Option("--predictor", metavar="FOLDER", help="A trained sparsity predictor to put in.")
    ] = None,
    predictor_bits: Annotated[
        Optional[PredictorBits],
        typer.Option(
            "--predictor-bits",
            help="Bits per weight of the predictor's head; 8 change 0.2 % of what is selected, 4 some 2 %.  "
            "[default: 8 with -q, else none: as it is]",
        ),
    ] = None,
    calibrate: Annotated[
        Optional[str],
        typer.Option(
            "--calibrate",
            metavar="[FILE]",
            help="Measure the prior on chats (JSON lines of messages); without FILE, on the small set that ships. "
            "Without this option and --prior, it comes from the weights alone.",
        ),
    ] = None,
    prior: Annotated[
        Optional[Path],
        typer.Option(
            "--prior", metavar="FILE", help="A ready prior, such as priors.safetensors of another checkpoint of it."
        ),
    ] = None,
    order: Annotated[
        OrderName,
        typer.Option(
            "--order",
            help="How neurons lie in the files. frequency: those selected most often on the --calibrate chats (or the "
            "small set that ships) first, one record each, which --residency ssd reads faster.",
        ),
    ] = OrderName.source,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
    upload_repo: Annotated[
        Optional[str],
        typer.Option(
            "--upload-repo",
            metavar="OWNER/NAME",
            help="Upload the result to this new or empty repository of the Hugging Face hub.",
        ),
    ] = None,
    trust_remote_code: TrustOption = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Convert a dense checkpoint into an IFP checkpoint, layer by layer."""
    if prior is not None and calibrate is not None:
        raise typer.BadParameter("cannot be given with --calibrate; give one of them", context, param_hint="--prior")

    import mlx.core as mx

    from ifprune_convert.calibrate import read_examples, shipped_examples
    from ifprune_convert.packing import quantization_of
    from ifprune_convert.pipeline import DEFAULT_DENSITY, Options, check_output
    from ifprune_convert.pipeline import convert as run
    from ifprune_convert.readers import open_source
    from ifprune_convert.readers.hub import locate_source
    from ifprune_convert.upload import check_upload, upload
    from ifprune_mlx import IfpruneError

    if not quantize and (q_bits is not None or q_group_size is not None or q_mode is not ModeName.affine):
        raise IfpruneError("--q-bits, --q-group-size and --q-mode need --quantize (-q) as well")
    examples = None
    if calibrate is not None:
        examples = shipped_examples() if calibrate == SHIPPED else read_examples(Path(calibrate))
    options = Options(
        quantization=quantization_of(q_mode.value, q_group_size, q_bits) if quantize else None,
        float_down=float_down,
        dtype=None if dtype is None else getattr(mx, dtype.value),
        density=DEFAULT_DENSITY if density is None else density,
        adapter=adapter,
        predictor=predictor,
        predictor_bits=_head_bits(predictor, predictor_bits, quantize),
        calibration=examples,
        prior=prior,
        order=(examples or shipped_examples()) if order is OrderName.frequency else None,
        overwrite=overwrite,
    )
    check_output(mlx_path, overwrite)
    if upload_repo is not None:
        check_upload(upload_repo)
    with progress("download", "B") as downloaded:
        path = locate_source(
            model,
            revision,
            out=mlx_path,
            bits=_bits(options),
            trust_remote_code=trust_remote_code,
            progress=downloaded,
        )
    source = open_source(path, trust_remote_code=trust_remote_code)
    if examples is None and prior is None and predictor is None:
        note(
            "without --calibrate, which neurons matter is guessed from the weights, and for some families (Gemma 3) "
            "that is no better than chance"
        )
    if examples is not None and mx.default_device() == mx.cpu and (quantize or dtype is not DtypeName.float32):
        weights_count = sum(math.prod(shape) for shape in source.shapes.values())
        if weights_count > _SLOW_WEIGHTS:
            note("calibrating on a CPU is slow at half precision and quantized; --dtype float32 without -q is quicker")
    with (
        progress("convert", "weights") as weights,
        progress("calibrate", "tokens") as tokens,
        progress("order", "chats") as chats,
    ):
        counters = {"convert": weights, "calibrate": tokens, "order": chats}
        conversion = run(
            source,
            mlx_path,
            options,
            lambda stage, done, total: counters[stage](done, total),
        )
    checkpoint = conversion.checkpoint
    page = None
    if upload_repo is not None:
        note(f"uploading {checkpoint.path} ({checkpoint.disk_bytes / 1e6:.0f} MB) to {upload_repo}")
        page = upload(checkpoint, upload_repo, bars=sys.stderr.isatty())
    quantization = checkpoint.layout.gate_up or checkpoint.layout.down
    if json:
        result_json(
            {
                "path": str(checkpoint.path),
                "bytes": checkpoint.disk_bytes,
                "seconds": conversion.seconds,
                "peak_rss": _peak_rss(),
                "ffns": len(checkpoint.layout.ffns),
                "parameters": checkpoint.parameters,
                "quantization": None if quantization is None else quantization.to_dict(),
            }
            | ({} if page is None else {"uploaded": page})
        )
        return
    print(checkpoint.path)
    note(
        f"{parameters(checkpoint.parameters)} parameters, {len(checkpoint.layout.ffns)} FFNs, "
        f"{checkpoint.disk_bytes / 1e6:.0f} MB, in {conversion.seconds:.1f} s; "
        f"try: ifprune chat --model {checkpoint.path if page is None else upload_repo}"
    )
    if page is not None:
        note(f"uploaded to {page}")


def _head_bits(predictor: Path | None, given: PredictorBits | None, quantize: bool) -> int | None:
    """What to pack the predictor's head with; None leaves it as it is."""
    from ifprune_mlx import IfpruneError

    if predictor is None:
        if given is not None:
            raise IfpruneError(f"--predictor-bits {given.value} needs --predictor FOLDER as well")
        return None
    chosen = given or (PredictorBits.eight if quantize else PredictorBits.none)
    return None if chosen is PredictorBits.none else int(chosen.value)


def _bits(options: Options) -> float | None:
    """Bits that a weight takes once converted, group scales and biases included; None if it stays as it is."""
    if (quantization := options.quantization) is not None:
        scales = 32 if quantization.has_biases else 8
        return quantization.bits + scales / quantization.group_size
    return None if options.dtype is None else 8.0 * options.dtype.size


def _peak_rss() -> int:
    """Peak resident memory of this process in bytes (macOS counts bytes, Linux kilobytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
