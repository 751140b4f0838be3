"""`ifprune bench`: how fast is this here, dense, sliced, and beside a plain model of the sliced size?"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from .console import gigabytes, kernel_lines, note, progress, result_json, show
from .loading import model_name, open_checkpoint
from .options import (
    AnyModelOption,
    DensityOption,
    DtypeName,
    DtypeOption,
    JsonFileOption,
    NoConvertOption,
    output_option,
)
from .ranks import follows, mute

if TYPE_CHECKING:
    from ifprune_mlx import Checkpoint

_shape_option = partial(typer.Option, rich_help_panel="Shape")


@dataclass(frozen=True)
class _Shape:
    """A model of noise to measure instead of a checkpoint."""

    shape: Annotated[
        Optional[str],
        _shape_option(
            "--shape",
            metavar="NAME",
            help="Measure noise in the shape of a model: paper-6b, paper-9b, paper-12b, llama-8b, or a config.json.",
        ),
    ] = None
    layers: Annotated[
        Optional[int],
        _shape_option(
            "--layers",
            min=1,
            help="Make only so many of the shape's layers, with vocabulary and predictor in proportion.",
        ),
    ] = None
    quantize: Annotated[bool, _shape_option("--quantize", "-q", help="Quantize the shape's weights.")] = False
    q_bits: Annotated[int, _shape_option("--q-bits", help="Quantize to this many bits per weight.")] = 4

    def make(self, folder: Path, dtype: DtypeName | None) -> Checkpoint:
        """Write the checkpoint, by default in float32."""
        import mlx.core as mx

        from ifprune_convert.bench_models import make_noise
        from ifprune_convert.packing import quantization_of
        from ifprune_convert.synthetic import shape_of

        assert self.shape is not None
        shape = shape_of(self.shape)
        if self.layers is not None:
            shape = shape.scaled(self.layers)
        packed = quantization_of("affine", None, self.q_bits) if self.quantize else None
        floats = getattr(mx, "float32" if dtype is None else dtype.value)
        with progress("make", "weights") as update:
            return make_noise(folder, shape, floats, packed, update)


@dataclass(frozen=True)
class _Measured:
    """What is measured."""

    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", "-p", min=2, help="Read this many tokens.")] = 128
    generation_tokens: Annotated[
        int, typer.Option("--generation-tokens", "-g", min=2, help="Generate this many tokens.")
    ] = 32
    num_trials: Annotated[int, typer.Option("--num-trials", "-n", min=1, help="Count this many rounds.")] = 7
    stock: Annotated[
        bool,
        typer.Option("--stock/--no-stock", help="Compare with plain models of mlx-lm, which are written first."),
    ] = True
    ssd: Annotated[bool, typer.Option("--ssd/--no-ssd", help="Measure residency ssd as well.")] = True


@dataclass(frozen=True)
class _Outputs:
    """Where files are written."""

    work: Annotated[
        Optional[Path],
        output_option("--work", metavar="FOLDER", help="Write models here.  [default: the temporary folder]"),
    ] = None
    plot: Annotated[Optional[Path], output_option("--plot", metavar="FILE", help="Draw the rates as .png or .svg.")] = (
        None
    )
    details: Annotated[bool, output_option("--details", help="Print all that was measured.")] = False
    json: JsonFileOption = None

    def check(self) -> None:
        """Raise IfpruneError for a place where nothing can be written."""
        from ifprune_mlx import IfpruneError
        from ifprune_mlx.checkpoint.atomic_write import check_replaceable
        from ifprune_mlx.eval.plots import check_plot

        if self.json is not None and self.json.is_dir():
            raise IfpruneError(f"--json {self.json}: is a folder; give a file, or - for stdout")
        if self.json is not None:
            check_replaceable(self.json, f"--json {self.json}")
        if self.work is not None and not self.work.is_dir():
            raise IfpruneError(f"--work {self.work}: no such folder; make it first")
        if self.plot is not None:
            check_plot(self.plot, "--plot")


def bench(
    shape: _Shape,
    measured: _Measured,
    outputs: _Outputs,
    model: AnyModelOption = None,
    no_convert: NoConvertOption = False,
    dtype: DtypeOption = None,
    density: DensityOption = None,
) -> None:
    """Time a model dense and sliced beside plain models of both sizes, in turn, and print medians."""
    from ifprune_mlx import IfpruneError
    from ifprune_mlx.checkpoint.atomic_write import write_atomic
    from ifprune_mlx.model import default_dtype

    if follows():
        mute()
        outputs = _Outputs()
    if "MLX_RANK" in os.environ:  # plain models are not shared, and a second model would need ports of its own
        measured = replace(measured, stock=False, ssd=False)
    outputs.check()
    if shape.shape is not None and model is not None:
        raise IfpruneError("--shape and --model: a shape is measured instead of a model; give one of them")
    if shape.shape is None and (shape.layers is not None or shape.quantize):
        raise IfpruneError("--layers and -q are for --shape; a model is measured as it is")
    if sys.platform == "linux" and "blas" not in os.environ.get("LD_PRELOAD", ""):
        note(
            "float32 is slow here: no BLAS is preloaded (on Debian: apt install libopenblas0-pthread, then make bench)"
        )
    with tempfile.TemporaryDirectory(prefix="ifprune-bench-", dir=outputs.work) as name:
        folder = Path(name)
        if shape.shape is None:
            checkpoint, cast = open_checkpoint(model, converts=not no_convert), None if dtype is None else dtype.value
        else:
            checkpoint, cast = shape.make(folder, dtype), None
        if dtype is None and (chosen := default_dtype(checkpoint)) is not None:
            cast = str(chosen).removeprefix("mlx.core.")  # for the plain models as well
        names = {"model": shape.shape or model_name(model), "shape": shape.shape or "checkpoint"}
        result = {**names, **_measure(checkpoint, folder, cast, density, measured)}
    if outputs.plot is not None:
        _draw(result, outputs.plot)
    if outputs.json is not None and str(outputs.json) == "-":
        result_json(result)
        return
    if outputs.json is not None:
        text = json.dumps(result) + "\n"
        write_atomic(outputs.json, lambda file: file.write_text(text, encoding="utf-8"), IfpruneError)
    lines = [*_headline(result), "", *_table(result)]
    show("\n".join([*lines, "", *_details(result)] if outputs.details else lines))
    if not outputs.details:
        note("--details prints all that was measured")


def _measure(
    checkpoint: Checkpoint, folder: Path, dtype: str | None, density: float | None, measured: _Measured
) -> dict[str, Any]:
    """The benchmark's result; plain models and selections are written to `folder`."""
    from ifprune_convert.bench_models import check_room, make_plain
    from ifprune_mlx import IfpruneError
    from ifprune_mlx.bench.benchmark import BenchConfig
    from ifprune_mlx.bench.benchmark import bench as measure
    from ifprune_mlx.checkpoint.budget import resolve_keep

    keep = resolve_keep(checkpoint, density=density)
    length = measured.prompt_tokens + measured.generation_tokens
    limit = checkpoint.config.get("max_position_embeddings")
    if limit is not None and length > limit:
        raise IfpruneError(f"{length} tokens to read and generate: the model's context holds {limit}; give fewer")
    plain = None
    if measured.stock:
        check_room(folder, checkpoint, keep)
        with progress("export", "B") as update:
            plain = make_plain(folder, checkpoint, keep, update)
    config = BenchConfig(
        checkpoint,
        dense=None if plain is None else plain.dense,
        static=None if plain is None else plain.static,
        ssd=measured.ssd,
        keep=keep,
        dtype=dtype,
        prompt_tokens=measured.prompt_tokens,
        generation_tokens=measured.generation_tokens,
        trials=measured.num_trials,
        work=folder,
    )
    with progress("bench", "trials") as update:
        return measure(config, update)


