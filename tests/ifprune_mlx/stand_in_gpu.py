"""A Mac's GPU that is not there: what MLX says of it, and its wired limit as MLX's Metal allocator handles that."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
import pytest


@dataclass
class StandInGPU:
    """Answers `mx.device_info` and `mx.set_wired_limit` (mlx 0.32: allocator.cpp, resident.cpp)."""

    memory: int
    working_set: int
    limit: int = 0
    calls: int = 0
    changes: list[int] = field(default_factory=list)  # limits that were set anew; MLX returns early for the same one

    def device_info(self, device: object = None) -> dict[str, str | int]:
        name = {"device_name": "Apple M0", "architecture": "applegpu_g00s"}
        return name | {"memory_size": self.memory, "max_recommended_working_set_size": self.working_set}

    def set_wired_limit(self, limit: int) -> int:
        if limit > self.working_set:
            raise ValueError("[metal::set_wired_limit] Setting a wired limit larger than the maximum working set size")
        self.calls += 1
        before, self.limit = self.limit, limit
        if limit != before:
            self.changes.append(limit)
        return before

    def install(self, patch: pytest.MonkeyPatch) -> StandInGPU:
        """Take the place of this machine's device, for our code and mlx-lm's."""
        patch.setattr(mx, "device_info", self.device_info)
        patch.setattr(mx, "set_wired_limit", self.set_wired_limit)
        return self
