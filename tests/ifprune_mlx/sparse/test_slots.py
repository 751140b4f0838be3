"""Switching: the plan is minimal and right, and after any walk of switches every row is where `order` says it is."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from ifprune_convert.packing import quantization_of
from ifprune_convert.pipeline import Options
from ifprune_mlx import Model
from ifprune_mlx.checkpoint.format import Checkpoint
from ifprune_mlx.checkpoint.neuron_reader import read_rows
from ifprune_mlx.errors import SelectionError
from ifprune_mlx.sparse.slots import FFNSlots, plan_switch
from tests.ifprune_mlx.reference import TOLERANCE, logits, open_model, random_selection
from tests.tiny import write_checkpoint

PROMPT = [1, 40, 300, 7, 99, 250]
WALK = 50
WIDTHS = (128, 128)


def row_bytes(array: mx.array) -> np.ndarray:
    """The bytes of every row, uint8 `[rows, bytes]`."""
    return np.array(array.reshape(array.shape[0], -1).view(mx.uint8))


def assert_rows_match_order(model: Model) -> None:
    """Every row of every array, bit for bit, is the source's row for the neuron that `order` names."""
    for index, slots in enumerate(model.slots):
        source, down_bias = read_rows(model.checkpoint, index)
        assert sorted(slots.order) == list(range(slots.d_ffn))
        assert slots.rows.keys() == source.keys()
        for name, rows in slots.rows.items():
            assert np.array_equal(row_bytes(rows), row_bytes(source[name])[slots.order]), name
        if down_bias is not None:
            assert slots.down_bias is not None
            assert np.array_equal(np.array(slots.down_bias), np.array(down_bias))


@pytest.mark.parametrize("seed", range(200))
def test_a_plan_is_minimal_and_right(seed: int) -> None:
    generator = np.random.default_rng(seed)
    d_ffn = int(generator.integers(1, 60))
    order = generator.permutation(d_ffn).astype(np.int32)
    k = int(generator.integers(1, d_ffn + 1))
    ids = np.sort(generator.permutation(d_ffn)[:k]).astype(np.int32)

    plan = plan_switch(order, ids)

    live = set(order[:k].tolist())
    wanted = set(ids.tolist())
    assert plan.k == k
    assert {int(order[slot]) for slot in plan.leaving} == live - wanted
    assert {int(order[slot]) for slot in plan.entering} == wanted - live
    assert len(plan.leaving) == len(plan.entering) == len(wanted - live)
    assert all(slot < k for slot in plan.leaving)
    assert all(slot >= k for slot in plan.entering)
    order[np.concatenate([plan.leaving, plan.entering])] = order[np.concatenate([plan.entering, plan.leaving])]
    assert set(order[:k].tolist()) == wanted


def test_the_same_ids_at_another_order_need_no_exchange() -> None:
    plan = plan_switch(np.array([3, 1, 2, 0], np.int32), np.array([1, 3], np.int32))
    assert len(plan.leaving) == len(plan.entering) == 0
    assert plan.k == 2


def test_growing_and_shrinking_move_only_what_is_missing() -> None:
    rows = {
        "down.weight": mx.arange(8)[:, None] * mx.ones((1, 4)),
        "gate.weight": mx.arange(8)[:, None] * mx.ones((1, 4)),
    }
    slots = FFNSlots(rows)
    plans = [slots.plan(np.array([0, 1, 7], np.int32))]
    slots.apply(plans[-1])  # 2 and 7 change places
    assert slots.order.tolist() == [0, 1, 7, 3, 4, 5, 6, 2]
    plans.append(slots.plan(np.array([0, 1, 3, 7], np.int32)))
    slots.apply(plans[-1])  # 3 lies right behind already
    assert plans[-1].k == 4
    plans.append(slots.plan(np.array([0, 1], np.int32)))
    slots.apply(plans[-1])  # a prefix of what is active
    slots.activate(plans[-1].k)  # what `Model` does when all FFNs have moved
    assert [plan.rows_written for plan in plans] == [2, 0, 0]
    assert slots.row_bytes == 2 * 16
    assert slots.ids().tolist() == [0, 1]
    assert slots.active("down.weight")[:, 0].tolist() == [0, 1]  # type: ignore[index]
    slots.activate_all()
    assert slots.active("down.weight")[:, 0].tolist() == [0, 1, 7, 3, 4, 5, 6, 2]  # type: ignore[index]
    assert slots.active("down.scales") is None


