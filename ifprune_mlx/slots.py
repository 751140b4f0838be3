"""Slots: where each neuron of an FFN lies in memory, and how a switch moves them (DESIGN.md section 3, idea 2).

The first *k* slots are the active ones, so a pruned FFN reads a row prefix and the dense FFN reads everything. A switch
exchanges only neurons that differ. `plan_switch` is pure; `FFNSlots.apply` moves the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .selection import Ids
from .store import Rows


@dataclass(frozen=True)
class SwitchPlan:
    """Slot pairs to exchange: `leaving[i]` (active, unwanted) with `entering[i]` (inactive, wanted)."""

    k: int
    leaving: npt.NDArray[np.int32]
    entering: npt.NDArray[np.int32]


def plan_switch(order: npt.NDArray[np.int32], ids: Ids) -> SwitchPlan:
    """The fewest exchanges that bring `ids` into the first `len(ids)` slots.

    Args:
        order: int32 `[d_ffn]`, the neuron in each slot.
        ids: int32 `[k]`, the neurons to be active.
    """
    k = len(ids)
    wanted = np.zeros(len(order), dtype=bool)
    wanted[ids] = True
    wanted_slots = wanted[order]
    leaving = np.flatnonzero(~wanted_slots[:k])
    entering = np.flatnonzero(wanted_slots[k:]) + k
    return SwitchPlan(k, leaving.astype(np.int32), entering.astype(np.int32))


class FFNSlots:
    """The neurons of one FFN in memory, the active ones first.

    Attributes:
        rows: per-neuron arrays in slot order.
        down_bias: bias of the down projection `[d_model]`, which belongs to no neuron.
        order: int32 `[d_ffn]`, the neuron in each slot.
        k: number of active slots.
    """

    def __init__(self, rows: Rows, down_bias: mx.array | None = None) -> None:
        self.rows = rows
        self.down_bias = down_bias
        self.d_ffn: int = rows["down.weight"].shape[0]
        self.order = np.arange(self.d_ffn, dtype=np.int32)
        self.k = self.d_ffn

    @property
    def row_bytes(self) -> int:
        """Bytes of one neuron, all its rows together."""
        return sum(array.nbytes for array in self.rows.values()) // self.d_ffn

    def active(self, name: str) -> mx.array | None:
        """The active rows of one array, a view `[k, ...]`; None if the FFN has no such array."""
        array = self.rows.get(name)
        if array is None or self.k == self.d_ffn:
            return array
        return array[: self.k]

    def ids(self) -> Ids:
        """The active neurons, sorted."""
        return np.sort(self.order[: self.k])

    def activate_all(self) -> None:
        """Make every neuron active; moves nothing."""
        self.k = self.d_ffn

    def apply(self, plan: SwitchPlan) -> int:
        """Exchange rows as planned and make the first `plan.k` slots active.

        Returns:
            Bytes written: the rows that entered and those that made room for them.
        """
        self.k = plan.k
        if not len(plan.leaving):
            return 0
        target = np.concatenate([plan.leaving, plan.entering])
        origin = np.concatenate([plan.entering, plan.leaving])
        to, frm = mx.array(target), mx.array(origin)
        for array in self.rows.values():
            # Assigning into the array that `rows` holds keeps one reference to its old data, so that MLX may reuse it.
            array[to] = mx.take(array, frm, axis=0)
            mx.eval(array)
        self.order[target] = self.order[origin]
        return len(target) * self.row_bytes
