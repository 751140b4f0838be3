"""What a switch in `ssd` residency reads of the disk, with Linux's pages and with those of Apple silicon."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ifprune_convert import layout
from ifprune_convert.frequency import reorder
from ifprune_convert.pipeline import Options
from ifprune_mlx.checkpoint import neuron_reader
from ifprune_mlx.checkpoint.format import Checkpoint
from ifprune_mlx.checkpoint.format_writer import write_manifest
from ifprune_mlx.checkpoint.neuron_layout import PAGE_SIZES, Part, Strip, record_stride
from ifprune_mlx.checkpoint.neuron_reader import READERS, RowReader, merged_ranges, read_rows
from ifprune_mlx.checkpoint.raw_array import raw
from tests.tiny import write_checkpoint

LINUX, MAC = PAGE_SIZES
SHARES = (0.05, 0.1, 0.3)
SCATTERED = np.array([1, 2, 3, 17, 18, 40, 64, 90, 127], np.int32)

# Neurons of a layer, bytes of a record, and per page the most bytes read for one that is wanted, at each share of a
# layer's neurons that are missing. Missing neurons are scattered evenly, which is the worst case: of small records
# several lie on a page, and most pages have a wanted one. What is read is never more than the file.
MODELS: dict[str, tuple[int, int, dict[int, tuple[float, float, float]]]] = {
    "SmolLM2 in float32": (1536, 6912, {LINUX: (1.31, 1.31, 1.31), MAC: (2.4, 2.32, 2.1)}),
    "SmolLM2 at 4 bit": (1536, 972, {LINUX: (4.0, 3.7, 2.75), MAC: (12.0, 9.0, 3.52)}),
    "an 8B at 4 bit": (14336, 6912, {LINUX: (1.31, 1.31, 1.31), MAC: (2.36, 2.3, 2.05)}),
    "the 9B at 4 bit": (24576, 3456, {LINUX: (1.31, 1.31, 1.31), MAC: (4.5, 4.15, 3.05)}),
    "the 9B in bf16": (24576, 12288, {LINUX: (1.16, 1.16, 1.16), MAC: (1.34, 1.34, 1.34)}),
}


def waste(places: np.ndarray[tuple[int], np.dtype[np.int32]], strip: Strip, page: int) -> float:
    """Bytes of the pages that are read for every byte that is wanted."""
    starts, stops = merged_ranges(places, strip, page)
    first = (strip.start + places[starts].astype(np.int64) * strip.stride) // page
    last = (strip.start + places[stops - 1].astype(np.int64) * strip.stride + strip.nbytes - 1) // page
    assert (first[1:] > last[:-1] + 1).all(), "ranges that meet on a page, or side by side, are one"
    return float((last - first + 1).sum()) * page / (len(places) * strip.nbytes)


@pytest.mark.parametrize("page", PAGE_SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_a_switch_reads_few_pages_that_it_does_not_need(name: str, page: int) -> None:
    d_ffn, nbytes, bounds = MODELS[name]
    strip = Strip(1 << 14, record_stride(nbytes), (Part("down.weight", "U8", (nbytes,)),))
    for share, most in zip(SHARES, bounds[page], strict=True):
        found = [
            waste(np.sort(np.random.default_rng(seed).permutation(d_ffn)[: round(share * d_ffn)]), strip, page)
            for seed in range(3)
        ]
        assert max(found) <= most, (share, found)
        assert max(found) <= 1.01 * strip.stride / nbytes / share


@pytest.mark.parametrize("page", PAGE_SIZES)
def test_neurons_side_by_side_are_one_read_without_waste(page: int) -> None:
    strip = Strip(1 << 14, 4096, (Part("down.weight", "U8", (3456,)),))
    places = np.arange(1000, 2000, dtype=np.int32)
    assert [ends.tolist() for ends in merged_ranges(places, strip, page)] == [[0], [1000]]
    assert waste(places, strip, page) <= 1.2


def ordered(folder: Path) -> Checkpoint:
    """A tiny checkpoint of records, in an order of its own."""
    made = Checkpoint.open(write_checkpoint(folder, "llama-bias", Options()))
    reorder(made, [np.random.default_rng(seed).permutation(128).astype(np.int32) for seed in (1, 2)])
    write_manifest(made.path, source="tests", licence=None)
    return Checkpoint.open(made.path)


def assert_reads(checkpoint: Checkpoint, ids: np.ndarray[tuple[int], np.dtype[np.int32]]) -> None:
    for index in range(2):
        expected, _ = read_rows(checkpoint, index)
        for name, rows in RowReader(checkpoint, index).read(ids).items():
            np.testing.assert_array_equal(rows, raw(expected[name])[ids])


@pytest.mark.parametrize(
    "stride", [lambda n: -(-n // 16) * 16, lambda n: 1 << 12, lambda n: 1 << 13], ids=["16", "4096", "8192"]
)
def test_records_of_any_stride_are_read(tmp_path: Path, stride: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """As earlier releases chose others, and later ones may."""
    monkeypatch.setattr(layout, "record_stride", stride)
    checkpoint = ordered(tmp_path / "checkpoint")
    assert checkpoint.strips(0)[0].stride == stride(checkpoint.strips(0)[0].nbytes)  # type: ignore[operator]
    assert_reads(checkpoint, SCATTERED)


@pytest.mark.parametrize("order", ["source", "frequency"])
def test_one_pool_of_threads_reads_all_layers(tmp_path: Path, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoint"
    checkpoint = ordered(folder) if order == "frequency" else Checkpoint.open(write_checkpoint(folder, "llama-bias"))
    # As if a page were a byte: ranges that a page would join stay apart.
    monkeypatch.setattr(merged_ranges, "__defaults__", (1,))
    readers, threads, read = [RowReader(checkpoint, index) for index in range(2)], set(), os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        threads.add(threading.current_thread())
        return read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    for seed in range(10):
        ids = np.sort(np.random.default_rng(seed).permutation(128)[:40]).astype(np.int32)
        for reader in readers:
            reader.read(ids)
    assert 1 < len(threads) <= READERS
    assert all(thread.name.startswith("ifprune-disk") for thread in threads)


def test_padding_behind_a_record_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "record_stride", lambda n: 1 << 12)
    checkpoint = ordered(tmp_path / "checkpoint")
    reader, sizes, read = RowReader(checkpoint, 0), [], os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(sum(map(len, buffers)))
        return read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    reader.read(np.array([5], np.int32))
    assert sizes == [checkpoint.strips(0)[0].nbytes]


def test_large_ranges_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuron_reader, "_PART_BYTES", 10_000)
    sizes, read = [], os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(sum(map(len, buffers)))
        return read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    assert_reads(ordered(tmp_path / "checkpoint"), np.arange(128, dtype=np.int32))
    assert len(sizes) > 2
    assert max(sizes) <= 10_000


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="macOS has another call")
def test_linux_gets_no_advice_but_to_read_nothing_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *call: calls.append(call))
    assert_reads(ordered(tmp_path / "checkpoint"), SCATTERED)
    assert calls == [(0, 0, os.POSIX_FADV_RANDOM)] * 2  # once a layer


def test_macos_gets_no_advice_but_to_read_nothing_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    monkeypatch.setattr(neuron_reader, "sys", SimpleNamespace(platform="darwin"))
    monkeypatch.setattr(neuron_reader, "fcntl", SimpleNamespace(fcntl=lambda _, *call: calls.append(call)))
    checkpoint = ordered(tmp_path / "checkpoint")
    assert_reads(checkpoint, SCATTERED)
    assert calls == [(45, 0)] * 2  # F_RDAHEAD, off, once a layer; F_RDADVISE would be 44
