"""Residency `ssd`: what is read from the file is what `ram` has in memory, whatever came before."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from ifprune_convert.packing import quantization_of
from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx import BudgetError, CheckpointError, Model, Selection, generate, load, make_selector, stream_generate
from ifprune_mlx.checkpoint.budget import resident_bytes
from ifprune_mlx.checkpoint.format import Checkpoint
from ifprune_mlx.checkpoint.neuron_layout import RECORDS, Part, Strip
from ifprune_mlx.checkpoint.neuron_reader import RowReader, merged_ranges, read_rows
from ifprune_mlx.checkpoint.raw_array import raw
from ifprune_mlx.data.dataset import Record
from ifprune_mlx.model import load_checkpoint
from ifprune_mlx.selection.selectors import Instruction
from ifprune_mlx.sparse import slots as slots_module
from ifprune_mlx.sparse.slots import EMPTY, FFNSlots, plan_switch
from tests.ifprune_mlx.reference import TOLERANCE, greedy, logits, open_model, random_selection
from tests.tiny import write_checkpoint, write_source
from tests.tiny_predictor import write_predictor

PROMPT = [1, 40, 300, 7, 99, 250]
WIDTHS = (128, 128)
CHATS = [Record(messages=[{"role": "user", "content": text}, {"role": "assistant", "content": "x"}])
         for text in ("sum of 2 and 3", "write a loop", "why is the sky blue", "def f(x):")]  # fmt: skip
PACKINGS = [None, ("affine", 32, 4), ("affine", 64, 8), ("mxfp4", 32, 4), ("nvfp4", 16, 4)]


def on_ssd(folder: Path, dtype: mx.Dtype | None = None, memory: int | None = None) -> Model:
    return load_checkpoint(Checkpoint.open(folder), dtype=dtype, residency="ssd", memory=memory)


def walk(steps: int, seed: int = 3) -> list[Selection]:
    """Selections of several densities, some of them close to the one before."""
    generator = np.random.default_rng(seed)
    selections = []
    for step in range(steps):
        keep = (generator.integers(1, 17, size=2) * 8).tolist() if step % 3 == 0 else list(selections[-1].keep)
        selections.append(random_selection(WIDTHS, keep, seed=seed * 1000 + step))
    return selections


def assert_rows_are_the_sources(model: Model) -> None:
    for index, slots in enumerate(model.slots):
        source, _ = read_rows(model.checkpoint, index)
        held = slots.order != EMPTY
        for name, rows in slots.rows.items():
            assert np.array_equal(raw(rows)[held], raw(source[name])[slots.order[held]]), name


@pytest.mark.parametrize("order", ["source", "frequency"])
@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("family", ["llama", "llama-bias", "gemma2"])
def test_ssd_equals_ram_after_any_walk(
    tmp_path: Path, family: str, packing: tuple[str, int, int] | None, order: str
) -> None:
    options = Options(
        quantization=quantization_of(*packing) if packing else None, order=CHATS if order == "frequency" else None
    )
    folder = write_checkpoint(tmp_path / "checkpoint", family, options)
    ssd, ram = on_ssd(folder), open_model(folder)
    for step, selection in enumerate(walk(24)):
        ssd.switch(selection)
        ram.switch(selection)
        if step % 4 == 0:
            assert np.abs(logits(ssd, PROMPT, [5]) - logits(ram, PROMPT, [5])).max() < TOLERANCE
            assert_rows_are_the_sources(ssd)
            assert [len(slots.order) for slots in ssd.slots] == list(selection.keep)
    ssd.close()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_rows_are_cast_as_ram_casts_them(tmp_path: Path, dtype: mx.Dtype) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", "llama-bias", Options(dtype=mx.bfloat16))
    checkpoint = Checkpoint.open(folder)
    expected, _ = read_rows(checkpoint, 0, dtype)
    reader = RowReader(checkpoint, 0, dtype)
    ids = np.array([0, 3, 4, 50, 127], np.int32)
    found = reader.read(ids)
    assert found.keys() == expected.keys() == reader.empty(1).keys()
    for name, rows in expected.items():
        assert np.array_equal(found[name], raw(rows)[ids]), name
        assert reader.empty(2)[name].dtype == rows.dtype


@pytest.mark.parametrize("seed", range(100))
def test_a_plan_with_spare_slots_keeps_what_is_selected_most(seed: int) -> None:
    generator = np.random.default_rng(seed)
    d_ffn = int(generator.integers(2, 60))
    slots = int(generator.integers(1, d_ffn))
    k = int(generator.integers(1, slots + 1))
    order = generator.permutation(d_ffn)[:slots].astype(np.int32)
    order[generator.random(slots) < 0.2] = EMPTY
    position = generator.permutation(d_ffn).astype(np.int32)
    ids = np.sort(generator.permutation(d_ffn)[:k]).astype(np.int32)

    plan = plan_switch(order, ids, position)

    after = order.copy()
    count = len(plan.entering)
    after[plan.leaving[:count]], after[plan.entering] = order[plan.entering], order[plan.leaving[:count]]
    after[plan.parking] = order[plan.parked]
    after[plan.leaving[count:]] = plan.missing
    assert set(after[:k].tolist()) == set(ids.tolist())
    assert set(plan.missing.tolist()) == set(ids.tolist()) - set(order.tolist())
    kept = [neuron for neuron in after[k:] if neuron != EMPTY]
    assert len(kept) == len(set(kept)) == len(set(kept) - set(ids.tolist()))
    # Nothing that was in memory, is not active and is not kept is selected more often than what is.
    lost = set(order.tolist()) - {EMPTY} - set(after.tolist())
    assert not lost or (len(kept) == slots - k and max(position[kept], default=-1) < min(position[list(lost)]))


def test_spare_slots_save_reading(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    checkpoint = Checkpoint.open(folder)
    one, other = random_selection(WIDTHS, (32, 32), seed=1), random_selection(WIDTHS, (32, 32), seed=2)
    model = on_ssd(folder, memory=resident_bytes(checkpoint, "ssd", (96, 96)))
    model.switch(one)
    first = model.switch(other)
    back = model.switch(one)
    assert first.missing == first.neurons > 0
    assert back.missing == 0
    assert back.neurons > 0
    assert [len(slots.order) for slots in model.slots] == [96, 96]
    ram = open_model(folder)
    ram.switch(one)
    assert np.abs(logits(model, PROMPT) - logits(ram, PROMPT)).max() < TOLERANCE


def test_a_switch_reads_only_what_it_misses(tmp_path: Path) -> None:
    model = on_ssd(write_checkpoint(tmp_path / "checkpoint"))
    selection = random_selection(WIDTHS, (64, 64), seed=1)
    ids = [layer.copy() for layer in selection.ids]
    out = np.setdiff1d(np.arange(128, dtype=np.int32), ids[0])[:5]
    ids[0] = np.sort(np.concatenate([ids[0][5:], out])).astype(np.int32)
    model.switch(selection)
    assert model.switch(Selection(tuple(ids), WIDTHS, "random")).missing == 5
    assert model.switch(Selection(tuple(ids), WIDTHS, "random")).missing == 0


def test_a_model_on_ssd_cannot_be_dense(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    model, tokenizer = load(folder, residency="ssd")
    for call in (
        lambda: model(mx.array([PROMPT])),
        lambda: generate(model, tokenizer, "hello", dense=True, max_tokens=2),
        lambda: generate(model, tokenizer, "hello", selector="activation", max_tokens=2),
    ):
        with pytest.raises(BudgetError, match="need residency ram"):
            call()
    ram, _ = load(folder)
    expected = generate(ram, tokenizer, "hello", selector="static", max_tokens=8)
    assert generate(model, tokenizer, "hello", selector="static", max_tokens=8) == expected
    model.switch(None)
    with pytest.raises(BudgetError, match="no selection is active"):
        model(mx.array([PROMPT]))


def test_a_file_that_vanishes_is_one_clear_error_and_no_wrong_answer(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    model, tokenizer = load(folder, residency="ssd")
    one, other = random_selection(WIDTHS, (64, 64), seed=1), random_selection(WIDTHS, (64, 64), seed=2)
    expected = generate(model, tokenizer, "hello", selection=other, max_tokens=6)
    generate(model, tokenizer, "hello", selection=one, max_tokens=6)
    file = model.checkpoint.neurons_file(1)
    content, before = file.read_bytes(), file.stat()
    os.truncate(file, 20000)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="ends at byte"):
            list(stream_generate(model, tokenizer, "hello", selection=other, max_tokens=6))
        with pytest.raises(CheckpointError, match="ends at byte"):
            model(mx.array([PROMPT]))
    with file.open("r+b") as opened:
        opened.write(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # else it counts as another file
    assert generate(model, tokenizer, "hello", selection=other, max_tokens=6) == expected


def test_a_checkpoint_that_is_replaced_meanwhile_changes_nothing(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    model, ram = on_ssd(folder), open_model(folder)
    model.switch(random_selection(WIDTHS, (64, 64), seed=1))
    convert(open_source(write_source(tmp_path / "other", seed=9)), folder, Options(overwrite=True))
    for each in (model, ram):
        each.switch(random_selection(WIDTHS, (64, 64), seed=2))
    assert np.abs(logits(model, PROMPT) - logits(ram, PROMPT)).max() < TOLERANCE


def test_leaving_a_selection_waits_for_what_it_reads(tmp_path: Path) -> None:
    model = on_ssd(write_checkpoint(tmp_path / "checkpoint"))
    for seed in range(30):
        model.switch(random_selection(WIDTHS, (64, 64), seed))
        model.switch(None)
        assert [slots.k for slots in model.slots] == [0, 0]
        assert [slots.pending for slots in model.slots] == [None, None]
        with pytest.raises(BudgetError, match="no selection is active"):
            model(mx.array([PROMPT]))


@pytest.mark.parametrize("residency", ["ram", "ssd"])
@pytest.mark.parametrize("moment", ["between layers", "within a layer"])
def test_a_switch_that_is_cut_off_leaves_no_mixture(
    tmp_path: Path, residency: str, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_checkpoint(Checkpoint.open(write_checkpoint(tmp_path / "checkpoint")), residency=residency)
    one, other = random_selection(WIDTHS, (64, 64), seed=1), random_selection(WIDTHS, (64, 64), seed=2)
    model.switch(one)
    model(mx.array([PROMPT]))
    calls = 0

    def interrupted(*given: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return original(*given)  # type: ignore[arg-type]

    if moment == "between layers":
        original, where = FFNSlots.plan, "ifprune_mlx.sparse.slots.FFNSlots.plan"
    else:
        original, where = slots_module.exchange_rows, "ifprune_mlx.sparse.slots.exchange_rows"  # type: ignore[assignment]
    with monkeypatch.context() as patch:
        patch.setattr(where, interrupted)
        if moment == "within a layer" and residency == "ssd":
            return  # without spare slots nothing is exchanged
        with pytest.raises(KeyboardInterrupt):
            model.switch(other)
    assert model.selection is None
    with pytest.raises(BudgetError):
        model(mx.array([PROMPT]))
    if moment == "within a layer":
        for selection in (one, None):
            with pytest.raises(CheckpointError, match="load the model again"):
                model.switch(selection)
        return
    model.switch(other)
    fresh = open_model(model.checkpoint.path)
    fresh.switch(other)
    assert np.abs(logits(model, PROMPT) - logits(fresh, PROMPT)).max() < TOLERANCE


def test_a_selection_beyond_the_memory_budget_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    model = on_ssd(folder, memory=resident_bytes(Checkpoint.open(folder), "ssd", (64, 64)))
    model.switch(live := random_selection(WIDTHS, (64, 64), seed=1))
    with pytest.raises(BudgetError, match="lower the density, or raise the budget"):
        model.switch(random_selection(WIDTHS, (72, 64), seed=2))
    assert model.selection is live


def test_budgets_count_floats_as_they_are_cast(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", options=Options(dtype=mx.bfloat16))
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.loaded_bytes(4) == 2 * checkpoint.loaded_bytes() == 2 * checkpoint.weight_bytes
    budget = resident_bytes(checkpoint, "ssd", (64, 64), 4)
    model, _ = load(folder, dtype=mx.float32, memory=budget)
    assert model.residency == "ssd"
    assert model.keep() == (64, 64)


def test_the_learned_selector_selects_alike_on_ssd_and_in_ram(tmp_path: Path) -> None:
    predictor = write_predictor(tmp_path / "predictor")
    folder = write_checkpoint(tmp_path / "checkpoint", options=Options(predictor=predictor, order=CHATS, density=0.5))
    results = []
    for residency in ("ram", "ssd"):
        model, tokenizer = load(folder, residency=residency)
        selector = make_selector(model)
        texts = [generate(model, tokenizer, text, max_tokens=8) for text in ("add 2 and 3", "a loop")]
        chosen = [selector.select(Instruction(text, (1,)), model.keep()).selection.hash for text in ("a", "b", "a")]
        results.append((texts, chosen))
        model.close()
    assert results[0] == results[1]


def test_frequency_order_changes_the_file_and_nothing_else(tmp_path: Path) -> None:
    predictor = write_predictor(tmp_path / "predictor")
    source = open_source(write_source(tmp_path / "source", "llama-bias"))
    options = Options(predictor=predictor, density=0.5)
    convert(source, tmp_path / "plain", options)
    source = open_source(tmp_path / "source")
    convert(source, tmp_path / "ordered", Options(predictor=predictor, density=0.5, order=CHATS))
    plain, ordered = Checkpoint.open(tmp_path / "plain"), Checkpoint.open(tmp_path / "ordered")
    assert plain.layout.order is None
    assert ordered.layout.order == "frequency"
    assert ordered.weight_bytes == plain.weight_bytes
    assert ordered.neuron_bytes(0) == plain.neuron_bytes(0)
    assert [len(checkpoint.strips(0)) for checkpoint in (plain, ordered)] == [3, 1]
    one, other = open_model(plain.path), open_model(ordered.path)
    for mine, theirs in zip(one.slots, other.slots, strict=True):
        for name, rows in mine.rows.items():
            assert np.array_equal(raw(rows), raw(theirs.rows[name])), name
    model, tokenizer = load(ordered.path)
    counts = np.zeros(128)
    for chat in CHATS:
        text = str(chat.messages[0]["content"])
        counts[make_selector(model).select(Instruction(text, (1,)), (64, 64)).selection.ids[0]] += 1
    position = RowReader(ordered, 0).position
    assert (np.diff(counts[np.argsort(position)]) <= 0).all()
    for file in ordered.path.glob("neurons-*"):
        tensors = ordered.headers[file.name].tensors
        assert tensors[RECORDS].start == min(info.start for info in tensors.values())
        assert tensors[RECORDS].start % 16384 == 0
    expected = greedy(one.module, tokenizer.encode("hello"), 6)
    assert greedy(other.module, tokenizer.encode("hello"), 6) == expected


@pytest.mark.parametrize("damage", ["twice", "key"])
def test_a_damaged_order_is_refused(tmp_path: Path, damage: str) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", options=Options(order=CHATS))
    if damage == "key":
        config = json.loads((folder / "config.json").read_text())
        config["ifpruning"]["order"] = "by taste"
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"config\.json"):
            Checkpoint.open(folder)
        return
    checkpoint = Checkpoint.open(folder)
    file = checkpoint.neurons_file(0)
    start = checkpoint.headers[file.name].tensors["order"].start
    content = bytearray(file.read_bytes())
    content[start : start + 4] = content[start + 4 : start + 8]
    file.write_bytes(content)
    for residency in ("ram", "ssd"):
        with pytest.raises(CheckpointError, match="its order of neurons is damaged"):
            load_checkpoint(checkpoint, residency=residency)


@pytest.mark.parametrize("seed", range(50))
def test_merged_ranges_cover_every_place_once_and_waste_little(seed: int) -> None:
    generator = np.random.default_rng(seed)
    count, width = int(generator.integers(0, 200)), 400
    places = np.sort(generator.permutation(width)[:count]).astype(np.int32)
    wanted, stride = ((64, 64), (3456, 4096), (3200, 4096), (1 << 17, 1 << 17))[seed % 4]
    strip = Strip(0, stride, (Part("down.weight", "U8", (wanted,)),))
    starts, stops = merged_ranges(places, strip, stride)
    covered = [place for start, stop in zip(starts, stops, strict=True) for place in range(start, stop)]
    assert covered == list(range(count))
    read = sum(int(places[stop - 1] - places[start] + 1) for start, stop in zip(starts, stops, strict=True))
    assert read <= 1.15 * count + 1e-9
    assert read * stride <= max(1.3 * wanted, stride) * count + 1e-6


def test_rows_in_place_are_seen_by_what_is_computed_next(tmp_path: Path) -> None:
    rows = {name: mx.zeros((64, 8)) for name in ("gate.weight", "up.weight", "down.weight")}
    mx.eval(rows)
    slots = FFNSlots(rows)
    before = rows["gate.weight"] @ mx.ones((8,))
    mx.eval(before)
    raw(slots.rows["gate.weight"])[5] = 1
    slots.apply(slots.plan(np.arange(32, 64, dtype=np.int32)))
    assert (slots.rows["gate.weight"] @ mx.ones((8,)))[37].item() == 8
    slots.restore()
    assert slots.order.tolist() == list(range(64))
    assert (slots.rows["gate.weight"] @ mx.ones((8,)))[5].item() == 8


def other_numbers(file: Path) -> None:
    """Write over a file in place, at the same size, as `cp` or `rsync --inplace` do."""
    length = int.from_bytes(file.read_bytes()[:8], "little")
    with file.open("r+b") as opened:
        opened.seek(8 + length)
        opened.write(os.urandom(file.stat().st_size - 8 - length))


@pytest.mark.parametrize("residency", ["ram", "ssd"])
@pytest.mark.parametrize("order", ["source", "frequency"])
def test_a_file_that_is_written_over_in_place_is_noticed(tmp_path: Path, residency: str, order: str) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", options=Options(order=CHATS if order == "frequency" else None))
    model = load_checkpoint(Checkpoint.open(folder), residency=residency)
    model.switch(random_selection(WIDTHS, (64, 64), seed=1))
    expected = logits(model, PROMPT)
    for file in (*folder.glob("neurons-*"), folder / "priors.safetensors"):
        other_numbers(file)
    assert np.array_equal(logits(model, PROMPT), expected)  # what is in memory stays right
    if residency == "ssd":
        for _ in range(2):
            model.switch(random_selection(WIDTHS, (64, 64), seed=2))
            with pytest.raises(CheckpointError, match=r"neurons-.*was written to while it was in use"):
                model(mx.array([PROMPT]))
    with pytest.raises(CheckpointError, match=r"priors.*was written to while it was in use"):
        _ = model.prior


@pytest.mark.parametrize("how", ["in place", "renamed", "shorter"])
@pytest.mark.parametrize("name", ["neurons-00002-of-00002.safetensors", "model-00001-of-00001.safetensors"])
def test_a_file_that_changes_between_opening_and_loading(tmp_path: Path, name: str, how: str) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    checkpoint = Checkpoint.open(folder)
    file = folder / name
    if how == "renamed":
        write_checkpoint(tmp_path / "other", seed=9)
        (tmp_path / "other" / file.name).replace(file)
    elif how == "in place":
        other_numbers(file)
    else:
        os.truncate(file, file.stat().st_size - 4)
    for residency in ("ram", "ssd"):
        with pytest.raises(CheckpointError, match=re.escape(str(folder))):
            load_checkpoint(checkpoint, residency=residency)


def test_closing_a_model_closes_its_files(tmp_path: Path) -> None:
    """At once, as macOS lets a process have 256 of them."""
    model = on_ssd(write_checkpoint(tmp_path / "checkpoint"))
    model.switch(random_selection(WIDTHS, (64, 64), 1))
    files = [slots._reader._descriptor for slots in model.slots if slots._reader is not None]
    assert len(files) == 2
    for file in files:
        os.fstat(file)
    model.close()
    for file in files:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(file)
