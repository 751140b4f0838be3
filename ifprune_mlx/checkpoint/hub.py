"""Finds a model: a folder on disk, or a repository of the Hugging Face hub, downloaded into the hub's own cache.

A repository is listed first, so one of the wrong kind, or too large for the disk, costs no download. Files come one
after the other and not by `snapshot_download`: its threads delay Ctrl-C, it lists the repository again, and it records
a branch's commit before the files are there (docs/log.md).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from ifprune_mlx.checkpoint.atomic_write import restore_folder
from ifprune_mlx.checkpoint.budget import check_files
from ifprune_mlx.checkpoint.format import MANIFEST, SECTION, Checkpoint, Layout
from ifprune_mlx.checkpoint.regular_file import read_json_object
from ifprune_mlx.errors import CheckpointError, IfpruneError, not_converted

Progress = Callable[[int, int], None]
"""Called with (bytes downloaded, bytes in all)."""

# mlx-lm's patterns leave out `neurons-*.safetensors` and the predictor's folder.
_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*")
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})


@dataclass(frozen=True)
class Repository:
    """The hub's listing of a repository at one commit."""

    name: str  # `owner/name`
    revision: str  # the given branch, tag or commit
    commit: str  # that revision's commit
    files: dict[str, int]  # every file's size in bytes, by its path
    parameters: int | None  # the number of weights, if the hub counted them


@dataclass(frozen=True)
class Room:
    """Bytes to be written to a folder, which need not exist yet; messages call them `what`."""

    what: str
    folder: Path
    size: int


def is_hub_id(text: str) -> bool:
    """Whether a text looks like a hub id, `owner/name`; `./a/b` does not."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text, re.ASCII) is not None


def hub_name(path: Path) -> str | None:
    """`owner/name@commit` for a path in the hub's cache; None for other paths."""
    match = re.search(r"/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]+)(/|$)", path.as_posix())
    return f"{match[1]}/{match[2]}@{match[3]}" if match else None


