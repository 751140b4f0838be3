"""The cache of converted models: a dense model that a command is given is converted once, and found there later.

Every source has a folder `models/NAME-HASH` in the cache, with one checkpoint in it, whose name says of what state of
the source it was made, and by which version. So a whole checkpoint of the right name is all that a later start needs.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import mlx.core as mx

from ifprune_mlx.checkpoint.atomic_write import write_atomic
from ifprune_mlx.checkpoint.budget import SSD
from ifprune_mlx.checkpoint.format import FORMAT_VERSION, MANIFEST, SECTION, Checkpoint, is_gguf
from ifprune_mlx.checkpoint.hub import cached_folder, hub_name, list_repository
from ifprune_mlx.checkpoint.regular_file import read_json_object
from ifprune_mlx.device import Device, this_device
from ifprune_mlx.errors import BudgetError, CheckpointError, IfpruneError, SourceError, not_converted, reason_of
from ifprune_mlx.sparse.ffn_detection import find_ffns

from .calibrate import shipped_examples
from .embedded import cache_folder
from .folder_lock import alone
from .memory_check import converted_bytes, least_hub_bytes
from .packing import plan, quantization_of
from .pipeline import Note, Options, Report, convert
from .readers import open_source
from .readers.hub import locate_source, parse_source
from .skeleton import build_skeleton
from .source import PackedSource, Source

# Raised whenever a conversion of the same source would come out differently.
_REVISION = 1
_VERSION = f"f{FORMAT_VERSION}r{_REVISION}"
_NAME = "source.json"  # in a source's folder: what people call the source
# A file of up to so many bits per weight is packed with as many as the number says; a larger one is not packed.
_PACKED = ((5.5, 4), (9.0, 8))
# Every so many of the chats that ship are enough for a first prior.
_EVERY = 4


@dataclass(frozen=True)
class CachedModel:
    """A part of the cache.

    Attributes:
        name: what people call it: of a converted model the source's path or hub id.
        kind: `converted`, `embedded`, or `download` for what the embedded model is made from.
        folder: where it lies.
        usable: False if a conversion was interrupted, or made by another version.
    """

    name: str
    kind: str
    folder: Path
    usable: bool

    @property
    def bytes(self) -> int:
        """Bytes of all its files."""
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())

    def remove(self) -> None:
        """Remove it from the disk.

        Raises:
            CheckpointError: if another process is converting it.
        """

        def busy() -> None:
            raise CheckpointError(f"{self.name}: is being converted by another process; wait for it, or end it")

        with alone(self.folder, busy, "remove it by hand"):
            shutil.rmtree(self.folder)


def names_dense_model(model: str) -> bool:
    """Whether this is surely no IFP checkpoint: a GGUF file, here or of the hub, a folder of a plain model, or what
    one of these was converted from. A bare hub id may be either.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        config = path / "config.json"
        if (path / MANIFEST).exists() or not config.is_file():
            return False
        with suppress(CheckpointError):  # the reader of checkpoints says what is wrong
            return SECTION not in read_json_object(config)
        return False
    if path.is_file():
        return is_gguf(path)
    _, file_name = parse_source(model)
    return file_name is not None or _Place(model).ready() is not None


def ensure_converted(
    model: str,
    *,
    convert_it: bool = True,
    trust_remote_code: bool = False,
    residency: str | None = None,
    memory: int | None = None,
    report: Report = lambda stage, done, total: None,
    note: Note = lambda line: None,
) -> Path:
    """The IFP checkpoint of a dense model; downloads and converts it where that has not been done.

    If the source or the hub cannot be reached, an earlier conversion is taken.

    Args:
        model: a GGUF file, a folder of safetensors, or a model of the hub (`ORG/NAME`, or `ORG/NAME:FILE.gguf`).
        convert_it: False takes only what is in the cache already, and gives back a local path as it is.
        residency, memory: what the model will be loaded with; without either, one that can never fit is refused.

    Raises:
        IfpruneError: in one line, if it cannot be downloaded, converted or written, or would not fit.
    """
    place = _Place(model)
    try:
        state = place.state()
    except SourceError as exc:
        if (found := place.ready()) is None:
            raise
        note(f"{exc}; its conversion in the cache is used")
        return found
    if (found := place.ready(state)) is not None:
        return found
    if not convert_it:
        if place.ready() is not None:
            raise not_converted(model, "has changed since its conversion")
        if (path := Path(model).expanduser()).exists():
            return path  # opening it says why it is no checkpoint
        raise not_converted(model, "is a model of the hub, no IFP checkpoint yet")
    try:
        busy = partial(note, f"Another process converts {model}; waiting for it")
        with alone(place.folder, busy, "set IFPRUNE_CACHE to another folder"):
            if (found := place.ready(state)) is not None:
                return found
            asks_less = residency == SSD or memory is not None
            return _convert(place, state, trust_remote_code, asks_less, report, note)
    except OSError as exc:
        raise SourceError(
            f"{place.folder}: cannot be written ({reason_of(exc)}); check permissions and free space, or set "
            "IFPRUNE_CACHE"
        ) from exc


