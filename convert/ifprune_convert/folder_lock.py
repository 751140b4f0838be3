"""One process at a time works on a folder."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ifprune_mlx.errors import SourceError, reason_of


@contextmanager
def alone(folder: Path, busy: Callable[[], None], remedy: str = "choose another place") -> Iterator[None]:
    """Nobody else is in this block for the same folder; `busy` is called before waiting for another, and may raise;
    `remedy` ends the message where nothing can be written.

    Raises:
        SourceError: if nothing can be written beside the folder.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Beside the folder, since a lock in it would go with it. The system frees it, however a process ends.
        opened = folder.with_name(f".{folder.name}.lock").open("w")
    except OSError as exc:
        raise SourceError(f"{folder}: cannot be written ({reason_of(exc)}); {remedy}") from exc
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
