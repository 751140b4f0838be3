"""A token and a switch build no operation of MLX's that is not needed: counted, not timed."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from ifprune_convert.packing import quantization_of
from ifprune_convert.pipeline import Options
from ifprune_mlx import Model
from ifprune_mlx.checkpoint.format import Checkpoint
from ifprune_mlx.model import load_checkpoint
from ifprune_mlx.sparse import inplace
from ifprune_mlx.sparse.inplace import shared
from scripts.count_operations import calls, in_graph, of_a_token, plain
from tests.ifprune_mlx.reference import random_selection
from tests.tiny import write_checkpoint

LAYERS, WIDTHS, KEEP = 2, (128, 128), (64, 32)
TOKENS = mx.array([[40, 41, 42]])


@pytest.fixture(scope="module", params=[(None, "float32"), (("affine", 32, 4), "bfloat16")], ids=["float32", "4 bit"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed rows have numbers in bfloat16, which NumPy has not got."""
    packing, dtype = request.param
    options = Options(quantization=quantization_of(*packing) if packing else None, dtype=getattr(mx, dtype))
    return write_checkpoint(tmp_path_factory.mktemp("work") / "checkpoint", options=options)


def opened(folder: Path, residency: str = "ram") -> Model:
    if not shared():
        pytest.skip("rows are moved by scatter here")
    return load_checkpoint(Checkpoint.open(folder), residency=residency)


def switch(model: Model, seed: int, keep: tuple[int, int] = KEEP) -> None:
    model.switch(random_selection(WIDTHS, keep, seed))


def test_a_sliced_token_builds_what_a_plain_models_does(checkpoint: Path) -> None:
    """But for two changes of shape around a packed down product, and a plain float one's transposition."""
    model = opened(checkpoint)
    switch(model, 1)
    ours, stock = of_a_token(model), of_a_token(plain(model))
    packed = model.checkpoint.layout.down is not None
    assert ours - stock == ({"Reshape": 2 * LAYERS} if packed else {})
    assert stock - ours == ({} if packed else {"Transpose": LAYERS})


@pytest.mark.parametrize("residency", ["ram", "ssd"])
def test_views_of_the_active_rows_are_made_once_and_computed(checkpoint: Path, residency: str) -> None:
    model = opened(checkpoint, residency)
    model.memory = 1 << 30  # in `ssd` residency there is room for spare slots
    switch(model, 1)
    mx.eval(model(TOKENS))
    before = [{name: slots.active(name) for name in slots.rows} for slots in model.slots]
    for views, k in zip(before, KEEP, strict=True):
        for name, view in views.items():
            assert view is not None
            assert (len(view), in_graph(view).total()) == (k, 0), name
    switch(model, 2)
    for views, slots in zip(before, model.slots, strict=True):
        assert all(slots.active(name) is view for name, view in views.items())
    switch(model, 2, (32, 32))
    assert [len(slots.active("down.weight")) for slots in model.slots] == [32, 32]  # type: ignore[arg-type]


def test_a_switch_builds_views_where_the_number_of_neurons_changes_and_else_nothing(checkpoint: Path) -> None:
    model = opened(checkpoint)
    for seed, keep in enumerate((KEEP, KEEP, (32, 32), (32, 32))):
        with calls() as found:
            switch(model, seed, keep)
        arrays = sum(len(slots.rows) for slots in model.slots[: LAYERS if seed == 0 else 1])
        assert found["__getitem__"] == (arrays if seed % 2 == 0 else 0)
        assert found["eval"] == 1
        del found["__getitem__"], found["eval"], found["synchronize"]
        assert not found
    with calls() as found:
        model.switch(None)
    assert not found


def test_numpys_views_of_buffers_are_made_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened(checkpoint)
    made: list[mx.array] = []
    raw = inplace.raw

    def watched(array: mx.array) -> inplace.Raw:
        made.append(array)
        return raw(array)

    monkeypatch.setattr(inplace, "raw", watched)
    for seed in range(4):
        switch(model, seed)
    assert len(made) == sum(len(slots.rows) for slots in model.slots)


def test_views_are_dropped_before_a_scatter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows cannot be written in place: with views of them, old rows would stay in memory beside new ones."""
    folder = write_checkpoint(tmp_path / "checkpoint", hidden_size=512, intermediate_size=2048, head_dim=64)
    model = opened(folder)
    monkeypatch.setattr(inplace, "shared", lambda: False)
    largest = max(rows.nbytes for rows in model.slots[0].rows.values())
    for seed in range(3):
        model.switch(random_selection((2048, 2048), (512, 1024), seed))
        mx.eval(model(TOKENS))
        if seed == 0:
            before = mx.get_active_memory()
            mx.reset_peak_memory()
    assert mx.get_active_memory() <= before + 1000
    assert mx.get_peak_memory() - before < 2.5 * largest
