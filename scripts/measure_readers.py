"""Measures how many readers `ssd` residency needs: the rate at which scattered neurons come from the disk.

    python -m scripts.measure_readers --work FOLDER                    4 bit: 0.4 GB of disk, minutes
    python -m scripts.measure_readers --work FOLDER --bits 0           bf16: 1.6 GB

The checkpoint is noise in the shape of the paper's 9B, in an order of its own, so that its neurons are records. A row
is a number of readers, a column a share of a layer's neurons that is missing, scattered evenly. Every trial reads every
layer once; the system forgets the files before, but not in the last column, which reads memory. Rates count wanted
bytes alone, and are medians of the trials, in MB/s. Take the smallest number of readers whose rates are the best ones,
or near them, in all columns.

On a Mac (where this was never run) it needs the internal SSD (`--work` on it) with nothing else at work, the power
supply plugged in, and a few GB of free memory, or macOS drops what the last column is to find there. Files are
forgotten by `msync(MS_INVALIDATE)`; if the last column is not several times the others, they were not: then `sudo
purge` is left.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from ifprune_convert.bench_models import make_noise
from ifprune_convert.frequency import reorder
from ifprune_convert.packing import quantization_of
from ifprune_convert.synthetic import SHAPES
from ifprune_mlx import Checkpoint
from ifprune_mlx.checkpoint import neuron_reader
from ifprune_mlx.checkpoint.format_writer import write_manifest
from ifprune_mlx.checkpoint.neuron_reader import RowReader

_MS_INVALIDATE = 2


def forget(file: Path) -> None:
    """Have the system drop a file from its memory."""
    with file.open("r+b") as opened:
        os.fsync(opened.fileno())
        if sys.platform != "darwin":
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return
        with mmap.mmap(opened.fileno(), 0) as memory:
            start = ctypes.c_char.from_buffer(memory)
            failed = ctypes.CDLL(None).msync(ctypes.byref(start), ctypes.c_size_t(len(memory)), _MS_INVALIDATE)
            del start  # else the map cannot be closed
        if failed:
            raise SystemExit(f"{file}: msync failed")


def rate(checkpoint: Checkpoint, readers: list[RowReader], share: float, seed: int, cold: bool) -> float:
    """MB/s of wanted bytes, over all layers."""
    generator = np.random.default_rng(seed)
    wanted, seconds = 0, 0.0
    for index, reader in enumerate(readers):
        width = checkpoint.widths[index]
        ids = np.sort(generator.permutation(width)[: round(share * width)]).astype(np.int32)
        if cold:
            forget(checkpoint.neurons_file(index))
        start = time.perf_counter()
        reader.read(ids)
        seconds += time.perf_counter() - start
        wanted += len(ids) * checkpoint.neuron_bytes(index)
    return wanted / seconds / 1e6


def main() -> None:
    """Make the checkpoint, and print a line for every number of readers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where to write the checkpoint; the temporary folder if not given")
    parser.add_argument("--bits", type=int, default=4, help="0: bf16")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--readers", default="1,2,4,8,16,24,32,48,64")
    parser.add_argument("--shares", default="0.05,0.1,0.3")
    arguments = parser.parse_args()
    counts = [int(text) for text in arguments.readers.split(",")]
    shares = [float(text) for text in arguments.shares.split(",")]
    with tempfile.TemporaryDirectory(prefix="ifprune-readers-", dir=arguments.work) as name:
        packed = quantization_of("affine", None, arguments.bits) if arguments.bits else None
        shape = SHAPES["paper-9b"].scaled(arguments.layers)
        made = make_noise(Path(name), shape, mx.bfloat16, packed, lambda *_: None)
        reorder(made, [np.random.default_rng(i).permutation(w).astype(np.int32) for i, w in enumerate(made.widths)])
        write_manifest(made.path, source="noise", licence=None)
        checkpoint = Checkpoint.open(made.path)
        (strip,) = checkpoint.strips(0)
        print(f"records of {strip.nbytes} bytes, {strip.stride} apart; pages of {mmap.PAGESIZE}; MB/s of wanted bytes")
        print("readers " + "".join(f"{share:>10.0%}" for share in shares) + f"{'in memory':>12}", flush=True)
        readers = [RowReader(checkpoint, index) for index in range(arguments.layers)]
        found: dict[tuple[int, int], list[float]] = {}
        columns = [*((share, True) for share in shares), (shares[-1], False)]
        # All counts within each trial: what else the machine does then meets all of them.
        for trial in range(arguments.trials):
            for count in counts:
                neuron_reader.READERS = count
                neuron_reader._readers.cache_clear()
                for column, (share, cold) in enumerate(columns):
                    found.setdefault((count, column), []).append(rate(checkpoint, readers, share, trial, cold))
        for count in counts:
            *rates, warm = (statistics.median(found[count, column]) for column in range(len(columns)))
            print(f"{count:>7} " + "".join(f"{value:>10.0f}" for value in rates) + f"{warm:>12.0f}")


if __name__ == "__main__":
    main()
