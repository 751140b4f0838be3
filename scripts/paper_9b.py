"""The paper's 9B with its predictor, generated, through every step of `ifprune`, with times and memory. Linux only.

    python -m scripts.paper_9b --folder FOLDER                  write FOLDER/source and FOLDER/predictor
    python -m scripts.paper_9b --folder FOLDER --measure        write, convert to 4 bit, generate, print a table; then
                                                                remove what was made, unless --keep (25.5 GB of disk)
    python -m scripts.paper_9b --folder FOLDER --measure --scale 16     the same with all widths divided, in seconds

Run it in the repository's root. The weights are noise: this measures the machinery, not answers. The model's shape is
the paper's (IFPruning, arXiv 2501.02086: 56 layers, width 2048, 16 query and 2 KV heads, FFNs of 24576 neurons, of
which 6656 are kept). Of the predictor the paper gives the size, 302M, and the head's, width -> 128 -> neurons; the
llama's shape with just that many parameters, embeddings included, is ours. The prompt is a few tokens without a chat
template, for on a CPU MLX multiplies quantized matrices slowly, and eight times as slowly beside bfloat16 as with
`--dtype float32`, which keeps the 4 bits.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scripts.make_synthetic import (
    BLOCK,
    CONFIG,
    Shapes,
    Watched,
    llama_shapes,
    process_memory,
    start_conversion,
    start_ifprune,
    watch,
    write_safetensors,
    write_shards,
    write_tokenizer,
)

MODEL: dict[str, Any] = CONFIG | {
    "num_hidden_layers": 56,
    "vocab_size": 100352,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
BACKBONE: dict[str, Any] = MODEL | {
    "hidden_size": 1024,
    "intermediate_size": 3200,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
RANK = 128
KEPT = 6656 / 24576
PROMPT = "Add 2 to 3."
TOKENS = 8
LIMIT_BYTES = 24 * 10**9
_SHARD_BYTES = 5 * 10**9
_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")


@dataclass(frozen=True)
class Row:
    """A line of the table: seconds, bytes, and what came out; None for a part of the step above."""

    step: str
    seconds: float
    cpu_seconds: float | None
    peak_rss: int | None
    peak_anonymous_rss: int | None
    result: str


def scaled(config: dict[str, Any], scale: int) -> dict[str, Any]:
    """The config with all widths divided; heads keep their size."""
    return config | {name: max(config[name] // scale, 1) for name in _WIDTHS}


def predictor_shapes(model: dict[str, Any], backbone: dict[str, Any]) -> Shapes:
    """The tensors of the predictor, named as the code of the paper's authors saves them."""
    shapes: Shapes = {}
    for group in llama_shapes(backbone):
        shapes |= {f"feature_extractor.{name}": shape for name, shape in group.items()}
    neurons = model["num_hidden_layers"] * model["intermediate_size"]
    return shapes | {
        "prediction_head1.weight": (RANK, backbone["hidden_size"]),
        "prediction_head1.bias": (RANK,),
        "prediction_head2.weight": (neurons, RANK),
        "prediction_head2.bias": (neurons,),
    }


def joined(groups: Iterable[Shapes], most_bytes: int) -> list[Shapes]:
    """Groups of tensors put together into shards of at most that many bytes."""
    shards: list[Shapes] = [{}]
    for group in groups:
        if shards[-1] and _bytes(shards[-1] | group) > most_bytes:
            shards.append({})
        shards[-1] |= group
    return shards


def bfloat16_noise() -> bytes:
    """The upper halves of float32 numbers, which is what bfloat16 is."""
    numbers = np.random.default_rng(0).normal(0, 0.02, BLOCK).astype("<f4")
    return (numbers.view("<u4") >> 16).astype("<u2").tobytes()


def write(folder: Path, model: dict[str, Any], backbone: dict[str, Any]) -> tuple[int, int]:
    """Write `folder/source` and `folder/predictor`.

    Returns:
        Bytes of weights of each.
    """
    noise = bfloat16_noise()
    for name, config in (("source", model), ("predictor", backbone)):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config, indent=1))
        write_tokenizer(folder / name)
    shards = joined(llama_shapes(model), _SHARD_BYTES)
    source = write_shards(folder / "source", shards, "BF16", noise)
    file = folder / "predictor" / "predictor.safetensors"
    return source, write_safetensors(file, predictor_shapes(model, backbone), "BF16", noise)


def check_disk(folder: Path, model: dict[str, Any], backbone: dict[str, Any], measured: bool) -> None:
    """Raise SystemExit if the disk has too little room for all that is to be written."""
    source, predictor = sum(map(_bytes, llama_shapes(model))), _bytes(predictor_shapes(model, backbone))
    # 4 bits and, for every 64 weights, two 16-bit numbers; then the predictor as it is.
    converted = source * 4.5 / 16 + predictor if measured else 0
    needed, free = 1.02 * (source + predictor + converted), shutil.disk_usage(folder).free
    if needed > free:
        raise SystemExit(f"{folder}: has {free / 1e9:.1f} GB of disk left, and {needed / 1e9:.1f} GB are needed")


