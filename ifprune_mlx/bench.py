"""Measures a loaded checkpoint, dense against sliced: alternating trials in one process, medians.

Compares what this package runs with what it runs; a native model of the sliced size comes with the full bench.
"""

from __future__ import annotations

import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from .model import Model
from .selection import Selection
from .selectors import Instruction, Selector

_BANDWIDTH_BYTES = 1 << 28


@dataclass(frozen=True)
class Trial:
    """One run: seconds and rates."""

    prefill_tok_s: float
    decode_tok_s: float
    select_s: float
    switch_s: float
    ttft_s: float


def measure_bandwidth() -> float:
    """Bytes per second at which this machine's MLX device reads memory (the best of 5 sums over 256 MB)."""
    data = mx.ones((_BANDWIDTH_BYTES // 4,), mx.float32)
    mx.eval(data)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        mx.eval(data.sum())
        best = min(best, time.perf_counter() - start)
    return _BANDWIDTH_BYTES / best


def bench(
    model: Model,
    selector: Selector,
    keep: tuple[int, ...],
    *,
    prompt_tokens: int,
    generation_tokens: int,
    trials: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Time dense and sliced in turn.

    Every sliced trial selects by another prompt, so that each one switches.

    Returns:
        What `ifprune bench --json` writes (DESIGN.md section 11); ratios that were not measured are None.
    """
    generator = np.random.default_rng(0)
    vocabulary = int(model.config["vocab_size"])
    results: dict[str, list[Trial]] = {"dense": [], "sliced": []}
    shares: list[float] = []
    # The first round warms up and is not counted.
    for round_ in range(trials + 1):
        tokens = generator.integers(0, vocabulary, size=prompt_tokens).tolist()
        dense = _run(model, None, tokens, generation_tokens, 0.0)
        start = time.perf_counter()
        selection = selector.select(Instruction(str(round_), tuple(tokens)), keep).selection
        sliced = _run(model, selection, tokens, generation_tokens, time.perf_counter() - start)
        if round_:
            results["dense"].append(dense)
            results["sliced"].append(sliced)
            shares.append((sliced.select_s + sliced.switch_s) / sliced.ttft_s)
        if progress is not None:
            progress(round_ + 1, trials + 1)
    active, total = model.checkpoint.active_parameters(keep), model.checkpoint.parameters
    speedup = statistics.median(
        sliced.decode_tok_s / dense.decode_tok_s
        for sliced, dense in zip(results["sliced"], results["dense"], strict=True)
    )
    layout = model.checkpoint.layout
    return {
        "machine": {"name": platform.machine(), "bandwidth": measure_bandwidth()},
        "shape": "checkpoint",
        "layers": len(layout.ffns),
        "dtype": str(next(iter(model.slots[0].rows.values())).dtype).removeprefix("mlx.core."),
        "quantization": None if layout.down is None else layout.down.to_dict(),
        "rows": [_row(name, runs) for name, runs in results.items()],
        "ratios": {
            "decode_vs_static": None,
            "decode_vs_dense_limit": speedup / (total / active),
            "prefill_vs_static": None,
            "select_switch_share_of_ttft": statistics.median(shares),
            "switch_bytes_share": None,
            "resident_vs_static": None,
        },
    }


def _run(model: Model, selection: Selection | None, tokens: list[int], count: int, select_s: float) -> Trial:
    switch = model.switch(selection)
    start = first = time.perf_counter()
    steps = generate_step(
        mx.array(tokens), model.module, max_tokens=count, prompt_cache=make_prompt_cache(model.module)
    )
    for index, _ in enumerate(steps):
        if index == 0:
            first = time.perf_counter()
    decode = time.perf_counter() - first
    prefill = first - start
    return Trial(
        len(tokens) / prefill, (count - 1) / decode, select_s, switch.seconds, select_s + switch.seconds + prefill
    )


def _row(name: str, runs: list[Trial]) -> dict[str, Any]:
    medians = {field: statistics.median(asdict(run)[field] for run in runs) for field in asdict(runs[0])}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rss = peak if sys.platform == "darwin" else peak * 1024
    return {"name": name, **medians, "peak_memory": mx.get_peak_memory(), "rss": rss}
