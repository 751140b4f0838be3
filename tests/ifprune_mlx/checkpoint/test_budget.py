"""Budgets: quantities as people write them, and the most neurons that a density, a parameter count or memory allow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ifprune_convert.pipeline import Options
from ifprune_mlx import BudgetError, Checkpoint, load
from ifprune_mlx.checkpoint.budget import (
    check_files,
    choose_residency,
    keep_count,
    parse_quantity,
    resident_bytes,
    resolve_keep,
    spare_slots,
)
from ifprune_mlx.checkpoint.format import Layout
from ifprune_mlx.device import Device, this_device
from tests.tiny import write_checkpoint


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3B", 3_000_000_000),
        ("3b", 3_000_000_000),
        ("250M", 250_000_000),
        ("6GB", 6_000_000_000),
        ("6 GB", 6_000_000_000),
        ("1.5GB", 1_500_000_000),
        (".5k", 500),
        ("512KB", 512_000),
        ("2TB", 2_000_000_000_000),
        ("1.5e9", 1_500_000_000),
        (" 12345 ", 12345),
        ("100B", 100_000_000_000),
    ],
)
def test_quantities_are_read_as_people_write_them(text: str, value: int) -> None:
    assert parse_quantity(text, "memory") == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "B",
        "GB",
        "-3B",
        "0",
        "0.2",
        "0M",
        "three",
        "3X",
        "3GiB",
        "1e",
        "nan",
        "inf",
        "3B 2B",
        "1,5",
        "1e999",
        "3B\n4",
    ],
)
def test_what_is_no_quantity_is_refused_with_one_line(text: str) -> None:
    with pytest.raises(BudgetError, match="is not a positive quantity; write it like 3B, 250M or 6GB") as caught:
        parse_quantity(text, "memory")
    assert str(caught.value).startswith("memory ")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module", params=["llama", "llama-bias", "wide"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Tiny ones, with and without biases, and one whose *k* are multiples of 64."""
    family = "llama-bias" if request.param == "wide" else request.param
    changes = {"intermediate_size": 1000} if request.param == "wide" else {}
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    return Checkpoint.open(write_checkpoint(folder, family, Options(density=0.3), **changes))


def test_without_a_budget_the_density_is_the_checkpoints_own(checkpoint: Checkpoint) -> None:
    expected = tuple(keep_count(0.3, spec.d_ffn) for spec in checkpoint.layout.ffns)
    assert resolve_keep(checkpoint) == expected


@pytest.mark.parametrize("density", [0.01, 0.27, 0.5, 1.0])
def test_a_density_is_rounded_for_every_layer(checkpoint: Checkpoint, density: float) -> None:
    expected = tuple(keep_count(density, spec.d_ffn) for spec in checkpoint.layout.ffns)
    assert resolve_keep(checkpoint, density=density) == expected


@pytest.mark.parametrize("density", [0, 2, -1, float("nan")])
def test_a_density_that_makes_no_sense_is_refused(checkpoint: Checkpoint, density: float) -> None:
    with pytest.raises(BudgetError, match="density"):
        resolve_keep(checkpoint, density=density)


def test_active_parameters_give_the_most_neurons_that_fit(checkpoint: Checkpoint) -> None:
    d_ffn = checkpoint.layout.ffns[0].d_ffn
    multiple = 8 if d_ffn < 512 else 64
    counts = list(range(multiple, d_ffn + 1, multiple))
    for k in counts:
        exact = checkpoint.active_parameters((k, k))
        assert resolve_keep(checkpoint, active_parameters=exact) == (k, k)
        assert resolve_keep(checkpoint, active_parameters=exact + 1) == (k, k)
        if k > multiple:
            assert resolve_keep(checkpoint, active_parameters=exact - 1) == (k - multiple, k - multiple)


def test_the_dense_model_fits_what_is_at_least_its_size(checkpoint: Checkpoint) -> None:
    dense = tuple(spec.d_ffn for spec in checkpoint.layout.ffns)
    assert resolve_keep(checkpoint, active_parameters=checkpoint.parameters) == dense
    assert resolve_keep(checkpoint, active_parameters=10**15) == dense
    assert resolve_keep(checkpoint, active_parameters=checkpoint.parameters - 1) < dense


def test_fewer_active_parameters_than_any_selection_has_are_refused(checkpoint: Checkpoint) -> None:
    multiple = 8 if checkpoint.layout.ffns[0].d_ffn < 512 else 64
    least = checkpoint.active_parameters((multiple, multiple))
    for wanted in (1, 1000, least - 1):
        with pytest.raises(BudgetError, match=f"give at least {least:,}"):
            resolve_keep(checkpoint, active_parameters=wanted)
    assert resolve_keep(checkpoint, active_parameters=least) == (multiple, multiple)


def test_memory_is_a_check_and_picks_no_density(checkpoint: Checkpoint) -> None:
    needed = checkpoint.weight_bytes
    assert resolve_keep(checkpoint, memory=needed) == resolve_keep(checkpoint)
    assert resolve_keep(checkpoint, memory=needed, density=0.5) == resolve_keep(checkpoint, density=0.5)
    with pytest.raises(BudgetError, match=r"residency ram, and the memory budget is .*; raise the budget") as caught:
        resolve_keep(checkpoint, memory=needed - 1)
    command = f"ifprune chat --model {checkpoint.path} --memory {needed - 1} --selector static --residency ssd"
    assert str(caught.value).endswith(f"; this fits: {command}")
    assert "\n" not in str(caught.value)


