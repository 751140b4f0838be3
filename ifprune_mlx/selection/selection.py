"""A selection: for every sliced FFN, the neurons that are kept. Data alone, no model.

Ids are in the numbering of the source model, sorted, so equal selections have equal hashes whoever made them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ifprune_mlx.checkpoint.atomic_write import write_atomic
from ifprune_mlx.checkpoint.safetensors_io import load_arrays, read_safetensors_header
from ifprune_mlx.errors import SelectionError

Ids = npt.NDArray[np.int32]
Scores = npt.NDArray[np.float32]

_FORMAT = "1"
_MOST_NEURONS = 2**31 - 1  # ids are int32


@dataclass(frozen=True, eq=False)
class Selection:
    """The kept neurons of every sliced FFN.

    Attributes:
        ids: per FFN, int32 `[k]`, sorted, without repeats.
        widths: per FFN, `d_ffn`.
        selector: name of what chose them (`learned`, `activation`, `static`, `random`, ...).

    Raises:
        SelectionError: if ids repeat, are unsorted, or lie outside their FFN.
    """

    ids: tuple[Ids, ...]
    widths: tuple[int, ...]
    selector: str

    def __post_init__(self) -> None:
        if not self.ids:
            raise SelectionError("selection has no layers")
        if len(self.ids) != len(self.widths):
            raise SelectionError(f"selection has {len(self.ids)} layers of ids but {len(self.widths)} widths")
        for layer, (ids, width) in enumerate(zip(self.ids, self.widths, strict=True)):
            if not 0 < width <= _MOST_NEURONS:
                raise SelectionError(f"selection, layer {layer}: a width must lie within 1..{_MOST_NEURONS}")
            if ids.dtype != np.int32 or ids.ndim != 1 or not len(ids):
                raise SelectionError(f"selection, layer {layer}: ids must be a non-empty int32 vector")
            if ids[0] < 0 or ids[-1] >= width or np.any(np.diff(ids) <= 0):
                raise SelectionError(f"selection, layer {layer}: ids must be sorted, unique and within 0..{width - 1}")
            ids.flags.writeable = False

    @property
    def keep(self) -> tuple[int, ...]:
        """*k* of every FFN."""
        return tuple(len(ids) for ids in self.ids)

    @property
    def density(self) -> float:
        """Kept neurons / all neurons, over all FFNs."""
        return sum(self.keep) / sum(self.widths)

    @cached_property
    def hash(self) -> str:
        """Content hash (16 hexadecimal digits) of widths and ids; the selector's name is not part of it."""
        digest = hashlib.sha256(b"ifprune-selection-1")
        for ids, width in zip(self.ids, self.widths, strict=True):
            digest.update(np.array([width, len(ids)], dtype="<i8").tobytes())
            digest.update(ids.astype("<i4").tobytes())
        return digest.hexdigest()[:16]

    def overlap_by_layer(self, other: Selection) -> list[float]:
        """Per FFN, the share of this selection's neurons that `other` keeps too."""
        if self.widths != other.widths:
            raise SelectionError("the two selections belong to models of different shape")
        return [
            len(np.intersect1d(mine, theirs, assume_unique=True)) / len(mine)
            for mine, theirs in zip(self.ids, other.ids, strict=True)
        ]

    def overlap(self, other: Selection) -> float:
        """Mean of `overlap_by_layer` (the paper's overlap, Figure 4)."""
        shares = self.overlap_by_layer(other)
        return sum(shares) / len(shares)

    def agreement(self, other: Selection) -> float:
        """Overlap beyond chance: 1 for the same neurons, about 0 for arbitrary ones, whatever the density.

        Two arbitrary selections of density 0.9 overlap by 0.9, so that overlaps of different densities do not compare.
        """
        chance = sum(k / width for k, width in zip(other.keep, other.widths, strict=True)) / len(other.widths)
        return 1.0 if chance == 1 else (self.overlap(other) - chance) / (1 - chance)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: int32 `layers.N` per FFN; density, selector, widths and hash as metadata."""
        path = Path(path)
        if path.suffix != ".safetensors":
            raise SelectionError(f"{path}: a selection file ends in .safetensors")
        tensors = {f"layers.{layer}": mx.array(ids) for layer, ids in enumerate(self.ids)}
        metadata = {
            "format": f"ifprune-selection-{_FORMAT}",
            "density": repr(self.density),
            "selector": self.selector,
            "widths": " ".join(str(width) for width in self.widths),
            "hash": self.hash,
        }
        write_atomic(path, lambda file: mx.save_safetensors(str(file), tensors, metadata), SelectionError)

    @classmethod
    def load(cls, path: str | Path) -> Selection:
        """Read what `save` wrote.

        Raises:
            SelectionError: naming the file, if it is missing, damaged, or no selection.
        """
        path = Path(path)
        if not path.is_file():
            raise SelectionError(f"{path}: no such selection file; make one with `ifprune select --save-to {path}`")
        header = read_safetensors_header(path, SelectionError)
        metadata = header.metadata
        if metadata.get("format") != f"ifprune-selection-{_FORMAT}":
            raise SelectionError(f"{path}: not a selection file of format {_FORMAT}; see `ifprune select --save-to`")
        names = [f"layers.{layer}" for layer in range(len(header.tensors))]
        if set(names) != set(header.tensors) or any(info.dtype != "I32" for info in header.tensors.values()):
            raise SelectionError(f"{path}: must hold int32 tensors layers.0 .. layers.N and nothing else")
        arrays = load_arrays(path)
        try:
            widths = tuple(int(width) for width in metadata["widths"].split())
            selection = cls(tuple(np.array(arrays[name]) for name in names), widths, metadata["selector"])
        except (KeyError, ValueError) as exc:
            raise SelectionError(f"{path}: malformed metadata ({exc}); make the file again") from exc
        except SelectionError as exc:
            raise SelectionError(f"{path}: {exc}; make the file again") from exc
        if selection.hash != metadata.get("hash"):
            raise SelectionError(f"{path}: its ids do not match its hash; the file is damaged, make it again")
        return selection


def top_k(scores: Sequence[Scores], keep: Sequence[int], selector: str) -> Selection:
    """The `keep[l]` best neurons of every FFN; of equal scores the lower id wins.

    Args:
        scores: per FFN, float32 `[d_ffn]`.
        keep: per FFN, *k*.

    Raises:
        SelectionError: if a score is NaN or infinite.
    """
    ids = []
    for layer, (values, k) in enumerate(zip(scores, keep, strict=True)):
        if not np.all(np.isfinite(values)):
            raise SelectionError(
                f"{selector} selector, layer {layer}: scores contain NaN or infinity; nothing selected"
            )
        ids.append(_best(values, k))
    return Selection(tuple(ids), tuple(len(values) for values in scores), selector)


def _best(values: Scores, k: int) -> Ids:
    """Sorted ids of the k largest values, the lower ids of equal ones."""
    if not 0 < k < len(values):
        return np.arange(len(values) if k > 0 else 0, dtype=np.int32)
    least = np.partition(values, len(values) - k)[len(values) - k]
    chosen = values >= least
    surplus = np.count_nonzero(chosen) - k
    if surplus:
        chosen[np.flatnonzero(values == least)[-surplus:]] = False
    return np.flatnonzero(chosen).astype(np.int32)
