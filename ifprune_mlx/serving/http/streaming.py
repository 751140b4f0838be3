"""One answer on its way to one client: whole or as server-sent events, given up when the client goes away.

How an API says it is an `AnswerFormat`'s task.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ifprune_mlx.serving.engine.request import Request, RequestOutput, RequestStats, TokenLogprob
from ifprune_mlx.serving.http.errors import RequestError, log_failure, to_request_error
from ifprune_mlx.serving.http.service import Service
from ifprune_mlx.serving.http.tools import ToolCall, ToolSplitter


@dataclass
class AnswerSoFar:
    """What has been computed of one answer.

    Attributes:
        index: its place among the answers to one request.
        splitter: tells calls from text; None where no tool may be called.
        parts: text and calls, in order.
        tokens: with log-probabilities, if the request asks for them.
        stats: once the answer is complete.
    """

    index: int
    splitter: ToolSplitter | None
    parts: list[str | ToolCall] = field(default_factory=list)
    tokens: list[TokenLogprob] = field(default_factory=list)
    stats: RequestStats | None = None

    def add(self, output: RequestOutput) -> list[str | ToolCall]:
        """Take in a stretch of the answer; returns the text and the calls that are certain by it."""
        if self.splitter is None:
            parts: list[str | ToolCall] = [output.text] if output.text else []
        else:
            parts = list(self.splitter.feed(output.text))
            if output.stats is not None:
                parts += self.splitter.finish()
        self.parts += parts
        self.tokens += output.tokens
        self.stats = output.stats
        return parts

    @property
    def complete(self) -> RequestStats:
        """The figures of an answer that is complete."""
        assert self.stats is not None
        return self.stats

    @property
    def text(self) -> str:
        """All of the text."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def calls(self) -> list[ToolCall]:
        """All of the calls."""
        return [part for part in self.parts if isinstance(part, ToolCall)]


class AnswerFormat(ABC):
    """The answers to one request as an API says them."""

    def start(self) -> Iterator[bytes]:
        """The events before the first output."""
        return iter(())

    @abstractmethod
    def events(self, answer: AnswerSoFar, parts: Sequence[str | ToolCall], output: RequestOutput) -> Iterator[bytes]:
        """The events of one more output of an answer, which has the text and calls `parts`."""

    @abstractmethod
    def end(self, answers: Sequence[AnswerSoFar]) -> Iterator[bytes]:
        """The events after the last output."""

    @abstractmethod
    def error(self, error: RequestError) -> bytes:
        """The event of a failure on the way; clients raise it."""

    @abstractmethod
    def whole(self, answers: Sequence[AnswerSoFar]) -> BaseModel:
        """All of the answers, for a client that did not ask for events."""


@dataclass(eq=False)
class StreamingAnswer(Response):
    """The response that computes `requests` and sends their answers in a format, as events if `stream` says so.

    What cannot be answered at all is raised before anything is sent.
    """

    service: Service
    requests: Sequence[Request]
    format: AnswerFormat
    stream: bool
    splitters: Sequence[ToolSplitter | None] = ()
    background = None  # FastAPI asks every response for it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response; the requests end when the client goes away."""
        # One task from first to last: wherever it waits when it is cancelled, the engine's generators are closed.
        work = asyncio.ensure_future(self._answer(scope, receive, send))
        # The body has been read, so that what is received next is that the client has gone.
        gone = asyncio.ensure_future(receive())
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            else:
                scope["state"]["outcome"] = "the client went away"
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        splitters = self.splitters or [None] * len(self.requests)
        answers = [AnswerSoFar(index, splitter) for index, splitter in enumerate(splitters)]
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        started = False

        async def send_events(events: Iterable[bytes]) -> None:
            for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})

        try:
            async with aclosing(self.service.run(self.requests)) as outputs:
                async for index, output in outputs:
                    parts = answers[index].add(output)
                    if output.stats is not None:
                        scope["state"]["outcome"] = _summary(output.stats)
                    if self.stream:
                        if not started:
                            started = True
                            await send({"type": "http.response.start", "status": 200, "headers": headers})
                            await send_events(self.format.start())
                        await send_events(self.format.events(answers[index], parts, output))
            if not self.stream:
                whole = self.format.whole(answers).model_dump_json(exclude_unset=True)
                await Response(whole, media_type="application/json")(scope, receive, send)
                return
            await send_events(self.format.end(answers))
        except Exception as exc:
            if not started:
                raise
            error = to_request_error(exc)
            if error.status >= 500:
                log_failure("an answer failed", exc)
            await send_events([self.format.error(error)])
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _summary(stats: RequestStats) -> str:
    """For the log."""
    how = "dense" if stats.selection is None else f"{stats.selector} {stats.density:.2f} {stats.selection[:6]}"
    return f"{how}, {stats.prompt_tokens}+{stats.completion_tokens} tokens, {stats.tokens_per_s:.1f}/s"


def sse(data: bytes, name: str | None = None) -> bytes:
    """One server-sent event."""
    return (b"" if name is None else b"event: " + name.encode() + b"\n") + b"data: " + data + b"\n\n"
