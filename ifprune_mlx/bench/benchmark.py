"""Compares models of the same weights in one run: each in a process of its own, in turn, round by round.

The rows are `mlx-lm dense` and `mlx-lm static` (plain models, the second with one selection's neurons and no others),
and `dense`, `sliced` and `sliced ssd` (ours). Ratios are taken round by round, since what else the machine does changes
from one to the next; their intervals are bootstrapped over rounds.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ifprune_mlx.bench.worker import WorkerClient, start_worker
from ifprune_mlx.checkpoint.budget import RAM, SSD, resident_bytes, room
from ifprune_mlx.checkpoint.format import Checkpoint
from ifprune_mlx.checkpoint.safetensors_io import DTYPE_BYTES
from ifprune_mlx.errors import BudgetError
from ifprune_mlx.eval.metrics import RESAMPLES
from ifprune_mlx.selection.selection import Ids, Selection

NEAR = 0.8
"""Overlap of a selection with the one before it, in the rounds that are timed whole."""
DENSE, STATIC = "mlx-lm dense", "mlx-lm static"
OUR_DENSE, SLICED, ON_SSD = "dense", "sliced", "sliced ssd"


@dataclass(frozen=True)
class BenchConfig:
    """The settings of `bench`."""

    checkpoint: Checkpoint
    dense: Path | None  # plain mlx-lm model with all neurons; None leaves the row out
    static: Path | None  # plain mlx-lm model with `keep` neurons; None leaves the row out
    ssd: bool  # measure residency `ssd` as well
    keep: tuple[int, ...]  # *k* per FFN
    dtype: str | None  # float type to cast to; None keeps the checkpoint's
    prompt_tokens: int  # per round
    generation_tokens: int  # per round
    trials: int  # rounds that count, after one to warm up
    work: Path  # folder for selection files


def bench(config: BenchConfig, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Time every row in turn.

    Returns:
        The JSON of `ifprune bench --json`; ratios that were not measured are None.

    Raises:
        IfpruneError: if a model cannot be loaded or its process dies.
    """
    checkpoint, done = config.checkpoint, 0
    given: dict[str, tuple[Path | None, str | None]] = {
        DENSE: (config.dense, None),
        STATIC: (config.static, None),
        SLICED: (checkpoint.path, RAM),
        ON_SSD: (checkpoint.path if config.ssd else None, SSD),
    }
    folders = {name: (folder, residency) for name, (folder, residency) in given.items() if folder is not None}
    names = [name for name in (DENSE, OUR_DENSE, SLICED, STATIC, ON_SSD) if name in folders or name == OUR_DENSE]
    _check_memory(config)
    drawn = _Selections(config)
    rounds: list[dict[str, dict[str, float]]] = []
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(start_worker(folder, residency, config.dtype, name))
            for name, (folder, residency) in folders.items()
        }
        workers[OUR_DENSE] = workers[SLICED]
        bandwidth = 0.0
        predictor = {name: int(workers[name]("predict")) for name in (SLICED, ON_SSD) if name in workers}
        for round_ in range(config.trials + 1):
            text, tokens = drawn.prompt()
            near, far = drawn.near(), drawn.far()
            result: dict[str, dict[str, float]] = {}
            # Every round begins with another row, so that none always follows the same one.
            shift = round_ % len(names)
            for name in names[shift:] + names[:shift]:
                result[name] = _trial(workers[name], name, config, text, tokens, (near, far))
                done += 1
                if progress is not None:
                    progress(done, (config.trials + 1) * len(names))
            # The best of all rounds, since other load only lowers it.
            bandwidth = max(bandwidth, float(workers[SLICED]("bandwidth")))
            if round_:  # the first one warms up
                rounds.append(result)
        memory = {name: workers[name]("memory") for name in names}
        kernels = workers[SLICED]("down_kernels")
    return {**_report(config, names, rounds, memory, predictor, bandwidth), "down_kernels": kernels}


def _check_memory(config: BenchConfig) -> None:
    """Raise BudgetError unless all rows together fit into memory; otherwise the timings would measure swapping."""
    checkpoint = config.checkpoint
    everything = [spec.d_ffn for spec in checkpoint.layout.ffns]
    whole = resident_bytes(checkpoint, RAM, everything)
    part = resident_bytes(checkpoint, SSD, config.keep)
    needed = whole + (whole if config.dense else 0) + (part if config.static else 0) + (part if config.ssd else 0)
    if needed > (space := room(None)):
        raise BudgetError(
            f"the models to compare take {needed / 1e9:.1f} GB together, and weights may take {space / 1e9:.1f} "
            "GB here; measure a shape with fewer --layers, or give --no-stock or --no-ssd"
        )


