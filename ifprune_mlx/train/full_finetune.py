"""Whole weights instead of adapters: all parameters of the decoder layers, as mlx-lm's `--fine-tune-type full`.

Parameters are float32 and computed with in the base's own type, so that small steps are not lost in rounding and the
model in training is the one that is saved. The base must be float.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ifprune_mlx.checkpoint.ffn_spec import join_fused
from ifprune_mlx.errors import DataError
from ifprune_mlx.model import Model
from ifprune_mlx.sparse.ffn import SlicedProjection
from ifprune_mlx.train.trainable import WEIGHTS, ActiveNeurons, Parameters, TrainableModel, TrainableProjection


class FullProjection(TrainableProjection):
    """A sliced projection whose rows are parameters of the module.

    `weight` `[d_ffn, d_model]`, neuron-major also for down, and `bias`, if there is one, `[d_ffn]`, that of down
    `[d_model]`; in the source's neuron order. A common leaf of gate and up has `[2 d_ffn, ...]`, laid out as it was.
    """

    def __init__(self, base: SlicedProjection, active: ActiveNeurons) -> None:
        super().__init__(base, active)
        weight = self._whole("weight")
        assert weight is not None
        self.weight: mx.array = weight
        bias = base.slots.down_bias if base.kind == "down" else self._whole("bias")
        if bias is not None:
            self.bias = bias

    def _whole(self, name: str) -> mx.array | None:
        rows = self.slots.rows
        if self.fused is None:
            return rows.get(f"{self.kind}.{name}")
        gate, up = rows.get(f"gate.{name}"), rows.get(f"up.{name}")
        return None if gate is None or up is None else join_fused(gate, up, self.fused)

    def __call__(self, x: mx.array) -> mx.array:
        """As `SlicedProjection`, over the active neurons."""
        x = self.observed(x)
        weight, bias = self.weight, self.get("bias")
        ids, inwards = self.active.neurons(), self.kind != "down"
        if ids is not None:
            rows = self.outputs(ids) if inwards else ids
            weight = mx.take(weight, rows, axis=0)
            bias = mx.take(bias, rows, axis=0) if bias is not None and inwards else bias
        y = x @ (weight.T if inwards else weight)
        return y if bias is None else y + bias


class FullModel(TrainableModel):
    """A model whose decoder layers are trained as they are.

    Args:
        model: as loaded; its leaves are replaced for good, and its slots keep the order of neurons without their rows.

    Raises:
        DataError: if its weights are quantized.
    """

    kind = "full"

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.in_order()
        self._replace_leaves(lambda base, active, _: FullProjection(base, active))
        module = model.module
        for layer in module.layers:
            arrays: Parameters = dict(tree_flatten(layer.parameters()))
            if not all(mx.issubdtype(array.dtype, mx.floating) for array in arrays.values()):
                raise DataError(
                    f"{model.checkpoint.path}: its weights are quantized, and fine-tune type full trains float "
                    "weights; convert without -q, or train adapters with --fine-tune-type lora"
                )
        # The leaves hold the rows now; moved in the slots as well, they would be in memory twice.
        for slots in model.slots:
            slots.clear()
        module.freeze()
        for layer in module.layers:
            layer.unfreeze()
        self._base: Parameters = dict(tree_flatten(module.trainable_parameters()))
        self._down = {f"{spec.path}.{spec.down}.weight" for spec in model.checkpoint.layout.ffns}
        self.initial = {name: array.astype(mx.float32) for name, array in self._base.items()}
        mx.eval(self.initial)

    @property
    def identity(self) -> dict[str, Any]:
        """The kind alone."""
        return {"fine_tune_type": self.kind}

    def use(self, parameters: Parameters | None) -> None:
        """Put weights in place, cast to the base's types; None gives the base model."""
        arrays = self._base if parameters is None else self._cast(parameters)
        self.model.module.update(tree_unflatten(list(arrays.items())))

    def save(self, folder: Path, parameters: Parameters) -> None:
        """Write weights in the base's types, as mlx-lm's full adapter: down `[d_model, d_ffn]`."""
        self._write(folder, self._transposed(self._cast(parameters)), {})

    def read(self, folder: Path) -> Parameters:
        """Weights that an earlier run saved.

        Raises:
            DataError: if they are missing, damaged, or were made for another model or in another way.
        """
        arrays = self._transposed(self._read(folder)[0])
        if {name: a.shape for name, a in arrays.items()} != {name: a.shape for name, a in self._base.items()}:
            raise DataError(f"{folder / WEIGHTS}: is of another model than this run; give weights of this one")
        return {name: array.astype(mx.float32) for name, array in arrays.items()}

    def _cast(self, parameters: Parameters) -> Parameters:
        return {name: array.astype(self._base[name].dtype) for name, array in parameters.items()}

    def _transposed(self, arrays: Parameters) -> Parameters:
        """The down projections transposed: between neuron-major and mlx-lm's layout, either way."""
        return {name: mx.contiguous(array.T) if name in self._down else array for name, array in arrays.items()}
