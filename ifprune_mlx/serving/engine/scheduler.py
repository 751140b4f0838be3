"""Which waiting job is next: few switches, and nobody starves. Pure; knows neither threads nor the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

ALONE = "alone"
"""Owner of a job that shares its batch with no other, whatever it selects."""


class Waiting(Protocol):
    """What is known of a job in the queue.

    Attributes:
        arrived: when, in seconds of some clock.
        owner: hash of its selection, `dense`, or ALONE; None before it has selected.
    """

    arrived: float
    owner: str | None


Queued = TypeVar("Queued", bound=Waiting)


def next_job(
    waiting: Sequence[Queued], live: str | None, since: float, running: bool, patience: float, now: float
) -> Queued | None:
    """The job to start now; None if it has to wait until those that run have ended, or until one has selected.

    Jobs of the live selection go first, in order, and join a running batch. A job of another selection that has waited
    for more than `patience` seconds of the live one's time ends that: what arrived after it does not join, and when the
    batch has run dry, its selection is next. So every selection is live for up to `patience` seconds, or as long as it
    has jobs, and the one whose job has waited longest follows.

    Args:
        waiting: in order of arrival.
        live: owner of what is active.
        since: when that became so.
        running: whether jobs of it are being computed.
    """
    known = [job for job in waiting if job.owner is not None]
    for job in known:
        mine = job.owner == live and live != ALONE
        overdue = not mine and now - max(job.arrived, since) > patience
        if overdue:
            return None if running else job
        if mine:
            return job
    return None if running or not known else known[0]