def cached_models() -> list[CachedModel]:
    """All that the cache holds, by name."""
    models = []
    for folder in _models_folder().glob("*-*/"):
        with suppress(IfpruneError):
            name = str(read_json_object(folder / _NAME)["name"])
            models.append(CachedModel(name, "converted", folder, _whole(folder) is not None))
    for folder in cache_folder().glob("smollm2-135m-instruct*/"):
        models.append(CachedModel(folder.name, "embedded", folder, True))
    for folder in cache_folder().glob("downloads/"):
        models.append(CachedModel(folder.name, "download", folder, True))
    return sorted(models, key=lambda model: model.name)


def cached_model(name: str) -> CachedModel:
    """What the cache holds of this name: as `cached_models` has it, as a command was given it, or its last part.

    Raises:
        CheckpointError: if there is none, or more than one.
    """
    models = cached_models()
    whole = [model for model in models if model.name in (name, _Place(name).name)]
    found = whole or [model for model in models if Path(model.name).name == name]
    if len(found) == 1:
        return found[0]
    names = ", ".join(model.name for model in found or models) or "nothing"
    raise CheckpointError(f"{name}: {'is not' if not found else 'is more than once'} in the cache, which holds {names}")


@dataclass(frozen=True)
class _Place:
    """Where the conversion of a source lies in the cache."""

    model: str

    @cached_property
    def name(self) -> str:
        """The source, however it was spelled: `owner/name`, `owner/name:FILE.gguf`, or a whole path."""
        path = Path(self.model).expanduser()
        repository, file = parse_source(self.model)
        if repository is None or path.exists():
            try:
                return str(path.resolve())
            except ValueError:  # no name that a file can have
                return str(path.absolute())
        return repository if file is None else f"{repository}:{file}"

    @property
    def folder(self) -> Path:
        last = Path(self.name).name if Path(self.name).is_absolute() else self.name
        short = re.sub(r"[^\w.-]+", "-", last, flags=re.ASCII)[-60:].strip("-.")
        return _models_folder() / f"{short}-{hashlib.sha256(self.name.encode(errors='surrogatepass')).hexdigest()[:8]}"

    def state(self) -> str:
        """What changes when the source does: the commit, or names, sizes and times of the files.

        Raises:
            SourceError: if the source is not there, or the hub cannot be reached and has not been before.
        """
        path = Path(self.model).expanduser()
        repository, file = parse_source(self.model)
        if path.exists():
            seen = json.dumps(stamps_of(path))
        elif repository is None:
            raise SourceError(f"{self.model}: no such file or folder")
        else:
            try:
                seen = list_repository(repository, None, SourceError).commit
            except SourceError:
                there = cached_folder(repository, file or "config.json")
                if there is None or (seen := (hub_name(there) or "").partition("@")[2]) == "":
                    raise
        return hashlib.sha256(seen.encode()).hexdigest()[:12]

    def ready(self, state: str = "*") -> Path | None:
        """The whole checkpoint of this state, or of any, that this version made."""
        return _whole(self.folder, state)


