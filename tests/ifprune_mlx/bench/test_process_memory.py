"""The memory of a process, read as macOS counts it from a stand-in for its call, and as systems without it do."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import pytest

from ifprune_mlx.bench import process_memory
from ifprune_mlx.bench.process_memory import footprint, most_resident, resident

# The numbers of macOS's `struct rusage_info_v4` (bsd/sys/resource.h), behind 16 bytes of uuid.
NAMES = (
    "user_time system_time pkg_idle_wkups interrupt_wkups pageins wired_size resident_size phys_footprint "
    "proc_start_abstime proc_exit_abstime child_user_time child_system_time child_pkg_idle_wkups child_interrupt_wkups "
    "child_pageins child_elapsed_abstime diskio_bytesread diskio_byteswritten cpu_time_qos_default "
    "cpu_time_qos_maintenance cpu_time_qos_background cpu_time_qos_utility cpu_time_qos_legacy "
    "cpu_time_qos_user_initiated cpu_time_qos_user_interactive billed_system_time serviced_system_time logical_writes "
    "lifetime_max_phys_footprint instructions cycles billed_energy serviced_energy interval_max_phys_footprint "
    "runnable_time"
)
FIELDS = NAMES.split()


class RusageInfoV4(ctypes.Structure):
    _fields_ = [("uuid", ctypes.c_uint8 * 16), *((name, ctypes.c_uint64) for name in FIELDS)]


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.POINTER(RusageInfoV4))
def proc_pid_rusage(process: int, flavor: int, info: ctypes._Pointer[RusageInfoV4]) -> int:
    if (process, flavor) != (os.getpid(), 4):
        return -1
    for index, name in enumerate(FIELDS):
        setattr(info.contents, name, index)
    info.contents.resident_size = 100_000_000
    info.contents.phys_footprint = 7_000_000_000
    info.contents.lifetime_max_phys_footprint = 9_000_000_000
    return 0


def test_macos_says_the_physical_footprint(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ctypes.sizeof(RusageInfoV4) <= ctypes.sizeof(process_memory._Usage)
    # As from a library, whose functions know nothing of their arguments' types.
    untyped = ctypes.cast(proc_pid_rusage, ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p))
    monkeypatch.setattr(process_memory, "_proc_pid_rusage", lambda: untyped)
    assert (resident(), most_resident()) == (7_000_000_000, 9_000_000_000)


def test_without_that_call_it_is_what_the_system_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a Mac whose library has no such call, and where it fails; there, the peak is in bytes."""
    here = resident()
    monkeypatch.setattr(process_memory, "_proc_pid_rusage", lambda: lambda *given: -1)
    assert footprint() is None
    assert 0.5 < resident() / here < 2
    monkeypatch.undo()
    kilobytes = most_resident() // 1024
    monkeypatch.setattr(sys, "platform", "darwin")
    if not Path("/usr/lib/libproc.dylib").exists():
        assert footprint() is None
        assert kilobytes <= most_resident() < 2 * kilobytes


@pytest.mark.parametrize("says", [None, "Name:\tpython\nVmRSS:\t9 kB\n"])
def test_without_proc_it_is_what_ps_says(monkeypatch: pytest.MonkeyPatch, says: str | None) -> None:
    """Which counts files as well."""

    def read_text(self: Path) -> str:
        if says is None:
            raise FileNotFoundError(2, "not here")
        return says

    here = resident()
    monkeypatch.setattr(process_memory, "footprint", lambda: None)
    monkeypatch.setattr(Path, "read_text", read_text)
    assert 0.9 * here < resident() < here + 10**9
