"""Atomic writing: what is left behind is old or new, never half."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from ifprune_mlx.errors import IfpruneError, reason_of

_ADVICE = "check permissions and free space, or write elsewhere"
# Both words follow the folder's name and precede the id of the process that works on it.
_PARTIAL, _ASIDE = "partial", "old"
_TEMPORARY = re.compile(rf"^\..*\.{_PARTIAL}-(\d+)-[0-9a-f]{{8}}(?:\.[^.]*)?$", re.DOTALL)
_NAMED_BYTES = 100  # of a file's own name in its temporary one, which a file system bounds
_SYSTEM_FILES = (".DS_Store", ".gitattributes")


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomic(path: Path, write: Callable[[Path], object], error: type[IfpruneError] = IfpruneError) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it there.

    The temporary name keeps the suffix of `path`, since `mx.save_safetensors` appends its own where it is missing.
    What processes that were killed have left in the folder is removed.

    Raises:
        IfpruneError: (or the given subclass) if the folder cannot be written or the disk is full; `path` is
            then as it was.
    """
    check_replaceable(path, error=error)
    temporary: Path | None = None
    try:
        remove_abandoned_files(path.parent)
        # Named so that who comes upon it later knows what it is and whose.
        named = os.fsencode(path.stem)[:_NAMED_BYTES].decode(errors="ignore")
        temporary = path.with_name(f".{named}.{_PARTIAL}-{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))  # the system applies the umask
        write(temporary)
        with temporary.open("rb") as file:
            _flush(file.fileno())
        temporary.replace(path)
        temporary = None
    except (OSError, RuntimeError) as exc:
        _raise_unless_bug(exc, error(f"{path}: cannot be written ({reason_of(exc)}); {_ADVICE}"))
    finally:
        if temporary is not None:
            with suppress(OSError):  # it may not be there
                temporary.unlink()


def _flush(descriptor: int) -> None:
    """Have the drive keep an open file's bytes. On macOS `fsync` leaves them in the drive's cache."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        with suppress(OSError):  # network drives do not have it
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)


def check_replaceable(path: Path, where: str = "", error: type[IfpruneError] = IfpruneError) -> None:
    """Raise IfpruneError (or the given subclass) if at `path` is a folder, a pipe or a device.

    Args:
        where: what the message begins with; the path, if it is empty.
    """
    _check_name(path, error)
    if path.exists() and not path.is_file():
        raise error(f"{where or path}: cannot be written (what is there is no ordinary file); write elsewhere")


def remove_abandoned_files(folder: Path) -> None:
    """Remove the temporary files of `write_atomic` in a folder whose processes no longer run."""
    with suppress(OSError):  # the folder is not there, or another process was quicker
        for file in folder.iterdir():
            temporary = _TEMPORARY.match(file.name)
            if temporary is not None and not _runs(temporary[1]) and not file.is_dir():
                file.unlink()


def restore_folder(path: Path) -> None:
    """Move a folder back that a process put aside to replace it, if that process was killed before it could."""
    if not os.path.lexists(path):
        for aside in _abandoned(path, _ASIDE):
            with suppress(OSError):  # another process was quicker
                aside.rename(path)
                return


def check_free(path: Path, overwrite: bool, error: type[IfpruneError] = IfpruneError) -> None:
    """Raise IfpruneError (or the given subclass) if something is at `path` and may not be replaced."""
    _check_name(path, error)
    restore_folder(path)
    if os.path.lexists(path) and not overwrite:
        raise error(f"{path}: already exists; choose another folder, or pass --overwrite to replace it")


def foreign_files(folder: Path, ours: Iterable[str]) -> list[str]:
    """The files below a folder, by their paths in it, that are not among `ours`, nor put there by the system."""
    there = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(set(there) - {*ours, *_SYSTEM_FILES})


@contextmanager
def new_folder(path: Path, *, overwrite: bool, error: type[IfpruneError] = IfpruneError) -> Iterator[Path]:
    """Yield a hidden sibling folder to fill; on success it is renamed to `path`, on failure it is removed.

    What is at `path` is renamed to another hidden sibling first. A process that is killed leaves hidden siblings only,
    which no loader takes for a checkpoint. The next call for the same `path` moves the old folder back if nothing took
    its place (so does `restore_folder`), and removes the others.

    Raises:
        IfpruneError: (or the given subclass) if `path` exists and `overwrite` is false, or nothing can be written.
    """
    path = path.absolute()
    check_free(path, overwrite, error)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in _abandoned(path, _PARTIAL) + (_abandoned(path, _ASIDE) if os.path.lexists(path) else []):
            _remove(stale)
        partial = path.with_name(f".{path.name}.{_PARTIAL}-{os.getpid()}-{secrets.token_hex(4)}")
        partial.mkdir(0o755)
    except OSError as exc:
        raise error(f"{path}: cannot be written ({reason_of(exc)}); {_ADVICE}") from exc
    try:
        yield partial
        if not _swap_in(partial, path, overwrite):
            raise error(f"{path}: was made by another process meanwhile; choose another folder, or pass --overwrite")
    except (OSError, RuntimeError) as exc:
        _raise_unless_bug(exc, error(f"{path}: cannot be written ({reason_of(exc)}), nothing was changed; {_ADVICE}"))
    finally:
        _remove(partial)


def _check_name(path: Path, error: type[IfpruneError]) -> None:
    """Raise `error` for a name that MLX and the tokenizers cannot write to."""
    try:
        str(path).encode()
    except UnicodeEncodeError as exc:
        raise error(f"{path}: the name is not UTF-8 text; choose another one") from exc


def _swap_in(partial: Path, path: Path, overwrite: bool) -> bool:
    """Rename `partial` to `path`, and remove what was there.

    Returns:
        False, with nothing done, if something is there that must not be overwritten.
    """
    aside = path.with_name(partial.name.replace(f".{path.name}.{_PARTIAL}-", f".{path.name}.{_ASIDE}-", 1))
    try:
        while True:
            try:
                partial.rename(path)  # fails where there is anything but an empty folder
                return True
            except OSError:
                if not os.path.lexists(path):
                    raise
            if not overwrite:
                return False
            _remove(aside)
            with suppress(FileNotFoundError):  # another process took it away
                path.rename(aside)
    finally:
        if os.path.lexists(path):
            _remove(aside)
        elif os.path.lexists(aside):
            aside.rename(path)


def _remove(path: Path) -> None:
    """Remove a folder, or a link to one, as far as it can be."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _abandoned(path: Path, what: str) -> list[Path]:
    """The hidden siblings of `path` whose process no longer runs."""
    prefix = f".{path.name}.{what}-"
    found = path.parent.glob(f"{glob.escape(prefix)}*")
    return [sibling for sibling in found if not _runs(sibling.name.removeprefix(prefix).split("-")[0])]


def _runs(process: str) -> bool:
    """Whether a process of this id runs."""
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True


def _raise_unless_bug(exc: OSError | RuntimeError, failure: IfpruneError) -> NoReturn:
    """Raise `failure` for an error of writing, which MLX reports as RuntimeError; else the error itself."""
    words = ("write", "open", "save_safetensors", "no space")
    if isinstance(exc, RuntimeError) and not any(word in str(exc).lower() for word in words):
        raise exc
    raise failure from exc
