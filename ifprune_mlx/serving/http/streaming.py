"""Sends answers to one client, whole or as server-sent events, and cancels them when the client goes away.

An `AnswerFormat` writes them in the form of one API.
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

from ifprune_mlx.serving.engine.request import PromptProgress, Request, RequestOutput, RequestStats, TokenLogprob
from ifprune_mlx.serving.http.errors import RequestError, log_failure, to_request_error
from ifprune_mlx.serving.http.service import Service
from ifprune_mlx.serving.http.tools import ToolCall, ToolSplitter
from ifprune_mlx.thinking import Reasoning, ThinkingSplitter

Part = str | Reasoning | ToolCall


@dataclass
class AnswerSoFar:
    """What has been computed of one answer."""

    index: int  # among the answers to one HTTP request
    thoughts: ThinkingSplitter | None  # None if none can come
    splitter: ToolSplitter | None  # None if no tool may be called
    parts: list[Part] = field(default_factory=list)  # in order
    tokens: list[TokenLogprob] = field(default_factory=list)  # empty unless the request wants log-probabilities
    stats: RequestStats | None = None  # set when the answer is complete

    def add(self, output: RequestOutput) -> list[Part]:
        """Add an output; returns the parts that are final now."""
        ended, texts = output.stats is not None, [output.text] if output.text else []
        parts: list[Part] = []
        for part in texts if self.thoughts is None else _fed(self.thoughts, texts, ended):
            # A call that is drafted in thoughts is none.
            parts += [part] if self.splitter is None or isinstance(part, Reasoning) else self.splitter.feed(part)
        if self.splitter is not None and output.stats is not None:
            stats = output.stats
            cut = stats.finish_reason == "length" or self.splitter.cut_by(stats.matched_stop)
            parts += self.splitter.finish(cut=cut)
        self.parts += parts
        self.tokens += output.tokens
        self.stats = output.stats
        return parts

    @property
    def complete(self) -> RequestStats:
        """The stats of a complete answer."""
        assert self.stats is not None
        return self.stats

    @property
    def text(self) -> str:
        """All of the text."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def reasoning(self) -> str:
        """All of the thoughts."""
        return "".join(part.text for part in self.parts if isinstance(part, Reasoning))

    @property
    def calls(self) -> list[ToolCall]:
        """All of the calls."""
        return [part for part in self.parts if isinstance(part, ToolCall)]


class AnswerFormat(ABC):
    """Writes the answers to one HTTP request in the form of one API."""

    def start(self) -> Iterator[bytes]:
        """The events before the first output."""
        return iter(())

    def waiting(self, progress: PromptProgress) -> bytes:
        """What is sent before the first token, so that clients and proxies wait: comments, which clients skip."""
        stage = "queued" if progress.read is None else f"reading {progress.read}/{progress.total}"
        selected = "" if progress.selection is None else f": selection {progress.selection.hash}\n\n"
        return f"{selected}: {stage}\n\n".encode()

    @abstractmethod
    def events(self, answer: AnswerSoFar, parts: Sequence[Part], output: RequestOutput) -> Iterator[bytes]:
        """The events of one more output, which consists of `parts`."""

    @abstractmethod
    def end(self, answers: Sequence[AnswerSoFar]) -> Iterator[bytes]:
        """The events after the last output."""

    @abstractmethod
    def error(self, error: RequestError) -> bytes:
        """The event of a failure after the headers; clients raise it."""

    @abstractmethod
    def whole(self, answers: Sequence[AnswerSoFar]) -> BaseModel:
        """All answers, for a client that does not stream."""


@dataclass(eq=False)
class StreamingAnswer(Response):
    """The response that computes `requests` and sends their answers, as events if `stream` is set.

    A stream begins as soon as all requests are accepted. An error before that, or of an answer that is not streamed, is
    raised, so that it gets an HTTP status.
    """

    service: Service
    requests: Sequence[Request]
    format: AnswerFormat
    stream: bool
    splitters: Sequence[ToolSplitter | None] = ()
    background = None  # FastAPI asks every response for it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response; the requests end when the client goes away."""
        # One task does everything, so that cancelling it always closes the engine's generators.
        work = asyncio.ensure_future(self._answer(scope, receive, send))
        # The body has been read: the next message says that the client has gone.
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
        answers = [
            AnswerSoFar(index, None if request.thinking is None else ThinkingSplitter(request.thinking), splitter)
            for index, (request, splitter) in enumerate(zip(self.requests, splitters, strict=True))
        ]
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        started = False

        async def send_events(events: Iterable[bytes]) -> None:
            for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})

        try:
            async with aclosing(self.service.run(self.requests)) as outputs:
                async for index, output in outputs:
                    if self.stream and not started:
                        started = True
                        await send({"type": "http.response.start", "status": 200, "headers": headers})
                        await send_events(self.format.start())
                    if isinstance(output, PromptProgress):
                        await send_events([self.format.waiting(output)] if self.stream else [])
                        continue
                    parts = answers[index].add(output)
                    if output.stats is not None:
                        scope["state"]["outcome"] = _summary(output.stats)
                    if self.stream:
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


def _fed(splitter: ThinkingSplitter, texts: Iterable[str], ended: bool) -> Iterator[str | Reasoning]:
    for text in texts:
        yield from splitter.feed(text)
    if ended:
        yield from splitter.finish()


def _summary(stats: RequestStats) -> str:
    """An answer's line in the log."""
    how = "dense" if stats.selection is None else f"{stats.selector} {stats.density:.2f} {stats.selection[:6]}"
    return f"{how}, {stats.prompt_tokens}+{stats.completion_tokens} tokens, {stats.tokens_per_s:.1f}/s"


def sse(data: bytes, name: str | None = None) -> bytes:
    """One server-sent event."""
    return (b"" if name is None else b"event: " + name.encode() + b"\n") + b"data: " + data + b"\n\n"
