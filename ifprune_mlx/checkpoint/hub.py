"""Finds a model: a folder on disk, or a repository on the Hugging Face hub, which comes into the hub's own cache.

A repository is listed first, so that one of the wrong kind, or too large for the disk, costs no download. Files come
one after the other and not by `snapshot_download`: its threads make Ctrl-C wait for the files that they fetch, it lists
the repository once more, and it notes a branch's commit before the files are there (docs/log.md).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ifprune_mlx.checkpoint.atomic_write import restore_folder
from ifprune_mlx.checkpoint.budget import check_files
from ifprune_mlx.checkpoint.format import MANIFEST, SECTION, Checkpoint, read_json_object
from ifprune_mlx.errors import BudgetError, CheckpointError, IfpruneError

Progress = Callable[[int, int], None]
"""Called with (bytes there, bytes in all) of what is downloaded."""

# Our own patterns: mlx-lm's would leave out `neurons-*.safetensors` and the predictor's folder.
_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*")
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})


@dataclass(frozen=True)
class Repository:
    """What the hub says of a repository at one commit.

    Attributes:
        name: its id, `owner/name`.
        revision: the branch, tag or commit that was given.
        commit: that revision's commit.
        files: every file's size in bytes, by its path.
        parameters: how many weights the hub counted, or None if it did not.
    """

    name: str
    revision: str
    commit: str
    files: dict[str, int]
    parameters: int | None


@dataclass(frozen=True)
class Room:
    """Bytes that are about to be written to a folder, which need not exist yet; `what` names them in messages."""

    what: str
    folder: Path
    size: int


def is_hub_id(text: str) -> bool:
    """Whether a text has the form of a hub id, `owner/name`; a path with a dot in front, such as `./a/b`, has not."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text, re.ASCII) is not None


def hub_name(path: Path) -> str | None:
    """`owner/name@commit` of what lies in the hub's cache; None for other paths."""
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
) -> Path:
    """The local folder of an IFP checkpoint; a hub id (`owner/name`) that is no local path is downloaded first.

    Where the hub cannot be reached, a checkpoint that was downloaded before is taken from its cache.

    Args:
        path_or_repo: folder, or hub id.
        revision: branch, tag or commit of a repository; None is its main branch.
        progress: shows the download; without it the hub's own progress bars do.
        loads: it is to be loaded, so check first that it fits into memory.
        residency, memory: how it is to be loaded, as `ifprune_mlx.load` takes them.

    Raises:
        BudgetError: if what would stay in memory is more than this machine has; nothing is downloaded then.
        CheckpointError: if it is neither, the repository is no IFP checkpoint, the disk is too small, the hub cannot be
            reached, or what came is damaged.
    """
    path = Path(path_or_repo).expanduser()
    name = str(path_or_repo)
    restore_folder(path)
    if path.exists() or not is_hub_id(name):
        return path
    try:
        repository = list_repository(name, revision, CheckpointError)
    except CheckpointError:
        if (folder := cached_folder(name, MANIFEST, revision)) is not None:
            return folder
        raise
    if MANIFEST not in repository.files:
        raise CheckpointError(
            f"{name}: is a repository of the hub, but no IFP checkpoint (it has no {MANIFEST}); "
            f"convert it first: ifprune convert --model {name}"
        )
    names = [file for file in repository.files if any(fnmatch(file, pattern) for pattern in _PATTERNS)]
    if loads:
        sizes = {file: repository.files[file] for file in names}
        try:
            check_files(name, sizes, residency, memory)
        except BudgetError:
            check_files(name, sizes, residency, memory, ordered=True)
            if not _is_ordered(repository):
                raise
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


def _is_ordered(repository: Repository) -> bool:
    """Whether a checkpoint's neurons are in an order of their own; its config, a few kilobytes, is fetched for that."""
    if "config.json" not in repository.files:
        return False
    folder = download(
        repository, ["config.json"], error=CheckpointError, progress=lambda done, total: None, more_follow=True
    )
    section = read_json_object(folder / "config.json").get(SECTION)
    return isinstance(section, dict) and section.get("order") is not None


def list_repository(name: str, revision: str | None, error: type[IfpruneError]) -> Repository:
    """Ask the hub what a repository holds; downloads nothing.

    Raises:
        IfpruneError: (of the given subclass) if it does not exist, cannot be seen, or the hub cannot be reached.
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
    except Exception as exc:  # the client's HTTP library, and with it its errors, depend on the client's version
        raise error(f"{name}: {_reason(exc, name, revision)}") from None


def cached_folder(name: str, file: str, revision: str | None = None) -> Path | None:
    """The folder of a repository's revision in the hub's cache, if `file` is there; asks nobody."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, file, revision=revision)
    except (ValueError, OSError):  # a name that the hub forbids; a cache that cannot be read
        return None
    return Path(found).parents[file.count("/")] if isinstance(found, str) else None


def download(
    repository: Repository,
    names: Iterable[str],
    *,
    error: type[IfpruneError],
    progress: Progress | None = None,
    room: Iterable[Room] = (),
    more_follow: bool = False,
) -> Path:
    """Download files of a repository into the hub's cache, those that are not there yet.

    Args:
        repository: as it was listed.
        names: the files, by their paths; pickles are refused.
        error: the class of errors.
        progress: shows the download; without it the hub's own progress bars do.
        room: what else will be written afterwards; it is checked with the download that the disks have room for both.
        more_follow: these files alone are of no use, so the cache is not yet told which commit the revision is at.

    Returns:
        The folder with the files, which are links into the cache.

    Raises:
        IfpruneError: (of the given subclass) if the disk is too small, access is not granted, or the download fails;
            files that came whole stay in the cache.
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
        # Unchanged files of an older commit need no room.
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
        # Last, since what is found by the name of a branch or tag is to be complete.
        with suppress(IfpruneError):  # only a later call without the hub is the poorer
            _fetch(repository, names[0], error, revision=repository.revision)
    return folder


def _fetch(repository: Repository, name: str, error: type[IfpruneError], **options: Any) -> Any:
    """What `hf_hub_download` gives for one file of the commit; what it raises, in one line."""
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(repository.name, name, **{"revision": repository.commit} | options)
    except Exception as exc:  # as in `list_repository`
        why = _reason(exc, repository.name, repository.revision)
        raise error(f"{repository.name}: {name} cannot be downloaded: {why}") from None


def _counter(progress: Progress, before: int, size: int, total: int) -> Any:
    """What the client takes for the progress bar of one file: it draws nothing and reports bytes to `progress`."""
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
            """The client counts what comes and what is written apart, on one bar if it has this method."""

        def set_transfer_postfix_str(self, text: str = "", refresh: bool = False) -> None:
            """As above."""

    return Counter


def _shortage(room: Iterable[Room]) -> str | None:
    """What is wrong, if the disks lack room; folders on one disk count together."""
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
    """Why the hub gave nothing, and what to do, in one line."""
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
    """Why a call of the hub's client failed, and what to do, in one line.

    Args:
        known: what to say of some errors; the first that fits, since some are special cases of others.
        disk, offline: advice where the disk is at fault, or the connection.
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