def _headline(result: dict[str, Any]) -> list[str]:
    """The line that people come for, and one that says so where the first token comes later."""
    ratio, rows = result["headline"], {row["name"]: row for row in result["rows"]}
    memory = f"memory {ratio['memory']:.2f}x"
    if ratio["memory_ssd"] is not None:
        memory += f" ({ratio['memory_ssd']:.2f}x on ssd)"
    line = f"sliced {ratio['decode']:.2f}x {ratio['against']} in decoding, {ratio['prefill']:.2f}x in reading, "
    lines = [f"{line}TTFT {ratio['ttft']:.2f}x, {memory}"]
    if ratio["ttft"] > 1:
        dense, sliced = rows[ratio["against"]], rows["sliced"]
        lines.append(
            f"the first token comes later: after {sliced['ttft_s']:.3f} s instead of {dense['ttft_s']:.3f} s, "
            f"of which {sliced['select_s'] + sliced['switch_s']:.3f} s select and switch"
        )
    return lines


def _table(result: dict[str, Any]) -> list[str]:
    """A row for everything that was timed."""
    lines = [_row("", "read tok/s", "decode tok/s", "spread +-", "TTFT s", "memory")]
    for row in result["rows"]:
        spread = f"{50 * row['decode_spread']:.0f} %"
        rates = f"{row['prefill_tok_s']:.1f}", f"{row['decode_tok_s']:.2f}", spread
        lines.append(_row(row["name"], *rates, f"{row['ttft_s']:.3f}", gigabytes(row["rss"])))
    return lines


def _row(name: str, *cells: str) -> str:
    return f"{name:<14} " + " ".join(f"{cell:>12}" for cell in cells)


def _details(result: dict[str, Any]) -> list[str]:
    """What else was measured: parts of the TTFT, and ratios in words."""
    bandwidth, ratios, intervals = result["machine"]["bandwidth"], result["ratios"], result["intervals"]
    lines = [_row("", "of limit", "select s", "switch s", "MLX peak")]
    for row in result["rows"]:
        share = "" if row["share_of_limit"] is None else f"{100 * row['share_of_limit']:.0f} %"
        times = f"{row['select_s']:.3f}", f"{row['switch_s']:.3f}"
        lines.append(_row(row["name"], share, *times, gigabytes(row["peak_memory"])))
    intervals_shown = {
        "decode_vs_static": "sliced decoding / a plain model of that size",
        "prefill_vs_static": "sliced prefill / a plain model of that size",
        "decode_vs_dense_limit": "sliced decoding / dense decoding times the bytes that a token reads less",
        "ssd_decode_vs_static": "sliced decoding with residency ssd / a plain model of that size",
    }
    lines.append("")
    for name, words in intervals_shown.items():
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
    lines += [f"down product, {line}" for line in kernel_lines(result["down_kernels"])]
    lines.append(f"memory is read at {bandwidth / 1e9:.1f} GB/s (limit: a token reads every active weight once)")
    return lines


def _draw(result: dict[str, Any], path: Path) -> None:
    from ifprune_mlx.eval.plots import bar_chart, write_figure

    bars = {}
    for row in result["rows"]:
        share = row["share_of_limit"]
        name = row["name"] if share is None else f"{row['name']} ({100 * share:.0f} % of the memory's limit)"
        bars[name] = {"measured": row["decode_tok_s"]}
    layers = f"{result['layers']} layers, density {result['density']:.2f}"
    write_figure(bar_chart(f"{result['model']}: decoding, {layers}", "tokens per second", bars), path)