def test_on_ssd_memory_lowers_the_density_to_what_fits(checkpoint: Checkpoint) -> None:
    widths = [spec.d_ffn for spec in checkpoint.layout.ffns]
    multiple = 8 if widths[0] < 512 else 64
    own = resolve_keep(checkpoint)
    for k in range(multiple, own[0] + 1, multiple):
        exact = resident_bytes(checkpoint, "ssd", (k, k))
        assert exact == checkpoint.weight_bytes - sum((width - k) * checkpoint.neuron_bytes(0) for width in widths)
        assert resolve_keep(checkpoint, memory=exact, residency="ssd") == (k, k)
        if k > multiple:
            assert resolve_keep(checkpoint, memory=exact - 1, residency="ssd") == (k - multiple, k - multiple)
    assert resolve_keep(checkpoint, memory=checkpoint.weight_bytes, residency="ssd") == own
    least = resident_bytes(checkpoint, "ssd", (multiple, multiple))
    with pytest.raises(BudgetError, match=r"is too small: .*; give at least"):
        resolve_keep(checkpoint, memory=least - 1, residency="ssd")
    with pytest.raises(BudgetError, match="lower the density, or raise the budget"):
        resolve_keep(checkpoint, memory=least, density=0.5, residency="ssd")


def test_a_memory_budget_picks_ssd_only_where_it_must(checkpoint: Checkpoint) -> None:
    whole = checkpoint.weight_bytes
    assert choose_residency(checkpoint, None, None) == "ram"
    assert choose_residency(checkpoint, None, whole) == "ram"
    assert choose_residency(checkpoint, None, whole - 1) == "ssd"
    assert choose_residency(checkpoint, "ssd", None) == "ssd"
    with pytest.raises(BudgetError, match="unknown residency 'disk'; choose ram or ssd"):
        choose_residency(checkpoint, "disk", None)


def test_what_a_budget_leaves_becomes_spare_slots(checkpoint: Checkpoint) -> None:
    keep = resolve_keep(checkpoint)
    part, row = resident_bytes(checkpoint, "ssd", keep), sum(checkpoint.neuron_bytes(index) for index in range(2))
    assert spare_slots(checkpoint, None, keep) == 0
    assert spare_slots(checkpoint, part, keep) == 0
    assert spare_slots(checkpoint, part + 5 * row, keep) == 5
    assert spare_slots(checkpoint, part + 5 * row - 1, keep) == 4


def test_two_budgets_at_once_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(BudgetError, match="not both"):
        resolve_keep(checkpoint, density=0.5, active_parameters=10**9)


def test_a_model_resolves_its_budgets_the_same_way(tmp_path: Path) -> None:
    from tests.ifprune_mlx.reference import open_model

    model = open_model(write_checkpoint(tmp_path / "checkpoint"))
    assert model.keep(0.27) == (32, 32)
    assert model.keep(active_parameters=model.total_parameters) == (128, 128)
    with pytest.raises(BudgetError):
        model.keep(memory=5)


def test_a_checkpoint_larger_than_memory_is_refused(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    assert 10**9 < this_device().memory < 10**13
    monkeypatch.setattr("ifprune_mlx.checkpoint.budget.this_device", lambda: Device(checkpoint.weight_bytes))
    with pytest.raises(BudgetError, match=r"weights may take .* GB of this machine's .* GB; this fits: .* ssd$"):
        load(tiny_checkpoint)
    monkeypatch.setattr("ifprune_mlx.checkpoint.budget.this_device", lambda: Device(1))
    with pytest.raises(BudgetError, match=r"of this machine's .* GB; it is too large .* convert its source with -q"):
        load(tiny_checkpoint)
    with pytest.raises(BudgetError, match=r"of this machine's .* GB; it is too large .* convert its source with -q"):
        load(tiny_checkpoint, residency="ssd")


def test_padded_files_may_be_larger_than_memory(checkpoint: Checkpoint) -> None:
    device, asked = Device(11_111), []  # 10,000 for weights
    sizes = {
        "neurons-00001-of-00001.safetensors": 10_400,
        "model-00001-of-00001.safetensors": 1_900,
        "manifest.json": 1,
    }

    def layout_of(order: str | None) -> Layout:
        asked.append(order)
        return replace(checkpoint.layout, order=order)

    def check(order: str | None, **changes: int) -> None:
        given = sizes | {f"{name}-00001-of-00001.safetensors": size for name, size in changes.items()}
        check_files("org/name", given, "ram", None, lambda: layout_of(order), device)

    with pytest.raises(BudgetError, match="nothing was downloaded"):
        check(None)
    check("frequency")  # 7,800 and 1,900 at least
    with pytest.raises(BudgetError, match="nothing was downloaded"):
        check("frequency", model=2_300)
    assert asked == [None, "frequency", "frequency"]
    check(None, neurons=8_000)
    with pytest.raises(BudgetError, match="nothing was downloaded"):
        check(None, model=10_001)
    assert len(asked) == 3  # what fits, and what no part of fits, needs no look at the config
