"""A neurons file of records holds what one of tensors holds, and reads fewer pages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ifprune_convert.frequency import reorder
from ifprune_convert.packing import quantization_of
from ifprune_convert.pipeline import Options
from ifprune_convert.weight_files import write_neurons
from ifprune_mlx import CheckpointError
from ifprune_mlx.checkpoint.format import Checkpoint
from ifprune_mlx.checkpoint.format_writer import write_manifest
from ifprune_mlx.checkpoint.neuron_layout import PAGE_SIZES, PARTS, RECORDS, record_stride, strips_of
from ifprune_mlx.checkpoint.neuron_reader import RowReader, read_rows
from ifprune_mlx.checkpoint.raw_array import raw
from ifprune_mlx.checkpoint.safetensors_io import load_arrays
from tests.tiny import write_checkpoint

PACKINGS = [None, ("affine", 32, 4), ("affine", 64, 8), ("mxfp4", 32, 4), ("nvfp4", 16, 4)]
ORDERS = [np.random.default_rng(seed).permutation(128).astype(np.int32) for seed in (1, 2)]


def pages(nbytes: int, stride: int, page: int) -> float:
    """On average over many records, counted one by one."""
    count = 1 << 12
    return sum((i * stride + nbytes - 1) // page - i * stride // page + 1 for i in range(count)) / count


@pytest.mark.parametrize(
    ("nbytes", "stride", "on_linux", "on_a_mac"),
    [
        (3456, 4096, 1, 1),  # the paper's 9B at 4 bit
        (6528, 8192, 2, 1),  # and at 8 bit
        (12288, 16384, 3, 1),  # and in bf16: side by side, every other record would lie on two of a Mac's pages
        (24576, 24576, 6, 2),
        (972, 1024, 1, 1),  # SmolLM2-135M at 4 bit: four on a page, or sixteen
        (6912, 8192, 2, 1),  # and in float32; also 8B models at 4 bit
        (13056, 16384, 4, 1),  # these at 8 bit
        (6048, 6144, 2, 1.25),  # Qwen2.5-7B at 4 bit: 8192 would be more than a third of it
    ],
)
def test_records_are_padded_where_that_saves_pages(nbytes: int, stride: int, on_linux: float, on_a_mac: float) -> None:
    assert record_stride(nbytes) == stride
    assert [pages(nbytes, stride, page) for page in PAGE_SIZES] == [on_linux, on_a_mac]


@pytest.mark.parametrize("nbytes", [1, 16, 100, 500, 1111, 2049, 4097, 5000, 10000, 100001])
def test_a_stride_is_never_worse_than_none_and_at_most_a_third_larger(nbytes: int) -> None:
    stride = record_stride(nbytes)
    assert nbytes <= stride <= max(4 / 3 * nbytes, nbytes + 15)
    for page in PAGE_SIZES:
        assert pages(nbytes, stride, page) <= pages(nbytes, nbytes, page) + 1e-3


def ordered(folder: Path, packing: tuple[str, int, int] | None) -> tuple[Checkpoint, Checkpoint]:
    """A checkpoint in the source's order, and a copy of it in another order, which is of records."""
    options = Options(quantization=quantization_of(*packing) if packing else None)
    plain = Checkpoint.open(write_checkpoint(folder / "plain", "llama-bias", options))
    other = Checkpoint.open(write_checkpoint(folder / "ordered", "llama-bias", options))
    reorder(other, ORDERS)
    write_manifest(other.path, source="tests", licence=None)
    return plain, Checkpoint.open(other.path)


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_records_hold_what_tensors_hold(tmp_path: Path, packing: tuple[str, int, int] | None) -> None:
    plain, made = ordered(tmp_path, packing)
    ids = np.array([0, 1, 2, 17, 64, 127], np.int32)
    for index in range(2):
        (strip,) = made.strips(index)
        assert strip.stride % 16 == 0
        assert all(part.offset % {"U8": 1, "F32": 4, "U32": 4}[part.dtype] == 0 for part in strip.parts)
        expected, bias = read_rows(plain, index)
        found, found_bias = read_rows(made, index)
        one, other = RowReader(plain, index), RowReader(made, index)
        np.testing.assert_array_equal(np.argsort(other.position), ORDERS[index])
        some, others = one.read(ids), other.read(ids)
        assert expected.keys() == found.keys() == some.keys() == others.keys()
        for name, rows in expected.items():
            assert rows.dtype == found[name].dtype == other.empty(1)[name].dtype
            np.testing.assert_array_equal(raw(rows), raw(found[name]))
            np.testing.assert_array_equal(some[name], others[name])
            np.testing.assert_array_equal(raw(rows)[ids], others[name])
        assert bias is not None
        assert found_bias is not None
        assert other.down_bias is not None
        assert mx.array_equal(bias, found_bias)
        assert mx.array_equal(bias, other.down_bias)
    assert made.weight_bytes == plain.weight_bytes
    assert [made.ffn_bytes(i, 4) for i in (0, 1)] == [plain.ffn_bytes(i, 4) for i in (0, 1)]


