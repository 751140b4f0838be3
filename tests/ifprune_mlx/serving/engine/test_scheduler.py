"""Which request is next: simulated queues, no model."""

from __future__ import annotations

from typing import Any

import pytest

from ifprune_mlx.serving.engine.request import RequestState
from ifprune_mlx.serving.engine.scheduler import EXCLUSIVE, next_request


def queued(arrived: float, selection_key: str) -> RequestState:
    anything: Any = None
    return RequestState(anything, anything, arrived=arrived, selection_key=selection_key)


def queue_of(text: str) -> list[RequestState]:
    """`A0 B1`: selection key and arrival; `?` has not selected, `-` is exclusive."""
    names = {"?": "", "-": EXCLUSIVE}
    return [queued(float(item[1:]), names.get(item[0], item[0])) for item in text.split()]


@pytest.mark.parametrize(
    ("waiting", "live", "running", "now", "expected"),
    [
        ("", "A", False, 1, None),
        ("?0", "A", False, 1, None),
        ("B0 A1", "A", False, 2, 1),  # the live selection first
        ("B0 A1", "A", True, 2, 1),
        ("B0 C1", "A", False, 2, 0),  # else who came first
        ("B0 C1", "A", True, 2, None),
        ("?0 B1", "A", False, 2, 1),
        ("B0 A1", "A", False, 6, 0),  # until patience ends
        ("B0 A1", "A", True, 6, None),  # and what came later does not join
        ("A0 B1 A2", "A", True, 7, 0),  # but what came earlier does
        ("-0 A1", "A", False, 2, 1),
        ("-0 A1", "A", True, 6, None),
        ("-0", "A", True, 2, None),
        ("-0 -1", EXCLUSIVE, False, 2, 0),
        ("-0", EXCLUSIVE, True, 2, None),
    ],
)
def test_who_is_next(waiting: str, live: str, running: bool, now: float, expected: int | None) -> None:
    queue = queue_of(waiting)
    chosen = next_request(queue, live, 0.0, running, 5.0, now)
    assert chosen is (None if expected is None else queue[expected])


def test_a_selection_that_has_just_come_has_its_time() -> None:
    queue = queue_of("C0 B1 B2")
    assert next_request(queue, "B", 20.0, True, 5.0, 24.0) is queue[1]
    assert next_request(queue, "B", 20.0, True, 5.0, 26.0) is None
    assert next_request(queue, "B", 20.0, False, 5.0, 26.0) is queue[0]


@pytest.mark.parametrize("patience", [0.0, 3.0, 10.0])
def test_under_a_steady_crowd_nobody_starves_and_switches_are_bounded(patience: float) -> None:
    """A machine with two seats, three selections, and more requests than it can ever answer; one unit each."""
    names = "ABC"
    waiting: list[RequestState] = []
    running: list[float] = []
    live, since, switches, waits = "A", 0.0, 0, []
    steps, came = 400, 0
    for step in range(steps):
        now = step * 0.5
        running = [end for end in running if end > now]
        for _ in range(2 if step < 40 else 1 if step % 2 else 2):
            waiting.append(queued(now, names[came * 7 % 5 % 3]))
            came += 1
        while (
            len(running) < 2 and (state := next_request(waiting, live, since, bool(running), patience, now)) is not None
        ):
            waiting.remove(state)
            waits.append((state.arrived, now - state.arrived))
            if state.selection_key != live:
                live, since, switches = state.selection_key, now, switches + 1
            running.append(now + 1)
    assert switches <= steps * 0.5 / max(patience, 0.5) + 1
    # The oldest that still waits is never older than the backlog: it is served by age, not by selection.
    oldest = min(state.arrived for state in waiting)
    last = max(arrived for arrived, _ in waits)
    assert last - oldest <= 3 * (patience + 1) + 3
