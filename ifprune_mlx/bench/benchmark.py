"""Compares models of the same weights in one run: each in a process of its own, in turn, round by round.

The rows are `mlx-lm dense` and `mlx-lm static` (plain models, the second with one selection's neurons and no others),
and `dense`, `sliced` and `sliced ssd` (ours). Ratios are taken round by round, since what else the machine does changes
from one to the next; their intervals are bootstrapped over rounds.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from ifprune_mlx.bench.worker import serve
from ifprune_mlx.checkpoint.budget import RAM, SSD, physical_memory, resident_bytes
from ifprune_mlx.checkpoint.format import Checkpoint
from ifprune_mlx.errors import BudgetError, IfpruneError
from ifprune_mlx.eval.metrics import RESAMPLES
from ifprune_mlx.selection.selection import Ids, Selection

NEAR = 0.8
"""Overlap of a selection with the one before it, in the rounds that are timed whole."""
DENSE, STATIC = "mlx-lm dense", "mlx-lm static"
OUR_DENSE, SLICED, ON_SSD = "dense", "sliced", "sliced ssd"
_GROWTH_FROM = 20


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        checkpoint: the IFP checkpoint.
        dense, static: plain mlx-lm models of the same weights: all neurons, and as many as `keep`; None leaves the row
            out.
        ssd: measure residency `ssd` as well.
        keep: per FFN, *k*.
        dtype: float type to cast to; None keeps the checkpoint's.
        prompt_tokens, generation_tokens, trials: of each round, and how many rounds count.
        work: folder for selection files.
    """

    checkpoint: Checkpoint
    dense: Path | None
    static: Path | None
    ssd: bool
    keep: tuple[int, ...]
    dtype: str | None
    prompt_tokens: int
    generation_tokens: int
    trials: int
    work: Path


class Asked:
    """A contender in its process."""

    def __init__(self, connection: Connection, name: str) -> None:
        self._connection = connection
        self._name = name
        self.load_s = float(self._answer()["load_s"])

    def __call__(self, do: str, **arguments: Any) -> Any:
        """Have it do something, and wait.

        Raises:
            IfpruneError: if it could not, or its process ended.
        """
        self._connection.send_bytes(json.dumps({"do": do, **arguments}).encode())
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            raise IfpruneError(
                f"bench: the process of {self._name} ended before it answered (out of memory?); give fewer --layers"
            ) from None
        if "error" in answer:
            raise IfpruneError(f"bench, {self._name}: {answer['error']}")
        return answer["ok"]


@contextmanager
def contender(folder: Path, residency: str | None, dtype: str | None, name: str) -> Iterator[Asked]:
    """A contender in a process of its own, ended with the block. See `ifprune_mlx.bench.worker.serve`."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, str(folder), residency, dtype), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Asked(ours, name)
    except BaseException:
        process.kill()
        raise
    finally:
        ours.close()
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()


def bench(settings: Settings, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Time every row in turn.

    Returns:
        What `ifprune bench --json` writes (DESIGN.md section 11), with intervals and spreads beside; ratios that were
        not measured are None.

    Raises:
        IfpruneError: if a contender cannot be loaded or dies.
    """
    checkpoint, done = settings.checkpoint, 0
    given: dict[str, tuple[Path | None, str | None]] = {
        DENSE: (settings.dense, None),
        STATIC: (settings.static, None),
        SLICED: (checkpoint.path, RAM),
        ON_SSD: (checkpoint.path if settings.ssd else None, SSD),
    }
    folders = {name: (folder, residency) for name, (folder, residency) in given.items() if folder is not None}
    names = [name for name in (DENSE, OUR_DENSE, SLICED, STATIC, ON_SSD) if name in folders or name == OUR_DENSE]
    _check_memory(settings)
    drawn = _Selections(settings)
    rounds: list[dict[str, dict[str, float]]] = []
    with ExitStack() as stack:
        asked = {
            name: stack.enter_context(contender(folder, residency, settings.dtype, name))
            for name, (folder, residency) in folders.items()
        }
        asked[OUR_DENSE] = asked[SLICED]
        bandwidth = 0.0
        predictor = {name: int(asked[name]("predict")["bytes"]) for name in (SLICED, ON_SSD) if name in asked}
        for round_ in range(settings.trials + 1):
            text, tokens = drawn.prompt()
            near, far = drawn.near(), drawn.far()
            result: dict[str, dict[str, float]] = {}
            # Every round begins with another row, so that none always follows the same one.
            shift = round_ % len(names)
            for name in names[shift:] + names[:shift]:
                result[name] = _trial(asked[name], name, settings, text, tokens, (near, far))
                done += 1
                if progress is not None:
                    progress(done, (settings.trials + 1) * len(names))
            # The best of all rounds: whatever else the machine does takes from it.
            bandwidth = max(bandwidth, float(asked[SLICED]("bandwidth")["bandwidth"]))
            if round_:  # the first one warms up
                rounds.append(result)
        memory = {name: asked[name]("memory") for name in names}
    return _report(settings, names, rounds, memory, predictor, bandwidth)


