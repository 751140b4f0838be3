"""The ranks of one run: processes that `mlx.launch` started, on one machine or several, each with a share of the model.

All ranks run the same program. MLX's collectives carry activations. What one rank alone knows (a line of stdin, a
request, which selection, that an answer ends) goes from rank 0, the leader, to the others over a TCP connection of our
own, as JSON: a rank that waits there sleeps, while MLX's ring keeps a core busy, and a rank that dies is noticed at
once.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from ifprune_mlx.errors import IfpruneError, reason_of

Answer = TypeVar("Answer")
_CONNECT_SECONDS = 30.0
# A rank that fails waits so long for the others to fail in the same way, before it counts as the only one.
_SAME_SECONDS = 3.0
# A process that MLX has left hanging over a lost peer, with Python's lock held, cannot end itself: a watchdog does.
# It waits on a connection of its own, which closes when the other rank's watchdog ends, and that when its rank does.
_WATCHDOG = """
import os, select, signal, sys, time
parent, peers = os.getppid(), {int(fd): rank for fd, rank in (one.split(":") for one in sys.argv[1:])}
ready = select.select([0, *peers], [], [])[0]
for _ in range(20):
    if select.select([0], [], [], 0.1)[0]:
        os._exit(0)
os.write(2, f"ifprune: error: rank {peers[ready[0]]} is gone\\n".encode() if "0" not in peers.values() else b"")
os.kill(parent, signal.SIGKILL)
"""
# A machine that vanishes closes nothing; it is given up after 20 s.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPALIVE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


class Ranks:
    """The other ranks of this run, as one of them sees them. Its methods are for one thread at a time.

    Args:
        group: MLX's group.
        peers: connections by rank: on the leader to all others, on these to the leader.
        end: called with one line in a thread of its own when the run cannot go on; must end this process.

    Attributes:
        rank, size: which one this is, of how many.
        leads: whether it is rank 0, the one that talks.
    """

    def __init__(
        self, group: mx.distributed.Group, peers: dict[int, socket.socket], end: Callable[[str], None]
    ) -> None:
        self.group = group
        self.rank, self.size = group.rank(), group.size()
        self.leads = self.rank == 0
        self._peers, self._end = peers, end
        self._sending = threading.Lock()
        self._shared: SimpleQueue[Any] = SimpleQueue()
        self._settled: dict[int, SimpleQueue[str | None]] = {rank: SimpleQueue() for rank in peers}
        self._failures, self._leaving = 0, False
        for rank, peer in peers.items():
            peer.settimeout(None)
            threading.Thread(target=self._read, args=(rank, peer), daemon=True).start()

    def share(self, value: Answer) -> Answer:
        """The leader's value, on every rank; it must be JSON. The others wait for it."""
        if not self.leads:
            shared: Answer = self._shared.get()
            return shared
        self._send("share", value)
        return value

    def once(self, work: Callable[[], Answer]) -> Answer:
        """What `work` gives, or the IfpruneError that it raises, on the leader alone, for every rank."""
        if not self.leads:
            result, error = self._shared.get()
            if error is not None:
                raise IfpruneError(error)
            given: Answer = result
            return given
        try:
            done = work()
        except IfpruneError as exc:
            self._send("share", (None, str(exc)))
            raise
        self._send("share", (done, None))
        return done

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run the block on every rank; if it raises IfpruneError on any, raise one on all."""
        problem: IfpruneError | None = None
        try:
            yield
        except IfpruneError as exc:
            problem = exc
        told = self._settle(None if problem is None else str(problem))
        if told is not None:
            raise problem or IfpruneError(told)

    def same_tokens(self, sampler: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
        """A sampler that gives the leader's tokens on every rank, whatever these have drawn."""
        return lambda logprobs: mx.distributed.all_sum(sampler(logprobs) * self.leads, group=self.group)

    def failed(self, exc: BaseException) -> None:
        """Tell that this rank has failed and goes on, or ends. The run ends unless all ranks fail there."""
        self._failures += 1
        self._send("failed", (self._failures, reason_of(exc)))

    def leave(self) -> None:
        """End this rank's part of a run that went well. A rank that does not lead ends here, with the leader."""
        self._leaving = True
        self._send("left", None)
        if not self.leads:
            threading.Event().wait()

    def _settle(self, problem: str | None) -> str | None:
        """The first problem of any rank."""
        if not self.leads:
            self._send("settled", problem)
            return self.share(problem)
        found = [problem, *(self._settled[rank].get() for rank in sorted(self._peers))]
        first = next(((rank, text) for rank, text in enumerate(found) if text is not None), None)
        return self.share(None if first is None else f"rank {first[0]}: {first[1]}")

    def _send(self, kind: str, value: object) -> None:
        line = json.dumps([kind, value]).encode() + b"\n"
        with self._sending:
            for peer in self._peers.values():
                with suppress(OSError):  # whoever reads from it sees that the peer has gone
                    peer.sendall(line)

    def _read(self, rank: int, peer: socket.socket) -> None:
        """Take messages until the peer ends, which ends this process too."""
        told = None
        with suppress(OSError):
            for line in peer.makefile("rb"):
                kind, value = json.loads(line)
                if kind == "share":
                    self._shared.put(value)
                elif kind == "settled":
                    self._settled[rank].put(value)
                elif kind == "failed":
                    told = f"rank {rank}: {value[1]}"
                    threading.Thread(target=self._compare, args=(value[0], told), daemon=True).start()
                elif kind == "left" and not self.leads:
                    os._exit(0)
        if self._leaving and self.leads:
            return
        if told is not None:
            time.sleep(_SAME_SECONDS)  # in which this rank ends by itself, if it has failed in the same way
        self._end(told or f"rank {rank} is gone: its process was ended, or its machine or the connection failed")

    def _compare(self, failures: int, told: str) -> None:
        time.sleep(_SAME_SECONDS)
        if self._failures < failures:
            self._end(told)


