"""Writing arrays in place, and the scatter that takes its place where MLX would not see it: both do the same."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from ifprune_convert.packing import quantization_of
from ifprune_convert.pipeline import Options
from ifprune_mlx.checkpoint.raw_array import from_raw, raw, raw_dtype
from ifprune_mlx.sparse import inplace
from ifprune_mlx.sparse.inplace import copy_rows, exchange_rows, movable, shared, write_rows
from tests.ifprune_mlx.reference import TOLERANCE, logits, open_model, random_selection
from tests.tiny import write_checkpoint

DTYPES = [mx.float32, mx.float16, mx.bfloat16, mx.uint32, mx.uint8]
ROWS = 700


@pytest.fixture(params=["in place", "scatter"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "scatter":
        monkeypatch.setattr(inplace, "shared", lambda: False)
    return str(request.param)


def some(dtype: mx.Dtype, width: int = 24) -> mx.array:
    array = mx.random.randint(0, 200, (ROWS, width)).astype(dtype)
    mx.eval(array)
    return array


def test_this_device_lets_mlx_see_what_is_written() -> None:
    # True on MLX's CPU build; wherever it is not, everything below falls back to a scatter.
    if mx.default_device() == mx.cpu:
        assert shared()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [1 << 21, 100])
def test_rows_are_exchanged_copied_and_written(
    way: str, dtype: mx.Dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inplace, "_CHUNK_BYTES", chunk)  # many chunks, and one
    generator = np.random.default_rng(0)
    array = some(dtype)
    expected = raw(array).copy()
    places = generator.permutation(ROWS).astype(np.int32)
    one, other, target = places[:200], places[200:400], places[400:500]

    exchange_rows(movable(array), one, other)
    expected[one], expected[other] = expected[other].copy(), expected[one].copy()
    assert np.array_equal(raw(array), expected)
    copy_rows(movable(array), target, one[:100])
    expected[target] = expected[one[:100]]
    assert np.array_equal(raw(array), expected)
    values = raw(some(dtype))[:100].copy()
    write_rows(movable(array), target, values)
    expected[target] = values
    assert np.array_equal(raw(array), expected)
    # What MLX computes with it, not only what lies in memory.
    assert np.array_equal(raw(array + mx.zeros((1,), dtype)), raw(from_raw(expected, dtype) + mx.zeros((1,), dtype)))
    assert array.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_raw_values_make_the_array_again(dtype: mx.Dtype) -> None:
    array = some(dtype)
    assert raw(array).dtype == raw_dtype(dtype)
    again = from_raw(raw(array).copy(), dtype)
    assert again.dtype == dtype
    assert bool(mx.array_equal(again, array))


def test_a_copy_reads_everything_before_it_writes(way: str) -> None:
    array = mx.arange(8).reshape(8, 1)
    mx.eval(array)
    moved = np.arange(8, dtype=np.int32)
    copy_rows(movable(array), moved, np.roll(moved, 1))
    assert array[:, 0].tolist() == [7, 0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("packing", [None, ("affine", 32, 4)], ids=str)
@pytest.mark.parametrize("residency", ["ram", "ssd"])
def test_a_model_switches_alike_either_way(
    tmp_path: Path, way: str, packing: tuple[str, int, int] | None, residency: str
) -> None:
    from ifprune_mlx.checkpoint.format import Checkpoint
    from ifprune_mlx.model import load_checkpoint

    options = Options(quantization=quantization_of(*packing) if packing else None, dtype=mx.bfloat16)
    folder = write_checkpoint(tmp_path / "checkpoint", "llama-bias", options)
    model = load_checkpoint(Checkpoint.open(folder), dtype=mx.float32, residency=residency)
    for seed in range(6):
        selection = random_selection((128, 128), (64, 40 + 8 * seed), seed)
        model.switch(selection)
    fresh = load_checkpoint(Checkpoint.open(folder), dtype=mx.float32)
    fresh.switch(selection)
    assert np.abs(logits(model, [1, 2, 3], [4]) - logits(fresh, [1, 2, 3], [4])).max() < TOLERANCE
    if residency == "ram":
        model.first_layers_in_order(1)
        assert model.slots[0].order.tolist() == list(range(128))
        source = open_model(folder)
        assert np.array_equal(
            raw(model.slots[0].rows["gate.bias"]), raw(source.slots[0].rows["gate.bias"].astype(mx.float32))
        )
