"""What this machine or model computes the slow way, and why: said once in the log, and shown by `ifprune info` and by
the server's metrics."""

from __future__ import annotations

import logging

UNPACKED, SCATTER, ONE_AT_A_TIME = "unpacked products", "scatter switches", "no batching"
SLOW_PATHS = (UNPACKED, SCATTER, ONE_AT_A_TIME)

_log = logging.getLogger(__name__)
_found: dict[str, str] = {}


def note_slow_path(name: str, reason: str) -> None:
    """Note that this process takes one of SLOW_PATHS; only the first time is said."""
    if name not in _found:
        _found[name] = reason
        _log.warning("slow path: %s: %s", name, reason)


def slow_paths() -> dict[str, str]:
    """Those that this process has taken so far, with the reason of each."""
    return dict(_found)
