"""`ifprune bench`: how fast is this here, dense, sliced, and beside a plain model of the sliced size?"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from .console import gigabytes, note, progress, result_json
from .loading import open_checkpoint
from .options import DensityOption, DtypeName, DtypeOption, ModelOption

if TYPE_CHECKING:
    from ifprune_mlx import Checkpoint


def bench(
    model: ModelOption = None,
    shape: Annotated[
        Optional[str],
        typer.Option(
            "--shape",
            metavar="NAME",
            help="Instead of a model, noise in the shape of one: paper-6b, paper-9b, paper-12b, llama-8b, or a "
            "config.json.",
        ),
    ] = None,
    layers: Annotated[
        Optional[int],
        typer.Option(
            "--layers", min=1, help="Of a shape, only so many layers, with vocabulary and predictor in proportion."
        ),
    ] = None,
    quantize: Annotated[bool, typer.Option("--quantize", "-q", help="Quantize a shape's weights.")] = False,
    q_bits: Annotated[int, typer.Option("--q-bits", help="Bits per weight, with -q.")] = 4,
    density: DensityOption = None,
    dtype: DtypeOption = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", "-p", min=2, help="Tokens to read.")] = 128,
    generation_tokens: Annotated[
        int, typer.Option("--generation-tokens", "-g", min=2, help="Tokens to generate.")
    ] = 32,
    num_trials: Annotated[int, typer.Option("--num-trials", "-n", min=1, help="Counted rounds.")] = 7,
    stock: Annotated[
        bool, typer.Option("--stock/--no-stock", help="Compare with plain models of mlx-lm, which are written first.")
    ] = True,
    ssd: Annotated[bool, typer.Option("--ssd/--no-ssd", help="Measure residency ssd as well.")] = True,
    work: Annotated[
        Optional[Path],
        typer.Option("--work", metavar="FOLDER", help="Where to write models.  [default: the temporary folder]"),
    ] = None,
    plot: Annotated[
        Optional[Path], typer.Option("--plot", metavar="FILE", help="Draw the rates as .png or .svg.")
    ] = None,
    json: Annotated[
        Optional[Path], typer.Option("--json", metavar="FILE", help="Write one JSON line to FILE; - is stdout.")
    ] = None,
) -> None:
    """Time a model dense and sliced beside plain models of both sizes, in turn, and print medians."""
    from ifprune_mlx import IfpruneError
    from ifprune_mlx.checkpoint.atomic_write import write_atomic

    if json is not None and json.is_dir():
        raise IfpruneError(f"--json {json}: is a folder; give a file, or - for stdout")
    if shape is not None and model is not None:
        raise IfpruneError("--shape and --model: a shape is measured instead of a model; give one of them")
    if shape is None and (layers is not None or quantize):
        raise IfpruneError("--layers and -q are for --shape; a model is measured as it is")
    if work is not None and not work.is_dir():
        raise IfpruneError(f"--work {work}: no such folder; make it first")
    if plot is not None:
        from ifprune_mlx.eval.plots import check_plot

        check_plot(plot, "--plot")
    if sys.platform == "linux" and "blas" not in os.environ.get("LD_PRELOAD", ""):
        note(
            "float32 is slow here: no BLAS is preloaded (on Debian: apt install libopenblas0-pthread, then make bench)"
        )
    with tempfile.TemporaryDirectory(prefix="ifprune-bench-", dir=work) as folder:
        checkpoint = (
            open_checkpoint(model)
            if shape is None
            else _noise(Path(folder), shape, layers, dtype or DtypeName.float32, q_bits if quantize else None)
        )
        result = {"shape": shape or "checkpoint"}
        result |= _measure(
            checkpoint,
            Path(folder),
            None if shape is not None or dtype is None else dtype.value,
            density,
            (prompt_tokens, generation_tokens, num_trials),
            stock,
            ssd,
        )
    if plot is not None:
        _draw(result, plot)
    if json is not None and str(json) == "-":
        result_json(result)
        return
    if json is not None:
        import json as encoder

        text = encoder.dumps(result) + "\n"
        write_atomic(json, lambda file: file.write_text(text, encoding="utf-8"), IfpruneError)
    print("\n".join(_table(result)))


def _noise(folder: Path, name: str, layers: int | None, dtype: DtypeName, bits: int | None) -> Checkpoint:
    import mlx.core as mx

    from ifprune_convert.bench_models import make_noise
    from ifprune_convert.packing import quantization_of
    from ifprune_convert.synthetic import shape_of

    shape = shape_of(name)
    if layers is not None:
        shape = shape.scaled(layers)
    packed = None if bits is None else quantization_of("affine", None, bits)
    with progress("make", "weights") as update:
        return make_noise(folder, shape, getattr(mx, dtype.value), packed, update)


def _measure(
    checkpoint: Checkpoint,
    folder: Path,
    dtype: str | None,
    density: float | None,
    counts: tuple[int, int, int],
    stock: bool,
    ssd: bool,
) -> dict[str, Any]:
    from ifprune_convert.bench_models import check_room, make_plain
    from ifprune_mlx import IfpruneError
    from ifprune_mlx.bench.benchmark import Settings
    from ifprune_mlx.bench.benchmark import bench as measure
    from ifprune_mlx.checkpoint.budget import resolve_keep

    keep = resolve_keep(checkpoint, density=density)
    length, limit = counts[0] + counts[1], checkpoint.config.get("max_position_embeddings")
    if limit is not None and length > limit:
        raise IfpruneError(f"{length} tokens to read and generate: the model's context holds {limit}; give fewer")
    plain = None
    if stock:
        check_room(folder, checkpoint, keep)
        with progress("export", "B") as update:
            plain = make_plain(folder, checkpoint, keep, update)
    settings = Settings(
        checkpoint,
        None if plain is None else plain.dense,
        None if plain is None else plain.static,
        ssd,
        keep,
        dtype,
        *counts,
        folder,
    )
    with progress("bench", "trials") as update:
        return measure(settings, update)


def _table(result: dict[str, Any]) -> list[str]:
    """In words: a row each, and what the ratios say."""
    bandwidth, ratios, intervals = result["machine"]["bandwidth"], result["ratios"], result["intervals"]
    heads = ("prefill tok/s", "decode tok/s", "of limit", "select s", "switch s", "TTFT s", "MLX peak", "resident")
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for row in result["rows"]:
        share = "" if row["share_of_limit"] is None else f"{100 * row['share_of_limit']:.0f} %"
        decode = f"{row['decode_tok_s']:.2f} ± {50 * row['decode_spread']:.0f} %"
        cells = [row["name"], f"{row['prefill_tok_s']:.1f}", decode, share]
        cells += [f"{row[what]:.3f}" for what in ("select_s", "switch_s", "ttft_s")]
        cells += [gigabytes(row["peak_memory"]), gigabytes(row["rss"])]
        lines.append("| " + " | ".join(cells) + " |")
    said = {
        "decode_vs_static": "sliced decoding / a plain model of that size",
        "prefill_vs_static": "sliced prefill / a plain model of that size",
        "decode_vs_dense_limit": "sliced decoding / dense decoding times the bytes that a token reads less",
        "ssd_decode_vs_static": "sliced decoding with residency ssd / a plain model of that size",
    }
    lines.append("")
    for name, words in said.items():
        if name in intervals:
            at = intervals[name]
            lines.append(f"{words}: {at['median']:.3f} [{at['low']:.3f}, {at['high']:.3f}]")
    shares = [
        ("select_switch_share_of_ttft", "select and switch / time to first token, 80 % of the neurons shared"),
        ("select_switch_share_of_ttft_random", "the same, between two arbitrary selections"),
        ("select_switch_share_of_ttft_live", "the same, for an instruction whose selection is live"),
        ("switch_bytes_share", "neurons that entered at 80 % overlap / active neurons, in bytes"),
        ("switch_written_share", "bytes written for that / bytes of active neurons"),
        ("switch_s_vs_random", "time of that switch / of a switch between arbitrary selections"),
        ("resident_vs_static", "resident with residency ssd, without the predictor / a plain model of that size"),
    ]
    lines += [f"{words}: {ratios[name]:.3f}" for name, words in shares if ratios[name] is not None]
    if result["selector"] == "random":
        lines.append("select s: no predictor here; arbitrary neurons were drawn")
    moved = max(row["moved_in_decode"] for row in result["rows"])
    lines.append(f"bytes of weights moved while decoding: {moved:.0f}")
    lines.append(f"memory is read at {bandwidth / 1e9:.1f} GB/s (limit: a token reads every active weight once)")
    return lines


def _draw(result: dict[str, Any], path: Path) -> None:
    from ifprune_mlx.eval.plots import bar_chart, write_figure

    rates = {
        row["name"]: {
            "measured": row["decode_tok_s"],
            "limit of the memory": row["decode_tok_s"] / row["share_of_limit"],
        }
        for row in result["rows"]
        if row["share_of_limit"] is not None
    }
    title = f"Decoding, {result['shape']}, {result['layers']} layers, density {result['density']:.2f}"
    write_figure(bar_chart(title, "tokens per second", rates), path)
