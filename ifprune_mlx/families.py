"""Finds the FFNs of an mlx-lm model that can be sliced, by structure and not by family name.

An FFN can be sliced where its hidden units are independent of each other: a gated FFN of three plain linear
leaves. Knows nothing of weights; a model whose parameters were never evaluated will do.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from mlx import nn

from .errors import SourceError

# Leaf names of a gated FFN: (gate, up, down).
_LEAF_NAMES = (("gate_proj", "up_proj", "down_proj"),)
# Families whose FFN mixes its hidden units (gemma3n: mean and deviation across them), so that slicing is not masking.
_REFUSED = {"gemma3n": "its FFN normalises across neurons, so leaving some out changes the others"}


@dataclass(frozen=True)
class FFNSpec:
    """One sliceable FFN: where its leaves are, and their shape.

    Attributes:
        path: module path in the mlx-lm model, such as `model.layers.0.mlp`.
        gate, up, down: names of the leaves below `path`.
        d_model, d_ffn: input width and number of neurons.
        bias: whether gate and up have biases `[d_ffn]`.
        down_bias: whether down has a bias `[d_model]`.
    """

    path: str
    gate: str
    up: str
    down: str
    d_model: int
    d_ffn: int
    bias: bool
    down_bias: bool

    def to_dict(self) -> dict[str, Any]:
        """As it stands in `config.json`."""
        return asdict(self)

    @property
    def parameters(self) -> int:
        """Weights and biases of the whole FFN."""
        return self.d_ffn * self.neuron_parameters + (self.d_model if self.down_bias else 0)

    @property
    def neuron_parameters(self) -> int:
        """Weights and biases of one neuron."""
        return 3 * self.d_model + (2 if self.bias else 0)


def find_ffns(model: nn.Module, model_type: str) -> list[FFNSpec]:
    """The sliceable FFNs of an mlx-lm model, in the order of its layers.

    Raises:
        SourceError: with the reason, if there is none or the family cannot be sliced.
    """
    if model_type in _REFUSED:
        raise SourceError(
            f"model type {model_type} cannot be sliced: {_REFUSED[model_type]}; use it with mlx-lm itself"
        )
    specs = []
    for path, module in model.named_modules():
        for gate, up, down in _LEAF_NAMES:
            leaves = [module.get(name) for name in (gate, up, down)]
            if not all(type(leaf) is nn.Linear for leaf in leaves):
                continue
            (d_ffn, d_model), up_shape, down_shape = (leaf.weight.shape for leaf in leaves)
            if up_shape != (d_ffn, d_model) or down_shape != (d_model, d_ffn):
                continue
            biased = ["bias" in leaf for leaf in leaves]
            if biased[0] != biased[1]:
                continue
            specs.append(FFNSpec(path, gate, up, down, d_model, d_ffn, biased[0], biased[2]))
    if not specs:
        raise SourceError(
            f"model type {model_type} has no gated FFN of plain linear layers (gate_proj, up_proj, down_proj); "
            "there is nothing to slice, use it with mlx-lm itself"
        )
    return sorted(specs, key=lambda spec: [int(part) if part.isdigit() else 0 for part in re.split(r"\.", spec.path)])
