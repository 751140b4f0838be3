"""What do ranks on one machine hold, and how fast do they decode, beside one process?

    python -m scripts.measure_ranks                            the embedded default, two ranks
    python -m scripts.measure_ranks --model CHECKPOINT --ranks 4 --density 0.27 --json

Starts one process and then the ranks, on a ring over the loopback device, as often as --rounds says. Each opens the
checkpoint with all rows in memory, keeps the neurons that the prior ranks highest, and decodes greedily. Prints the
bytes of weights of each rank as a share of the one process's, and the median ratio of tokens per second. Ranks on one
machine share its cores and its memory's bandwidth: the ratio shows what the ring costs, not what two machines gain.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step

from ifprune_convert.embedded import ensure_embedded
from ifprune_mlx import Model, Selection, load
from ifprune_mlx.checkpoint.format import Checkpoint
from ifprune_mlx.parallel.ranks import join

PROMPT = list(range(100, 132))


def free_ports(count: int) -> list[int]:
    """Ports of the loopback device that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def run(count: int, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """What each of `count` ranks measured; one is a process of its own."""
    command = [sys.executable, "-m", "scripts.measure_ranks", "--model", str(arguments.model), "--rank"]
    command += ["--density", str(arguments.density), "--tokens", str(arguments.tokens)]
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(count)]), encoding="utf-8")
        ring = [{} if count == 1 else {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)} for rank in range(count)]
        started = [subprocess.Popen(command, env={**os.environ, **one}, stdout=subprocess.PIPE) for one in ring]
        said = [one.communicate()[0] for one in started]
    if any(one.returncode for one in started):
        raise SystemExit(f"{count} ranks ended with {[one.returncode for one in started]}")
    return [json.loads(line) for line in said]


def resident(model: Model) -> int:
    """Bytes of weights in this process."""
    rows = [array for slots in model.slots for array in slots.rows.values()]
    return sum(array.nbytes for array in [*rows, *dict(tree_flatten(model.module.parameters())).values()])


def measure(checkpoint: Path, density: float, tokens: int) -> None:
    """One rank's part; prints what it found."""
    ranks = join(lambda line: os._exit(print(line, file=sys.stderr, flush=True) or 1))
    model, _ = load(Checkpoint.open(checkpoint), residency="ram", ranks=ranks)
    kept = zip(model.prior, model.keep(density), strict=True)
    ids = tuple(np.sort(np.argsort(-prior, kind="stable")[:k]).astype(np.int32) for prior, k in kept)
    model.switch(Selection(ids, tuple(model.checkpoint.widths), "static"))
    times = []
    for _ in generate_step(mx.array(PROMPT), model.module, max_tokens=tokens):
        times.append(time.perf_counter())
    found = {"bytes": resident(model), "tokens_per_second": 1 / float(np.median(np.diff(times)))}
    print(json.dumps(found), flush=True)
    if ranks is not None:
        ranks.leave()  # which ends the process


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint; the embedded default if not given")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        measure(arguments.model, arguments.density, arguments.tokens)
        return
    arguments.model = arguments.model or ensure_embedded(lambda _: None)
    shares, ratios = [], []
    for _ in range(arguments.rounds):
        [alone], several = run(1, arguments), run(arguments.ranks, arguments)
        shares = [one["bytes"] / alone["bytes"] for one in several]
        ratios.append(several[0]["tokens_per_second"] / alone["tokens_per_second"])
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    found = {"ranks": arguments.ranks, "weights": shares, "decode": {"median": middle, "low": low, "high": high}}
    if arguments.json:
        print(json.dumps(found))
        return
    each = ", ".join(f"{share:.3f}" for share in shares)
    print(f"weights of each rank / of one process ({alone['bytes'] / 1e9:.3g} GB): {each}")
    print(f"decoding, {arguments.ranks} ranks / one process: {middle:.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
