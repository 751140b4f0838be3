"""Low-rank adapters (LoRA, arXiv 2106.09685) of all linear layers. The base may be quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.lora import LoRALinear

from ifprune_mlx.checkpoint.ffn_spec import FFNSpec
from ifprune_mlx.errors import DataError
from ifprune_mlx.model import Model
from ifprune_mlx.sparse.ffn import SlicedProjection
from ifprune_mlx.train.trainable import (
    CONFIG,
    WEIGHTS,
    ActiveNeurons,
    FrozenProjection,
    Parameters,
    TrainableModel,
    TrainableProjection,
)


class LoRAProjection(TrainableProjection):
    """A sliced projection with a low-rank term of the same neurons.

    `lora_a` `[in, r]` and `lora_b` `[r, out]` are those of the whole projection, as in mlx-lm.
    """

    def __init__(self, base: SlicedProjection, active: ActiveNeurons, d_model: int, rank: int, scale: float) -> None:
        super().__init__(base, active)
        d_ffn = base.slots.d_ffn
        inputs, outputs = (d_ffn, d_model) if base.kind == "down" else (d_model, 2 * d_ffn if base.fused else d_ffn)
        bound = inputs**-0.5
        self.lora_a = mx.random.uniform(-bound, bound, (inputs, rank))
        self.lora_b = mx.zeros((rank, outputs))
        self.scale = scale

    def __call__(self, x: mx.array) -> mx.array:
        """As `SlicedProjection`, over the active neurons."""
        x = self.observed(x)
        ids = self.active.neurons()
        a, b = self.lora_a, self.lora_b
        if ids is not None:
            a, b = (mx.take(a, ids, axis=0), b) if self.kind == "down" else (a, mx.take(b, self.outputs(ids), axis=1))
        y = self.project(x, self.active.rows)
        return y + (self.scale * ((x @ a) @ b)).astype(y.dtype)


class LoRAModel(TrainableModel):
    """A model whose linear layers carry adapters.

    Args:
        model: as loaded; its FFN leaves are replaced for good.
        rank: *r* of every adapter.
        scale: what the low-rank term is multiplied by (LoRA's alpha / r).
        seed: of the first values.
        layers: so many of the last get adapters; None gives them to all. A predictor that reads with the layers before
            them goes on reading what it was trained on.

    Raises:
        DataError: if the model has fewer layers.
    """

    kind = "lora"

    def __init__(self, model: Model, *, rank: int, scale: float, seed: int = 0, layers: int | None = None) -> None:
        super().__init__(model)
        module = model.module
        if layers is not None and layers > len(module.layers):
            raise DataError(f"--num-layers {layers}: the model has {len(module.layers)} layers")
        self.rank, self.scale, self.layers = rank, scale, len(module.layers) if layers is None else layers
        self._keys: set[str] = set()
        mx.random.seed(seed)
        adapted = module.layers[-self.layers :]
        within = {id(part) for layer in adapted for part in layer.modules()}

        def leaf(base: SlicedProjection, active: ActiveNeurons, spec: FFNSpec) -> TrainableProjection:
            if id(base) in within:
                return LoRAProjection(base, active, spec.d_model, rank, scale)
            return FrozenProjection(base, active)

        self._replace_leaves(leaf)
        for layer in adapted:
            linear = [
                (path, leaf) for path, leaf in layer.named_modules() if type(leaf) in (nn.Linear, nn.QuantizedLinear)
            ]
            replaced = [(path, LoRALinear.from_base(leaf, r=rank, scale=scale)) for path, leaf in linear]
            layer.update_modules(tree_unflatten(replaced))
            self._keys |= {path for path, leaf in layer.named_modules() if "lora_a" in leaf}
        module.freeze()
        module.apply_to_modules(
            lambda _, leaf: leaf.unfreeze(keys=["lora_a", "lora_b"], recurse=False) if "lora_a" in leaf else None
        )
        self.initial = dict(tree_flatten(module.trainable_parameters()))
        mx.eval(self.initial)
        self._nothing = {name: mx.zeros_like(array) for name, array in self.initial.items()}

    @property
    def identity(self) -> dict[str, Any]:
        """Rank and scale, and the number of layers where it is not all."""
        found: dict[str, Any] = {"rank": self.rank, "scale": self.scale}
        return found if self.layers == len(self.model.layers) else {**found, "num_layers": self.layers}

    def use(self, parameters: Parameters | None) -> None:
        """Put adapter weights in place; None gives the base model."""
        self.model.module.update(tree_unflatten(list((parameters or self._nothing).items())))

    def save(self, folder: Path, parameters: Parameters) -> None:
        """Write adapter weights as mlx-lm does: `adapters.safetensors` and `adapter_config.json`."""
        lora = {"rank": self.rank, "scale": self.scale, "dropout": 0.0, "keys": sorted(self._keys)}
        self._write(folder, parameters, {"num_layers": self.layers, "lora_parameters": lora})

    def read(self, folder: Path) -> Parameters:
        """Adapter weights that an earlier run saved.

        Raises:
            DataError: if they are missing, damaged, or were made for another model, rank, scale or number of layers.
        """
        arrays, config = self._read(folder)
        try:
            scale = config["lora_parameters"]["scale"]
        except (KeyError, TypeError) as exc:
            raise DataError(f"{folder / CONFIG}: cannot be read ({exc!r}); train the adapter again") from exc
        ours = {name: array.shape for name, array in self.initial.items()}
        if {name: array.shape for name, array in arrays.items()} != ours or scale != self.scale:
            raise DataError(
                f"{folder / WEIGHTS}: is of another model, rank or scale than this run (rank {self.rank}, scale "
                f"{self.scale:g}); give the ones that it was trained with"
            )
        return {name: array.astype(mx.float32) for name, array in arrays.items()}
