"""The memory of the device that MLX computes on: what weights may take, and MLX's limits while models are open."""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass, replace
from threading import Lock

import mlx.core as mx

# What macOS and other programs need of a Mac's memory, at least: a guess.
_SYSTEM_SHARE, _LEAST_SYSTEM = 8, 4 << 30
# MLX may keep a 64th of the memory in freed buffers. Its own limit is the whole memory, too much on a Mac that is used.
_CACHE_SHARE, _LEAST_CACHE = 64, 1 << 27


@dataclass(frozen=True)
class Device:
    """What MLX computes on.

    Attributes:
        memory: its bytes; of a Mac, and where the CPU computes, the machine's.
        working_set: bytes that a Mac's GPU keeps at hand (Metal's `recommendedMaxWorkingSetSize`); macOS's setting
            `iogpu.wired_limit_mb` raises it. What is beyond may be paged out, and then costs many times as much. None
            for what is no Mac's GPU.
    """

    memory: int
    working_set: int | None = None

    @property
    def usable(self) -> int:
        """Bytes that weights may take. The tenth that is left is for the KV cache, activations and freed buffers."""
        # mlx-lm warns from nine tenths on as well, and from 0.95 on MLX gives its freed buffers back.
        limit = self.memory if self.working_set is None else self.working_set
        return limit * 9 // 10

    @property
    def most_wired_mb(self) -> int | None:
        """The highest `iogpu.wired_limit_mb` (MiB) that leaves macOS what it needs; None where that is no more."""
        most = self.memory - max(self.memory // _SYSTEM_SHARE, _LEAST_SYSTEM)
        return None if self.working_set is None or most <= self.working_set else most >> 20

    def wired_limit_mb(self, weights: int) -> int | None:
        """The `iogpu.wired_limit_mb` that has room for so many bytes of weights; None if none would do."""
        limit = -(-weights * 10 // 9 >> 20)
        return None if self.most_wired_mb is None or limit > self.most_wired_mb else limit

    def raised(self, wired_limit_mb: int) -> Device:
        """The same Mac after `sudo sysctl iogpu.wired_limit_mb=...`."""
        return replace(self, working_set=wired_limit_mb << 20)


def this_device() -> Device:
    """The device that MLX computes on now."""
    info = mx.device_info()
    memory = info.get("memory_size") or info.get("total_memory")  # Metal's and CUDA's; a CPU names neither
    working_set = info.get("max_recommended_working_set_size")
    if memory is None:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Device(int(memory), None if working_set is None else int(working_set))


def limit_cache() -> tuple[int, int]:
    """Limit the freed buffers that MLX keeps to a share of the memory; returns the limit in bytes before and now."""
    limit = max(this_device().memory // _CACHE_SHARE, _LEAST_CACHE)
    before = mx.set_cache_limit(limit)
    if before < limit:
        mx.set_cache_limit(before)
    return before, min(before, limit)


def wire() -> int | None:
    """Let MLX wire memory as far as the GPU may use it; returns the limit in bytes before, None where none is."""
    # Exactly what mlx-lm sets around its loops: MLX does nothing where the limit is that already.
    working_set = this_device().working_set
    return None if working_set is None else mx.set_wired_limit(working_set)


class Limits:
    """MLX's limits, which all models of a process share: less cache, and wired memory, while any of them is open."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._open: weakref.WeakSet[object] = weakref.WeakSet()  # a model that is dropped unclosed leaves it
        self._cache: int | None = None  # what the limits were before; None while no model is open
        self._wired: int | None = None
        self._lowered = 0

    def opened(self, model: object) -> None:
        """A model holds its weights from now on."""
        with self._lock:
            before, now = limit_cache()
            # If all models were dropped unclosed, a limit other than ours is the user's.
            if self._cache is None or (not self._open and before != self._lowered):
                self._cache = before
            self._lowered = now
            if not self._open:
                wired = wire()
                if self._wired is None or wired != this_device().working_set:
                    self._wired = wired
            self._open.add(model)

    def closed(self, model: object) -> None:
        """A model's weights are freed, and nothing that used them is still being computed."""
        with self._lock:
            self._open.discard(model)
            if self._open:
                return
            if self._cache is not None:
                mx.set_cache_limit(self._cache)
            if self._wired is not None:
                mx.set_wired_limit(self._wired)
            self._cache = self._wired = None


limits = Limits()
