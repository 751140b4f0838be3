"""Reads neuron rows from an IFP checkpoint into memory.

Knows how the file lays rows out (`gate_up` interleaved) and how memory does (`gate` and `up` apart, each
contiguous, so that a row prefix of either is a view); knows nothing of selections.
"""

from __future__ import annotations

import mlx.core as mx

from .checkpoint import Checkpoint
from .errors import CheckpointError

Rows = dict[str, mx.array]
"""Per-neuron arrays by name, `gate|up|down` + `.weight|.scales|.biases|.bias`; axis 0 is the neuron everywhere."""

_FLOATS = (mx.float32, mx.float16, mx.bfloat16)


def read_rows(checkpoint: Checkpoint, index: int, dtype: mx.Dtype | None = None) -> tuple[Rows, mx.array | None]:
    """All rows of FFN `index`, evaluated, and the bias of its down projection.

    Args:
        dtype: float type to cast float arrays to; None keeps the file's.

    Returns:
        Rows `[d_ffn, ...]` in the source's neuron order, and the down bias `[d_model]` or None.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    file = checkpoint.neurons_file(index)
    try:
        arrays = mx.load(str(file))
        assert isinstance(arrays, dict)
        down_bias = arrays.pop("down.bias", None)
        rows: Rows = {}
        for name in list(arrays):
            array = _cast(arrays.pop(name), dtype)
            kind, _, leaf = name.partition(".")
            if kind == "down":
                rows[name] = array
            else:
                rows[f"gate.{leaf}"] = mx.contiguous(array[:, 0])
                rows[f"up.{leaf}"] = mx.contiguous(array[:, 1])
            del array
            mx.eval(list(rows.values()))
        if down_bias is not None:
            down_bias = _cast(down_bias, dtype)
            mx.eval(down_bias)
    except RuntimeError as exc:
        raise CheckpointError(f"{file}: cannot be read ({exc}); copy or convert the checkpoint again") from None
    return rows, down_bias


def _cast(array: mx.array, dtype: mx.Dtype | None) -> mx.array:
    return array.astype(dtype) if dtype is not None and array.dtype in _FLOATS else array
