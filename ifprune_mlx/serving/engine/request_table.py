"""The books of an engine: which tickets wait, which run, and how those that are gone have ended.

They are what the event loops' threads and the worker share, under one lock. Nothing here touches the model.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from ifprune_mlx.serving.engine.request import EngineClosedError, EngineFullError, RequestStats
from ifprune_mlx.serving.engine.request_state import RequestState
from ifprune_mlx.serving.engine.scheduler import next_job

_TOKENS = ("prompt_tokens", "cached_tokens", "completion_tokens")
_SECONDS = ("select_s", "switch_s", "prefill_s", "decode_s")


class RequestTable:
    """The books of one engine. It is at work while it is in line for the model or has it, and else at rest.

    Args:
        most: how many tickets may wait.
        patience: of `queueing.next_job`.
    """

    def __init__(self, most: int, patience: float) -> None:
        self._most, self._patience = most, patience
        self._lock = threading.Lock()
        self._waiting: list[RequestState] = []
        self._running: dict[int, RequestState] = {}  # only the worker changes it
        self._place: Future[object] | None = None
        self._closed = self._working = False
        self._idle = threading.Event()
        self._idle.set()
        self._counts = {"requests": 0, "failed": 0, "cancelled": 0, "switches": 0}
        self._sums: dict[str, float] = {**dict.fromkeys(_TOKENS, 0), **dict.fromkeys(_SECONDS, 0.0)}

    # From any thread.

    @property
    def closed(self) -> bool:
        """Whether nobody may enter any more."""
        return self._closed

    def given_up(self, ticket: RequestState) -> bool:
        """Whether nobody waits for the ticket's answer, or the engine is closed."""
        return ticket.left or self._closed

    def counts(self) -> dict[str, Any]:
        """What `EngineStats` says of jobs: how many, their tokens and their seconds."""
        with self._lock:
            return {**self._counts, "running": len(self._running), "waiting": len(self._waiting), **self._sums}

    def enter(self, ticket: RequestState) -> bool:
        """Let a ticket wait.

        Returns:
            Whether the engine was at rest. It is at work now, and whoever called has to get in line for the model.

        Raises:
            EngineFullError, EngineClosedError: if it may not.
        """
        with self._lock:
            if self._closed:
                raise EngineClosedError
            if len(self._waiting) >= self._most:
                raise EngineFullError(f"{self._most} requests wait already; try again in a few seconds")
            self._waiting.append(ticket)
            if self._working:
                return False
            self._working = True
            self._idle.clear()
            return True

    def leave(self, ticket: RequestState) -> None:
        """Nobody listens to a ticket any more: it waits no longer, and if it runs, the worker drops it."""
        with self._lock:
            ticket.left = True
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self._count("cancelled")
                ticket.counted = True

    def line_up(self, place: Future[object]) -> bool:
        """Note the engine's place in line for the model; whether the engine has been closed meanwhile."""
        with self._lock:
            self._place = place
            return self._closed

    def rest(self) -> bool:
        """The engine does not have the model any more: it is at rest, unless something waits. Whether it is."""
        with self._lock:
            self._working = bool(self._waiting)
            if not self._working:
                self._idle.set()
            return not self._working

    def close(self) -> Future[object] | None:
        """Let nobody enter any more; the engine's last place in line for the model."""
        with self._lock:
            self._closed = True
            return self._place

    def wait_for_rest(self) -> None:
        """Return when the engine is at rest."""
        self._idle.wait()

    # From the worker, which alone starts and ends tickets; `fail_all` also where its turn has been called off.

    @property
    def running(self) -> Mapping[int, RequestState]:
        """The tickets that are being computed, by their uids in the lane."""
        return self._running

    @property
    def empty(self) -> bool:
        """Whether nothing waits or runs."""
        with self._lock:
            return not (self._waiting or self._running)

    def without_owner(self, most: int) -> list[RequestState]:
        """The first tickets in the queue that have not selected, `most` at most."""
        with self._lock:
            return [ticket for ticket in self._waiting if ticket.owner is None][:most]

    def take_next(self, live: str, since: float) -> RequestState | None:
        """Take the ticket whose turn it is from the queue; see `queueing.next_job`."""
        with self._lock:
            now = time.monotonic()
            ticket = next_job(self._waiting, live, since, bool(self._running), self._patience, now)
            if ticket is not None:
                self._waiting.remove(ticket)
            return ticket

    def started(self, uid: int, ticket: RequestState) -> None:
        """A ticket runs."""
        with self._lock:
            self._running[uid] = ticket

    def switched(self) -> None:
        """Another selection has been made active."""
        with self._lock:
            self._counts["switches"] += 1

    def answered(self, uid: int, stats: RequestStats) -> None:
        """A running ticket has got its whole answer."""
        with self._lock:
            del self._running[uid]
            self._counts["requests"] += 1
            for name in self._sums:
                self._sums[name] += getattr(stats, name)

    def cancelled(self, uid: int) -> RequestState:
        """A running ticket, to which nobody listens, has ended."""
        with self._lock:
            ticket = self._running.pop(uid)
            self._count("cancelled")
            return ticket

    def refused(self, ticket: RequestState) -> None:
        """A ticket that does not run yet has ended with an error."""
        with self._lock:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            if not ticket.counted:  # by `leave`, while its selection was made
                self._count("cancelled" if ticket.left else "failed")

    def fail_running(self) -> list[RequestState]:
        """Every running ticket ends with an error."""
        with self._lock:
            failed = list(self._running.values())
            self._running.clear()
            self._count("failed", len(failed))
            return failed

    def fail_all(self) -> list[RequestState]:
        """Every ticket that there is ends with an error."""
        with self._lock:
            failed = [*self._running.values(), *self._waiting]
            self._running.clear()
            self._waiting.clear()
            self._count("failed", len(failed))
            return failed

    def _count(self, outcome: str, jobs: int = 1) -> None:
        self._counts["requests"] += jobs
        self._counts[outcome] += jobs
