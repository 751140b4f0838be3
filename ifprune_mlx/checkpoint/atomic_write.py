"""Atomic writing: what is left behind is old or new, never half."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ifprune_mlx.errors import IfpruneError

_ADVICE = "check permissions and free space, or write elsewhere"


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

    Raises:
        IfpruneError: (or the given subclass) if the folder cannot be written or the disk is full; `path` is
            then as it was.
    """
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644 & ~_umask())
        temporary.replace(path)
        temporary = None
    except (OSError, RuntimeError) as exc:  # MLX reports a failed write as RuntimeError
        if isinstance(exc, RuntimeError) and not _is_write_failure(exc):
            raise
        raise error(f"{path}: cannot be written ({_reason(exc)}); {_ADVICE}") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_free(path: Path, overwrite: bool, error: type[IfpruneError] = IfpruneError) -> None:
    """Raise IfpruneError (or the given subclass) if something is at `path` and may not be replaced."""
    if (path.exists() or path.is_symlink()) and not overwrite:
        raise error(f"{path}: already exists; choose another folder, or pass --overwrite to replace it")


@contextmanager
def new_folder(path: Path, *, overwrite: bool, error: type[IfpruneError] = IfpruneError) -> Iterator[Path]:
    """Yield a hidden sibling folder to fill; on success it is renamed to `path`, on failure it is removed.

    A process that is killed leaves only the hidden sibling, which no loader takes for a checkpoint (it has no
    manifest) and which the next call for the same `path` sweeps away.

    Raises:
        IfpruneError: (or the given subclass) if `path` exists and `overwrite` is false, or nothing can be written.
    """
    path = path.absolute()
    check_free(path, overwrite, error)
    prefix = f".{path.name}.partial-"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f"{glob_escape(prefix)}*"):
            if not _owner_alive(stale):
                shutil.rmtree(stale, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=path.parent))
    except OSError as exc:
        raise error(f"{path}: cannot be written ({_reason(exc)}); {_ADVICE}") from None
    try:
        yield partial
        partial.chmod(0o755 & ~_umask())
        if not _swap_in(partial, path, overwrite):
            raise error(f"{path}: was made by another process meanwhile; choose another folder, or pass --overwrite")
    except (OSError, RuntimeError) as exc:
        if isinstance(exc, RuntimeError) and not _is_write_failure(exc):
            raise
        raise error(f"{path}: cannot be written ({_reason(exc)}), nothing was changed; {_ADVICE}") from None
    finally:
        _remove(partial)


def glob_escape(text: str) -> str:
    """`text` with the characters that `Path.glob` treats specially taken literally."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in text)


def _swap_in(partial: Path, path: Path, overwrite: bool) -> bool:
    """Rename `partial` to `path`; what was there is exchanged in one step where the system can, and then removed.

    Returns:
        False, with nothing done, if something is there that must not be overwritten.
    """
    try:
        partial.rename(path)  # fails where there is anything but an empty folder
        return True
    except OSError:
        if not (path.exists() or path.is_symlink()):
            raise
    if not overwrite:
        return False
    if _exchange(partial, path):
        return True  # `partial` now names what was there, which the caller removes
    aside = path.with_name(f"{partial.name}-old")
    path.rename(aside)
    try:
        partial.rename(path)
    except BaseException:
        aside.rename(path)
        raise
    _remove(aside)
    return True


def _remove(path: Path) -> None:
    """Remove a folder, or a link to one, as far as it can be."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders atomically (`renameat2` on Linux, `renamex_np` on macOS); False where it cannot be done."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            return bool(libc.renamex_np(os.fsencode(one), os.fsencode(other), 2) == 0)
        return bool(libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), 2) == 0)
    except (AttributeError, OSError):
        return False


def _owner_alive(partial: Path) -> bool:
    """Whether the process that made a partial folder (its id is in the name) still runs."""
    try:
        os.kill(int(partial.name.rsplit(".partial-", 1)[1].split("-")[0]), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _is_write_failure(exc: RuntimeError) -> bool:
    text = str(exc).lower()
    return any(word in text for word in ("write", "open", "save_safetensors", "no space"))


def _reason(exc: BaseException) -> str:
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror
    return str(exc).splitlines()[0] if str(exc) else type(exc).__name__
