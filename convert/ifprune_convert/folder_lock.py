"""One process at a time works on a folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ifprune_mlx.errors import SourceError, reason_of


@contextmanager
def alone(folder: Path, busy: Callable[[], None], remedy: str = "choose another place") -> Iterator[None]:
    """Nobody else is in this block for the same folder; `busy` is called before waiting for another, and may raise;
    `remedy` ends the message where nothing can be written.

    Raises:
        SourceError: if nothing can be written beside the folder.
    """
    # Beside the folder, since a lock in it would go with it. The system frees it, however a process ends.
    lock = folder.with_name(f".{folder.name}.lock")
    while True:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            opened = lock.open("w")
        except OSError as exc:
            raise SourceError(f"{folder}: cannot be written ({reason_of(exc)}); {remedy}") from exc
        with opened as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                busy()
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _still_there(lock, file.fileno()):  # who had it has removed it
                continue
            try:
                yield
            finally:
                with suppress(OSError):
                    lock.unlink()
            return


def _still_there(lock: Path, descriptor: int) -> bool:
    """Whether an open lock is the one that others would open now."""
    try:
        return os.path.samestat(lock.stat(), os.fstat(descriptor))
    except OSError:
        return False
