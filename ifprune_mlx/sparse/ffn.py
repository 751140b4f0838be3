"""The leaves that stand in for an FFN's gate, up and down projections, over its active slots.

Only these leaves change; activation, norms and attention stay mlx-lm's. All three projections are neuron-major,
`[d_ffn, d_model]`: gate and up multiply by the transpose, down as it is. The reference of it all is the dense FFN with
the input of its down projection masked (`MaskedDown` in the tests).
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
from mlx import nn

from ifprune_mlx.checkpoint.ffn_spec import FFNSpec, join_fused
from ifprune_mlx.checkpoint.format import Quantization
from ifprune_mlx.sparse.down_product import own_product
from ifprune_mlx.sparse.quantized import by_rows, neuron_major_matmul
from ifprune_mlx.sparse.slots import FFNSlots

Observer = Callable[[mx.array], "mx.array | None"]
"""Sees the hidden activations `[..., k]` of an FFN, in slot order, each time it runs; what it returns, if anything,
takes their place."""


class SlicedProjection(nn.Module):
    """One projection over the active slots.

    Args:
        slots: the FFN's neurons; shared by its leaves, and no parameter of the module tree.
        kind: `gate`, `up` or `down`; `gate_up` where the model has one leaf for the two.
        quantization: how the rows are packed, or None for float rows.
        fused: how a `gate_up` leaf lays out its output; see `FFNSpec`.

    Attributes:
        group: of a down leaf, the ranks whose shares of the neurons are added up; None if these are all of them.
    """

    def __init__(self, slots: FFNSlots, kind: str, quantization: Quantization | None, fused: str | None = None) -> None:
        super().__init__()
        self.slots = slots
        self.kind = kind
        self.quantization = quantization
        self.fused = fused
        self.observer: Observer | None = None
        self.group: mx.distributed.Group | None = None

    def __call__(self, x: mx.array) -> mx.array:
        """Gate, up: `[..., d_model]` -> `[..., k]`, both in one `[..., 2 k]`; down: `[..., k]` -> `[..., d_model]`.

        Raises:
            CheckpointError: in `ssd` residency, if the rows could not be read.
        """
        if self.slots.pending is not None:
            self.slots.wait(x)
        return self.project(self.observed(x), self.slots.active)

    def observed(self, x: mx.array) -> mx.array:
        """The input, or what the observer puts in its place."""
        seen = None if self.observer is None else self.observer(x)
        return x if seen is None else seen

    def project(self, x: mx.array, rows: Callable[[str], mx.array | None]) -> mx.array:
        """The projection over the rows that `rows` gives for the name of an array, None where the FFN has none."""
        if self.fused is None:
            return self._project(self.kind, x, rows)
        return join_fused(self._project("gate", x, rows), self._project("up", x, rows), self.fused, axis=-1)

    def _project(self, kind: str, x: mx.array, rows: Callable[[str], mx.array | None]) -> mx.array:
        packed = self.quantization
        weight = rows(f"{kind}.weight")
        assert weight is not None
        inwards = kind != "down"
        bias = rows(f"{kind}.bias") if inwards else self.slots.down_bias
        own = None if inwards or self.training else own_product(x, rows, packed)  # ours has no gradient
        if own is not None:
            y = own
        elif packed is None:
            y = x @ (weight.T if inwards else weight)
        else:
            scales, biases = rows(f"{kind}.scales"), rows(f"{kind}.biases")
            assert scales is not None
            if not inwards:
                y = neuron_major_matmul(x, weight, scales, biases, packed)
            elif self.training:  # the gradient is a neuron-major product, of the shape that this one has
                settings = packed.to_dict()
                y = by_rows(lambda x: mx.quantized_matmul(x, weight, scales, biases, **settings), x)
            else:
                y = mx.quantized_matmul(x, weight, scales, biases, **packed.to_dict())
        if self.group is not None:
            y = mx.distributed.all_sum(y, group=self.group)
        return y if bias is None else y + bias


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path, such as `model.layers.0.mlp`."""
    module = model
    for part in path.split("."):
        module = module[int(part)] if isinstance(module, list) else module[part]
    return module


def replace_leaves(
    model: nn.Module, spec: FFNSpec, slots: FFNSlots, gate_up: Quantization | None, down: Quantization | None
) -> SlicedProjection:
    """Put sliced leaves over `slots` into one FFN of an mlx-lm model.

    Returns:
        The new down leaf, whose observer sees the FFN's hidden activations.
    """
    ffn = module_at(model, spec.path)
    if spec.fused is None:
        ffn[spec.gate] = SlicedProjection(slots, "gate", gate_up)
        ffn[spec.up] = SlicedProjection(slots, "up", gate_up)
    else:
        ffn[spec.gate] = SlicedProjection(slots, "gate_up", gate_up, spec.fused)
    ffn[spec.down] = leaf = SlicedProjection(slots, "down", down)
    return leaf
