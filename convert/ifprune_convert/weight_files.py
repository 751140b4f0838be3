"""Reads and writes weights: the neurons file of one FFN, and everything else as numbered shards, as mlx-lm names them.

The runtime reads single neurons from a neurons file, so its data begin on the border of a memory page, of 16 KiB as
Apple silicon has them: a row that crosses a page more than it has to costs a page more from the disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import mlx.core as mx

from ifprune_mlx.checkpoint.neuron_layout import PAGE_SIZES
from ifprune_mlx.checkpoint.raw_array import raw
from ifprune_mlx.checkpoint.safetensors_io import load_arrays
from ifprune_mlx.errors import IfpruneError, reason_of

from .layout import DTYPE_NAMES

SHARD_BYTES = 256_000_000


def load_lazily(file: Path, error: type[IfpruneError], advice: str) -> dict[str, mx.array]:
    """The tensors of a file that somebody gave, not evaluated.

    Raises:
        IfpruneError: (of the given subclass) if MLX cannot load it, with advice.
    """
    try:
        return load_arrays(file)
    except (IfpruneError, ValueError) as exc:
        raise error(f"{file}: cannot be loaded ({reason_of(exc.__cause__ or exc)}); {advice}") from exc


def write_neurons(
    file: Path, tensors: Mapping[str, mx.array], metadata: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write a safetensors file whose header is padded, with spaces as the format allows, to a page.

    Raises:
        OSError: if it cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "mlx", **metadata}}
    # The largest first: their sizes are multiples of a page, so that they all begin on one.
    ordered = sorted(tensors, key=lambda name: -tensors[name].nbytes)
    offset = 0
    for name in ordered:
        array = tensors[name]
        end = offset + array.nbytes
        header[name] = {"dtype": DTYPE_NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % max(PAGE_SIZES))
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            array = mx.contiguous(tensors[name])
            mx.eval(array)
            out.write(raw(array).tobytes())


class Shards:
    """The `model-*.safetensors` of one folder, one of them in memory at a time; until `finish`, no loader sees any.

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
