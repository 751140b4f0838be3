"""Checks requests: host, origin, API key, size and speed of the body, number at once. Counts and logs every request."""

from __future__ import annotations

import asyncio
import hmac
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ifprune_mlx.serving.engine.request import EngineClosedError
from ifprune_mlx.serving.http.errors import (
    RETRY_AFTER,
    RequestError,
    error_response,
    log,
    log_failure,
    to_request_error,
)
from ifprune_mlx.serving.http.metrics import Metrics

BODY_SECONDS = 30.0  # the most time for a body to arrive
# How long the rest of a refused body is read and thrown away, and how long it may pause.
LINGER_SECONDS, LINGER_SILENCE = 10.0, 2.0
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_CLIENT_GONE = 499  # logged as the status if the client left before any answer


@dataclass(frozen=True)
class Limits:
    """The limits for every request."""

    api_key: str | None = None  # clients must send it; None is safe on a loopback address only
    loopback: bool = True  # only this machine can reach the server
    host: str = "127.0.0.1"  # the address that the server was bound to; Host headers may name it
    origins: tuple[str, ...] = ()  # origins of allowed web pages; `*` allows all
    max_body: int = 10_000_000  # bytes
    requests: int = 256  # the most requests at once, waiting ones included


@dataclass
class _Body:
    """Receives a request's body, up to a size and a time. After it, `receive` reports that the client has gone."""

    receive: Receive
    max_bytes: int
    deadline: float
    size: int = 0
    complete: bool = False

    async def __call__(self) -> Message:
        if self.complete:
            return await self.receive()
        try:
            message = await asyncio.wait_for(self.receive(), max(self.deadline - time.monotonic(), 0.01))
        except asyncio.TimeoutError as exc:
            reason = f"the body took longer than {BODY_SECONDS:g} s"
            raise RequestError(reason, status=408, code="body_timeout") from exc
        self.size += len(message.get("body", b""))
        self.complete = not message.get("more_body", False)
        if self.size > self.max_bytes:
            raise _too_large(self.max_bytes)
        return message

    async def drain(self) -> None:
        """Read the rest for a while. Closing a socket with unread bytes resets the connection, and the client may then
        lose an answer that it has not read yet."""
        end = time.monotonic() + LINGER_SECONDS
        while not self.complete and time.monotonic() < end:
            try:
                message = await asyncio.wait_for(self.receive(), LINGER_SILENCE)
            except asyncio.TimeoutError:
                return
            self.complete = not message.get("more_body", False)


class RequestMiddleware:
    """An ASGI application that passes on allowed requests, and turns exceptions into error responses.

    Args:
        paths: paths that are counted by name.
        open_paths: paths that need no key.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, metrics: Metrics, paths: frozenset[str], open_paths: frozenset[str]
    ) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._paths, self._open_paths = paths, open_paths
        self._running: set[int] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        start, status, complete = time.monotonic(), _CLIENT_GONE, False
        scope.setdefault("state", {})  # optional in ASGI; `StreamingAnswer` leaves its outcome there for the log
        body = _Body(receive, self._limits.max_body, start + BODY_SECONDS)

        async def send_message(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body", False):
                complete = True
                if not body.complete:
                    self._running.discard(id(body))  # draining must not take another client's place
                    await send({**message, "more_body": True})
                    await body.drain()
                    message = {"type": "http.response.body", "body": b""}
            await send(message)

        try:
            self._check(scope)
            self._running.add(id(body))
            await self._app(scope, body, send_message)
        except asyncio.CancelledError:  # the server ends, and has waited long enough
            if status == _CLIENT_GONE:
                error = to_request_error(EngineClosedError())
                await error_response(scope["path"], error)(scope, receive, send_message)
            raise
        except Exception as exc:
            error = to_request_error(exc)
            if error.status >= 500:
                log_failure(f"{scope['path'].encode('unicode_escape').decode()} failed", exc)
            if status == _CLIENT_GONE:
                await error_response(scope["path"], error)(scope, receive, send_message)
            elif not complete:
                raise
        finally:
            self._running.discard(id(body))
            seconds = time.monotonic() - start
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).inc(seconds)
            outcome = scope["state"].get("outcome")
            where = scope["raw_path"].decode("ascii", "replace")[:100]
            log.info("%s %s %d %.2f s%s", scope["method"], where, status, seconds, f", {outcome}" if outcome else "")

    def _check(self, scope: Scope) -> None:
        """Raise RequestError if the headers already refuse a request."""
        limits, headers = self._limits, Headers(scope=scope)
        for name in ("origin", "authorization", "x-api-key"):
            if len(headers.getlist(name)) > 1:
                raise RequestError(f"the header {name} is there twice", code="duplicate_header")
        if limits.loopback and limits.api_key is None:
            # Any web page can send requests to this machine, or point its own name at this address (DNS rebinding).
            # The browser's Host and Origin headers reveal that. Starlette's TrustedHostMiddleware answers in plain
            # text, and its older releases do not understand IPv6 hosts.
            if not self._is_own_host(f"//{headers.get('host', '')}"):
                reason = "the Host header names another host; ask http://127.0.0.1, or start the server with an API key"
                raise RequestError(reason, status=403, code="wrong_host")
            origin = headers.get("origin")
            if origin is not None and not ({"*", origin} & {*limits.origins} or self._is_own_host(origin)):
                reason = "a web page of another origin asks; `ifprune serve --cors ORIGIN` lets it"
                raise RequestError(reason, status=403, code="wrong_origin")
        if scope["path"] in self._open_paths:
            return
        if limits.api_key is not None:
            scheme, _, bearer = headers.get("authorization", "").partition(" ")
            key = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
            if not hmac.compare_digest(key.encode("latin-1"), limits.api_key.encode("utf-8")):
                reason = "no API key, or a wrong one; send the server's as `Authorization: Bearer KEY`"
                asks = {"WWW-Authenticate": "Bearer"}
                raise RequestError(reason, status=401, code="invalid_api_key", headers=asks)
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > limits.max_body:
            raise _too_large(limits.max_body)
        if len(self._running) >= limits.requests:
            reason, later = "too many requests at once; try again in a few seconds", {"Retry-After": RETRY_AFTER}
            raise RequestError(reason, status=429, code="too_many_requests", headers=later)

    def _is_own_host(self, url: str) -> bool:
        try:
            host = urlsplit(url).hostname
        except ValueError:
            return False
        return host in _LOOPBACK or host == self._limits.host.lower()


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(f"the body is larger than {max_bytes} bytes", status=413, code="body_too_large")