def _check_memory(settings: Settings) -> None:
    """Raise BudgetError unless all rows together fit into memory: swapping would be all that is measured."""
    checkpoint = settings.checkpoint
    everything = [spec.d_ffn for spec in checkpoint.layout.ffns]
    whole = resident_bytes(checkpoint, RAM, everything)
    part = resident_bytes(checkpoint, SSD, settings.keep)
    needed = whole + (whole if settings.dense else 0) + (part if settings.static else 0) + (part if settings.ssd else 0)
    if needed > (have := physical_memory()):
        raise BudgetError(
            f"the models to compare take {needed / 1e9:.1f} GB together, and this machine has {have / 1e9:.1f} GB; "
            "measure a shape with fewer --layers, or give --no-stock or --no-ssd"
        )


def _trial(
    ask: Asked, name: str, settings: Settings, text: str, tokens: list[int], selections: tuple[Path, Path]
) -> dict[str, float]:
    trial: dict[str, float] = {"select_s": 0.0, "switch_s": 0.0}
    if name == OUR_DENSE:
        ask("switch", selection=None)
    if name in (SLICED, ON_SSD):
        near, far = selections
        trial["select_s"] = ask("select", text=text, cached=False)["select_s"]
        trial |= ask("switch", selection=str(near))
        # What ssd reads comes from memory here: the system has cached the file. See scripts/measure_residency.py.
        trial["switch_s"] = trial["rows_s"]
    trial |= ask("run", tokens=tokens, generate=settings.generation_tokens)
    if name in (SLICED, ON_SSD):
        # The same instruction again: both are there already.
        ask("select", text=text, cached=True)
        ask("switch", selection=str(near))
        again = ask("select", text=text, cached=True)["select_s"]
        trial["live_s"] = again + ask("switch", selection=str(near))["switch_s"]
        other = ask("switch", selection=str(far))
        trial |= {f"far_{what}": other[what] for what in ("rows_s", "entered", "written", "active")}
    trial["ttft_s"] = trial["select_s"] + trial["switch_s"] + trial["prefill_s"]
    return trial


class _Selections:
    """Selections that overlap as wanted, and prompts, drawn by one seed."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._generator = np.random.default_rng(0)
        self._widths = tuple(spec.d_ffn for spec in settings.checkpoint.layout.ffns)
        self._count = 0
        self._ids: list[Ids] = []
        self.far()

    def prompt(self) -> tuple[str, list[int]]:
        """Words, and as many token ids as a prompt has."""
        length = self._settings.prompt_tokens
        letters = self._generator.integers(97, 123, size=4 * length).astype(
            np.uint8
        )  # a token has 4 at most, as a rule
        letters[5::6] = 32
        vocabulary = int(self._settings.checkpoint.config.get("vocab_size", 256))
        return letters.tobytes().decode(), self._generator.integers(0, vocabulary, size=length).tolist()

    def near(self) -> Path:
        """One that shares NEAR of each FFN's neurons with the last one drawn."""
        ids = []
        for live, width in zip(self._ids, self._widths, strict=True):
            out = min(round((1 - NEAR) * len(live)), width - len(live))
            others = np.setdiff1d(np.arange(width, dtype=np.int32), live, assume_unique=True)
            kept = self._generator.permutation(live)[: len(live) - out]
            ids.append(np.sort(np.concatenate([kept, self._generator.permutation(others)[:out]])).astype(np.int32))
        return self._save(ids)

    def far(self) -> Path:
        """An arbitrary one."""
        keep = self._settings.keep
        pairs = zip(self._widths, keep, strict=True)
        return self._save([np.sort(self._generator.permutation(width)[:k]).astype(np.int32) for width, k in pairs])

    def _save(self, ids: list[Ids]) -> Path:
        self._ids = ids
        self._count += 1
        file = self._settings.work / f"selection-{self._count}.safetensors"
        Selection(tuple(ids), self._widths, "random").save(file)
        return file