def join(end: Callable[[str], None]) -> Ranks | None:
    """Join the ranks that `mlx.launch` has started this process as one of; None for a process alone.

    Args:
        end: as in `Ranks`.

    Raises:
        IfpruneError: if they do not find each other.
    """
    try:
        group = mx.distributed.init()
        if group.size() == 1:
            return None
        listener, (host, port, secret) = _meet(group)
        peers, watched = (_connect(listener, host, port, secret, group) for _ in range(2))
        if listener is not None:
            listener.close()
        _watch(watched)
        return Ranks(group, peers, end)
    except (OSError, RuntimeError, ValueError) as exc:
        raise IfpruneError(
            f"rank {os.environ.get('MLX_RANK', '?')} does not reach the others ({reason_of(exc)}); check the hosts "
            "file and the network, and that every machine runs the same command"
        ) from exc


def _meet(group: mx.distributed.Group) -> tuple[socket.socket | None, tuple[str, int, int]]:
    """The leader's listening socket, on the leader, and its address with a number that shows who is of this run."""
    host, leads = _leader_address(), group.rank() == 0
    listener = socket.create_server((host, 0)) if leads else None
    mine = [0, 0] if listener is None else [listener.getsockname()[1], secrets.randbits(30) + 1]
    port, secret = map(int, np.array(mx.distributed.all_sum(mx.array(mine, mx.int32), group=group)))
    return listener, (host, port, secret)


def _connect(
    listener: socket.socket | None, host: str, port: int, secret: int, group: mx.distributed.Group
) -> dict[int, socket.socket]:
    """A connection to the leader; on the leader, those of all others."""
    if listener is None:
        peers = {0: socket.create_connection((host, port), _CONNECT_SECONDS)}
        peers[0].sendall(f"{secret} {group.rank()}\n".encode())
        peers[0].recv(1)  # the leader has taken it, and the next one is another
        return peers
    peers = {}
    listener.settimeout(_CONNECT_SECONDS)
    while len(peers) < group.size() - 1:
        peer = listener.accept()[0]
        peer.settimeout(_CONNECT_SECONDS)
        said = peer.recv(64).split()
        if len(said) == 2 and said[0] == str(secret).encode():
            peers[int(said[1])] = peer
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            peer.close()
    for peer in peers.values():
        peer.sendall(b"+")
    return peers


def _watch(peers: dict[int, socket.socket]) -> None:
    """Start the watchdog of this process over connections to the other ranks'."""
    for peer in peers.values():
        peer.settimeout(None)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    reading, _kept = os.pipe()  # its other end closes with this process
    files = [f"{peer.fileno()}:{rank}" for rank, peer in peers.items()]
    subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _WATCHDOG, *files],
        stdin=reading,
        stdout=subprocess.DEVNULL,
        pass_fds=[peer.fileno() for peer in peers.values()],
        start_new_session=True,
    )
    os.close(reading)
    for peer in peers.values():
        peer.close()


def _leader_address() -> str:
    """Where `mlx.launch` says that rank 0 is reached."""
    if (coordinator := os.environ.get("MLX_JACCL_COORDINATOR")) is not None:
        address = coordinator
    elif (hostfile := os.environ.get("MLX_HOSTFILE")) is not None:
        address = json.loads(Path(hostfile).read_text(encoding="utf-8"))[0][0]
    else:
        raise ValueError("the backend names no address of rank 0: use --backend ring or jaccl")
    return address.rpartition(":")[0].strip("[]")