def _trial(
    worker: WorkerClient, name: str, config: BenchConfig, text: str, tokens: list[int], selections: tuple[Path, Path]
) -> dict[str, float]:
    trial: dict[str, float] = {"select_s": 0.0, "switch_s": 0.0}
    if name == OUR_DENSE:
        worker("switch", selection=None)
    if name in (SLICED, ON_SSD):
        near, far = selections
        trial["select_s"] = worker("select", text=text, cached=False)
        trial |= worker("switch", selection=str(near))
        # What ssd reads comes from memory here: the system has cached the file. See scripts/measure_residency.py.
        trial["switch_s"] = trial["rows_s"]
    trial |= worker("run", tokens=tokens, generate=config.generation_tokens)
    if name in (SLICED, ON_SSD):
        # The same instruction again: both are there already.
        worker("select", text=text, cached=True)
        worker("switch", selection=str(near))
        again = worker("select", text=text, cached=True)
        trial["live_s"] = again + worker("switch", selection=str(near))["switch_s"]
        other = worker("switch", selection=str(far))
        trial |= {f"far_{what}": other[what] for what in ("rows_s", "entered", "written", "active")}
    trial["ttft_s"] = trial["select_s"] + trial["switch_s"] + trial["prefill_s"]
    return trial


class _Selections:
    """Selections that overlap as wanted, and prompts, drawn by one seed."""

    def __init__(self, config: BenchConfig) -> None:
        self._config = config
        self._generator = np.random.default_rng(0)
        self._widths = tuple(spec.d_ffn for spec in config.checkpoint.layout.ffns)
        self._count = 0
        self._ids: list[Ids] = []
        self.far()

    def prompt(self) -> tuple[str, list[int]]:
        """Words, and as many token ids as a prompt has."""
        length = self._config.prompt_tokens
        # A token has 4 letters at most, as a rule.
        letters = self._generator.integers(97, 123, size=4 * length).astype(np.uint8)
        letters[5::6] = 32
        vocabulary = int(self._config.checkpoint.config.get("vocab_size", 256))
        return letters.tobytes().decode(), self._generator.integers(0, vocabulary, size=length).tolist()

    def near(self) -> Path:
        """Write a selection that shares NEAR of each FFN's neurons with the last one; return its file."""
        ids = []
        for live, width in zip(self._ids, self._widths, strict=True):
            out = min(round((1 - NEAR) * len(live)), width - len(live))
            others = np.setdiff1d(np.arange(width, dtype=np.int32), live, assume_unique=True)
            kept = self._generator.permutation(live)[: len(live) - out]
            ids.append(np.sort(np.concatenate([kept, self._generator.permutation(others)[:out]])).astype(np.int32))
        return self._save(ids)

    def far(self) -> Path:
        """Write a random selection; return its file."""
        pairs = zip(self._widths, self._config.keep, strict=True)
        return self._save([np.sort(self._generator.permutation(width)[:k]).astype(np.int32) for width, k in pairs])

    def _save(self, ids: list[Ids]) -> Path:
        self._ids = ids
        self._count += 1
        file = self._config.work / f"selection-{self._count}.safetensors"
        Selection(tuple(ids), self._widths, "random").save(file)
        return file


def bytes_per_token(checkpoint: Checkpoint, keep: Sequence[int]) -> int:
    """Bytes of active weights that a token reads, as typed on disk, without an embedding that is only looked up."""
    total = resident_bytes(checkpoint, RAM, keep) - checkpoint.predictor_bytes
    for index, (spec, k) in enumerate(zip(checkpoint.layout.ffns, keep, strict=True)):
        total -= (spec.d_ffn - k) * checkpoint.neuron_bytes(index)
    tensors = {name: info for header in checkpoint.headers.values() for name, info in header.tensors.items()}
    if any("lm_head." in name for name in tensors):
        total -= sum(info.end - info.start for name, info in tensors.items() if "embed_tokens." in name)
    return total


def interval(values: Sequence[float]) -> dict[str, float]:
    """Median over rounds, and its 95 % interval over resampled rounds."""
    drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(np.median(np.array(values)[drawn], axis=1), [2.5, 97.5])
    return {"median": statistics.median(values), "low": float(low), "high": float(high)}


