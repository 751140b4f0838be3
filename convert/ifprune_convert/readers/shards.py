"""Which weight files of a folder are the model, and where each tensor lies.

An index says it, but indexes go stale: a model that was saved anew beside its old index is whole all the same. Where
the index does not fit what is there, all of the model's files are tried, and the model tells whether they are whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ifprune_convert.skeleton import listing
from ifprune_mlx.checkpoint.regular_file import open_regular, read_bounded
from ifprune_mlx.checkpoint.safetensors_io import SafetensorsHeader, TensorInfo, read_safetensors_header
from ifprune_mlx.errors import SourceError, reason_of

INDEX = "model.safetensors.index.json"
_LARGEST_INDEX = 1 << 26  # bytes
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Placed:
    """Where a tensor lies."""

    file: Path
    info: TensorInfo


@dataclass(frozen=True)
class WeightFiles:
    """Files that may be the whole model.

    Attributes:
        files: the names of the files.
        doubt: why the index or the files' own numbers say that they are not whole; None if nothing does.
    """

    files: tuple[str, ...]
    doubt: str | None = None


def read_index(file: Path) -> dict[str, set[str]]:
    """The weight files that an index names, each with the tensors that it places there.

    Raises:
        SourceError: if it is no such index, or names files elsewhere.
    """
    shards: dict[str, set[str]] = {}
    try:
        for tensor, name in json.loads(read_bounded(file, _LARGEST_INDEX))["weight_map"].items():
            shards.setdefault(name, set()).add(tensor)
        if shards and all(Path(name).name == name and name.endswith(".safetensors") for name in shards):
            return shards
    except OSError as exc:
        raise SourceError(f"{file}: cannot be read ({reason_of(exc)})") from exc
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise SourceError(f"{file}: is not an index of safetensors files; download it again")


def find_weights(path: Path) -> list[WeightFiles]:
    """The choices of weight files in a folder, the likeliest first.

    Raises:
        SourceError: if there is an index that is none, or several files that nothing says belong together.
    """
    there = sorted(file.name for file in path.glob("*.safetensors") if not file.name.startswith("."))
    # As mlx-lm and transformers: `consolidated`, `adapters` and the like beside `model*` are not the model.
    models = [name for name in there if name.startswith("model")]
    names = models or there
    doubt = None
    if (path / INDEX).exists():
        placed = read_index(path / INDEX)
        if (doubt := _contradiction(path, placed)) is None:
            indexed = tuple(placed)
            return [WeightFiles(indexed), *([WeightFiles(tuple(names))] if set(names) - set(indexed) else [])]
    elif not models and len(names) > 1 and not all(map(_numbered, names)):
        raise SourceError(
            f"{path}: has several weight files and no {INDEX} to say which belong together "
            f"({listing(names)}); download the index, or remove what is not the model"
        )
    present = tuple(name for name in names if (path / name).is_file())
    missing = [name for name in names if name not in present] + missing_shards(names)
    if doubt is None and missing:
        doubt = f"{path}: lacks {listing(missing)}; download the missing weight files"
    return [WeightFiles(present, doubt)]


def missing_shards(names: list[str]) -> list[str]:
    """The files that files numbered `*-00001-of-00003.safetensors` lack, by their own count."""
    matches = list(filter(None, map(_numbered, names)))
    wanted = (f"{m[1]}{number:05d}-of-{m[3]}.safetensors" for m in matches for number in range(1, int(m[3]) + 1))
    return [name for name in dict.fromkeys(wanted) if name not in names]


def _numbered(name: str) -> re.Match[str] | None:
    return re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})\.safetensors", name)


def _contradiction(path: Path, placed: dict[str, set[str]]) -> str | None:
    """What an index says that is not so, or None."""
    if missing := sorted(name for name in placed if not (path / name).is_file()):
        return f"{path}: lacks {listing(missing)}; download the missing weight files"
    for name, tensors in placed.items():
        if absent := sorted(tensors - read_safetensors_header(path / name, SourceError).tensors.keys()):
            return f"{path / name}: lacks {listing(absent)}, which {INDEX} places there; download both"
    return None


def place_tensors(path: Path, files: Iterable[str], notes: list[str]) -> dict[str, Placed]:
    """Where each tensor of these files lies; a line goes to `notes` for what several of them hold.

    Raises:
        SourceError: if a file is damaged, or two hold different tensors of one name.
    """
    found: dict[str, Placed] = {}
    twice: list[str] = []
    for file in files:
        header: SafetensorsHeader = read_safetensors_header(path / file, SourceError)
        for name, info in header.tensors.items():
            here = Placed(path / file, info)
            if (first := found.setdefault(name, here)) is not here:
                if not equal_tensors(first, here):
                    raise SourceError(
                        f"{path}: tensor {name} is in both {first.file.name} and {file}, and they differ; "
                        "remove the stale one"
                    )
                twice.append(name)
    if twice:
        notes.append(f"{path}: {listing(sorted(set(twice)))}: in several files, and equal")
    return found


def equal_tensors(one: Placed, other: Placed) -> bool:
    """Whether two tensors are of one type and shape and equal, byte by byte.

    Raises:
        SourceError: if a file cannot be read.
    """
    if one == other:
        return True
    if (one.info.dtype, one.info.shape) != (other.info.dtype, other.info.shape):
        return False
    try:
        with open_regular(one.file) as first, open_regular(other.file) as second:
            first.seek(one.info.start)
            second.seek(other.info.start)
            left = one.info.end - one.info.start
            while left > 0:
                count = min(left, _CHUNK)
                if first.read(count) != second.read(count):
                    return False
                left -= count
    except OSError as exc:
        raise SourceError(f"{exc.filename or one.file}: cannot be read ({reason_of(exc)})") from exc
    return True
