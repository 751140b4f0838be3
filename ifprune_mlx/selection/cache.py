"""Selections that were made before, by what they were made from: in memory, and on disk if a folder is given."""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

from ifprune_mlx.errors import IfpruneError, SelectionError, reason_of
from ifprune_mlx.selection.selection import Selection

_KEY = re.compile(r"[0-9a-f]{64}")
_SUFFIX = ".safetensors"
# Of a full folder this share of the files goes at once, so that not every put has to scan it.
_SWEPT_SHARE = 16


class SelectionCache:
    """The selections used last. Any thread may use it, and several processes may share its folder.

    A file that is damaged counts as none and is written anew; one that cannot be written is left out. Neither is an
    error: what is not found is selected again.

    Args:
        folder: keep them there too, one selection file each; None keeps them in memory only.
        entries: the most in memory.
        size: the most bytes of ids in memory; an entry takes 4 per kept neuron.
        files: the most files in the folder.

    Attributes:
        hits, misses: of `get`, so far; `hits` counts those found on disk as well.

    Raises:
        SelectionError: if the folder cannot be made or is none.
    """

    def __init__(
        self, folder: str | Path | None = None, *, entries: int = 256, size: int = 1 << 27, files: int = 4096
    ) -> None:
        self.hits = self.misses = 0
        self._entries, self._size, self._files = entries, size, files
        self._known: OrderedDict[str, Selection] = OrderedDict()
        self._bytes = 0
        self._written = 0  # files in the folder, as far as this process knows
        self._lock = threading.Lock()
        self._folder = None if folder is None else Path(folder).expanduser()
        if self._folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as exc:
                raise SelectionError(
                    f"{self._folder}: cannot be a cache of selections ({reason_of(exc)}); give another folder"
                ) from exc
            self._sweep(files)

    def __len__(self) -> int:
        """Selections in memory."""
        return len(self._known)

    def get(self, key: str, widths: tuple[int, ...], keep: tuple[int, ...]) -> Selection | None:
        """The selection under a key; None if there is none.

        Args:
            key: 64 hexadecimal digits.
            widths, keep: `d_ffn` and *k* per FFN that it must have; a file with others counts as damaged.
        """
        with self._lock:
            selection = self._known.get(key)
            if selection is not None:
                self._known.move_to_end(key)
                self.hits += 1
                return selection
        selection = self._read(key, widths, keep)
        with self._lock:
            if selection is None:
                self.misses += 1
            else:
                self.hits += 1
                self._remember(key, selection)
        return selection

    def put(self, key: str, selection: Selection) -> None:
        """Keep a selection under a key (64 hexadecimal digits)."""
        with self._lock:
            self._remember(key, selection)
        if self._folder is None:
            return
        file = self._file(key)
        new = not file.exists()
        try:
            selection.save(file)
        except SelectionError:  # a full disk, say
            return
        with self._lock:
            self._written += new
            if self._written > self._files:
                self._sweep(self._files - self._files // _SWEPT_SHARE)

    def _remember(self, key: str, selection: Selection) -> None:
        if (replaced := self._known.pop(key, None)) is not None:
            self._bytes -= _bytes(replaced)
        self._known[key] = selection
        self._bytes += _bytes(selection)
        while self._known and (len(self._known) > self._entries or self._bytes > self._size):
            _, dropped = self._known.popitem(last=False)
            self._bytes -= _bytes(dropped)

    def _read(self, key: str, widths: tuple[int, ...], keep: tuple[int, ...]) -> Selection | None:
        if self._folder is None:
            return None
        file = self._file(key)
        try:
            selection = Selection.load(file)
        except (IfpruneError, OSError, RuntimeError, ValueError):  # of MLX, if it goes while it is read
            return None
        if (selection.widths, selection.keep) != (widths, keep):
            return None
        with suppress(OSError):
            os.utime(file)  # so that what is used stays
        return selection

    def _sweep(self, most: int) -> None:
        """Remove the files that were not used for longest, what a killed process left half written among them.

        Args:
            most: how many may stay.
        """
        assert self._folder is not None
        found = []
        with suppress(OSError):
            for entry in os.scandir(self._folder):
                # Hidden, with the key in front: being written. Nothing else in the folder is ours.
                if entry.name.endswith(_SUFFIX) and _KEY.match(entry.name.removeprefix(".")):
                    with suppress(OSError):
                        found.append((entry.stat().st_mtime, entry.path))
        for _, path in sorted(found)[: max(len(found) - most, 0)]:
            with suppress(OSError):  # another process was quicker
                Path(path).unlink()
        self._written = min(len(found), most)

    def _file(self, key: str) -> Path:
        assert self._folder is not None
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no key")
        return self._folder / f"{key}{_SUFFIX}"


def _bytes(selection: Selection) -> int:
    return sum(ids.nbytes for ids in selection.ids)
