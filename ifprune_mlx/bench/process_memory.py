"""What this process holds in memory, and the most that it held.

On macOS that is the physical footprint, as Activity Monitor shows it: the resident size there counts files that were
merely read, and may leave out pages that only the GPU wrote. It can trail what was freed by a few seconds. On Linux it
is what no file stands behind. The most is there of all pages, since the system keeps no other figure.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

_FLAVOR = 4  # RUSAGE_INFO_V4 of macOS's sys/resource.h: a uuid of 16 bytes, then 64-bit numbers
_FOOTPRINT, _MOST = 7, 28  # the places of ri_phys_footprint and ri_lifetime_max_phys_footprint among these


class _Usage(ctypes.Structure):
    _fields_ = (("uuid", ctypes.c_uint8 * 16), ("numbers", ctypes.c_uint64 * 64))  # more than any system fills


def resident() -> int:
    """Bytes of this process in memory now."""
    if found := footprint():
        return found[0]
    kilobytes: list[str] = []
    with suppress(OSError):
        status = Path("/proc/self/status").read_text()
        kilobytes = re.findall(r"^Rss(?:Anon|Shmem):\s*(\d+) kB", status, re.MULTILINE)
    if not kilobytes:
        command = ["ps", "-o", "rss=", "-p", str(os.getpid())]
        kilobytes = [subprocess.run(command, capture_output=True, text=True, check=True).stdout]
    return 1024 * sum(map(int, kilobytes))


def most_resident() -> int:
    """The most bytes of this process that were in memory so far."""
    if found := footprint():
        return found[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def footprint() -> tuple[int, int] | None:
    """Bytes of the physical footprint now, and at most so far; None where the system has no such figure."""
    usage, call = _Usage(), _proc_pid_rusage()
    if call is None or call(os.getpid(), _FLAVOR, ctypes.byref(usage)) != 0:
        return None
    return usage.numbers[_FOOTPRINT], usage.numbers[_MOST]


def _proc_pid_rusage() -> Callable[..., Any] | None:
    if sys.platform != "darwin":
        return None
    try:
        return ctypes.CDLL("/usr/lib/libproc.dylib").proc_pid_rusage
    except (AttributeError, OSError):
        return None