def test_ordered_tensors_are_read_as_well(tmp_path: Path) -> None:
    """Checkpoints that were ordered before there were records."""
    plain, made = ordered(tmp_path, ("affine", 32, 4))
    for index, order in enumerate(ORDERS):
        arrays = load_arrays(plain.neurons_file(index))
        bias = arrays.pop("down.bias")
        tensors = {name: mx.take(array, mx.array(order), axis=0) for name, array in arrays.items()}
        write_neurons(made.neurons_file(index), tensors | {"down.bias": bias, "order": mx.array(order)})
    write_manifest(made.path, source="tests", licence=None)
    found = Checkpoint.open(made.path)
    assert len(found.strips(0)) == 6 + 1  # weights, scales and biases of two kinds, and the bias of gate and up
    for index in range(2):
        expected, _ = read_rows(plain, index)
        rows, _ = read_rows(found, index)
        some = RowReader(found, index).read(np.array([3, 90], np.int32))
        for name in expected:
            assert mx.array_equal(expected[name], rows[name])
            np.testing.assert_array_equal(raw(expected[name])[[3, 90]], some[name])


def edited(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, str]], None]:
    def edit(metadata: dict[str, str]) -> None:
        parts = json.loads(metadata[PARTS])
        change(parts)
        metadata[PARTS] = json.dumps(parts)

    return edit


DAMAGES: dict[str, tuple[Callable[[dict[str, str]], object], str]] = {
    "no description": (lambda metadata: metadata.pop(PARTS), "records are not as"),
    "not JSON": (lambda metadata: metadata.update({PARTS: "{"}), "records are not as"),
    "a list": (lambda metadata: metadata.update({PARTS: "[1]"}), "records are not as"),
    "deep": (lambda metadata: metadata.update({PARTS: "[" * 100000}), "records are not as"),
    "beyond the record": (edited(lambda parts: parts["down.weight"].update(offset=1 << 40)), "records are not as"),
    "before the record": (edited(lambda parts: parts["down.weight"].update(offset=-4)), "records are not as"),
    "unknown type": (edited(lambda parts: parts["down.weight"].update(dtype="F7")), "records are not as"),
    "no offset": (edited(lambda parts: parts["down.weight"].pop("offset")), "records are not as"),
    "no down": (edited(lambda parts: parts.pop("down.weight")), "down.weight is missing"),
    "infinite": (
        lambda metadata: metadata.update({PARTS: metadata[PARTS].replace('"offset": 0', '"offset": 1e999')}),
        "records are not as",
    ),
    "a fraction": (edited(lambda parts: parts["down.weight"].update(offset=0.5)), "records are not as"),
    "words": (edited(lambda parts: parts["down.weight"].update(shape="64")), "records are not as"),
    "negative sizes": (edited(lambda parts: parts["down.weight"].update(shape=[-8, -8])), "records are not as"),
    "a part more": (
        edited(lambda parts: parts.update({"down.x": {"dtype": "F32", "shape": [0], "offset": 0}})),
        "holds down.x, of which config.json knows nothing",
    ),
    "signed": (edited(lambda parts: parts["down.weight"].update(dtype="I32")), "down.weight is of type I32, expected"),
    "another shape": (edited(lambda parts: parts["down.weight"].update(shape=[32])), r"\[128, 32\], config.json asks"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_records_that_are_not_as_described_are_refused(tmp_path: Path, name: str) -> None:
    _, made = ordered(tmp_path, None)
    file = made.neurons_file(1)
    header = made.headers[file.name]
    arrays = load_arrays(file)
    mx.eval(arrays)  # before the file is written anew
    metadata = dict(header.metadata)
    change, words = DAMAGES[name]
    change(metadata)
    write_neurons(file, arrays, metadata)
    write_manifest(made.path, source="tests", licence=None)
    with pytest.raises(CheckpointError, match=words) as caught:
        Checkpoint.open(made.path)
    assert file.name in str(caught.value)


def test_records_of_another_width_are_refused(tmp_path: Path) -> None:
    _, made = ordered(tmp_path, None)
    header = made.headers[made.neurons_file(0).name]
    assert header.tensors[RECORDS].shape == (128, made.strips(0)[0].stride)
    with pytest.raises(CheckpointError, match="records are not as"):
        strips_of(header, 127, tmp_path)


@pytest.mark.parametrize("name", ["gate_up.weight", "down.bias", "down.x"])
def test_tensors_that_cannot_be_rows_are_refused_when_opening(tmp_path: Path, name: str) -> None:
    plain = Checkpoint.open(write_checkpoint(tmp_path / "plain", "llama-bias", Options()))
    file = plain.neurons_file(0)
    arrays = load_arrays(file)
    mx.eval(arrays)
    arrays[name] = arrays.get(name, mx.zeros((128, 0))).astype(mx.int32)
    write_neurons(file, arrays)
    write_manifest(plain.path, source="tests", licence=None)
    with pytest.raises(CheckpointError, match=f"{name}(, of which|.* is of type I32, expected)"):
        Checkpoint.open(plain.path)
