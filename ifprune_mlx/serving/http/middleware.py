"""Who may ask, and how much: hosts, origins, the API key, bodies that are too large or too slow, too many at once."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ifprune_mlx.serving.http.error_responses import RETRY_AFTER, error_response
from ifprune_mlx.serving.http.fields import RequestError

BODY_SECONDS = 30.0  # until a body must be there
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True)
class Limits:
    """What holds for every request.

    Attributes:
        api_key: what clients must send; None for no key, which is safe on a loopback address only.
        loopback: whether the server can be reached from its own machine only.
        host: what it was bound to; a name that requests may ask for.
        origins: of web pages that may ask; `*` for all.
        open_paths: paths that need no key.
        max_body: bytes of a request's body.
        requests: the most that are in work at once, waiting ones included.
    """

    api_key: str | None = None
    loopback: bool = True
    host: str = "127.0.0.1"
    origins: tuple[str, ...] = ()
    open_paths: frozenset[str] = frozenset({"/health"})
    max_body: int = 10_000_000
    requests: int = 256


class Guard:
    """Lets through only what `limits` allow; an ASGI application around another."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._limits = app, limits
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or hand it on with a limit on its body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        try:
            headers = _headers(scope)
            self._check(path, headers)
            if self._under_way >= self._limits.requests and path not in self._limits.open_paths:
                raise RequestError(
                    "too many requests at once; try again in a few seconds",
                    status=429,
                    code="too_many_requests",
                    headers={"Retry-After": RETRY_AFTER},
                )
        except RequestError as exc:
            await error_response(path, exc)(scope, receive, send)
            return
        self._under_way += 1
        try:
            await self._app(scope, _Body(receive, headers, self._limits), send)
        finally:
            self._under_way -= 1

    def _check(self, path: str, headers: Mapping[str, str]) -> None:
        limits = self._limits
        if limits.loopback and limits.api_key is None:
            # A web page of anyone may send requests to this machine, and give its own name this address (DNS
            # rebinding): the names that its browser puts into these headers give it away.
            if not self._own(f"//{headers.get('host', '')}"):
                raise RequestError(
                    "the Host header names another host; ask http://127.0.0.1, or start the server with an API key",
                    status=403,
                    code="wrong_host",
                )
            origin = headers.get("origin")
            if (
                origin is not None
                and "*" not in limits.origins
                and origin not in limits.origins
                and not self._own(origin)
            ):
                raise RequestError(
                    "a web page of another origin asks; `ifprune serve --cors ORIGIN` lets it",
                    status=403,
                    code="wrong_origin",
                )
        if limits.api_key is not None and path not in limits.open_paths:
            scheme, _, bearer = headers.get("authorization", "").partition(" ")
            given = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
            if not hmac.compare_digest(given.encode("utf-8"), limits.api_key.encode("utf-8")):
                raise RequestError(
                    "no API key, or a wrong one; send the server's as `Authorization: Bearer KEY`",
                    status=401,
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )

    def _own(self, url: str) -> bool:
        try:
            host = urlsplit(url).hostname
        except ValueError:
            return False
        return host in _LOOPBACK or host == self._limits.host.lower()


class _Body:
    """Receives a request's body, up to a size and a time."""

    def __init__(self, receive: Receive, headers: Mapping[str, str], limits: Limits) -> None:
        self._receive, self._limits = receive, limits
        length = headers.get("content-length", "")
        self._announced = int(length) if length.isascii() and length.isdigit() else 0
        self._bytes = 0
        self._deadline: float | None = None
        self._read = False

    async def __call__(self) -> Message:
        """The next part of the body; afterwards, that the client has gone."""
        if self._read:
            return await self._receive()
        now = asyncio.get_running_loop().time()
        self._deadline = now + BODY_SECONDS if self._deadline is None else self._deadline
        self._check(self._announced)
        try:
            message = await asyncio.wait_for(self._receive(), max(self._deadline - now, 0.01))
        except asyncio.TimeoutError:
            raise RequestError(
                f"the body took longer than {BODY_SECONDS:g} s", status=408, code="body_timeout"
            ) from None
        if message["type"] == "http.request":
            self._bytes += len(message.get("body", b""))
            self._check(self._bytes)
            self._read = not message.get("more_body", False)
        return message

    def _check(self, size: int) -> None:
        if size > self._limits.max_body:
            raise RequestError(
                f"the body is larger than {self._limits.max_body} bytes", status=413, code="body_too_large"
            )


def _headers(scope: Scope) -> dict[str, str]:
    """The headers by lower-case name; keys may be any UTF-8.

    Raises:
        RequestError: if one that decides who asks is there twice, so that none of them is to be believed.
    """
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        key = name.decode("latin-1")
        if key in found and key in ("host", "origin", "authorization", "x-api-key"):
            raise RequestError(f"the header {key} is there twice", code="duplicate_header")
        found[key] = value.decode("utf-8", "replace")
    return found
