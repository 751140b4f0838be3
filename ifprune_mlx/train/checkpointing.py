"""What all runs that can be stopped share: the files of their folders, how two runs are told apart, the schedule of a
learning rate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mlx.optimizers import cosine_decay, join_schedules, linear_schedule

from ifprune_mlx.checkpoint.atomic_write import write_atomic
from ifprune_mlx.errors import DataError

STATE, METRICS = "state.safetensors", "metrics.jsonl"


def schedule(rate: float, steps: int, warmup: int) -> Any:
    """A learning rate for mlx's optimizers: up to `rate` within `warmup` steps, then by a cosine to a tenth."""
    warmup = min(warmup, steps - 1)
    cosine = cosine_decay(rate, max(steps - warmup, 1), rate / 10)
    if warmup < 1:
        return cosine
    return join_schedules([linear_schedule(rate / (warmup + 1), rate, warmup), cosine], [warmup])


def hash_of_arrays(arrays: Sequence[np.ndarray[Any, Any]]) -> str:
    """Hash (16 hexadecimal digits) of the bytes of arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def differences(theirs: str, ours: str) -> str:
    """What two runs differ in, in words; a run is a JSON object, of which `settings` and `objective` hold more."""
    try:
        old, new = json.loads(theirs), json.loads(ours)
    except ValueError:
        return "other settings"
    if not isinstance(old, dict):
        return "other settings"
    flat_old, flat_new = (
        {
            **{k: v for k, v in run.items() if not isinstance(v, dict)},
            **run.get("settings", {}),
            **run.get("objective", {}),
        }
        for run in (old, new)
    )
    names = [name for name in flat_new | flat_old if flat_old.get(name) != flat_new.get(name)]
    return "another " + ", ".join(name.replace("_", " ") for name in names)


def sweep(folder: Path, names: Iterable[str]) -> None:
    """Remove what a kill left half written of these files, which may be patterns."""
    for name in map(Path, names):
        for stale in folder.glob(str(name.with_name(f".{name.stem}-*{name.suffix}"))):
            stale.unlink()


def cut_metrics(folder: Path, step: int) -> None:
    """Drop what the metrics say of steps after `step`; a line that a kill left half written goes too."""
    file = folder / METRICS
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line).get("step", -1) <= step:
                kept.append(line)
        except ValueError:
            continue
    write_atomic(file, lambda path: path.write_text("".join(kept), encoding="utf-8"), DataError)
