"""What weights may take of a device's memory: on described Macs, with CUDA, and where the CPU computes."""

from __future__ import annotations

import os

import mlx.core as mx
import pytest

from ifprune_mlx.device import Device, this_device
from tests.ifprune_mlx.stand_in_gpu import StandInGPU

GIB = 1 << 30


def test_on_a_mac_the_gpus_working_set_counts_and_not_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    StandInGPU(16 * GIB, 11_453_246_122).install(monkeypatch)
    assert this_device() == Device(16 * GIB, 11_453_246_122)
    assert this_device().usable == 10_307_921_509


def test_with_cuda_the_gpus_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "GPU", "total_memory": 10_000, "free_memory": 1})
    assert this_device() == Device(10_000)
    assert this_device().usable == 9_000


def test_on_a_cpu_the_machines_memory_counts() -> None:
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert this_device() == Device(machine)
    assert this_device().wired_limit_mb(1) is None
    assert this_device().most_wired_mb is None


@pytest.mark.parametrize(("gib", "most"), [(8, None), (16, 12), (24, 20), (32, 28), (64, 56), (128, 112)])
def test_the_wired_limit_leaves_macos_an_eighth_and_4_gib(gib: int, most: int | None) -> None:
    device = Device(gib * GIB, gib * GIB * 2 // 3)
    if most is None:
        assert device.most_wired_mb is None
        return
    assert device.most_wired_mb == most << 10
    assert device.raised(most << 10).most_wired_mb is None
    weights = device.raised(most << 10).usable
    assert device.wired_limit_mb(weights) == most << 10
    assert device.wired_limit_mb(weights + (1 << 20)) is None


@pytest.mark.parametrize("weights", [1, 10**6 + 7, 10**9 + 1, 7_654_321_098, 11 * GIB])
def test_the_wired_limit_that_is_named_has_room(weights: int) -> None:
    device = Device(64 * GIB, 48 * GIB)
    limit = device.wired_limit_mb(weights)
    assert limit is not None
    assert device.raised(limit).usable >= weights > device.raised(limit - 2).usable
