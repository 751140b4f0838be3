"""What a run that can be stopped keeps on disk: which run it is, its state, its metrics."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ifprune_mlx.checkpoint.atomic_write import sha256_file, write_atomic
from ifprune_mlx.checkpoint.regular_file import LARGEST_TEXT, read_bounded
from ifprune_mlx.checkpoint.safetensors_io import load_arrays, read_safetensors_header
from ifprune_mlx.errors import DataError, reason_of

STATE, METRICS = "state.safetensors", "metrics.jsonl"
_WRITTEN = (
    STATE,
    METRICS,
    "prior*.safetensors",
    "adapters/*/gains.safetensors",
    "predictor/head.safetensors",
    "adapters/*/adapters.safetensors",
    "adapters/*/adapter_config.json",
)


def save_state(folder: Path, identity: str, arrays: Mapping[str, mx.array], **position: object) -> None:
    """Write the state of a run in one file, which is replaced at once.

    Args:
        identity: of the run, JSON.
        position: JSON values, such as the step.
    """
    metadata = {"run": identity, **{name: json.dumps(value) for name, value in position.items()}}
    write_atomic(folder / STATE, lambda path: mx.save_safetensors(str(path), dict(arrays), metadata), DataError)


def load_state(folder: Path, identity: str) -> tuple[dict[str, mx.array], dict[str, Any]] | None:
    """The arrays and the position that `save_state` wrote; None if there is no state.

    Raises:
        DataError: if the state is damaged, or that of another run: the message says what differs.
    """
    if not (folder / STATE).is_file():
        return None
    metadata = read_safetensors_header(folder / STATE, DataError).metadata
    found = metadata.pop("run", "")
    if found != identity:
        raise DataError(
            f"{folder}: holds a run with {_differences(found, identity)}; give the same again to go on with it, or "
            "another --output"
        )
    try:
        return load_arrays(folder / STATE), {name: json.loads(value) for name, value in metadata.items()}
    except (ValueError, RecursionError) as exc:
        raise DataError(f"{folder / STATE}: is damaged; remove it to train from the start") from exc


def _differences(theirs: str, ours: str) -> str:
    """What two runs differ in, in words. A run is a JSON object, whose `settings` and `objective` are objects."""
    try:
        old, new = (
            {**run.pop("settings", {}), **run.pop("objective", {}), **run} for run in map(json.loads, (theirs, ours))
        )
    except (ValueError, AttributeError, TypeError, RecursionError):
        return "other settings"
    names = [name for name in new | old if old.get(name) != new.get(name)]
    return "another " + ", ".join(name.replace("_", " ") for name in names)


def hash_of_arrays(arrays: Iterable[np.ndarray[Any, Any]]) -> str:
    """Hash (16 hexadecimal digits) of the bytes of arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def hash_of_adapters(folder: Path) -> str:
    """Hash (16 hexadecimal digits) of the adapters that a run wrote."""
    digest = hashlib.sha256()
    for file in sorted((folder / "adapters").rglob("*.safetensors")):
        digest.update(f"{file.relative_to(folder)} {sha256_file(file)}\n".encode())
    return digest.hexdigest()[:16]


def sweep(folder: Path) -> None:
    """Remove the temporary files that a killed run left."""
    for name in map(Path, _WRITTEN):
        for stale in folder.glob(str(name.with_name(f".{name.stem}-*{name.suffix}"))):
            stale.unlink()


def cut_metrics(folder: Path, step: int) -> None:
    """Drop the lines of later steps from the metrics, and a last line that a kill left half written."""
    file = folder / METRICS
    if not file.is_file():
        return
    try:
        text = read_bounded(file, LARGEST_TEXT).decode("utf-8", errors="replace")
    except OSError as exc:
        raise DataError(f"{file}: cannot be read ({reason_of(exc)}); move it away to go on") from exc
    kept = []
    for line in text.splitlines(keepends=True):
        try:
            if json.loads(line).get("step", -1) <= step:
                kept.append(line)
        except (AttributeError, RecursionError, TypeError, ValueError):
            continue
    write_atomic(file, lambda path: path.write_text("".join(kept), encoding="utf-8"), DataError)
