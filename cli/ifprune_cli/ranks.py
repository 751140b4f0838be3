"""Where `mlx.launch` has started a command as several ranks: they join, and rank 0 alone reads, writes and talks."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from .console import note

if TYPE_CHECKING:
    from ifprune_mlx.parallel.ranks import Ranks

Given = TypeVar("Given")


def follows() -> bool:
    """Whether this process is a rank other than 0."""
    return os.environ.get("MLX_RANK", "0") != "0"


def mute() -> None:
    """Have nothing of this process seen, and Ctrl-C left to rank 0."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):  # stdin stays open: mlx.launch writes it to every rank
        os.dup2(null, stream)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@cache
def join() -> Ranks | None:
    """The ranks of this run; None for a process alone.

    Raises:
        IfpruneError: if they do not find each other.
    """
    if "MLX_RANK" not in os.environ:  # of every backend of mlx.launch that is of use here
        return None
    from ifprune_mlx.parallel.ranks import join as join_ranks

    ranks = join_ranks(_end)
    if ranks is None:
        return None
    if ranks.leads:
        _hide_backend()
    else:
        mute()
    return ranks


def leads() -> bool:
    """Whether this process may write files and talk: rank 0, or a process alone."""
    ranks = join()
    return ranks is None or ranks.leads


def size() -> int:
    """How many ranks share a model; 1 for a process alone, and for commands that do not join."""
    ranks = join() if join.cache_info().currsize else None
    return 1 if ranks is None else ranks.size


def together() -> AbstractContextManager[None]:
    """As `Ranks.together`; nothing for a process alone."""
    ranks = join()
    return nullcontext() if ranks is None else ranks.together()


def once(work: Callable[[], Given]) -> Given:
    """What `work` gives, which must be JSON, on rank 0 alone, for every rank."""
    ranks = join()
    return work() if ranks is None else ranks.once(work)


def leave(exc: BaseException | None) -> None:
    """Tell the other ranks, if this process has joined them, that it ends: after an error, or else when all is done."""
    ranks = join() if join.cache_info().currsize else None
    if ranks is not None and exc is None:
        ranks.leave()
    elif ranks is not None and exc is not None:
        ranks.failed(exc)


def _end(line: str) -> None:
    note(f"ifprune: error: {line}")
    os._exit(1)


def _hide_backend() -> None:
    """Python's stderr stays; what MLX's backend writes of a lost peer, a line for each try, is not seen."""
    sys.stderr.flush()
    seen = os.dup(2)
    sys.stderr = os.fdopen(seen, "w", buffering=1, encoding=sys.stderr.encoding, errors=sys.stderr.errors)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
