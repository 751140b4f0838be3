"""Measures residency `ssd` and switches: bytes read from the disk, a cold first answer, memory over many switches.

    python -m scripts.measure_residency --layers 4 --work FOLDER          float32 (11 GB of disk with 4 layers)
    python -m scripts.measure_residency --layers 4 --work FOLDER --q-bits 4
    python -m scripts.measure_residency --layers 2 --q-bits 4 --reads      bytes read alone: minutes

Run it in the repository's root, on Linux: it reads `/proc/self/io`, and has the system forget files before it reads
them.

The checkpoint is noise in the shape of the paper's 9B. Which of its neurons are selected is real: the embedded SmolLM2
selects by the prompts of `scripts/held_out`, code, maths and general in turn, and every one of its 1536 neurons a layer
stands for 16 of the 24576, scattered at random. The frequencies that order the file come from other prompts than those
that are measured. Memory is measured with arbitrary selections.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ifprune_convert.bench_models import make_noise, make_plain
from ifprune_convert.embedded import ensure_embedded
from ifprune_convert.frequency import reorder
from ifprune_convert.packing import quantization_of
from ifprune_convert.synthetic import SHAPES
from ifprune_mlx import Checkpoint, Selection, load, make_selector
from ifprune_mlx.bench.worker import start_worker
from ifprune_mlx.checkpoint.budget import RAM, SSD, resident_bytes
from ifprune_mlx.checkpoint.format_writer import write_manifest
from ifprune_mlx.selection.selection import Ids
from ifprune_mlx.selection.selectors import Instruction

HELD_OUT = Path(__file__).parent / "held_out"
DOMAINS = ("code", "maths", "general")
COPIES = 16
PROMPT_TOKENS = 1000


def real_selections(count: int) -> list[list[Ids]]:
    """What SmolLM2 selects by `count` prompts of each domain, in turn, at the paper's density."""
    model, _ = load(ensure_embedded(lambda _: None, lambda *_: None))
    keep = tuple(6656 * width // 24576 for width in model.checkpoint.widths)
    selector = make_selector(model, "learned")
    texts: list[str] = []
    prompts = {domain: (HELD_OUT / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines() for domain in DOMAINS}
    for index in range(count):
        texts += [json.loads(prompts[domain][index])["messages"][0]["content"] for domain in DOMAINS]
    found = [list(selector.select(Instruction(text, (1,)), keep).selection.ids) for text in texts]
    model.close()
    return found


def enlarged(found: Sequence[Sequence[Ids]], layers: int) -> list[Selection]:
    """The same selections on FFNs of 16 times the width."""
    generator = np.random.default_rng(0)
    width = 1536 * COPIES
    places = [generator.permutation(width).reshape(1536, COPIES).astype(np.int32) for _ in range(layers)]
    taken = [layer * len(found[0]) // layers for layer in range(layers)]
    return [
        Selection(
            tuple(np.sort(places[layer][ids[taken[layer]]].ravel()) for layer in range(layers)),
            (width,) * layers,
            "learned",
        )
        for ids in found
    ]


def frequencies(selections: Sequence[Selection]) -> list[Ids]:
    """Neurons of each FFN, those in the most selections first; ties at random."""
    generator = np.random.default_rng(1)
    orders = []
    for layer, width in enumerate(selections[0].widths):
        counts = np.zeros(width)
        for selection in selections:
            counts[selection.ids[layer]] += 1
        orders.append(np.lexsort((generator.random(width), -counts)).astype(np.int32))
    return orders


def bytes_read() -> int:
    """Bytes that this process had the disk read."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def drop_from_cache(checkpoint: Checkpoint) -> None:
    """Ask the system to forget a checkpoint's files, so that reading them reads the disk."""
    for file in checkpoint.path.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_rate(checkpoint: Checkpoint) -> float:
    """Bytes per second of reading the neurons files from end to end."""
    drop_from_cache(checkpoint)
    start, total = time.perf_counter(), 0
    for file in sorted(checkpoint.path.glob("neurons-*")):
        with file.open("rb", buffering=0) as opened:
            while block := opened.read(1 << 22):
                total += len(block)
    return total / (time.perf_counter() - start)


def switches_from_disk(checkpoint: Checkpoint, selections: Sequence[Selection]) -> dict[str, Any]:
    """Every switch reads the disk; how much, and how fast."""
    model, _ = load(checkpoint.path, residency="ssd")
    model.switch(selections[0])
    _wait(model)
    shares, overlaps, rates = [], [], []
    for selection in selections[1:]:
        drop_from_cache(checkpoint)
        before, start = bytes_read(), time.perf_counter()
        done = model.switch(selection)
        _wait(model)
        seconds, read = time.perf_counter() - start, bytes_read() - before
        missing = done.missing * model.slots[0].row_bytes
        shares.append(read / missing)
        assert done.overlap is not None
        overlaps.append(done.overlap)
        rates.append(missing / seconds)
    model.close()
    return {
        "read_vs_changed": statistics.median(shares),
        "read_vs_changed_max": max(shares),
        "overlap": statistics.median(overlaps),
        "changed_bytes_per_s": statistics.median(rates),
        "switches": len(shares),
    }


def _wait(model: Any) -> None:
    for slots in model.slots:
        if slots.pending is not None:
            slots.pending.result()


def cold_answers(checkpoint: Checkpoint, static: Path, selection: Path, rate: float, trials: int) -> dict[str, Any]:
    """From a process that has nothing to its first token, beside what disk and compute need at least."""
    keep = Selection.load(selection).keep
    tokens = np.random.default_rng(2).integers(0, 256, size=PROMPT_TOKENS).tolist()
    text = "abcd " * (PROMPT_TOKENS // 5)
    size = resident_bytes(checkpoint, SSD, keep)
    cold, warm = [], []
    with start_worker(static, None, None, "static") as plain:
        plain("run", tokens=tokens, generate=2)
        for _ in range(trials):
            warm.append(plain("run", tokens=tokens, generate=2)["prefill_s"])
            drop_from_cache(checkpoint)
            with start_worker(checkpoint.path, SSD, None, "ssd") as ssd:
                select = ssd("select", text=text, cached=False)
                first = ssd("first", selection=str(selection), tokens=tokens)
                cold.append(ssd.load_s + select + first)
    limit = size / rate + statistics.median(warm)
    return {
        "cold_s": statistics.median(cold),
        "static_ttft_s": statistics.median(warm),
        "bytes": size,
        "disk_bytes_per_s": rate,
        "cold_vs_limit": statistics.median(cold) / limit,
        "trials": trials,
    }


def memory(checkpoint: Checkpoint, plain: Any, files: Sequence[Path], counts: tuple[int, int]) -> dict[str, Any]:
    """Memory over many switches between arbitrary selections, in fresh processes."""
    check = list(range(1, 17))
    names = [str(file) for file in files]
    everything = [spec.d_ffn for spec in checkpoint.layout.ffns]
    dense = resident_bytes(checkpoint, RAM, everything) - checkpoint.predictor_bytes
    layer = everything[0] * checkpoint.neuron_bytes(0)
    with start_worker(checkpoint.path, RAM, None, "ram") as ram:
        ram("switches", selections=[names[i % len(names)] for i in range(counts[0])], check=check)
        ram_peak = ram("memory")
    with start_worker(plain.static, None, None, "static") as static:
        static("switches", selections=[], check=check)
        static("run", tokens=check, generate=2)
        base = static("memory")
    with start_worker(checkpoint.path, SSD, None, "ssd") as ssd:
        predictor = ssd("predict")
        after = ssd("switches", selections=[names[i % len(names)] for i in range(counts[1])], check=check)
    resident = np.array([entry["rss"] for entry in after], float)[20:]
    slope = float(np.polyfit(np.arange(len(resident)), resident, 1)[0])
    return {
        "ram_switches": counts[0],
        "ram_mlx_peak_vs_dense_and_layer": ram_peak["mlx_peak"] / (1.03 * dense + layer),
        "ram_mlx_peak": ram_peak["mlx_peak"],
        "dense_bytes": dense,
        "layer_bytes": layer,
        "ssd_switches": counts[1],
        "ssd_rss_max": max(entry["rss"] for entry in after),
        "predictor_grew": predictor,
        "predictor_bytes": checkpoint.predictor_bytes,
        "static_rss": base["rss"],
        "ssd_vs_static_and_predictor": max(entry["rss"] for entry in after) / (base["rss"] + predictor),
        "ssd_growth_per_switch": slope,
        "ssd_rss_range": float(resident.max() - resident.min()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--work", type=Path, help="where to write models; the temporary folder if not given")
    parser.add_argument("--q-bits", type=int, help="quantize the weights")
    parser.add_argument("--prompts", type=int, default=20, help="of each domain; half order, half are measured")
    parser.add_argument("--ram-switches", type=int, default=50)
    parser.add_argument("--ssd-switches", type=int, default=200)
    parser.add_argument("--trials", type=int, default=7, help="cold answers")
    parser.add_argument("--reads", action="store_true", help="measure the bytes that switches read, and nothing else")
    arguments = parser.parse_args()
    selections = enlarged(real_selections(arguments.prompts), arguments.layers)
    half = len(selections) // 2
    packed = None if arguments.q_bits is None else quantization_of("affine", None, arguments.q_bits)
    result: dict[str, Any] = {"layers": arguments.layers, "q_bits": arguments.q_bits}
    with tempfile.TemporaryDirectory(prefix="ifprune-residency-", dir=arguments.work) as name:
        folder = Path(name)
        shape = SHAPES["paper-9b"].scaled(arguments.layers)
        checkpoint = make_noise(folder, shape, mx.float32, packed, lambda *_: None)
        keep = selections[0].keep
        _say(result, "source_order", switches_from_disk(checkpoint, selections[half:]))
        reorder(checkpoint, frequencies(selections[:half]))
        write_manifest(checkpoint.path, source="noise", licence=None)
        checkpoint = Checkpoint.open(checkpoint.path)
        _say(result, "frequency_order", switches_from_disk(checkpoint, selections[half:]))
        if arguments.reads:
            print(json.dumps(result))
            return
        plain = make_plain(folder, checkpoint, keep, lambda *_: None)
        chosen = folder / "selection.safetensors"
        selections[half].save(chosen)
        rates = [disk_rate(checkpoint) for _ in range(3)]
        _say(result, "cold", cold_answers(checkpoint, plain.static, chosen, max(rates), arguments.trials))
        files = []
        generator = np.random.default_rng(3)
        for index in range(8):
            pairs = zip(selections[0].widths, keep, strict=True)
            ids = tuple(np.sort(generator.permutation(width)[:k]).astype(np.int32) for width, k in pairs)
            files.append(folder / f"random-{index}.safetensors")
            Selection(ids, selections[0].widths, "random").save(files[-1])
        counts = (arguments.ram_switches, arguments.ssd_switches)
        _say(result, "memory", memory(checkpoint, plain, files, counts))
    print(json.dumps(result))


def _say(result: dict[str, Any], name: str, found: dict[str, Any]) -> None:
    result[name] = found
    print(name, {key: round(value, 4) for key, value in found.items()}, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)
