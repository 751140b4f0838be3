"""Finds what `ifprune convert` is given: a path on this machine, or a model of the Hugging Face hub, downloaded first.

Chooses of a repository's files those that a reader here reads: safetensors at its top with config and tokenizer, or one
GGUF. Never a pickle; nor copies of the same weights in other formats or folders. What cannot be converted is refused
before its weights come. The listing, the cache and the download are `ifprune_mlx.checkpoint.hub`'s.
"""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from ifprune_convert.skeleton import build_skeleton, listing
from ifprune_mlx.checkpoint.format import MANIFEST
from ifprune_mlx.checkpoint.hub import (
    PICKLES,
    Progress,
    Repository,
    Room,
    cached_folder,
    download,
    is_hub_id,
    list_repository,
)
from ifprune_mlx.errors import IfpruneError, SourceError
from ifprune_mlx.sparse.ffn_detection import find_ffns

from .chat_templates import MORE_TEMPLATES
from .safetensors import VOCABULARIES, check_config
from .shards import INDEX, missing_shards, read_index

# Small files at a repository's top: config, tokenizer, chat template, licence. No code: none of it is ever run.
_SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "README.md", "LICENSE*")
_SHOWN_GGUFS = 12
_PART = re.compile(r"-\d{5}-of-(?!00001)\d{5}\.gguf$", re.IGNORECASE)
# More than any model has; a damaged config must not keep us busy.
_MAX_LAYERS = 1000


def locate_source(
    source: str,
    revision: str | None = None,
    *,
    out: Path,
    bits: float | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Path:
    """The path of a source for `open_source`; a model of the hub is downloaded into the hub's cache.

    Where the hub cannot be reached, a model that was downloaded before is taken from the cache.

    Args:
        source: a file or folder; else `ORG/NAME`, or for one GGUF of many `ORG/NAME:FILE.gguf` (or `/FILE.gguf`).
        revision: branch, tag or commit of the hub's repository; None is its main branch.
        out: where the conversion will be written, and `bits` per weight that it will take (None: as in the source).
            With the download it must fit on the disk.
        trust_remote_code: as for `open_source`.
        progress: shows the download in bytes; without it the hub's own progress bars do.

    Raises:
        SourceError: in one line, if the hub has no such model, it cannot be converted, or it cannot be downloaded.
    """
    path = Path(source).expanduser()
    name, file = parse_source(source)
    if path.exists() or path.is_symlink() or name is None:
        if revision is not None:
            raise SourceError(f"{source}: --revision is for a model of the hub, ORG/NAME, and this is a local path")
        return path
    try:
        repository = list_repository(name, revision, SourceError)
    except SourceError:
        if (folder := cached_folder(name, file or "config.json", revision)) is None:
            raise
        return folder / (file or "")
    if file is not None:
        if file not in repository.files:
            raise SourceError(f"{name}: has no file {file}; {_name_one(repository)}")
        _check_whole(name, file)
        written = _weights_size(repository, 16 if bits is None else bits)
        room = [Room("to write", out, written)]
        return download(repository, [file], error=SourceError, progress=progress, room=room) / file
    _check_kind(repository)
    small = [one for one in repository.files if "/" not in one and any(fnmatch(one, pattern) for pattern in _SMALL)]
    small += [one for one in repository.files if fnmatch(one, f"{MORE_TEMPLATES}/*.jinja")]
    folder = download(repository, small, error=SourceError, progress=progress, more_follow=True)
    _check_model(name, folder, trust_remote_code)
    weights = _weight_files(repository, folder)
    written = sum(repository.files[one] for one in weights) if bits is None else _weights_size(repository, bits)
    room = [Room("to write", out, written)]
    return download(repository, weights, error=SourceError, progress=progress, room=room)


def parse_source(source: str) -> tuple[str | None, str | None]:
    """The hub id in what was given, and the GGUF of it that was named; (None, None) if it can only be a path."""
    match = re.fullmatch(r"([^/:]+/[^/:]+)(?:[:/](.+\.gguf))?", source, re.IGNORECASE)
    return (match[1], match[2]) if match and is_hub_id(match[1]) else (None, None)


def _check_kind(repository: Repository) -> None:
    """Refuse a repository that no reader here reads."""
    name, files = repository.name, repository.files
    if MANIFEST in files and any(fnmatch(file, "neurons-*.safetensors") for file in files):
        raise SourceError(f"{name}: is an IFP checkpoint already; use it as it is: ifprune chat --model {name}")
    top = [file for file in files if "/" not in file]
    if not any(file.endswith(".safetensors") for file in top):
        if any(file.lower().endswith(".gguf") for file in files):
            raise SourceError(f"{name}: holds GGUF files; {_name_one(repository)}")
        if any(PurePosixPath(file).suffix in PICKLES for file in files):
            raise SourceError(
                f"{name}: has its weights as Python pickles only, which can run code when read, so they are not even "
                "downloaded; look for a repository of the same model in safetensors or GGUF"
            )
        raise SourceError(f"{name}: holds no *.safetensors at its top and no GGUF; check the name and the --revision")
    if "config.json" not in files:
        raise SourceError(f"{name}: has *.safetensors but no config.json; it may be an adapter or no language model")
    if not any(file in files for file in VOCABULARIES):
        raise SourceError(
            f"{name}: has no tokenizer; put it and the tokenizer of the model that it was made from into one folder, "
            "and convert that"
        )


def _check_model(name: str, folder: Path, trust_remote_code: bool) -> None:
    """Refuse a model whose config tells that it cannot be converted."""
    try:
        config = check_config(folder, trust_remote_code)
        find_ffns(build_skeleton(folder, config, _MAX_LAYERS), str(config["model_type"]))
    except IfpruneError as exc:
        text = str(exc).replace(str(folder), name)
        raise SourceError(text if text.startswith(name) else f"{name}: {text}") from exc


def _name_one(repository: Repository) -> str:
    """How to name one of a repository's GGUF files, and which there are."""
    every = sorted(file for file in repository.files if file.lower().endswith(".gguf"))
    if not every:
        return "it has no GGUF files; give its name alone"
    names = [file for file in every if not _PART.search(file)] or every
    more = f" and {len(names) - _SHOWN_GGUFS} more" if len(names) > _SHOWN_GGUFS else ""
    return f"name one, as in --model {repository.name}:{names[0]}; it has {', '.join(names[:_SHOWN_GGUFS])}{more}"


def _check_whole(name: str, file: str) -> None:
    if _PART.search(file):
        raise SourceError(
            f"{name}: {file} is one of several parts; download them all and join them with llama.cpp's "
            "`llama-gguf-split --merge`, and convert the joined file"
        )


def _weight_files(repository: Repository, folder: Path) -> list[str]:
    """The weight files that the safetensors reader reads: those in the index, else `model*`, else all at the top."""
    top = [file for file in repository.files if "/" not in file and file.endswith(".safetensors")]
    models = [file for file in top if file.startswith("model")] or top
    if INDEX in repository.files:
        placed = sorted(read_index(folder / INDEX))
        missing = [name for name in placed if name not in top]
        if not missing:
            return placed
        if not models or missing_shards(models):  # else the index is stale, and the model may be whole without it
            raise SourceError(f"{repository.name}: lacks {listing(missing)}, which its index names")
    return models


def _weights_size(repository: Repository, bits: float) -> int:
    """About how many bytes the weights take at so many bits each; none where the hub did not count them."""
    return int((repository.parameters or 0) * bits / 8)