def resolve(
    path_or_repo: str | Path,
    revision: str | None = None,
    progress: Progress | None = None,
    *,
    loads: bool = True,
    residency: str | None = None,
    memory: int | None = None,
    ranks: int = 1,
) -> Path:
    """The local folder of an IFP checkpoint; a hub id (`owner/name`) that is no local path is downloaded first.

    If the hub cannot be reached, an earlier download is taken from its cache.

    Args:
        path_or_repo: folder, or hub id.
        revision: branch, tag or commit of a repository; None is its main branch.
        progress: shows the download; None shows the hub's own progress bars.
        loads: the checkpoint will be loaded, so check first that it fits into memory.
        residency, memory: as in `ifprune_mlx.load`.
        ranks: how many processes will share the weights.

    Raises:
        BudgetError: if the resident weights are larger than what the GPU may use; no weights are downloaded then.
        DenseModelError: if the repository is no IFP checkpoint, but may be a model.
        CheckpointError: if it is neither, the disk is too small, the hub cannot be reached, or a downloaded file is
            damaged.
    """
    path = Path(path_or_repo).expanduser()
    name = str(path_or_repo)
    restore_folder(path)
    if path.exists() or not is_hub_id(name):
        return path
    try:
        repository = list_repository(name, revision, CheckpointError)
    except CheckpointError as exc:
        if (folder := cached_folder(name, MANIFEST, revision)) is not None:
            return folder
        if cached_folder(name, "config.json", revision) is not None:
            raise not_converted(name, "is a plain model in the hub's cache, no IFP checkpoint yet") from exc
        raise
    if MANIFEST not in repository.files:
        raise not_converted(name, f"is on the hub, but no IFP checkpoint yet (it has no {MANIFEST})")
    names = [file for file in repository.files if any(fnmatch(file, pattern) for pattern in _PATTERNS)]
    if loads:
        sizes = {file: repository.files[file] // ranks for file in names}
        check_files(name, sizes, residency, memory, partial(_layout, repository))
    new = any(cached_folder(name, file, repository.commit) is None for file in names)
    folder = download(repository, names, error=CheckpointError, progress=progress)
    if new and (damaged := Checkpoint.open(folder).verify()):
        for file in damaged:
            (folder / file).resolve().unlink(missing_ok=True)
            (folder / file).unlink(missing_ok=True)
        raise CheckpointError(
            f"{name}: {damaged[0]} came damaged and was removed (its sha256 is not the manifest's); load it again"
        )
    return folder


def _layout(repository: Repository) -> Layout | None:
    """What a checkpoint's config says of its FFNs; downloads the config, a few kilobytes."""
    if "config.json" not in repository.files:
        return None
    folder = download(
        repository, ["config.json"], error=CheckpointError, progress=lambda done, total: None, more_follow=True
    )
    file = folder / "config.json"
    return Layout.from_dict(read_json_object(file).get(SECTION), file)


def list_repository(name: str, revision: str | None, error: type[IfpruneError]) -> Repository:
    """List a repository; downloads nothing.

    Raises:
        IfpruneError: (of the given subclass) if it does not exist, is not visible, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import DEFAULT_REVISION

    revision = revision or DEFAULT_REVISION
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
        siblings = info.siblings or []
        counted = [getattr(info.safetensors, "total", None), (getattr(info, "gguf", None) or {}).get("total")]
        return Repository(
            name,
            revision,
            str(info.sha),
            {sibling.rfilename: sibling.size or 0 for sibling in siblings},
            next((int(number) for number in counted if number), None),
        )
    except Exception as exc:  # the error classes depend on the client's version
        raise error(f"{name}: {_reason(exc, name, revision)}") from exc


def cached_folder(name: str, file: str, revision: str | None = None) -> Path | None:
    """The folder of a repository's revision in the hub's cache, if `file` is there; needs no network."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, file, revision=revision)
    except (ValueError, OSError):  # a name that the hub forbids; a cache that cannot be read
        return None
    return Path(found).parents[file.count("/")] if isinstance(found, str) else None


def cached_checkpoints() -> list[str]:
    """The names, `owner/name`, of all IFP checkpoints in the hub's cache; needs no network."""
    from huggingface_hub import constants

    names = set()
    for manifest in Path(constants.HF_HUB_CACHE).glob(f"models--*/snapshots/*/{MANIFEST}"):
        with suppress(CheckpointError):
            if SECTION in read_json_object(manifest.with_name("config.json"), CheckpointError):
                names.add((hub_name(manifest) or "").partition("@")[0])
    return sorted(names)


def download(
    repository: Repository,
    names: Iterable[str],
    *,
    error: type[IfpruneError],
    progress: Progress | None = None,
    room: Iterable[Room] = (),
    more_follow: bool = False,
) -> Path:
    """Download those files of a repository that are not in the hub's cache yet.

    Args:
        names: the files' paths; pickles are refused.
        error: the class of errors.
        progress: shows the download; None shows the hub's own progress bars.
        room: other bytes that will be written later; the disks must have room for them too.
        more_follow: more files will follow, so do not yet record the revision's commit in the cache.

    Returns:
        The folder with the files, which are links into the cache.

    Raises:
        IfpruneError: (of the given subclass) if the disk is too small, access is not granted, or the download fails;
            complete files stay in the cache.
    """
    from huggingface_hub import constants

    names = list(names)
    assert names
    if pickles := [name for name in names if Path(name).suffix in PICKLES]:
        raise error(f"{repository.name}: {pickles[0]} is a Python pickle, which is never downloaded")
    missing = [name for name in names if cached_folder(repository.name, name, repository.commit) is None]
    size = sum(repository.files[name] for name in missing)
    cache = Path(constants.HF_HUB_CACHE)
    if _shortage([Room("to download", cache, size), *room]):
        # Files that an older commit has too need no room.
        missing = [name for name in missing if _fetch(repository, name, error, dry_run=True).will_download]
        size = sum(repository.files[name] for name in missing)
        if short := _shortage([Room("to download", cache, size), *room]):
            raise error(f"{repository.name}: {short}")
    done = 0
    for name in missing:
        bar = None if progress is None else _counter(progress, done, repository.files[name], size)
        _fetch(repository, name, error, tqdm_class=bar)
        done += repository.files[name]
        if progress is not None:
            progress(min(done, size), size)
    folder = cached_folder(repository.name, names[0], repository.commit)
    assert folder is not None
    if not more_follow and cached_folder(repository.name, names[0], repository.revision) != folder:
        # Last, so that a lookup by branch or tag finds complete downloads only.
        with suppress(IfpruneError):  # only later calls without the hub need this
            _fetch(repository, names[0], error, revision=repository.revision)
    return folder


def _fetch(repository: Repository, name: str, error: type[IfpruneError], **options: Any) -> Any:
    """Call `hf_hub_download` for one file of the commit, and turn its errors into one line."""
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(repository.name, name, **{"revision": repository.commit} | options)
    except Exception as exc:  # as in `list_repository`
        why = _reason(exc, repository.name, repository.revision)
        raise error(f"{repository.name}: {name} cannot be downloaded: {why}") from exc


def _counter(progress: Progress, before: int, size: int, total: int) -> Any:
    """A progress bar class for the hub's client that draws nothing and reports one file's bytes to `progress`."""
    from huggingface_hub.utils.tqdm import tqdm

    base: Any = tqdm  # untyped

    class Counter(base):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._there = int(options.get("initial") or 0)
            super().__init__(*arguments, **(options | {"disable": True}))

        def update(self, n: float | None = 1) -> None:
            self._there += int(n or 0)
            progress(before + min(max(self._there, 0), size), total)

        def update_transfer(self, n: float | None = 1) -> None:
            """If a bar has this method, the client does not count transferred bytes on a second bar."""

        def set_transfer_postfix_str(self, text: str = "", refresh: bool = False) -> None:
            """As above."""

    return Counter


def _shortage(room: Iterable[Room]) -> str | None:
    """A message if a disk lacks room, else None; folders on one disk count together."""
    disks: dict[int, list[tuple[Room, Path]]] = {}
    for one in room:
        folder = one.folder.expanduser().absolute()
        while not folder.exists():
            folder = folder.parent
        disks.setdefault(folder.stat().st_dev, []).append((one, folder))
    for wanted in disks.values():
        free = shutil.disk_usage(wanted[0][1]).free
        if sum(one.size for one, _ in wanted) > free:
            parts = " and ".join(f"{_size(one.size)} {one.what} ({one.folder})" for one, _ in wanted if one.size)
            return (
                f"the disk has {_size(free)} free, and {parts} must fit; "
                "free some space, or use another disk (HF_HOME moves the hub's cache)"
            )
    return None


def _size(count: int) -> str:
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def _reason(exc: Exception, name: str, revision: str) -> str:
    """One line that says why the hub failed, and what to do."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{name}"
    access = "log in with `hf auth login`"
    return hub_failure(
        exc,
        {
            errors.OfflineModeIsEnabled: (
                "no such folder here, nor in the hub's cache, and HF_HUB_OFFLINE is set; unset it"
            ),
            errors.GatedRepoError: f"its owner has to grant access; ask for it at {page}, and {access}",
            errors.RepositoryNotFoundError: (
                f"no such folder here, and no such repository on the hub, or a private one; check the name, or {access}"
            ),
            errors.RevisionNotFoundError: f"has no revision {revision!r}; {page} shows its branches, tags and commits",
        },
        disk="check free space and permissions, or set HF_HOME",
        offline="check it and try again, or give a local folder",
    )


def hub_failure(exc: BaseException, known: Mapping[type[Exception], str], *, disk: str, offline: str) -> str:
    """One line that says why a call of the hub's client failed, and what to do.

    Args:
        known: texts for some errors; the first match is used, since some classes are subclasses of others.
        disk, offline: advice for errors of the disk, and of the connection.
    """
    from huggingface_hub import errors

    first = " ".join(str(exc).split("\n\n")[0].split())[:200] or type(exc).__name__
    for kind, text in known.items():
        if isinstance(exc, kind):
            return text
    if isinstance(exc, errors.HFValidationError):
        return f"no such folder here, and no name that the hub allows ({first})"
    if isinstance(exc, errors.HfHubHTTPError):
        return f"the hub answered: {first}; try again later"
    if isinstance(exc, OSError) and exc.strerror and not isinstance(exc, ConnectionError):
        return f"{f'{exc.filename}: ' if exc.filename else ''}{exc.strerror}; {disk}"
    return f"the connection to the hub failed ({first}); {offline}"
