"""Drives the chat page of `ifprune serve --ui` in a real browser, against the real server.

Needs Chromium and playwright (the Python package; its own browsers are not needed); tests are skipped without them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cli.process import start

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
expect.set_options(timeout=60_000)


@contextmanager
def served_page(checkpoint: Path, folder: Path, *options: str) -> Iterator[str]:
    """The URL of a server process of its own, which is told to end afterwards."""
    arguments = ["serve", "--model", checkpoint, "--ui", "--port", "0", "--json", "--log-level", "error", *options]
    with start(arguments, folder) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.terminate()
            process.communicate(timeout=60)


def ask(tab: Any, text: str, *, end: bool = True) -> None:
    """Write a message and send it; wait for the end of the answer if `end`."""
    tab.fill("#message", text)
    tab.press("#message", "Enter")
    if end:
        expect(tab.locator("#stop")).to_be_disabled()
        expect(tab.locator("#figures")).to_contain_text("tokens/s")


def answer_with(tab: Any, *texts: str) -> None:
    """Put an answer in the place of the server's, for what a tiny model cannot be made to write."""
    events: list[Any] = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in texts]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    tab.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=200, content_type="text/event-stream", body=body),
    )


def bodies(tab: Any) -> list[dict[str, Any]]:
    """The bodies of the requests for answers, as they come."""
    sent: list[dict[str, Any]] = []
    tab.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    return sent


def colours(tab: Any) -> set[str]:
    """Of the strip's pixels."""
    tab.expected.append("willReadFrequently")  # of this
    found: list[str] = tab.evaluate(
        """() => {
          const strip = document.getElementById("strip");
          const { data } = strip.getContext("2d").getImageData(0, 0, strip.width, strip.height);
          return [...Array(data.length / 4).keys()].map((at) => data.slice(4 * at, 4 * at + 4).join(" "));
        }"""
    )
    return set(found)