def bytes_per_token(checkpoint: Checkpoint, keep: Sequence[int]) -> int:
    """Bytes of weights that a token reads, as they are typed on disk.

    That is all that are active but an embedding table that is looked up and not multiplied by."""
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
    settings: Settings,
    names: Sequence[str],
    rounds: list[dict[str, dict[str, float]]],
    memory: dict[str, dict[str, int]],
    predictor: dict[str, int],
    bandwidth: float,
) -> dict[str, Any]:
    checkpoint, layout = settings.checkpoint, settings.checkpoint.layout
    everything = tuple(spec.d_ffn for spec in layout.ffns)
    size = {name: bytes_per_token(checkpoint, everything) for name in (DENSE, OUR_DENSE)}
    size |= {name: bytes_per_token(checkpoint, settings.keep) for name in (SLICED, STATIC, ON_SSD)}
    floats = {"float32": 4, "float16": 2, "bfloat16": 2}

    def each(name: str, what: str) -> list[float]:
        return [round_[name][what] for round_ in rounds]

    def ratios(one: str, other: str, what: str, factor: float = 1.0) -> dict[str, float] | None:
        if one not in names or other not in names:
            return None
        # Rates, and so the seconds of the other by those of the one.
        return interval([factor * b / a for a, b in zip(each(one, what), each(other, what), strict=True)])

    rows = []
    for name in names:
        decode = statistics.median(each(name, "decode_s"))
        quartiles = statistics.quantiles(each(name, "decode_s"), n=4) if len(rounds) > 1 else [decode] * 3
        row: dict[str, Any] = {
            "name": name,
            "prefill_tok_s": settings.prompt_tokens / statistics.median(each(name, "prefill_s")),
            "decode_tok_s": 1 / decode,
            "decode_spread": (quartiles[2] - quartiles[0]) / decode,
            "select_s": statistics.median(each(name, "select_s")),
            "switch_s": statistics.median(each(name, "switch_s")),
            "ttft_s": statistics.median(each(name, "ttft_s")),
            "peak_memory": memory[name]["mlx_peak"],
            "rss": memory[name]["rss"],
            "moved_in_decode": max(each(name, "moved_in_decode")),
            "bytes_per_token": size[name],
            "share_of_limit": size[name] / bandwidth / decode if settings.dtype is None else None,
        }
        if settings.dtype is not None and layout.gate_up is None:
            parts = (part for strip in checkpoint.strips(0) for part in strip.parts)
            typed = next(part.dtype for part in parts if part.name == "gate_up.weight")
            scale = floats[settings.dtype] / {"F32": 4, "F16": 2, "BF16": 2}[typed]
            row["share_of_limit"] = scale * size[name] / bandwidth / decode
        rows.append(row)
    near_far: dict[str, float] = {}
    sliced = [round_[SLICED] for round_ in rounds]
    near_far["near"] = statistics.median((r["select_s"] + r["switch_s"]) / r["ttft_s"] for r in sliced)
    far = [r["select_s"] + r["far_rows_s"] for r in sliced]
    near_far["far"] = statistics.median(f / (f + r["prefill_s"]) for f, r in zip(far, sliced, strict=True))
    near_far["live"] = statistics.median(r["live_s"] / (r["live_s"] + r["prefill_s"]) for r in sliced)
    measured = {
        "decode_vs_static": ratios(SLICED, STATIC, "decode_s"),
        "decode_vs_dense_limit": ratios(SLICED, DENSE, "decode_s", size[SLICED] / size[OUR_DENSE]),
        "prefill_vs_static": ratios(SLICED, STATIC, "prefill_s"),
        "ssd_decode_vs_static": ratios(ON_SSD, STATIC, "decode_s"),
    }
    resident = None
    if ON_SSD in names and STATIC in names:
        resident = (memory[ON_SSD]["rss"] - predictor[ON_SSD]) / memory[STATIC]["rss"]
    return {
        "machine": {"name": platform.machine(), "bandwidth": bandwidth},
        "layers": len(layout.ffns),
        "dtype": settings.dtype,
        "quantization": None if layout.gate_up is None else layout.gate_up.to_dict(),
        "density": sum(settings.keep) / sum(everything),
        "prompt_tokens": settings.prompt_tokens,
        "generation_tokens": settings.generation_tokens,
        "trials": settings.trials,
        "selector": "learned" if checkpoint.has_predictor else "random",
        "predictor_bytes": checkpoint.predictor_bytes,
        "rows": rows,
        "ratios": {
            **{name: None if value is None else value["median"] for name, value in measured.items()},
            "select_switch_share_of_ttft": near_far["near"],
            "select_switch_share_of_ttft_random": near_far["far"],
            "select_switch_share_of_ttft_live": near_far["live"],
            "switch_bytes_share": statistics.median(r["entered"] / r["active"] for r in sliced),
            "switch_written_share": statistics.median(r["written"] / r["active"] for r in sliced),
            "switch_s_vs_random": statistics.median(r["switch_s"] / r["far_rows_s"] for r in sliced),
            "resident_vs_static": resident,
        },
        "intervals": {name: value for name, value in measured.items() if value is not None},
        "memory": {name: memory[name] for name in names},
    }
