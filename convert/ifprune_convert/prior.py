"""Reads a ready prior: the importance of every neuron, measured elsewhere, in the format of a checkpoint's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from ifprune_mlx.checkpoint.safetensors_io import read_safetensors_header
from ifprune_mlx.errors import SourceError
from ifprune_mlx.selection.selection import Scores

from .wording import listing

_FLOATS = ("F32", "F16", "BF16")
_ADVICE = "give one that was measured on this model, such as priors.safetensors of a checkpoint made from it"


def read_prior(file: Path, widths: Sequence[int]) -> tuple[list[Scores], str]:
    """Read the tensors `prior.N` of a safetensors file; tensors `down_norm.N` may be there and are ignored.

    Args:
        widths: `d_ffn` of every FFN of the model.

    Returns:
        Per FFN, importance float32 `[d_ffn]` in the source's neuron order; and the file's own word for where it comes
        from (`weights` or `calibrated`, the latter if it says nothing).

    Raises:
        SourceError: naming the file, if it is missing or damaged, belongs to a model of another shape, or holds
            anything but finite numbers of 0 and above.
    """
    if not file.is_file():
        raise SourceError(f"{file}: no such prior file; {_ADVICE}")
    header = read_safetensors_header(file, SourceError)
    expected = {f"prior.{index}": (width,) for index, width in enumerate(widths)}
    if missing := [name for name in expected if name not in header.tensors]:
        raise SourceError(f"{file}: lacks {listing(missing)}, and the model has {len(widths)} FFNs; {_ADVICE}")
    found = [name for name in header.tensors if not name.startswith("down_norm.")]
    if extra := [name for name in found if name not in expected]:
        raise SourceError(f"{file}: holds {listing(extra)}, and the model has {len(widths)} FFNs; {_ADVICE}")
    for name, shape in expected.items():
        info = header.tensors[name]
        if info.shape != shape or info.dtype not in _FLOATS:
            raise SourceError(
                f"{file}: tensor {name} is {info.dtype} {list(info.shape)}, and the model needs F32 {list(shape)}; "
                f"{_ADVICE}"
            )
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    prior = [np.array(arrays[name].astype(mx.float32)) for name in expected]
    for name, values in zip(expected, prior, strict=True):
        if not np.isfinite(values).all() or values.min() < 0:
            raise SourceError(
                f"{file}: tensor {name} holds NaN, infinity or negative numbers, which no importance is; "
                "measure the prior again"
            )
    method = header.metadata.get("method")
    return prior, "weights" if method == "weights" else "calibrated"
