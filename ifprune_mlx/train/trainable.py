"""The base of both kinds of fine-tuning: a model that runs on each sequence's own neurons while it is trained.

The base model is never changed. The trained parameters come from outside, so that several arms (learned, static, none)
can share one base. On disk they look as mlx-lm's do: `mlx_lm.fuse` and `ifprune convert --adapter` take them.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from ifprune_mlx.checkpoint.atomic_write import write_atomic
from ifprune_mlx.checkpoint.ffn_spec import FFNSpec, join_fused, split_fused
from ifprune_mlx.checkpoint.regular_file import read_json_object
from ifprune_mlx.checkpoint.safetensors_io import load_arrays, read_safetensors_header
from ifprune_mlx.errors import DataError
from ifprune_mlx.model import Model
from ifprune_mlx.sparse.ffn import SlicedProjection, module_at
from ifprune_mlx.sparse.slots import FFNSlots

Parameters = dict[str, mx.array]
"""Trained arrays by mlx-lm name, such as `model.layers.0.mlp.up_proj.lora_a`."""

CONFIG, WEIGHTS, GAINS_FILE = "adapter_config.json", "adapters.safetensors", "gains.safetensors"


class ActiveNeurons:
    """The neurons of one FFN that forward passes compute.

    Attributes:
        ids: int32 `[m]`, in any order; None takes the slots' active ones, as the runtime does.
        mask: float `[m]`, or `[chats, 1, m]` with one for each chat. The activations of those neurons are multiplied
            by it (soft or straight-through); None is all ones.
        gain: float `[d_ffn]`, in the source's order, by which activations are multiplied as well; None is all ones.
    """

    def __init__(self, slots: FFNSlots) -> None:
        self.slots = slots
        self.ids: mx.array | None = None
        self.mask: mx.array | None = None
        self.gain: mx.array | None = None
        self._order: np.ndarray[Any, Any] | None = None
        self._slot_of = mx.array(0)

    def neurons(self) -> mx.array | None:
        """Their ids, int32 `[m]`, in the order in which they are computed; None for all, in the source's order."""
        if self.ids is not None:
            return self.ids
        slots = self.slots
        if slots.k == slots.d_ffn and np.array_equal(slots.order, np.arange(slots.d_ffn)):
            return None
        return mx.array(slots.order[: slots.k])

    def rows(self, name: str) -> mx.array | None:
        """Their rows of one of the slots' arrays."""
        if self.ids is None:
            return self.slots.active(name)
        array = self.slots.rows.get(name)
        if array is None:
            return None
        if self._order is None or not np.array_equal(self._order, self.slots.order):
            self._order = self.slots.order.copy()
            self._slot_of = mx.array(np.argsort(self._order).astype(np.int32))
        return mx.take(array, mx.take(self._slot_of, self.ids), axis=0)


