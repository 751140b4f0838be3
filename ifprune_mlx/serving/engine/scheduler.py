"""The scheduler: the queue, the running requests and the counters, under one lock, and the choice of the next request.

The event loops' threads and the worker thread share it. It does not touch the model.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from ifprune_mlx.serving.engine.request import (
    EngineClosedError,
    EngineFullError,
    Request,
    RequestState,
    RequestStats,
)

EXCLUSIVE = "exclusive"  # selection key of a request that runs alone
_COUNTED = ("requests", "failed", "cancelled", "prefix_hits")
_SUMMED = ("prompt_tokens", "cached_tokens", "completion_tokens", "select_s", "switch_s", "prefill_s", "decode_s")


def next_request(
    waiting: Sequence[RequestState], live_key: str, since: float, running: bool, patience: float, now: float
) -> RequestState | None:
    """The request to start now; None if the running ones must end first, or none has selected.

    Requests of the live selection go first, in order, and join a running batch. Once a request of another selection has
    waited for more than `patience` seconds of the live selection's time, no later arrival joins, and its selection is
    next when the batch has ended. So a selection stays live for up to `patience` seconds, or as long as only it has
    requests. Then the request that has waited longest follows.

    Args:
        waiting: in order of arrival.
        live_key: key of the live selection.
        since: when that selection became live.
        running: requests of it are running.
    """
    selected = [state for state in waiting if state.selection_key]
    for state in selected:
        joins = state.selection_key == live_key != EXCLUSIVE
        if not joins and now - max(state.arrived, since) > patience:
            return None if running else state
        if joins:
            return state
    return None if running or not selected else selected[0]


class Scheduler:
    """The requests of one engine. The engine is busy from the first `add` until `rest` finds no request.

    Any thread may call `add`, `cancel`, `counters`, `rest` and `close`; only the worker thread calls the others.

    Args:
        queue: the most requests that wait beside those that run.
        patience: see `next_request`.
        concurrency: the most requests that run. One that could run may wait, too, until the worker thread is there.
    """

    def __init__(self, queue: int, patience: float, concurrency: int = 1) -> None:
        self._most, self._patience = queue + concurrency, patience
        self._lock = threading.RLock()
        self._counters: dict[str, float] = dict.fromkeys(_COUNTED + _SUMMED, 0)
        self.waiting: list[RequestState] = []  # in order of arrival
        self.running: list[RequestState] = []  # only the worker thread changes it, so it reads without the lock
        self.closed = False
        self.idle = threading.Event()  # set while the engine has no requests
        self.idle.set()

    def add(self, state: RequestState) -> bool:
        """Put a request into the queue.

        Returns:
            Whether the engine was idle. If so, the caller must ask for the model.

        Raises:
            EngineFullError, EngineClosedError: if the request is not taken.
        """
        with self._lock:
            if self.closed:
                raise EngineClosedError
            if len(self.running) + len(self.waiting) >= self._most:
                raise EngineFullError(f"{len(self.waiting)} requests wait already; try again in a few seconds")
            self.waiting.append(state)
            was_idle = self.idle.is_set()
            self.idle.clear()
            return was_idle

    def cancel(self, state: RequestState) -> None:
        """Cancel a request. If it runs, the worker thread ends it before its next token."""
        with self._lock:
            state.cancelled = state.stopped = True
            if state in self.waiting:
                self.finish(state)

    def counters(self) -> dict[str, Any]:
        """The fields of `EngineStats` about requests."""
        with self._lock:
            return {**self._counters, "running": len(self.running), "waiting": len(self.waiting)}

    def rest(self) -> bool:
        """Call it after releasing the model. Whether the engine is idle; if not, it must ask for the model again."""
        with self._lock:
            if not self.waiting:
                self.idle.set()
            return self.idle.is_set()

    def close(self) -> None:
        """Accept no more requests, end those that wait, and stop the others."""
        with self._lock:
            self.closed = True
            for state in self.running:
                state.stopped = True
            for state in tuple(self.waiting):
                state.stopped = True
                self.finish(state)
                state.put(EngineClosedError())

    def unselected(self, most: int) -> list[RequestState]:
        """The first `most` requests in the queue that have not selected."""
        with self._lock:
            return [state for state in self.waiting if not state.selection_key][:most]

    def next(self, live_key: str, since: float) -> RequestState | None:
        """Start the request that `next_request` picks: move it from the queue to the running ones."""
        with self._lock:
            now = time.monotonic()
            state = next_request(self.waiting, live_key, since, bool(self.running), self._patience, now)
            if state is not None:
                self.waiting.remove(state)
                self.running.append(state)
            return state

    def outlook(self) -> tuple[bool, bool, list[int]]:
        """Whether the scheduler is closed, whether it has no requests, and the serials of those that wait."""
        with self._lock:
            return self.closed, not (self.waiting or self.running), [state.serial for state in self.waiting]

    def hear_of(self, serial: int, request: Request) -> RequestState:
        """On a rank that does not lead: the waiting request of that serial, new or known; nobody reads its answer."""
        known = next((state for state in self.waiting if state.serial == serial), None)
        if known is None:
            self.waiting.append(known := RequestState(request, None, serial=serial))
        return known

    def start(self, serial: int) -> RequestState:
        """On a rank that does not lead: start the request that the leader's `next` has picked."""
        state = next(state for state in self.waiting if state.serial == serial)
        self.waiting.remove(state)
        self.running.append(state)
        return state

    def keep_waiting(self, serials: Sequence[int]) -> None:
        """On a rank that does not lead: drop waiting requests but for these; the others were cancelled."""
        self.waiting = [state for state in self.waiting if state.serial in serials]

    def finish(self, state: RequestState, stats: RequestStats | None = None) -> None:
        """Remove and count an ended request: answered if it has `stats`, else cancelled or failed."""
        with self._lock:
            if state in self.running:
                self.running.remove(state)
            elif state in self.waiting:
                self.waiting.remove(state)
            else:
                return  # it was cancelled before, and counted
            self._counters["requests"] += 1
            if stats is None:
                self._counters["cancelled" if state.cancelled else "failed"] += 1
                return
            self._counters["prefix_hits"] += stats.cached_tokens > 0
            for name in _SUMMED:
                self._counters[name] += getattr(stats, name)
