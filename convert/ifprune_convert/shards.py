"""Writes tensors as numbered safetensors shards, as mlx-lm names them, with one shard in memory at a time.

Until `finish`, no file has a name that a loader looks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

SHARD_BYTES = 256_000_000


class Shards:
    """The `model-*.safetensors` of one folder, as they are written.

    Attributes:
        bytes: of all tensors so far.
    """

    def __init__(self, folder: Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write into `folder`; `metadata` goes into every file's header."""
        self.bytes = 0
        self._folder = folder
        self._metadata = {"format": "mlx", **(metadata or {})}
        self._held: dict[str, mx.array] = {}
        self._names: list[list[str]] = []

    def add(self, tensors: dict[str, mx.array]) -> None:
        """Evaluate tensors and take them in; writes a shard when enough are held."""
        mx.eval(tensors)
        self._held |= tensors
        self.bytes += sum(tensor.nbytes for tensor in tensors.values())
        if sum(tensor.nbytes for tensor in self._held.values()) >= SHARD_BYTES:
            self._write()

    def finish(self) -> dict[str, str]:
        """Write what is left and number the files.

        Returns:
            The name of its file for every tensor.
        """
        if self._held:
            self._write()
        files: dict[str, str] = {}
        for index, names in enumerate(self._names):
            file = f"model-{index + 1:05d}-of-{len(self._names):05d}.safetensors"
            self._unnumbered(index).rename(self._folder / file)
            files |= dict.fromkeys(names, file)
        return files

    def _write(self) -> None:
        mx.save_safetensors(str(self._unnumbered(len(self._names))), self._held, self._metadata)
        self._names.append(list(self._held))
        self._held = {}
        mx.clear_cache()

    def _unnumbered(self, index: int) -> Path:
        return self._folder / f"shard-{index}.safetensors"
