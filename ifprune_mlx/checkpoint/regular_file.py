"""Opens files that people name: ordinary ones, since a pipe can block for ever and a device need not end."""

from __future__ import annotations

import errno
import stat
from io import BufferedReader
from pathlib import Path


def open_regular(path: Path) -> BufferedReader:
    """Open an ordinary file, or a link to one, for reading bytes.

    Raises:
        OSError: if it is anything else, or cannot be opened.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "is no ordinary file", str(path))
    return path.open("rb")


def read_bounded(path: Path, most: int) -> bytes:
    """All bytes of an ordinary file of at most `most` bytes.

    Raises:
        OSError: if it is longer, no ordinary file, or cannot be read.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"is larger than {most / 1e6:.0f} MB", str(path))
    return content
