"""Listens on a socket and serves an ASGI application there with uvicorn, until it is told to stop.

Adds to uvicorn what it has no settings for: time limits for clients that send or read slowly, refusals as JSON, and
that a client which is still sending hears them.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from ifprune_mlx.errors import IfpruneError
from ifprune_mlx.serving.http.error_responses import error_body, to_json
from ifprune_mlx.serving.http.fields import RequestError

_MOST_CONNECTIONS = 1000
_MOST_HEADER_BYTES = 65_536
_STOP_SECONDS = 5
HEADER_SECONDS, STALLED_SECONDS, LINGER_SECONDS = 10.0, 60.0, 10.0


def bind(host: str, port: int) -> socket.socket:
    """A socket that has a place to listen, and does not listen yet.

    Args:
        port: 0 takes a free one.

    Raises:
        IfpruneError: if the host is none of this machine's, or the port is taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as exc:
        raise IfpruneError(f"--host {host}: no address of that name ({_reason(exc)})") from None
    family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as exc:
        listener.close()
        raise IfpruneError(
            f"cannot listen on {host} port {port} ({_reason(exc)}); give another --port, or end what uses it"
        ) from None
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether a socket can be reached from this machine only."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def url(listener: socket.socket) -> str:
    """Where a client finds a socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: ASGIApp, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM; answers under way then have a few seconds to end.

    Args:
        ready: called when requests are taken.
    """
    config = uvicorn.Config(
        app,
        http=_Connection,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        log_level="critical",  # `metrics.Watch` writes the log
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_STOP_SECONDS,
        h11_max_incomplete_event_size=_MOST_HEADER_BYTES,
    )
    try:
        asyncio.run(_Server(config, ready).serve(sockets=[listener]))
    except KeyboardInterrupt:
        pass  # uvicorn has ended in order, and gives the signal back afterwards
    finally:
        listener.close()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()


class _Transport:
    """A connection's transport that can end its own side first.

    A socket that is closed while it holds bytes that nobody has read resets the connection, and the reset may take from
    the client the answer that it has not read yet. So where the client may still be sending, the answer ends with the
    end of our side, and what still comes is read and thrown away.

    Args:
        transport: what is wrapped; of what is not here, it answers.
        sending: whether the client may still be sending.
    """

    def __init__(self, transport: asyncio.Transport, sending: Callable[[], bool]) -> None:
        self._transport, self._sending = transport, sending
        self._end: asyncio.TimerHandle | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Whether our side has ended, or is about to."""
        return self._end is not None or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        """Send, if our side has not ended."""
        if self._end is None:
            self._transport.write(data)

    def close(self) -> None:
        """End our side once all is sent; a client that does not take it, or goes on sending, is cut off later."""
        if self.is_closing():
            return
        sending = self._sending()
        seconds = LINGER_SECONDS if sending else STALLED_SECONDS
        self._end = asyncio.get_running_loop().call_later(seconds, self._transport.abort)
        if not sending:
            self._transport.close()
            return
        try:
            self._transport.write_eof()
            self._transport.resume_reading()
        except OSError:  # the client has gone
            self._transport.abort()

    def lost(self) -> None:
        """The connection is no more."""
        if self._end is not None:
            self._end.cancel()


class _Connection(H11Protocol):
    """One connection. A client has `HEADER_SECONDS` for the headers of a request, as many for the rest of a body that
    was refused before it ended, `LINGER_SECONDS` to notice that the server has hung up, and may stop reading an answer
    for `STALLED_SECONDS`."""

    _slow: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_Transport(transport, self._sending))  # type: ignore[arg-type]
        if len(self.connections) > _MOST_CONNECTIONS:
            transport.abort()
            return
        self._start_clock()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._slow is None and self.conn.their_state is h11.IDLE:
            self._start_clock()
        super().data_received(data)
        if self._answering:
            self._stop_clock()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        if self._stalled is not None:
            self._stalled.cancel()
        self.transport.lost()  # type: ignore[attr-defined]
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP."""
        if self._answering:
            if self.cycle.response_started:
                self.transport.abort()
                return
            # A body that breaks off in what is no HTTP: the application hears that the client has gone.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._refuse(b"400 Bad Request", RequestError("this is not an HTTP request", code="invalid_http"))

    def _sending(self) -> bool:
        """Whether the client may be in the middle of a request: of its headers, its body, or of what is not HTTP."""
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR) or bool(self.conn.trailing_data[0])

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_clock(self) -> None:
        self._stop_clock()
        self._slow = self.loop.call_later(HEADER_SECONDS, self._too_slow)

    def _stop_clock(self) -> None:
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None

    def _too_slow(self) -> None:
        if self.transport.is_closing() or self._answering:
            return
        if self.conn.their_state is h11.IDLE:
            reason = f"the headers took longer than {HEADER_SECONDS:g} s"
            self._refuse(b"408 Request Timeout", RequestError(reason, status=408, code="header_timeout"))
        else:
            self.transport.close()

    def _refuse(self, status: bytes, error: RequestError) -> None:
        body = to_json(error_body("", error))
        head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % (
            status,
            len(body),
        )
        self.transport.write(head + body)
        self.transport.close()


def _reason(exc: Exception) -> Any:
    return getattr(exc, "strerror", None) or exc
