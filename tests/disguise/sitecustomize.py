"""What every process of the tests begins with: it can look like another system, and compute on the CPU.

Python imports this file by its name, with its folder on PYTHONPATH (`make test-without-linux`, `make test-cpu`):

IFPRUNE_TEST_HIDE_LINUX=1   what only Linux has is not there: posix_fadvise, RLIMIT_*, a readable /proc
IFPRUNE_TEST_DEVICE=cpu     MLX computes on the CPU, also where there is a GPU
"""

from __future__ import annotations

import errno
import importlib.util
import os
import resource
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def hide_linux() -> None:
    """Take away what only Linux has, or has in full."""
    for module, prefix in ((os, "posix_fadvise"), (os, "POSIX_FADV_"), (resource, "RLIMIT_")):
        for name in [name for name in vars(module) if name.startswith(prefix)]:
            if name != "RLIMIT_NOFILE":  # every system has it, and mlx-lm cannot do without
                delattr(module, name)
    sys.addaudithook(_without_proc)
    stat = os.stat

    def without_proc(path: Any, *given: Any, **named: Any) -> os.stat_result:
        _without_proc("open", (path,))  # `os.stat` raises no event
        return stat(path, *given, **named)

    os.stat = without_proc


def _without_proc(event: str, given: tuple[Any, ...]) -> None:
    """Python asks before it opens or lists anything."""
    if event in ("open", "os.listdir", "os.scandir") and isinstance(given[0], str | bytes | os.PathLike):
        path = os.fsdecode(given[0])
        if path == "/proc" or path.startswith("/proc/"):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


class _OnDevice:
    """Sets MLX's default device as soon as it has been imported, before another module makes a stream for it."""

    def __init__(self, device: str) -> None:
        self._device = device

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "mlx.core":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def then_set_device(module: ModuleType) -> None:
            execute(module)
            module.set_default_device(getattr(module, self._device))

        spec.loader.exec_module = then_set_device  # type: ignore[method-assign]
        return spec


if os.environ.get("IFPRUNE_TEST_HIDE_LINUX"):
    hide_linux()
if device := os.environ.get("IFPRUNE_TEST_DEVICE"):
    sys.meta_path.insert(0, _OnDevice(device))  # type: ignore[arg-type]
