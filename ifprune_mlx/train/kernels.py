"""Refuses to train where MLX's own gradients would be wrong."""

from __future__ import annotations

from importlib.metadata import version

from ifprune_mlx.errors import DataError
from ifprune_mlx.model import Model
from ifprune_mlx.packed import right


def check_kernels(model: Model) -> None:
    """Raise DataError if the model's weights are packed and this device multiplies by them wrongly.

    The gradient of a product with packed weights is one with them the other way round, in every model of mlx-lm's.
    """
    layout = model.checkpoint.layout
    width = max(spec.d_model for spec in layout.ffns)
    for packing in {layout.gate_up, layout.down} - {None}:
        assert packing is not None
        if not right(packing, width, model.dtype):
            raise DataError(
                f"MLX {version('mlx')} computes gradients of {packing.bits}-bit weights wrongly on this GPU; install "
                "another release of mlx, or train on float weights"
            )