class TrainableProjection(SlicedProjection):
    """A sliced projection over the active neurons; a subclass holds what it is multiplied by."""

    def __init__(self, base: SlicedProjection, active: ActiveNeurons) -> None:
        super().__init__(base.slots, base.kind, base.quantization, base.fused)
        self.active = active

    def outputs(self, ids: mx.array) -> mx.array:
        """Where the outputs of neurons `[m]` lie in the whole projection's output, int32 `[m]`; `[2 m]` where gate and
        up are one leaf."""
        if self.fused is None:
            return ids
        gate, up = split_fused(mx.arange(2 * self.slots.d_ffn), self.fused)
        return join_fused(mx.take(gate, ids), mx.take(up, ids), self.fused)

    def observed(self, x: mx.array) -> mx.array:
        """The input, or what the observer replaces it by; before the down projection it is multiplied by mask and
        gain."""
        x = super().observed(x)
        mask, gain = self.active.mask, self.active.gain
        if self.kind != "down":
            return x
        if gain is not None:
            ids = self.active.neurons()
            x = x * (gain if ids is None else mx.take(gain, ids)).astype(x.dtype)
        if mask is None:
            return x
        if mask.ndim > x.ndim:  # some experts see the tokens of all chats in one row
            mask = mx.broadcast_to(mask, (len(mask), x.size // mask.size, mask.shape[-1])).reshape(x.shape)
        return x * mask.astype(x.dtype)


class TrainableModel(ABC):
    """A model with trained parameters.

    Attributes:
        kind: mlx-lm's `fine_tune_type`.
        model: the model; its FFN leaves are replaced for good.
        active: the active neurons of every FFN.
        initial: parameters to begin with, float32; with them the model computes what the base model does.
    """

    kind: ClassVar[str]
    initial: Parameters

    def __init__(self, model: Model) -> None:
        self.model = model
        self.active = [ActiveNeurons(slots) for slots in model.slots]

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """The settings that runs must share for one to continue with the other's parameters."""

    def begin(self, folder: Path) -> Parameters:
        """Parameters that an earlier run saved, float32; `initial` if it held the model still.

        Raises:
            DataError: as `read`.
        """
        config = folder / CONFIG
        held = (
            config.is_file()
            and not (folder / WEIGHTS).is_file()
            and _read_config(config).get("fine_tune_type") == FrozenModel.kind
        )
        return dict(self.initial) if held else self.read(folder)

    @abstractmethod
    def use(self, parameters: Parameters | None) -> None:
        """Put parameters in place, so that gradients flow to them; None gives the base model."""

    @abstractmethod
    def save(self, folder: Path, parameters: Parameters) -> None:
        """Write parameters as mlx-lm does: `adapters.safetensors` and `adapter_config.json`."""

    @abstractmethod
    def read(self, folder: Path) -> Parameters:
        """Parameters that an earlier run saved, float32.

        Raises:
            DataError: if they are missing, damaged, or were made for another model or in another way.
        """

    def choose(self, ids: Sequence[mx.array] | None, masks: Sequence[mx.array] | None = None) -> None:
        """Run each FFN on these neurons from now on; without ids, on those that `Model.switch` made active."""
        for index, active in enumerate(self.active):
            active.ids = None if ids is None else ids[index]
            active.mask = None if masks is None else masks[index]

    def multiply(self, gains: Sequence[mx.array] | None) -> None:
        """Multiply the neurons' activations by these gains from now on, per FFN `[d_ffn]`; None by nothing."""
        for index, active in enumerate(self.active):
            active.gain = None if gains is None else gains[index]

    def save_gains(self, folder: Path, gains: Sequence[mx.array]) -> None:
        """Write the gains of all neurons, per FFN `[d_ffn]`, beside the other parameters, where `ifprune convert
        --adapter` finds them: `MODULE.gain` for each down projection."""
        arrays = dict(zip(self._gain_names(), gains, strict=True))
        write_atomic(folder / GAINS_FILE, lambda path: mx.save_safetensors(str(path), arrays), DataError)

    def read_gains(self, folder: Path | None) -> list[mx.array]:
        """The gains that an earlier run saved, per FFN float32 `[d_ffn]`; ones if it has none, or for no folder.

        Raises:
            DataError: if they are damaged, or of another model.
        """
        widths = [slots.d_ffn for slots in self.model.slots]
        if folder is None or not (folder / GAINS_FILE).is_file():
            return [mx.ones(width) for width in widths]
        file, names = folder / GAINS_FILE, self._gain_names()
        read_safetensors_header(file, DataError)
        arrays = load_arrays(file)
        expected = {name: (width,) for name, width in zip(names, widths, strict=True)}
        if {name: array.shape for name, array in arrays.items()} != expected:
            raise DataError(f"{file}: does not hold the gains of this model's neurons; give a run of this model")
        return [arrays[name].astype(mx.float32) for name in names]

    def _gain_names(self) -> list[str]:
        return [f"{spec.path}.{spec.down}.gain" for spec in self.model.checkpoint.layout.ffns]

    def in_order(self) -> None:
        """Run all neurons again, in the source's order. Switches leave another order, in which sums of floats differ in
        the last digits."""
        self.choose(None)
        self.model.first_layers_in_order(len(self.model.slots))

    def _replace_leaves(self, leaf: Callable[[SlicedProjection, ActiveNeurons, FFNSpec], TrainableProjection]) -> None:
        model = self.model
        for index, (spec, active) in enumerate(zip(model.checkpoint.layout.ffns, self.active, strict=True)):
            ffn = module_at(model.module, spec.path)
            for name in spec.leaves:
                ffn[name] = leaf(ffn[name], active, spec)
            model.down_leaves[index] = ffn[spec.down]

    def _write(self, folder: Path, arrays: Parameters | None, more: Mapping[str, Any]) -> None:
        config = {"fine_tune_type": self.kind, "num_layers": len(self.model.layers), **more}
        folder.mkdir(parents=True, exist_ok=True)
        if arrays is not None:
            write_atomic(folder / WEIGHTS, lambda path: mx.save_safetensors(str(path), dict(arrays)), DataError)
        text = json.dumps(config, indent=2) + "\n"
        write_atomic(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"), DataError)

    def _read(self, folder: Path) -> tuple[Parameters, dict[str, Any]]:
        read_safetensors_header(folder / WEIGHTS, DataError)
        arrays = load_arrays(folder / WEIGHTS)
        config = _read_config(folder / CONFIG)
        kind = config.get("fine_tune_type", "lora")
        if kind != self.kind:
            raise DataError(
                f"{folder / CONFIG}: was trained with --fine-tune-type {kind}, this run is of type {self.kind}; give "
                f"--fine-tune-type {kind}, or begin with another run"
            )
        return arrays, config


class FrozenProjection(TrainableProjection):
    """A sliced projection over the active neurons, with the rows as they are."""

    def __call__(self, x: mx.array) -> mx.array:
        """As `SlicedProjection`, over the active neurons."""
        return self.project(self.observed(x), self.active.rows)


class FrozenModel(TrainableModel):
    """A model that is held still while a head, scores or gains learn."""

    kind = "none"

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self._replace_leaves(lambda base, active, _: FrozenProjection(base, active))
        model.module.freeze()
        self.initial = {}

    @property
    def identity(self) -> dict[str, Any]:
        """The kind alone."""
        return {"fine_tune_type": self.kind}

    def use(self, parameters: Parameters | None) -> None:
        """Nothing: there are no parameters."""

    def save(self, folder: Path, parameters: Parameters) -> None:
        """Write `adapter_config.json`, which says that there are no weights."""
        self._write(folder, None, {})

    def read(self, folder: Path) -> Parameters:
        """None, whatever the earlier run trained is refused.

        Raises:
            DataError: if it trained adapters or weights.
        """
        raise DataError(
            f"{folder}: holds trained weights, which --fine-tune-type none would drop; fuse them into a checkpoint "
            "with ifprune convert --adapter first"
        )


def _read_config(file: Path) -> dict[str, Any]:
    try:
        return read_json_object(file, DataError)
    except DataError as exc:
        raise DataError(f"{exc}; or train the adapter again") from exc
