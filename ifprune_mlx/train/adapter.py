"""Low-rank adapters (LoRA, arXiv 2106.09685) over a loaded IFP checkpoint, whose FFNs run on a few neurons of each
sequence's own while they are trained, at the cost of a small model.

The base weights, quantized or not, are never touched. Several arms (learned, static, none) are sets of adapter weights
over one base. What is saved is what mlx-lm saves: `mlx_lm.fuse` and `ifprune convert --adapter` take it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.lora import LoRALinear

from ifprune_mlx.errors import DataError
from ifprune_mlx.ffn import SlicedProjection, module_at
from ifprune_mlx.files import read_safetensors_header, write_atomic
from ifprune_mlx.model import Model
from ifprune_mlx.slots import FFNSlots

Parameters = dict[str, mx.array]
"""Adapter weights by mlx-lm name, such as `model.layers.0.mlp.up_proj.lora_a`."""

_CONFIG, _WEIGHTS = "adapter_config.json", "adapters.safetensors"


class Chosen:
    """Which neurons of one FFN the forward passes under way compute.

    Attributes:
        ids: int32 `[m]`, in any order; None leaves it to the slots, as in the runtime.
        mask: float `[m]`, multiplies the activations of those neurons (soft or straight-through); None is all ones.
    """

    def __init__(self, slots: FFNSlots) -> None:
        self.slots = slots
        self.ids: mx.array | None = None
        self.mask: mx.array | None = None
        self._order: np.ndarray[Any, Any] | None = None
        self._slot_of = mx.array(0)

    def neurons(self) -> mx.array | None:
        """Ids of the neurons computed, int32 `[m]`, in the order in which they are; None for all, in their own."""
        if self.ids is not None:
            return self.ids
        slots = self.slots
        if slots.k == slots.d_ffn and np.array_equal(slots.order, np.arange(slots.d_ffn)):
            return None
        return mx.array(slots.order[: slots.k])

    def rows(self, name: str) -> mx.array | None:
        """Rows of one array for those neurons."""
        if self.ids is None:
            return self.slots.active(name)
        array = self.slots.rows.get(name)
        if array is None:
            return None
        if self._order is None or not np.array_equal(self._order, self.slots.order):
            self._order = self.slots.order.copy()
            self._slot_of = mx.array(np.argsort(self._order).astype(np.int32))
        return mx.take(array, mx.take(self._slot_of, self.ids), axis=0)


class AdaptedProjection(SlicedProjection):
    """A sliced projection with a low-rank term of the same neurons.

    `lora_a` `[in, r]` and `lora_b` `[r, out]` are those of the whole projection, as in mlx-lm.
    """

    def __init__(self, base: SlicedProjection, chosen: Chosen, d_model: int, rank: int, scale: float) -> None:
        super().__init__(base.slots, base.kind, base.quantization)
        d_ffn = base.slots.d_ffn
        inputs, outputs = (d_ffn, d_model) if base.kind == "down" else (d_model, d_ffn)
        bound = inputs**-0.5
        self.lora_a = mx.random.uniform(-bound, bound, (inputs, rank))
        self.lora_b = mx.zeros((rank, outputs))
        self.chosen = chosen
        self.scale = scale

    def __call__(self, x: mx.array) -> mx.array:
        """As `SlicedProjection`, over the chosen neurons."""
        x = self.observed(x)
        ids = self.chosen.neurons()
        a, b = self.lora_a, self.lora_b
        if self.kind == "down":
            if self.chosen.mask is not None:
                x = x * self.chosen.mask.astype(x.dtype)
            a = a if ids is None else mx.take(a, ids, axis=0)
        elif ids is not None:
            b = mx.take(b, ids, axis=1)
        y = self.project(x, self.chosen.rows)
        return y + (self.scale * ((x @ a) @ b)).astype(y.dtype)


class Adapted:
    """A model whose linear layers carry adapters.

    Args:
        model: as loaded; its leaves are replaced for good.
        rank: *r* of every adapter.
        scale: what the low-rank term is multiplied by (LoRA's alpha / r).
        seed: of the first values.

    Attributes:
        model: the model.
        chosen: per FFN, which neurons run.
        initial: adapter weights to begin with, float32; they change nothing yet.
    """

    def __init__(self, model: Model, *, rank: int, scale: float, seed: int = 0) -> None:
        self.model = model
        self.rank, self.scale = rank, scale
        self.chosen: list[Chosen] = []
        self._keys: set[str] = set()
        mx.random.seed(seed)
        module = model.module
        specs = model.checkpoint.layout.ffns
        for index, (spec, slots) in enumerate(zip(specs, model.slots, strict=True)):
            chosen = Chosen(slots)
            self.chosen.append(chosen)
            ffn = module_at(module, spec.path)
            for name in (spec.gate, spec.up, spec.down):
                ffn[name] = AdaptedProjection(ffn[name], chosen, spec.d_model, rank, scale)
            model.down_leaves[index] = ffn[spec.down]
        for layer in module.layers:
            linear = [(path, leaf) for path, leaf in layer.named_modules() if type(leaf) in _LINEAR]
            adapted = [(path, LoRALinear.from_base(leaf, r=rank, scale=scale)) for path, leaf in linear]
            layer.update_modules(tree_unflatten(adapted))
            self._keys |= {path for path, leaf in layer.named_modules() if "lora_a" in leaf}
        module.freeze()
        module.apply_to_modules(
            lambda _, leaf: leaf.unfreeze(keys=["lora_a", "lora_b"], recurse=False) if "lora_a" in leaf else None
        )
        self.initial: Parameters = dict(tree_flatten(module.trainable_parameters()))
        mx.eval(self.initial)
        self._nothing = {name: mx.zeros_like(array) for name, array in self.initial.items()}

    def use(self, parameters: Parameters | None) -> None:
        """Put adapter weights in place; None takes the adapters' effect away: the base model."""
        self.model.module.update(tree_unflatten(list((parameters or self._nothing).items())))

    def choose(self, ids: Sequence[mx.array] | None, masks: Sequence[mx.array] | None = None) -> None:
        """Run each FFN on these neurons from now on; None leaves it to `Model.switch` again."""
        for index, chosen in enumerate(self.chosen):
            chosen.ids = None if ids is None else ids[index]
            chosen.mask = None if masks is None else masks[index]

    def in_order(self) -> None:
        """Run all neurons again, in the source's order: switches leave them in another, in which floats add up to
        something else in the last digits."""
        self.choose(None)
        self.model.switch(None)
        for slots in self.model.slots:
            back = mx.array(np.argsort(slots.order).astype(np.int32))
            slots.order = np.arange(slots.d_ffn, dtype=np.int32)
            for name in slots.rows:
                slots.rows[name] = mx.take(slots.rows[name], back, axis=0)
                mx.eval(slots.rows[name])

    def save(self, folder: Path, parameters: Parameters) -> None:
        """Write adapter weights as mlx-lm does: `adapters.safetensors` and `adapter_config.json`."""
        config = {
            "fine_tune_type": "lora",
            "num_layers": len(self.model.layers),
            "lora_parameters": {"rank": self.rank, "scale": self.scale, "dropout": 0.0, "keys": sorted(self._keys)},
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / _WEIGHTS, lambda path: mx.save_safetensors(str(path), dict(parameters)), DataError)
        text = json.dumps(config, indent=2) + "\n"
        write_atomic(folder / _CONFIG, lambda path: path.write_text(text, encoding="utf-8"), DataError)

    def read(self, folder: Path) -> Parameters:
        """Adapter weights that an earlier run saved.

        Raises:
            DataError: if they are missing, damaged, or were made for another model, rank or scale.
        """
        file = folder / _WEIGHTS
        read_safetensors_header(file, DataError)
        arrays = mx.load(str(file))
        assert isinstance(arrays, dict)
        try:
            scale = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))["lora_parameters"]["scale"]
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise DataError(f"{folder / _CONFIG}: cannot be read ({exc!r}); train the adapter again") from None
        ours = {name: array.shape for name, array in self.initial.items()}
        if {name: array.shape for name, array in arrays.items()} != ours or scale != self.scale:
            raise DataError(
                f"{file}: is of another model, rank or scale than this run (rank {self.rank}, scale {self.scale:g}); "
                "give the ones that it was trained with"
            )
        return {name: array.astype(mx.float32) for name, array in arrays.items()}


_LINEAR = (nn.Linear, nn.QuantizedLinear)
