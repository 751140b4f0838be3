"""What the converter reads from: any dense checkpoint, under mlx-lm's parameter names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import mlx.core as mx

from ifprune_mlx.checkpoint.format import Quantization


class Source(Protocol):
    """A dense checkpoint that hands out one tensor at a time."""

    path: Path
    """The file or folder that was opened."""
    config: dict[str, Any]
    """What mlx-lm's `ModelArgs.from_dict` reads, `model_type` included."""
    licence: str | None
    """The licence that the source names, if it names one."""
    notes: Sequence[str]
    """Lines for the user on what is odd about it, and was put right."""
    dequantizes: bool
    """Whether its float32 tensors were unpacked from fewer bits, so that float16 holds them."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by mlx-lm's parameter name (after the model class's own `sanitize`)."""
        ...

    def take(self, name: str) -> mx.array:
        """The tensor of that name, evaluated, in a float type. The source keeps no reference: take each once.

        Raises:
            KeyError: if there is no such tensor, or it was taken before.
            SourceError: if the file can no longer be read.
        """
        ...

    def write_tokenizer(self, folder: Path) -> None:
        """Write tokenizer files, chat template and generation config into `folder`, as mlx-lm reads them."""
        ...


@runtime_checkable
class PackedSource(Source, Protocol):
    """A checkpoint some of whose weights are quantized already, as mlx-lm packs them.

    `shapes` and `take` know only of weights as floats; scales and biases of groups are not among them.
    """

    packed: dict[str, Quantization]
    """How the weights of a module are packed, by the module's path."""

    def take_packed(self, path: str) -> dict[str, mx.array]:
        """The packed weight of a module, evaluated: `weight`, `scales` and, where the mode has them, `biases`.

        Takes the place of `take(f"{path}.weight")`.
        """
        ...