def stamps_of(path: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a source's files. Hidden ones are of the system, and no part of it."""
    files = [path] if path.is_file() else sorted(one for one in path.iterdir() if not one.name.startswith("."))
    return [(one.name, one.stat().st_size, one.stat().st_mtime_ns) for one in files if one.is_file()]


def _whole(folder: Path, state: str = "*") -> Path | None:
    for path in sorted(folder.glob(f"{state}-{_VERSION}")):
        with suppress(CheckpointError):
            return Checkpoint.open(path).path
    return None


def _models_folder() -> Path:
    return cache_folder() / "models"


def _convert(place: _Place, state: str, trust_remote_code: bool, asks_less: bool, report: Report, note: Note) -> Path:
    """Convert a source into its folder, and remove what was there before.

    Args:
        asks_less: the model will be loaded within a budget of memory, or with residency `ssd`.
    """
    device, cpu = this_device(), mx.default_device() == mx.cpu
    target = place.folder / f"{state}-{_VERSION}"
    if not Path(place.model).expanduser().exists():
        _check_hub_fits(place, device, asks_less)
    path = locate_source(
        place.model,
        out=target,
        bits=32 if cpu else None,
        trust_remote_code=trust_remote_code,
        progress=partial(report, "download"),
    )
    source = open_source(path, trust_remote_code=trust_remote_code)
    options, size = choose_options(source, device, cpu=cpu)
    if size > device.usable and not asks_less:
        raise _too_large(place.model, size, device)
    earlier = [one.name for one in place.folder.glob("*-f*r*") if not one.name.startswith(".")]
    why = "is no IFP checkpoint yet"
    if earlier:
        why = "was converted by another version" if earlier[0].startswith(state) else "has changed since its conversion"
    unfinished = place.folder / f".{target.name}.unfinished"
    if unfinished.exists():
        note(f"{place.model}: its conversion goes on")
    else:
        free = _check_disk(place, size)
        note(
            f"{place.model} {why}; it is converted into the cache, once: {_source_bytes(path) / 1e9:.3g} GB read, "
            f"{size / 1e9:.3g} GB written ({_words(options, source)}), of {free / 1e9:.3g} GB free. In memory the "
            f"weights take {size / 1e9:.3g} GB of {device.usable / 1e9:.3g} GB. --no-convert refuses; `ifprune models` "
            "lists and removes"
        )
    place.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"name": place.name}) + "\n"
    write_atomic(place.folder / _NAME, lambda file: file.write_text(text, encoding="utf-8"), SourceError)
    if target.exists():  # damaged
        shutil.rmtree(target)
    try:
        convert(source, target, options, report, note, unfinished=unfinished)
    except BaseException as exc:
        kept = unfinished.exists()
        if isinstance(exc, KeyboardInterrupt):
            left = "the converted model is kept, and the next start goes on" if kept else "nothing of it was kept"
            note(f"{place.model}: its conversion was stopped; {left}")
        if not earlier and not kept:
            shutil.rmtree(place.folder, ignore_errors=True)
        raise
    density = Checkpoint.open(target).layout.density
    note(f"{place.model}: its density of {density:g} is a guess; `ifprune adapt` measures, and trains a predictor")
    for other in place.folder.iterdir():
        if other not in (target, place.folder / _NAME):
            shutil.rmtree(other, ignore_errors=True)
    return target


def choose_options(source: Source, device: Device, *, cpu: bool) -> tuple[Options, int]:
    """How to convert a model that is to be used right away.

    The bits per weight stay about as they are, or become four where the weights would not fit into memory. A CPU gets
    float32, since MLX is slow there at anything else. What fits is calibrated on some of the chats that ship.

    Args:
        device, cpu: what will compute.

    Returns:
        The options, and about how many bytes the weights take.
    """
    skeleton = build_skeleton(source.path, source.config, len(source.shapes))
    specs = find_ffns(skeleton, str(source.config["model_type"]))
    rows = math.gcd(*(spec.d_model for spec in specs))
    group = next((size for size in (64, 32) if rows % size == 0), None)
    wanted = [Options(dtype=mx.float32) if cpu else Options()]
    if not (isinstance(source, PackedSource) and source.packed) and group is not None:
        weights = sum(math.prod(shape) for shape in source.shapes.values())
        bits = 8 * _source_bytes(source.path) / weights
        packed = [Options(quantization=quantization_of("affine", group, n)) for most, n in _PACKED if bits <= most]
        smallest = Options(quantization=quantization_of("affine", group, 4))
        wanted = [*wanted, smallest] if cpu else [*packed[:1], *([] if packed else wanted), smallest]
    size = 0
    for options in wanted:
        size = converted_bytes(source, options, specs, plan(source, skeleton, specs, options.quantization, False))
        if size <= device.usable:
            return replace(options, calibration=shipped_examples()[::_EVERY], tolerance=None), size
    return wanted[-1], size


def _check_hub_fits(place: _Place, device: Device, asks_less: bool) -> None:
    """Raise BudgetError, before the download, for a model of the hub that does not fit even with four bits a weight."""
    least = least_hub_bytes(place.name.partition(":")[0])
    if least > device.usable and not asks_less:
        raise _too_large(place.model, least, device)


def _too_large(model: str, size: int, device: Device) -> BudgetError:
    return BudgetError(
        f"{model}: is not converted, since its weights would take {size / 1e9:.3g} GB, and may take "
        f"{device.usable / 1e9:.3g} GB of this machine's {device.memory / 1e9:.3g} GB; choose a smaller model, or keep "
        f"only active neurons in memory: ifprune chat --model {shlex.quote(model)} --residency ssd"
    )


def _check_disk(place: _Place, size: int) -> int:
    """The bytes that the cache's disk has free; raises SourceError if a checkpoint of so many does not fit."""
    place.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place.folder).free
    if size > free:
        raise SourceError(
            f"{place.model}: converting it writes {size / 1e9:.3g} GB, and the disk of {place.folder} has "
            f"{free / 1e9:.3g} GB free; free some space (`ifprune models` removes), or set IFPRUNE_CACHE"
        )
    return free


def _source_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("*.safetensors")))


def _words(options: Options, source: Source) -> str:
    if options.quantization is not None:
        return f"{options.quantization.bits} bits a weight"
    if options.dtype is not None:
        return str(options.dtype).removeprefix("mlx.core.")
    return "packed as it is" if isinstance(source, PackedSource) and source.packed else "half precision"
