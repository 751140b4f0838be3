"""Listens on a socket and serves an ASGI application with uvicorn, until a signal stops it."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import socket
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from ifprune_mlx.errors import IfpruneError
from ifprune_mlx.serving.http.errors import RequestError, error_body, to_json

_MOST_CONNECTIONS = 1000
_MOST_HEADER_BYTES = 65_536
_STOP_SECONDS = 5.0  # for running answers to end by themselves, and as long again for the others to be told
_LOOK_SECONDS = 0.5
HEADER_SECONDS, STALLED_SECONDS = 10.0, 60.0


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. Port 0 takes a free one.

    Raises:
        IfpruneError: if the host is not an address of this machine, or the port is taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as exc:
        raise IfpruneError(f"--host {host}: no address of that name ({_reason(exc)})") from exc
    family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as exc:
        listener.close()
        raise IfpruneError(
            f"cannot listen on {host} port {port} ({_reason(exc)}); give another --port, or end what uses it"
        ) from exc
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can reach a socket."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def url(listener: socket.socket) -> str:
    """The URL of a socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: ASGIApp, listener: socket.socket, ready: Callable[[], None], stop: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM; running answers then have a few seconds to end.

    Args:
        ready: called once the server accepts requests.
        stop: called in a thread after those seconds; ends all answers with an error that their clients get.
    """
    config = uvicorn.Config(
        app,
        http=_Connection,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        log_level="critical",  # the application writes the log
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_graceful_shutdown=round(2 * _STOP_SECONDS),
        h11_max_incomplete_event_size=_MOST_HEADER_BYTES,
    )
    server = uvicorn.Server(config)

    async def watch() -> None:
        while not server.started:
            await asyncio.sleep(0.01)
        ready()
        while not server.should_exit:
            await asyncio.sleep(0.1)
        await asyncio.sleep(_STOP_SECONDS)
        await asyncio.to_thread(stop)

    async def run() -> None:
        watching = asyncio.ensure_future(watch())
        await server.serve(sockets=[listener])
        watching.cancel()

    gc.collect()
    gc.freeze()  # what is loaded stays: looking through it again and again would stop everything for a moment
    try:
        asyncio.run(run())
    except KeyboardInterrupt:
        pass  # uvicorn has shut down, and raises the signal again afterwards
    finally:
        listener.close()


class _Connection(H11Protocol):
    """uvicorn's connection with limits that uvicorn has no settings for.

    Clients may take `HEADER_SECONDS` for a request's headers or the rest of a refused one, and may stop reading for
    `STALLED_SECONDS`. Input that is not HTTP is refused in JSON, even while the client is still sending. A client that
    closes its side after a request gets its answer.
    """

    _since = 0.0  # since when the server has been waiting for the client
    _look_again: asyncio.TimerHandle | None = None
    _refused = False
    _half_closed = False  # the client sends no more

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since = self.loop.time()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._look_again is not None:
            self._look_again.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._refused:
            super().data_received(data)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection for an answer under way; `shutdown` and `close` of a client look alike."""
        answering = self.cycle is not None and not (self.cycle.response_complete or self.cycle.more_body)
        self._half_closed = answering and not self._refused
        if self._half_closed and not self.cycle.response_started and self.scope["http_version"] == "1.1":
            # Only writing shows which it was: the system of a client that has gone refuses it, and `_look` sees that.
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return self._half_closed

    def on_response_complete(self) -> None:
        self._since = self.loop.time()
        super().on_response_complete()
        if self._half_closed and self.cycle.response_complete:  # and no other request was sent before
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Refuse input that is not HTTP."""
        if self.cycle is not None and not self.cycle.response_complete:
            if self.cycle.response_started:
                self.transport.abort()
                return
            # A body that stops being HTTP: the application is told that the client has gone.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._refuse(b"400 Bad Request", RequestError("this is not an HTTP request", code="invalid_http"))

    def _refuse(self, status: bytes, error: RequestError) -> None:
        """Answer and close our side. Further input is thrown away until the client or `_look` hangs up."""
        self._refused, self._since = True, self.loop.time()
        body = to_json(error_body("", error))
        head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (status, len(body)) + body)
        self.flow.resume_reading()
        try:
            self.transport.write_eof()
        except OSError:  # the client has gone
            self.transport.abort()

    def _look(self) -> None:
        """Hang up on a client that keeps the server waiting, or has gone."""
        if self._half_closed and self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
            return
        now = self.loop.time()
        answering = self.cycle is not None and not (self.cycle.response_complete or self._refused)
        if answering and not self.flow.write_paused:
            self._since = now
        sending = not (answering or self.transport.is_closing())
        if now - self._since > (HEADER_SECONDS if sending else STALLED_SECONDS):
            if self._refused or not sending or self.conn.their_state is not h11.IDLE:
                self.transport.abort()
                return
            reason = f"the headers took longer than {HEADER_SECONDS:g} s"
            self._refuse(b"408 Request Timeout", RequestError(reason, status=408, code="header_timeout"))
        self._look_again = self.loop.call_later(_LOOK_SECONDS, self._look)


def _reason(exc: Exception) -> Any:
    return getattr(exc, "strerror", None) or exc
