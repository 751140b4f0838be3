"""Slots: where each neuron of an FFN lies in memory, and how a switch moves them.

The first *k* slots are the active ones, so a pruned FFN reads a row prefix. In `ram` residency there is a slot for
every neuron: the dense FFN reads all of them, and a switch exchanges only those that differ. In `ssd` residency there
are *k* slots and, where memory allows, some spare ones that keep the neurons selected most often; a switch reads from
the file the neurons that are not in memory. `plan_switch` is pure; `FFNSlots.apply` moves and reads the rows.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ifprune_mlx.checkpoint.neuron_reader import RowReader, Rows
from ifprune_mlx.checkpoint.raw_array import raw
from ifprune_mlx.errors import CheckpointError
from ifprune_mlx.sparse.inplace import Movable, copy_rows, exchange_rows, movable, write_rows

if TYPE_CHECKING:
    from ifprune_mlx.selection.selection import Ids

EMPTY = -1
"""Marks an empty slot in `order`."""


@dataclass(frozen=True)
class SwitchPlan:
    """The moves of one switch. All arrays but `missing` hold slots.

    Attributes:
        k: active slots afterwards.
        leaving: active slots to refill. The first `len(entering)` exchange rows with `entering[i]`; the rest receive
            `missing[i]`.
        entering: inactive slots whose neuron becomes active.
        missing: neurons that are in no slot, sorted.
        parked, parking: row `parked[i]` is copied to the spare slot `parking[i]` before it is overwritten.
    """

    k: int
    leaving: npt.NDArray[np.int32]
    entering: npt.NDArray[np.int32]
    missing: Ids
    parked: npt.NDArray[np.int32]
    parking: npt.NDArray[np.int32]

    @property
    def rows_written(self) -> int:
        """Slots whose neuron changes."""
        return len(self.leaving) + len(self.entering) + len(self.parked)


def plan_switch(order: npt.NDArray[np.int32], ids: Ids, position: npt.NDArray[np.int32] | None = None) -> SwitchPlan:
    """The fewest moves that bring `ids` into the first `len(ids)` slots.

    Args:
        order: int32 `[slots]`, the neuron in each slot, or EMPTY.
        ids: int32 `[k]`, the neurons to activate; at most as many as slots.
        position: int32 `[d_ffn]`, each neuron's rank by how often it is selected. It decides which neurons stay in
            spare slots; needed unless every neuron has a slot.
    """
    k = len(ids)
    wanted = np.zeros(len(order) if position is None else len(position), dtype=bool)
    wanted[ids] = True
    wanted_slots = wanted[order] & (order != EMPTY)
    leaving = np.flatnonzero(~wanted_slots[:k]).astype(np.int32)
    entering = (np.flatnonzero(wanted_slots[k:]) + k).astype(np.int32)
    none = np.empty(0, np.int32)
    if len(leaving) == len(entering):
        return SwitchPlan(k, leaving, entering, none, none, none)
    assert position is not None
    wanted[order[wanted_slots]] = False
    missing = np.flatnonzero(wanted).astype(np.int32)
    # Empty slots and then rarely selected neurons go first: the last of `leaving` are overwritten.
    rank = np.where(order == EMPTY, len(position), position[order])
    leaving = leaving[np.argsort(rank[leaving], kind="stable")]
    lost = leaving[len(entering) :]
    spare = np.setdiff1d(np.arange(k, len(order), dtype=np.int32), entering)
    spare = spare[np.argsort(-rank[spare], kind="stable")]  # the least worth keeping first
    pairs = min(len(lost), len(spare))
    better = rank[lost[:pairs]] < rank[spare[:pairs]]
    return SwitchPlan(k, leaving, entering, missing, lost[:pairs][better], spare[:pairs][better])


class FFNSlots:
    """The neurons of one FFN in memory, the active ones first.

    Args:
        rows: per-neuron arrays of all neurons in the source's order; None starts with no neuron.
        down_bias: bias of the down projection `[d_model]`, which belongs to no neuron.
        reader: reads neurons that are not in memory; needed if `rows` is None.
        share: int32, sorted, the neurons that are this rank's, where several share the model; None for all. `order`,
            plans and the reader number these from 0.

    Attributes:
        rows: per-neuron arrays in slot order.
        order: int32 `[slots]`, the neuron in each slot, or EMPTY.
        k: number of active slots; see `activate`.
        pending: reading for a switch, in another thread; see `wait`.
        bytes_moved: bytes of weights written since the FFN was loaded.
    """

    def __init__(
        self,
        rows: Rows | None,
        down_bias: mx.array | None = None,
        reader: RowReader | None = None,
        share: Ids | None = None,
    ) -> None:
        self.down_bias = down_bias
        self._share = share
        self._reader = None if rows is not None else reader
        if rows is None:
            assert reader is not None
            rows = reader.empty(0)
            self.d_ffn = len(reader.position)
            self.order = np.empty(0, np.int32)
            one = reader.empty(1)
            self.row_bytes = sum(array.nbytes for array in one.values())
        else:
            self.d_ffn = int(rows["down.weight"].shape[0])
            self.order = np.arange(self.d_ffn, dtype=np.int32)
            self.row_bytes = sum(array.nbytes for array in rows.values()) // self.d_ffn
        self.rows = rows
        self._active: Rows = {}  # views of the active rows; not while all slots are active
        self._movable: dict[str, Movable] = {}  # `rows`, in the form in which they are moved
        self.k = len(self.order)
        self.pending: Future[None] | None = None
        self.bytes_moved = 0
        self._moving = False

    def active(self, name: str) -> mx.array | None:
        """The active rows of one array, a view `[k, ...]`; None if the FFN has no such array."""
        return (self.rows if self.k == len(self.order) else self._active).get(name)

    def activate(self, k: int) -> list[mx.array]:
        """Make the first `k` slots the active ones.

        Returns:
            New views of their rows, for the caller to evaluate: no token has to make them. None if there are some of
            as many rows, and none while neurons are still read; `wait` makes these.
        """
        self.k = k
        made = {len(rows) for rows in self._active.values()} == {k}
        if made or k == len(self.order) or self.pending is not None:
            return []
        self._active = {name: rows[:k] for name, rows in self.rows.items()}
        return list(self._active.values())

    def own(self, ids: Ids) -> Ids:
        """This rank's neurons among `ids`, sorted neurons of the source's numbering, in the numbering of `order`."""
        if self._share is None:
            return ids
        return np.flatnonzero(np.isin(self._share, ids, assume_unique=True)).astype(np.int32)

    def source_ids(self, numbers: npt.NDArray[np.int32]) -> Ids:
        """In the source's numbering, neurons that are numbered as in `order`."""
        return numbers if self._share is None else self._share[numbers]

    def ids(self) -> Ids:
        """The active neurons, sorted."""
        return np.sort(self.source_ids(self.order[: self.k]))

    def activate_all(self) -> None:
        """Make every neuron active, or none where not all are in memory; moves nothing.

        Raises:
            CheckpointError: if an earlier move was cut off.
        """
        self._settle()
        self.k = self.d_ffn if self._reader is None else 0

    def plan(self, ids: Ids, spare: int = 0) -> SwitchPlan:
        """Plan to activate `ids`. In `ssd` residency, first resize to `len(ids) + spare` slots.

        Raises:
            CheckpointError: if an earlier move was cut off.
        """
        self._settle()
        if self._reader is None:
            return plan_switch(self.order, ids)
        slots = min(len(ids) + spare, self.d_ffn)
        if slots != len(self.order):
            self._resize(slots, ids)
        return plan_switch(self.order, ids, self._reader.position)

    def apply(self, plan: SwitchPlan) -> None:
        """Move and read rows as planned, so that the first `plan.k` slots can be the active ones.

        No lazy array may depend on the rows. If reading fails, the slots stay empty, and the next plan fills them.

        Raises:
            CheckpointError: if the file cannot be read.
        """
        if not len(plan.leaving):
            return
        self.bytes_moved += plan.rows_written * self.row_bytes
        count = len(plan.entering)
        out, filled = plan.leaving[:count], plan.leaving[count:]
        movables = self._begin_move()
        for rows in movables.values():
            if count:
                exchange_rows(rows, out, plan.entering)
            if len(plan.parked):
                copy_rows(rows, plan.parking, plan.parked)
        self.order[out], self.order[plan.entering] = self.order[plan.entering], self.order[out]
        self.order[plan.parking] = self.order[plan.parked]
        self.order[filled] = EMPTY
        self._moving = False
        if len(filled):
            assert self._reader is not None
            for name, values in self._reader.read(plan.missing).items():
                write_rows(movables[name], filled, values)
            self.order[filled] = plan.missing

    def restore(self) -> None:
        """Put all rows back into the source's order, so that sums do not depend on earlier selections.

        No lazy array may depend on the rows. Every neuron must have a slot.
        """
        assert self._reader is None
        home = np.arange(self.d_ffn, dtype=np.int32)
        moved = np.flatnonzero(self.order != home).astype(np.int32)
        if len(moved):
            origin = np.argsort(self.order).astype(np.int32)[moved]
            for rows in self._begin_move().values():
                copy_rows(rows, moved, origin)
            self.order = home
            self._moving = False

    def wait(self, needed: mx.array) -> None:
        """Start computing `needed`, and wait for the pending rows.

        Raises:
            CheckpointError: if they could not be read.
        """
        if self.pending is not None:
            mx.async_eval(needed)  # type: ignore[no-untyped-call]
            self.pending.result()
            self.pending = None  # stays if it raised: the rows are still missing
            mx.async_eval(self.activate(self.k))  # type: ignore[no-untyped-call]

    def clear(self) -> None:
        """Drop the rows, and all that keeps them in memory."""
        for arrays in (self.rows, self._active, self._movable):
            arrays.clear()

    def close(self) -> None:
        """Drop the rows, and close their file; the slots cannot be used afterwards."""
        self.clear()
        if self._reader is not None:
            self._reader.close()

    def _resize(self, slots: int, ids: Ids) -> None:
        """Change the number of slots. Of the neurons in memory `ids` stay first, then the most selected ones."""
        assert self._reader is not None
        held = np.flatnonzero(self.order != EMPTY)
        rank = self._reader.position[self.order[held]] + np.where(np.isin(self.order[held], ids), 0, self.d_ffn)
        kept = held[np.argsort(rank, kind="stable")][:slots].astype(np.int32)
        order = np.full(slots, EMPTY, np.int32)
        order[: len(kept)] = self.order[kept]
        new = self._reader.empty(slots)
        for name, rows in self.rows.items():
            write_rows(movable(new[name]), np.arange(len(kept), dtype=np.int32), raw(rows)[kept])
        self.clear()
        self.rows, self.order = new, order

    def _begin_move(self) -> dict[str, Movable]:
        """The rows as they are moved; NumPy's views of them are made once."""
        self._moving = True
        if not self._movable:
            self._movable = {name: movable(rows) for name, rows in self.rows.items()}
        if any(isinstance(rows, mx.array) for rows in self._movable.values()):
            self._active = {}  # views of what a scatter replaces, and would have to copy while there are any
        return self._movable

    def _settle(self) -> None:
        """Wait for pending reads. Neurons that could not be read are missing from `order`.

        Raises:
            CheckpointError: if an earlier move was cut off.
        """
        if self.pending is not None:
            self.pending.exception()
            self.pending = None
        if self._moving:
            raise CheckpointError("moving neurons was cut off half way (Ctrl-C, or no memory); load the model again")