def convert_and_generate(folder: Path, dtype: str | None) -> tuple[list[Row], dict[str, Watched]]:
    """Each step in a process of its own; `dtype` is what `ifprune generate` is to cast to.

    Raises:
        SystemExit: if one fails, or does not do what it should, or takes too much memory.
    """
    out, predictor = folder / "converted", folder / "predictor"
    density = f"{KEPT:.4f}"
    options = ("-q", "--q-bits", "4", "--density", density, "--predictor", str(predictor))
    converted = _child("convert", start_conversion(folder / "source", out, *options))
    info = _child("info", start_ifprune("info", "--json", "--model", str(out)))
    generate = ("generate", "--json", "--model", str(out), "--selector", "learned", "--density", density)
    given = ("--ignore-chat-template", "-m", str(TOKENS), "-p", PROMPT, *(("--dtype", dtype) if dtype else ()))
    generated = _child("generate", start_ifprune(*generate, *given))
    stats = generated.answer
    if stats["completion_tokens"] != TOKENS or stats["selector"] != "learned" or abs(stats["density"] - KEPT) > 0.01:
        raise SystemExit(f"the generation is not what was asked for: {stats}")
    stages = [stats[f"{stage}_s"] for stage in ("select", "switch", "prefill", "decode")]
    shape = f"{info.answer['parameters'] / 1e9:.2f}B parameters, {info.answer['ffn_parameters'] / 1e9:.2f}B in FFNs"
    active = f"{stats['active_parameters'] / 1e9:.2f}B active parameters"
    load, peak = generated.seconds - sum(stages), f"MLX's own peak {stats['peak_memory'] / 1e9:.2f} GB"
    parts = (
        ("start, load model and predictor", load, peak),
        ("select", stages[0], "learned"),
        ("switch", stages[1], active),
        (f"prefill, {stats['prompt_tokens']} tokens", stages[2], "and the first new token"),
        (f"decode, {TOKENS - 1} tokens more", stages[3], f"{stats['tokens_per_s']:.2f} tokens/s"),
    )
    rows = [
        _row("convert -q --q-bits 4", converted, f"{converted.answer['bytes'] / 1e9:.2f} GB, predictor included"),
        _row("info", info, shape),
        _row(f"generate --dtype {dtype}" if dtype else "generate", generated, "all of the following"),
        *(Row(f"- {step}", seconds, None, None, None, result) for step, seconds, result in parts),
    ]
    return rows, {"convert": converted, "info": info, "generate": generated}


def table(rows: list[Row]) -> str:
    """In Markdown; gigabytes are 10^9 bytes."""
    lines = ["| step | seconds | CPU seconds | peak RSS, GB | of it anonymous, GB | |", "|---|---|---|---|---|---|"]
    for row in rows:
        memory = ("" if size is None else f"{size / 1e9:.2f}" for size in (row.peak_rss, row.peak_anonymous_rss))
        cpu = "" if row.cpu_seconds is None else f"{row.cpu_seconds:.1f}"
        lines.append(" | ".join([f"| {row.step}", f"{row.seconds:.1f}", cpu, *memory, f"{row.result} |"]))
    return "\n".join(lines)


def _child(name: str, process: subprocess.Popen[bytes]) -> Watched:
    child = watch(process)
    print(f"{name}: {child}", file=sys.stderr, flush=True)
    if child.peak_rss >= LIMIT_BYTES:
        raise SystemExit(
            f"{name} took {child.peak_rss / 1e9:.1f} GB of memory, at most {LIMIT_BYTES / 1e9:g} GB are given"
        )
    return child


def _row(step: str, child: Watched, result: str) -> Row:
    return Row(step, child.seconds, child.cpu_seconds, child.peak_rss, child.peak_anonymous_rss, result)


def _bytes(shapes: Shapes) -> int:
    return 2 * sum(map(math.prod, shapes.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where to write")
    parser.add_argument("--measure", action="store_true", help="convert and generate")
    parser.add_argument("--keep", action="store_true", help="with --measure: remove nothing")
    parser.add_argument("--scale", type=int, default=1, help="divide all widths by this (a power of 2, at most 16)")
    parser.add_argument("--dtype", help="generate with it; else in the checkpoint's bfloat16")
    parser.add_argument("--layers", type=int, default=MODEL["num_hidden_layers"])
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    made = [folder / name for name in ("source", "predictor", "converted")]
    if there := [str(path) for path in made if path.exists()]:
        parser.error(f"{', '.join(there)}: exists already; remove it, or give another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    model = scaled(MODEL, arguments.scale) | {"num_hidden_layers": arguments.layers}
    backbone = scaled(BACKBONE, arguments.scale)
    check_disk(folder, model, backbone, arguments.measure)
    # So that what was made is removed then too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    done = False
    try:
        start = time.perf_counter()
        source, predictor = write(folder, model, backbone)
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        shards = len(list((folder / "source").glob("*.safetensors")))
        wrote = f"{source / 1e9:.2f} GB in {shards} shards; predictor {predictor / 1e9:.2f} GB"
        seconds, cpu = time.perf_counter() - start, time.process_time()
        rows = [Row("write", seconds, cpu, peak, process_memory(os.getpid(), "RssAnon"), wrote)]
        result: dict[str, Any] = {"layers": arguments.layers, "scale": arguments.scale, "dtype": arguments.dtype}
        result |= {"source_bytes": source, "predictor_bytes": predictor, "write": asdict(rows[0])}
        if arguments.measure:
            more, children = convert_and_generate(folder, arguments.dtype)
            rows += more
            result |= {name: asdict(child) for name, child in children.items()}
        print(table(rows))
        print(json.dumps(result))
        done = True
    finally:
        if not arguments.keep and (arguments.measure or not done):
            for path in (*made, *folder.glob(".converted.partial-*")):
                shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    main()
