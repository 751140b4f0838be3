"""Selections: how many neurons a density keeps, top-k, hash, overlap, and files that are whole or refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from ifprune_mlx.checkpoint.budget import keep_count, keep_multiple
from ifprune_mlx.errors import BudgetError, SelectionError
from ifprune_mlx.selection.selection import Selection, top_k
from tests.ifprune_mlx.reference import random_selection


def selection(*ids: list[int], widths: tuple[int, ...] = (16, 24), selector: str = "static") -> Selection:
    return Selection(tuple(np.array(layer, np.int32) for layer in ids), widths, selector)


SMALL = selection([0, 3, 15], [7, 23])


@pytest.mark.parametrize(
    ("density", "d_ffn", "k"),
    [
        (0.125, 128, 16),
        (0.27, 128, 32),  # 34.56 is nearest to 32
        (0.5, 128, 64),
        (1.0, 128, 128),
        (1, 1003, 1003),
        (0.001, 128, 8),  # at least one multiple
        (0.999, 128, 128),
        (0.7, 1536, 1088),  # multiples of 64 in a real model
        (0.27, 1536, 384),  # 414.72 was rounded to 416, a multiple of 32
        (0.75, 1536, 1152),
        (0.9, 1536, 1408),
        (0.27, 14336, 3840),
        (0.001, 512, 64),
        (0.9, 1000, 896),
        (0.999, 1000, 1000),
        (0.3, 8, 8),  # too narrow to cut
        (0.3, 5, 5),
    ],
)
def test_keep_count_rounds_to_the_nearest_multiple(density: float, d_ffn: int, k: int) -> None:
    assert keep_count(density, d_ffn) == k


@pytest.mark.parametrize("d_ffn", [8, 24, 128, 200, 511, 512, 1003, 4095, 4096, 14336])
def test_keep_count_is_within_the_layer_and_grows_with_density(d_ffn: int) -> None:
    counts = [keep_count(density, d_ffn) for density in np.linspace(0.001, 1, 200)]
    assert counts == sorted(counts)
    assert counts[-1] == d_ffn
    assert all(1 <= k <= d_ffn and (k % keep_multiple(d_ffn) == 0 or k == d_ffn) for k in counts)


@pytest.mark.parametrize("density", [0, 0.0, 2, 1.0001, -1, -0.1, float("nan"), float("inf"), float("-inf")])
def test_densities_outside_0_to_1_are_refused(density: float) -> None:
    with pytest.raises(BudgetError, match=r"density .* is not usable; give a number above 0") as caught:
        keep_count(density, 128)
    assert "\n" not in str(caught.value)


def test_top_k_keeps_the_best_sorted_by_id() -> None:
    scores = [np.array([0.5, -1, 9, 3], np.float32), np.array([1, 2, 3, 4, 5], np.float32)]
    chosen = top_k(scores, [2, 3], "learned")
    assert [ids.tolist() for ids in chosen.ids] == [[2, 3], [2, 3, 4]]
    assert all(ids.dtype == np.int32 for ids in chosen.ids)
    assert (chosen.widths, chosen.keep, chosen.selector) == ((4, 5), (2, 3), "learned")
    assert chosen.density == 5 / 9


def test_of_equal_scores_the_lower_id_wins() -> None:
    assert top_k([np.zeros(9, np.float32)], [4], "static").ids[0].tolist() == [0, 1, 2, 3]
    assert top_k([np.array([1, 2, 1, 2, 2, 1], np.float32)], [2], "static").ids[0].tolist() == [1, 3]
    assert top_k([np.array([1, 2, 1, 2, 2, 1], np.float32)], [4], "static").ids[0].tolist() == [0, 1, 3, 4]
    assert top_k([np.array([0.0, -0.0, 0.0], np.float32)], [2], "static").ids[0].tolist() == [0, 1]


@pytest.mark.parametrize("seed", range(30))
def test_top_k_agrees_with_sorting_by_score_and_id(seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores = generator.integers(-3, 4, size=int(generator.integers(1, 50))).astype(np.float32)  # many ties
    k = int(generator.integers(1, len(scores) + 1))
    expected = sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])
    assert top_k([scores], [k], "static").ids[0].tolist() == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_no_numbers_are_refused(bad: float) -> None:
    scores = [np.ones(4, np.float32), np.array([1, 2, bad, 4], np.float32)]
    with pytest.raises(SelectionError, match="learned selector, layer 1: scores contain NaN or infinity"):
        top_k(scores, [1, 1], "learned")


def test_keeping_no_neuron_is_refused() -> None:
    with pytest.raises(SelectionError, match="non-empty"):
        top_k([np.ones(4, np.float32)], [0], "static")


@pytest.mark.parametrize(
    ("ids", "widths"),
    [
        ([np.array([3, 1], np.int32)], (4,)),
        ([np.array([1, 1], np.int32)], (4,)),
        ([np.array([-1, 1], np.int32)], (4,)),
        ([np.array([1, 4], np.int32)], (4,)),
        ([np.array([], np.int32)], (4,)),
        ([np.array([1, 2], np.int64)], (4,)),
        ([np.array([1, 2], np.float32)], (4,)),
        ([np.array([[1, 2]], np.int32)], (4,)),
        ([np.array([1], np.int32)], (4, 4)),
    ],
    ids=["unsorted", "repeated", "negative", "too large", "empty", "int64", "float", "matrix", "fewer layers"],
)
def test_ids_that_are_no_selection_are_refused(ids: list[np.ndarray], widths: tuple[int, ...]) -> None:
    with pytest.raises(SelectionError):
        Selection(tuple(ids), widths, "static")


def test_ids_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="read-only"):
        SMALL.ids[0][0] = 1


def test_the_hash_is_pinned() -> None:
    # A hash is written into saved chats, caches and selection files: it must not change between releases.
    assert SMALL.hash == "7e900102461bed47"
    plain = b"ifprune-selection-1"
    for ids, width in zip(SMALL.ids, SMALL.widths, strict=True):
        plain += width.to_bytes(8, "little") + len(ids).to_bytes(8, "little")
        plain += b"".join(int(i).to_bytes(4, "little") for i in ids)
    assert hashlib.sha256(plain).hexdigest()[:16] == SMALL.hash


def test_the_hash_knows_ids_and_widths_but_not_the_selector() -> None:
    assert selection([0, 3, 15], [7, 23], selector="learned").hash == SMALL.hash
    assert selection([0, 3, 14], [7, 23]).hash != SMALL.hash
    assert selection([0, 3, 15], [7, 23], widths=(17, 24)).hash != SMALL.hash
    assert selection([0, 3], [15, 23]).hash != selection([0, 3, 15], [23]).hash


def test_overlap_is_the_mean_share_of_kept_neurons() -> None:
    one, other = selection([0, 1, 2, 3], [5, 6]), selection([2, 3, 4, 5], [6])
    assert one.overlap_by_layer(other) == [0.5, 0.5]
    assert other.overlap_by_layer(one) == [0.5, 1.0]
    assert (one.overlap(other), other.overlap(one), one.overlap(one)) == (0.5, 0.75, 1.0)
    with pytest.raises(SelectionError, match="different shape"):
        one.overlap(selection([0], [1], widths=(16, 16)))


def test_a_file_gives_back_the_selection(tmp_path: Path) -> None:
    chosen = random_selection((128, 200), (40, 8), seed=4, selector="activation")
    chosen.save(tmp_path / "s.safetensors")
    loaded = Selection.load(tmp_path / "s.safetensors")
    assert loaded.hash == chosen.hash
    assert (loaded.widths, loaded.selector, loaded.keep) == (chosen.widths, "activation", (40, 8))
    arrays, metadata = mx.load(str(tmp_path / "s.safetensors"), return_metadata=True)
    assert [array.dtype for array in arrays.values()] == [mx.int32] * 2
    assert float(metadata["density"]) == chosen.density
    assert {name: array.tolist() for name, array in arrays.items()} == {
        f"layers.{layer}": ids.tolist() for layer, ids in enumerate(chosen.ids)
    }
    assert list(tmp_path.iterdir()) == [tmp_path / "s.safetensors"]


def test_a_file_is_replaced_whole_and_another_suffix_refused(tmp_path: Path) -> None:
    SMALL.save(tmp_path / "s.safetensors")
    other = selection([1], [2])
    other.save(tmp_path / "s.safetensors")
    assert Selection.load(tmp_path / "s.safetensors").hash == other.hash
    with pytest.raises(SelectionError, match=r"ends in \.safetensors"):
        SMALL.save(tmp_path / "s.json")
    with pytest.raises(SelectionError, match="cannot be written"):
        SMALL.save(tmp_path / "missing" / "s.safetensors")


def write(path: Path, arrays: dict[str, mx.array] | None = None, **changes: str | None) -> None:
    """The file of `SMALL` with other tensors, or other metadata (None leaves a key out)."""
    SMALL.save(path)
    ours, metadata = mx.load(str(path), return_metadata=True)
    mx.eval(ours)
    metadata = {key: value for key, value in (metadata | changes).items() if value is not None}
    mx.save_safetensors(str(path), arrays or ours, metadata)


def cut(path: Path) -> None:
    SMALL.save(path)
    path.write_bytes(path.read_bytes()[:-3])


def cut_header(path: Path) -> None:
    SMALL.save(path)
    path.write_bytes(path.read_bytes()[:40])


def lengthen(path: Path) -> None:
    SMALL.save(path)
    path.write_bytes(path.read_bytes() + b"x")


def flip(path: Path) -> None:
    SMALL.save(path)
    content = bytearray(path.read_bytes())
    content[-4] ^= 1  # 23 becomes 22: still sorted
    path.write_bytes(content)


def arrays(first: mx.array, *, names: tuple[str, str] = ("layers.0", "layers.1")) -> dict[str, mx.array]:
    return {names[0]: first, names[1]: mx.array([7, 23])}


IDS = mx.array([0, 3, 15])
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lambda path: None, "no such selection file"),
    "a folder": (lambda path: path.mkdir(), "no such selection file"),
    "empty": (lambda path: path.write_bytes(b"") and None, "not a safetensors file"),
    "text": (lambda path: path.write_bytes(b"a selection, but in words") and None, "not a safetensors file"),
    "header not JSON": (lambda path: path.write_bytes(b"\x05" + bytes(7) + b"hello") and None, "not valid JSON"),
    "cut in the data": (cut, "cut short"),
    "cut in the header": (cut_header, "cut off within its header"),
    "bytes added": (lengthen, "longer than its header says"),
    "another safetensors file": (
        lambda path: mx.save_safetensors(str(path), {"w": mx.ones(3)}),
        "not a selection file",
    ),
    "another format": (lambda path: write(path, format="ifprune-selection-2"), "not a selection file of format 1"),
    "unsorted": (lambda path: write(path, arrays(mx.array([3, 0, 15]))), "layer 0: ids must be sorted"),
    "repeated": (lambda path: write(path, arrays(mx.array([3, 3, 15]))), "layer 0: ids must be sorted, unique"),
    "outside": (lambda path: write(path, arrays(mx.array([0, 3, 16]))), "layer 0: ids must .* within 0..15"),
    "no ids": (lambda path: write(path, arrays(mx.array([], mx.int32))), "layer 0: ids must be a non-empty"),
    "a matrix": (lambda path: write(path, arrays(IDS[None])), "layer 0: ids must be a non-empty int32 vector"),
    "float ids": (lambda path: write(path, arrays(IDS.astype(mx.float32))), "must hold int32 tensors"),
    "int64 ids": (lambda path: write(path, arrays(IDS.astype(mx.int64))), "must hold int32 tensors"),
    "a layer missing": (lambda path: write(path, {"layers.1": IDS}), "must hold int32 tensors layers.0"),
    "a layer too few": (lambda path: write(path, {"layers.0": IDS}), "1 layers of ids but 2 widths"),
    "another name": (lambda path: write(path, arrays(IDS, names=("layers.0", "layers.2"))), "must hold int32 tensors"),
    "an id changed": (flip, "do not match its hash"),
    "hash changed": (lambda path: write(path, hash="0" * 16), "do not match its hash"),
    "hash missing": (lambda path: write(path, hash=None), "do not match its hash"),
    "widths changed": (lambda path: write(path, widths="16 25"), "do not match its hash"),
    "widths missing": (lambda path: write(path, widths=None), "malformed metadata"),
    "widths no numbers": (lambda path: write(path, widths="16 wide"), "malformed metadata"),
    "selector missing": (lambda path: write(path, selector=None), "malformed metadata"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_with_one_line_that_names_it(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "s.safetensors"
    spoil, reason = DAMAGES[damage]
    spoil(path)
    with pytest.raises(SelectionError, match=reason) as caught:
        Selection.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_file_without_layers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    nothing = hashlib.sha256(b"ifprune-selection-1").hexdigest()[:16]
    SMALL.save(path)
    _, metadata = mx.load(str(path), return_metadata=True)
    header = {"__metadata__": metadata | {"widths": "", "hash": nothing}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(SelectionError, match="no layers"):
        Selection.load(path)


def test_agreement_is_overlap_beyond_chance() -> None:
    generator = np.random.default_rng(0)
    for k in (32, 256, 480):
        draws = [np.sort(generator.choice(512, k, replace=False)).astype(np.int32) for _ in range(80)]
        one, other = (Selection(tuple(draws[i::2]), (512,) * 40, "random") for i in (0, 1))
        assert one.agreement(one) == 1.0
        assert abs(one.agreement(other)) < 0.03
    everything = Selection((np.arange(8, dtype=np.int32),), (8,), "x")
    assert everything.agreement(everything) == 1.0