def _report(
    config: BenchConfig,
    names: Sequence[str],
    rounds: list[dict[str, dict[str, float]]],
    memory: dict[str, dict[str, int]],
    predictor: dict[str, int],
    bandwidth: float,
) -> dict[str, Any]:
    checkpoint, layout = config.checkpoint, config.checkpoint.layout
    everything = tuple(spec.d_ffn for spec in layout.ffns)
    size = {name: bytes_per_token(checkpoint, everything) for name in (DENSE, OUR_DENSE)}
    size |= {name: bytes_per_token(checkpoint, config.keep) for name in (SLICED, STATIC, ON_SSD)}
    scale = _cast_scale(config)

    def each(name: str, what: str) -> list[float]:
        return [round_[name][what] for round_ in rounds]

    def rates(one: str, other: str, what: str, factor: float = 1.0) -> dict[str, float] | None:
        """The ratio of two rows' rates: the seconds of the other by those of the one."""
        if one not in names or other not in names:
            return None
        return interval([factor * b / a for a, b in zip(each(one, what), each(other, what), strict=True)])

    def of_sliced(share: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(share(round_[SLICED]) for round_ in rounds)

    rows = []
    for name in names:
        medians = {
            what: statistics.median(each(name, what)) for what in ("prefill_s", "select_s", "switch_s", "ttft_s")
        }
        decode = statistics.median(each(name, "decode_s"))
        quartiles = statistics.quantiles(each(name, "decode_s"), n=4) if len(rounds) > 1 else [decode] * 3
        row = {
            "name": name,
            "prefill_tok_s": config.prompt_tokens / medians.pop("prefill_s"),
            "decode_tok_s": 1 / decode,
            "decode_spread": (quartiles[2] - quartiles[0]) / decode,
            **medians,
            "peak_memory": memory[name]["mlx_peak"],
            "rss": memory[name]["rss"],
            "moved_in_decode": max(each(name, "moved_in_decode")),
            "bytes_per_token": size[name],
            "share_of_limit": None if scale is None else scale * size[name] / bandwidth / decode,
        }
        rows.append(row)
    measured = {
        "decode_vs_static": rates(SLICED, STATIC, "decode_s"),
        "decode_vs_dense_limit": rates(SLICED, DENSE, "decode_s", size[SLICED] / size[OUR_DENSE]),
        "prefill_vs_static": rates(SLICED, STATIC, "prefill_s"),
        "ssd_decode_vs_static": rates(ON_SSD, STATIC, "decode_s"),
    }
    resident = None
    if ON_SSD in names and STATIC in names:
        resident = (memory[ON_SSD]["rss"] - predictor[ON_SSD]) / memory[STATIC]["rss"]
    return {
        "machine": {"name": platform.machine(), "bandwidth": bandwidth},
        "layers": len(layout.ffns),
        "dtype": config.dtype,
        "quantization": None if layout.gate_up is None else layout.gate_up.to_dict(),
        "density": sum(config.keep) / sum(everything),
        "prompt_tokens": config.prompt_tokens,
        "generation_tokens": config.generation_tokens,
        "trials": config.trials,
        "selector": "learned" if checkpoint.has_predictor else "random",
        "predictor_bytes": checkpoint.predictor_bytes,
        "rows": rows,
        "headline": _headline(rows),
        "ratios": {
            **{name: None if value is None else value["median"] for name, value in measured.items()},
            "select_switch_share_of_ttft": of_sliced(lambda r: (r["select_s"] + r["switch_s"]) / r["ttft_s"]),
            "select_switch_share_of_ttft_random": of_sliced(
                lambda r: (r["select_s"] + r["far_rows_s"]) / (r["select_s"] + r["far_rows_s"] + r["prefill_s"])
            ),
            "select_switch_share_of_ttft_live": of_sliced(lambda r: r["live_s"] / (r["live_s"] + r["prefill_s"])),
            "switch_bytes_share": of_sliced(lambda r: r["entered"] / r["active"]),
            "switch_written_share": of_sliced(lambda r: r["written"] / r["active"]),
            "switch_s_vs_random": of_sliced(lambda r: r["switch_s"] / r["far_rows_s"]),
            "resident_vs_static": resident,
        },
        "intervals": {name: value for name, value in measured.items() if value is not None},
        "memory": memory,
    }


def _headline(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What most people want to know: the row `sliced` divided by the dense one, figure by figure of the table.

    `against` names the dense row, mlx-lm's if it was measured. `memory_ssd` is of the row `sliced ssd`, or None.
    """
    named = {row["name"]: row for row in rows}
    dense, sliced = named.get(DENSE, named[OUR_DENSE]), named[SLICED]
    figures = {"decode": "decode_tok_s", "prefill": "prefill_tok_s", "ttft": "ttft_s", "memory": "rss"}
    ssd = named[ON_SSD]["rss"] / dense["rss"] if ON_SSD in named else None
    ratios = {name: sliced[what] / dense[what] for name, what in figures.items()}
    return {"against": dense["name"], **ratios, "memory_ssd": ssd}


def _cast_scale(config: BenchConfig) -> float | None:
    """By what casting to `dtype` multiplies the bytes that a token reads; None where only a part of them is cast."""
    halves = config.dtype in ("float16", "bfloat16") and config.checkpoint.float_types <= {"F16", "BF16"}
    if config.dtype is None or halves:
        return 1.0
    if config.checkpoint.layout.gate_up is not None:
        return None
    parts = (part for strip in config.checkpoint.strips(0) for part in strip.parts)
    typed = next(part.dtype for part in parts if part.name == "gate_up.weight")
    return {"float32": 4, "float16": 2, "bfloat16": 2}[config.dtype] / DTYPE_BYTES[typed]