@pytest.mark.parametrize("packing", [None, ("affine", 32, 4), ("mxfp4", 32, 4), ("nvfp4", 16, 4)], ids=str)
@pytest.mark.parametrize("family", ["llama", "llama-bias"])
def test_after_a_random_walk_of_switches_the_model_equals_a_freshly_loaded_one(
    tmp_path: Path, family: str, packing: tuple[str, int, int] | None
) -> None:
    options = Options(quantization=quantization_of(*packing) if packing else None)
    folder = write_checkpoint(tmp_path / "checkpoint", family, options)
    model = open_model(folder)
    source, _ = read_rows(model.checkpoint, 0)
    neuron_bytes = sum(row_bytes(array).shape[1] for array in source.values())
    generator = np.random.default_rng(3)
    for step in range(WALK):
        if generator.random() < 0.15:
            model.switch(None)
            assert model.selection is None
            continue
        keep = generator.integers(1, 17, size=2) * 8  # 128 of 128 included
        selection = random_selection(WIDTHS, keep.tolist(), seed=100 + step)
        missing = [
            len(set(ids.tolist()) - set(slots.order[: len(ids)].tolist()))
            for slots, ids in zip(model.slots, selection.ids, strict=True)
        ]
        switch = model.switch(selection)

        assert switch.neurons == sum(missing)
        assert switch.bytes == 2 * sum(missing) * neuron_bytes
        for slots, ids in zip(model.slots, selection.ids, strict=True):
            assert np.array_equal(slots.ids(), ids)
        if step % 10 == 0:
            assert_rows_match_order(model)
            fresh = open_model(folder)
            fresh.switch(selection)
            # Another order of the neurons is another order of summation; else the two are the same numbers.
            assert np.abs(logits(model, PROMPT, [5]) - logits(fresh, PROMPT, [5])).max() < TOLERANCE
    model.switch(selection)
    assert_rows_match_order(model)
    fresh = open_model(folder)
    fresh.switch(selection)
    assert np.abs(logits(model, PROMPT, [5]) - logits(fresh, PROMPT, [5])).max() < TOLERANCE


def test_switching_to_the_live_selection_moves_nothing(tiny_checkpoint: Path) -> None:
    model = open_model(tiny_checkpoint)
    selection = random_selection(WIDTHS, (40, 56), seed=1)
    first = model.switch(selection)
    assert first.bytes > 0
    assert first.overlap is None  # it was dense before
    again = model.switch(random_selection(WIDTHS, (40, 56), seed=1, selector="static"))
    assert (again.bytes, again.neurons, again.overlap) == (0, 0, 1.0)
    model.switch(None)
    back = model.switch(selection)
    assert (back.bytes, back.neurons, back.overlap) == (0, 0, None)  # the neurons were left where they lay


def test_a_switch_reports_the_overlap_with_the_live_selection(tiny_checkpoint: Path) -> None:
    model = open_model(tiny_checkpoint)
    one, other = random_selection(WIDTHS, (64, 64), seed=1), random_selection(WIDTHS, (32, 96), seed=2)
    model.switch(one)
    shares = [len(set(b.tolist()) & set(a.tolist())) / len(b) for a, b in zip(one.ids, other.ids, strict=True)]
    assert model.switch(other).overlap == pytest.approx(sum(shares) / 2)


@pytest.mark.parametrize("widths", [(128,), (128, 128, 128), (128, 136)])
def test_a_selection_for_another_model_is_refused_and_nothing_moves(
    tiny_checkpoint: Path, widths: tuple[int, ...]
) -> None:
    model = open_model(tiny_checkpoint)
    live = random_selection(WIDTHS, (32, 32), seed=1)
    model.switch(live)
    with pytest.raises(SelectionError, match="another model"):
        model.switch(random_selection(widths, [16] * len(widths), seed=2))
    assert model.selection is live
    assert np.array_equal(model.slots[0].ids(), live.ids[0])


def test_two_models_of_one_checkpoint_do_not_share_slots(tiny_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    one, other = open_model(checkpoint.path), open_model(checkpoint.path)
    dense = logits(other, PROMPT)
    one.switch(random_selection(WIDTHS, (24, 24), seed=9))
    assert np.array_equal(logits(other, PROMPT), dense)


def test_closing_gives_the_weights_back(tiny_checkpoint: Path) -> None:
    model = open_model(tiny_checkpoint)
    slots = list(model.slots)
    model.close()
    assert all(not entry.rows for entry in slots)
    model.close()  # twice is no error
