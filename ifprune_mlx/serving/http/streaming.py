"""One answer on its way to one client: whole or as server-sent events, given up when the client goes away.

How an API words it is a `Writer`'s affair.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from starlette.requests import Request as HTTPRequest
from starlette.types import Receive, Scope, Send

from ifprune_mlx.serving.engine.request import Request, RequestOutput
from ifprune_mlx.serving.http.error_responses import JsonResponse, log_failure, refusal
from ifprune_mlx.serving.http.fields import Fields, RequestError, decode_json
from ifprune_mlx.serving.http.service import Service


class Writer(Protocol):
    """Words an answer as an API wants it."""

    def start(self) -> Iterator[bytes]:
        """The events before the first piece."""
        ...

    def take(self, index: int, piece: RequestOutput) -> Iterator[bytes]:
        """Take in a piece of the answer of a job; the events that it makes."""
        ...

    def end(self) -> Iterator[bytes]:
        """The events after the last piece."""
        ...

    def error(self, error: RequestError) -> bytes:
        """The event of a failure on the way."""
        ...

    def whole(self) -> dict[str, Any]:
        """All of the answer, for a client that did not ask for events."""
        ...


class AnswerResponse:
    """The response that computes `jobs` and sends what `writer` makes of them; an ASGI application.

    What cannot be answered at all is raised before anything is sent.
    """

    def __init__(self, service: Service, jobs: Sequence[Request], writer: Writer, stream: bool) -> None:
        self._service, self._jobs, self._writer, self._stream = service, jobs, writer, stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response; the jobs end when the client goes away."""
        # One task from first to last: wherever it waits when it is cancelled, the engine's generators are closed.
        work = asyncio.ensure_future(self._answer(scope, receive, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            else:
                scope.setdefault("state", {})["note"] = "the client went away"
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._service.run(self._jobs)) as pieces:
            if not self._stream:
                async for index, piece in pieces:
                    self._note(scope, piece)
                    for _ in self._writer.take(index, piece):
                        pass
                await JsonResponse(self._writer.whole())(scope, receive, send)
                return
            index, piece = await anext(pieces)
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            try:
                for event in self._writer.start():
                    await _send(send, event)
                while True:
                    self._note(scope, piece)
                    for event in self._writer.take(index, piece):
                        await _send(send, event)
                    try:
                        index, piece = await anext(pieces)
                    except StopAsyncIteration:
                        break
                for event in self._writer.end():
                    await _send(send, event)
            except Exception as exc:
                error = refusal(exc)
                if error.status >= 500:
                    log_failure("an answer failed", exc)
                await _send(send, self._writer.error(error))
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _note(self, scope: Scope, piece: RequestOutput) -> None:
        stats = piece.stats
        if stats is not None:
            what = "dense" if stats.selection is None else f"{stats.selector} {stats.density:.2f} {stats.selection[:6]}"
            scope.setdefault("state", {})["note"] = (
                f"{what}, {stats.prompt_tokens}+{stats.completion_tokens} tokens, {stats.tokens_per_s:.1f}/s"
            )


async def read_fields(request: HTTPRequest) -> Fields:
    """The JSON object in a request's body.

    Raises:
        RequestError: if it is none.
    """
    return decode_json(await request.body())


def event(data: bytes, name: str | None = None) -> bytes:
    """One server-sent event."""
    return (b"" if name is None else b"event: " + name.encode() + b"\n") + b"data: " + data + b"\n\n"


async def _send(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
