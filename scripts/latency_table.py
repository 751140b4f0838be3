"""Makes the paper's latency table (IFPruning, arXiv 2501.02086, its table of 4,000 tokens read and 100 generated) here:
the paper's 9B shape, dense, as a plain model of the sliced size, and sliced.

    python -m scripts.latency_table --work FOLDER                              56 layers, bfloat16: a GPU of 80 GB
    python -m scripts.latency_table --work FOLDER --bits 4
    python -m scripts.latency_table --work FOLDER --layers 4 --dtype float32   a CPU; the ratios are what counts

Weights are noise. Models are written to FOLDER first (56 layers in bfloat16: 44 GB) and kept there, so that the same
command with `--only-make` before takes no time from a machine that is wanted for measuring. Rows take turns; printed
are medians in seconds and, of each row, its ratio to the dense model's median.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from ifprune_cli.console import progress
from ifprune_convert.bench_models import Plain, make_noise, make_plain
from ifprune_convert.packing import quantization_of
from ifprune_convert.synthetic import shape_of
from ifprune_mlx.bench.benchmark import DENSE, OUR_DENSE, SLICED, STATIC, BenchConfig, bench
from ifprune_mlx.checkpoint.budget import resolve_keep
from ifprune_mlx.checkpoint.format import Checkpoint

COLUMNS = ("select", "load", "prefill", "TTFT", "decode")
PAPER = {
    "dense 9B": (None, None, 0.846, 0.846, 7.16),
    "dense 3B": (None, None, 0.356, 0.356, 5.68),
    "IFPruning 9B -> 3B": (0.070, 0.043, 0.358, 0.471, 5.58),
}
"""Seconds on one A6000, from the paper; its models run in PyTorch."""


def made(folder: Path, shape: str, layers: int | None, dtype: str, bits: int | None) -> tuple[Checkpoint, Plain]:
    """The models of a shape, written unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    sized = shape_of(shape) if layers is None else shape_of(shape).scaled(layers)
    if (folder / "whole").exists():
        return Checkpoint.open(folder / "checkpoint"), Plain(folder / "dense", folder / "static")
    for left in ("predictor", "checkpoint", "dense", "static"):  # of a run that was stopped
        shutil.rmtree(folder / left, ignore_errors=True)
    packed = None if bits is None else quantization_of("affine", None, bits)
    with progress("make", "B") as update:
        checkpoint = make_noise(folder, sized, getattr(mx, dtype), packed, update)
    with progress("export", "B") as update:
        plain = make_plain(folder, checkpoint, resolve_keep(checkpoint), update)
    (folder / "whole").touch()
    return checkpoint, plain


def rows(result: dict[str, Any], generated: int) -> dict[str, tuple[float | None, ...]]:
    """Per model, seconds by `COLUMNS`."""
    found: dict[str, tuple[float | None, ...]] = {}
    by_name = {row["name"]: row for row in result["rows"]}
    for name in (DENSE, OUR_DENSE, STATIC, SLICED):
        row = by_name[name]
        prefill = result["prompt_tokens"] / row["prefill_tok_s"]
        chosen = (row["select_s"], row["switch_s"]) if name == SLICED else (None, None)
        found[name] = (*chosen, prefill, row["ttft_s"], generated / row["decode_tok_s"])
    return found


def table(found: dict[str, tuple[float | None, ...]]) -> list[str]:
    """Seconds, and of prefill and decode the ratio to the first row's."""
    lines = ["| | " + " | ".join(COLUMNS) + " | TTFT / dense | decode / dense |", "|---" * (len(COLUMNS) + 3) + "|"]
    dense = next(iter(found.values()))
    for name, values in found.items():
        cells = ["-" if value is None else f"{value:.3f}" for value in values]
        ratios = [f"{values[i] / dense[i]:.2f}" for i in (3, 4)]  # type: ignore[operator]
        lines.append("| " + " | ".join([name, *cells, *ratios]) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shape", default="paper-9b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--bits", type=int)
    parser.add_argument("-p", "--prompt-tokens", type=int, default=4000)
    parser.add_argument("-g", "--generation-tokens", type=int, default=100)
    parser.add_argument("-n", "--num-trials", type=int, default=7)
    parser.add_argument("--only-make", action="store_true")
    given = parser.parse_args()
    name = f"{given.shape}-{given.layers or 'all'}-{given.dtype}-{given.bits or 'float'}"
    checkpoint, plain = made(given.work / name, given.shape, given.layers, given.dtype, given.bits)
    if given.only_make:
        return
    counts = (given.prompt_tokens, given.generation_tokens, given.num_trials)
    keep = resolve_keep(checkpoint)
    result = bench(BenchConfig(checkpoint, plain.dense, plain.static, False, keep, None, *counts, given.work / name))
    print("The paper, one A6000, 4000 tokens read and 100 generated:\n")
    print("\n".join(table(PAPER)))
    device = mx.device_info().get("device_name", mx.default_device())
    print(f"\n{name} on {device}, {counts[0]} tokens read and {counts[1]} generated:\n")
    print("\n".join(table(rows(result, given.generation_tokens))))
    print()
    for what, at in result["intervals"].items():
        print(f"{what}: {at['median']:.3f} [{at['low']:.3f}, {at['high']:.3f}]")
    for row in result["rows"]:
        print(f"{row['name']}: {row['bytes_per_token'] / 1e9:.2f} GB a token, peak {row['peak_memory'] / 1e9:.1f} GB")
    for what, share in result["ratios"].items():
        if what.startswith(("select_switch", "switch")):
            print(f"{what}: {share:.3f}")
    print(f"memory is read at {result['machine']['bandwidth'] / 1e9:.0f} GB/s")
    print(json.dumps({"name": name, **result}))


if __name__ == "__main__":
    main()
