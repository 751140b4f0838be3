"""What a checkpoint says of one sliceable FFN: where its leaves are in the model, and their shape."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx

HALVES, INTERLEAVED = "halves", "interleaved"


@dataclass(frozen=True)
class FFNSpec:
    """One sliceable FFN: where its leaves are, and their shape.

    Attributes:
        path: module path in the mlx-lm model, such as `model.layers.0.mlp`.
        gate, up, down: names of the leaves below `path`; gate and up are the same leaf where they are one matrix.
        d_model, d_ffn: input width and number of neurons.
        bias: whether gate and up have biases `[d_ffn]`.
        down_bias: whether down has a bias `[d_model]`.
        fused: how the rows of a common gate and up leaf `[2 d_ffn, d_model]` lie: `halves` (one after the other) or
            `interleaved` (the two rows of a neuron together); None for two leaves. Which of the two rows is the gate's
            does not matter to slicing: the first counts as the gate.
    """

    path: str
    gate: str
    up: str
    down: str
    d_model: int
    d_ffn: int
    bias: bool
    down_bias: bool
    fused: str | None = None

    def __post_init__(self) -> None:
        texts, sizes = (self.path, self.gate, self.up, self.down), (self.d_model, self.d_ffn)
        flags = (self.bias, self.down_bias)
        for values, kind in ((texts, str), (sizes, int), (flags, bool)):
            if wrong := [value for value in values if type(value) is not kind]:
                raise TypeError(f"{wrong[0]!r} is no {kind.__name__}")
        if self.fused not in (None, HALVES, INTERLEAVED) or (self.gate == self.up) != (self.fused is not None):
            raise ValueError(f"fused {self.fused!r} does not go with leaves {self.gate!r} and {self.up!r}")

    def to_dict(self) -> dict[str, Any]:
        """As it stands in `config.json`; `fused` only where there is something to say."""
        entries = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in entries.items() if name != "fused" or value is not None}

    @property
    def leaves(self) -> tuple[str, ...]:
        """The names of its leaves, two or three."""
        return (self.gate, self.down) if self.fused else (self.gate, self.up, self.down)

    @property
    def parameters(self) -> int:
        """Weights and biases of the whole FFN."""
        return self.d_ffn * self.neuron_parameters + (self.d_model if self.down_bias else 0)

    @property
    def neuron_parameters(self) -> int:
        """Weights and biases of one neuron."""
        return 3 * self.d_model + (2 if self.bias else 0)


def split_fused(array: mx.array, fused: str) -> tuple[mx.array, mx.array]:
    """Rows of a common leaf `[2 n, ...]` -> those of gate and up, `[n, ...]` each."""
    if fused == HALVES:
        half = array.shape[0] // 2
        return array[:half], array[half:]
    return array[::2], array[1::2]


def join_fused(gate: mx.array, up: mx.array, fused: str, axis: int = 0) -> mx.array:
    """What `split_fused` takes apart, along any axis: two arrays `[..., n, ...]` -> `[..., 2 n, ...]`."""
    if fused == HALVES:
        return mx.concatenate([gate, up], axis=axis)
    axis %= gate.ndim
    both = mx.stack([gate, up], axis=axis + 1)
    return both.reshape(*gate.shape[:axis], -1, *gate.shape[axis + 1 :])
