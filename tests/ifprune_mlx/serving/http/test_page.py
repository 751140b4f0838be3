"""The chat page of `ifprune serve --ui`, in a real browser against the real server.

Skips where Chromium or playwright (the Python package; its own browsers are not needed) is missing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cli.process import start
from tests.ifprune_mlx.serving.http.serving import eventually
from tests.tiny import write_checkpoint

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

PICTURE = os.environ.get("IFPRUNE_PAGE_PICTURE")  # where to put a screenshot of the page with the real model
KEY = "a key of some length"
# Text that would run, load or break something if it were HTML.
HTML = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script><b>bold</b> &amp;"


@contextmanager
def served(checkpoint: Path, folder: Path, *options: str) -> Iterator[str]:
    """The URL of a server process of its own, which is told to end afterwards."""
    arguments = ["serve", "--model", checkpoint, "--ui", "--port", "0", "--json", "--log-level", "error", *options]
    with start(arguments, folder) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.terminate()
            process.communicate(timeout=60)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("page") / "checkpoint", max_position_embeddings=8192)


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(checkpoint, tmp_path_factory.mktemp("server"), "--max-tokens", "60") as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tools:
        # A BLAS that is preloaded for MLX starts threads in all of Chromium's processes, whose sandbox forbids it.
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        launched = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], env=environment)
        yield launched
        launched.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """A page of its own in the browser, which must have nothing to complain of at the end but what `expected` names."""
    opened = browser.new_page(viewport={"width": 900, "height": 760})
    complaints: list[str] = []
    opened.expected = []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("requestfailed", lambda request: complaints.append(f"{request.url}: {request.failure}"))
    opened.set_default_timeout(60_000)
    yield opened
    opened.close()
    assert [text for text in complaints if not any(re.search(known, text) for known in opened.expected)] == []


def ask(tab: Any, text: str, *, end: bool = True) -> None:
    tab.fill("#message", text)
    tab.press("#message", "Enter")
    if end:
        playwright.expect(tab.locator("#stop")).to_be_disabled()
        playwright.expect(tab.locator("#figures")).to_contain_text("tokens/s")


def colours(tab: Any) -> set[str]:
    """Of the strip's bins."""
    found: list[str] = tab.evaluate(
        """() => {
          const strip = document.getElementById("strip");
          const { data } = strip.getContext("2d").getImageData(0, 0, strip.width, strip.height);
          return [...Array(data.length / 4).keys()].map((at) => data.slice(4 * at, 4 * at + 4).join(" "));
        }"""
    )
    return set(found)


def test_a_chat_with_its_selections(tab: Any, server: str) -> None:
    tab.expected = ["willReadFrequently"]  # of `colours` here
    tab.goto(server)
    playwright.expect(tab.locator("#model")).to_have_text("checkpoint")
    tab.fill("#density", "0.25")
    ask(tab, "Hello there")
    assert tab.locator(".turn.user").inner_text() == "Hello there"
    assert tab.locator(".turn.assistant").inner_text().endswith(" [cut off]")
    assert "density 0.25" in tab.locator("#figures").inner_text()
    assert tab.get_attribute("#strip", "aria-label") == "25 % of 2 layers' neurons are active"
    first = colours(tab)
    assert first == {"11 83 148 255", "233 239 245 255"}  # a neuron a bin: kept or not
    ask(tab, "Something else: 1 + 1 = 2, 2 + 2 = 4.")
    playwright.expect(tab.locator("#figures")).to_contain_text("of it active before")
    assert colours(tab) == first | {"213 94 0 255"}  # came in
    tab.hover("#strip", position={"x": 5, "y": 5})
    assert re.fullmatch(r"layer 0, neurons \d+ to \d+: \d of 1 kept, \d new", tab.locator("#hovered").inner_text())
    assert tab.locator(".turn").count() == 4
    tab.click("#new")
    assert tab.locator(".turn").count() == 0


def test_the_whole_conversation_is_sent(tab: Any, server: str) -> None:
    sent: list[Any] = []
    tab.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    tab.goto(server)
    ask(tab, "one")
    tab.fill("#density", "0.5")
    tab.select_option("#choice", "first")
    ask(tab, "two")
    tab.select_option("#choice", "dense")
    assert tab.locator("#density").is_disabled()
    ask(tab, "three")
    playwright.expect(tab.locator("#figures")).to_contain_text("all neurons")
    assert [body["ifprune"] for body in sent[1:]] == [{"policy": "first", "density": 0.5}, {"dense": True}]
    assert [message["role"] for message in sent[2]["messages"]] == ["user", "assistant", "user", "assistant", "user"]
    assert tab.get_attribute("#strip", "aria-label") == "All neurons are active"


def test_stop_ends_the_answer_here_and_in_the_server(tab: Any, server: str) -> None:
    tab.expected = ["net::ERR_ABORTED"]

    def longer(route: Any) -> None:
        route.continue_(post_data=json.dumps({**route.request.post_data_json, "max_tokens": 6000}))

    def cancelled() -> float:
        with urllib.request.urlopen(f"{server}/metrics", timeout=60) as response:
            return float(re.search(rb"ifprune\w*cancelled\w* ([0-9.]+)", response.read())[1])

    tab.route("**/v1/chat/completions", longer)
    tab.goto(server)
    before = cancelled()
    stops = (lambda: tab.click("#stop"), lambda: tab.keyboard.press("Escape"))
    for stop in stops:
        ask(tab, "Tell me a long story", end=False)
        playwright.expect(tab.locator(".turn.assistant").last).to_have_text(re.compile("....", re.DOTALL))
        assert tab.locator("#send").is_disabled()
        stop()
        playwright.expect(tab.locator(".turn.assistant").last).to_have_text(re.compile(r" \[stopped\]$"))
        assert tab.locator("#send").is_enabled()
        if stop is not stops[-1]:
            tab.click("#new")
    eventually(lambda: cancelled() == before + 2)


def test_html_in_messages_and_answers_is_shown_as_text(tab: Any, server: str) -> None:
    # A tiny random model cannot be made to write this: its answer is put in the place of the server's.
    events = [
        {"choices": [{"index": 0, "delta": {"content": HTML}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    ]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    tab.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=200, content_type="text/event-stream", body=body),
    )
    tab.goto(server)
    tab.fill("#message", HTML)
    tab.press("#message", "Enter")
    playwright.expect(tab.locator(".turn.assistant")).to_have_text(HTML)
    assert tab.locator(".turn.user").inner_text() == HTML
    assert tab.locator(".turn *").count() == 0
    assert tab.title() == "checkpoint"


def test_inline_scripts_are_blocked_by_the_policy(tab: Any, server: str) -> None:
    # Guards the tests above: violations do reach the console.
    tab.expected = ["Content Security Policy"]
    tab.goto(server)
    tab.evaluate("document.body.insertAdjacentHTML('beforeend', '<p style=\"color: red\">')")
    tab.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'document.title = 1'}))")
    playwright.expect(tab.locator("#model")).to_have_text("checkpoint")
    assert tab.title() == "checkpoint"


def test_a_key_is_asked_for_where_the_server_wants_one(tab: Any, checkpoint: Path, tmp_path: Path) -> None:
    tab.expected = ["401"]
    with served(checkpoint, tmp_path, "--api-key", KEY, "--max-tokens", "20") as url:
        tab.goto(url)
        playwright.expect(tab.locator("#key-form")).to_be_visible()
        for key, hidden in (("wrong", False), (KEY, True)):
            tab.fill("#key", key)
            tab.press("#key", "Enter")
            playwright.expect(tab.locator("#key")).to_have_value("" if not hidden else KEY)
            playwright.expect(tab.locator("#key-form")).to_be_visible(visible=not hidden)
        ask(tab, "Hello there")
        assert tab.locator(".turn.error").count() == 0
        assert tab.evaluate("Object.keys(localStorage).length + Object.keys(sessionStorage).length") == 0


def test_an_error_of_the_server_is_shown_and_leaves_the_conversation(tab: Any, server: str) -> None:
    tab.expected = ["400"]
    tab.goto(server)
    tab.fill("#density", "0.25")
    ask(tab, "x" * 9000, end=False)
    playwright.expect(tab.locator(".turn.error")).to_be_visible()
    ask(tab, "Hello there")
    assert tab.locator(".turn.assistant").count() == 1


@pytest.mark.real
@pytest.mark.skipif(PICTURE is None, reason="IFPRUNE_PAGE_PICTURE names no file for a screenshot of the real model")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_screenshot(tab: Any, smollm2: Path, tmp_path: Path, scheme: str) -> None:
    named = tmp_path / "SmolLM2-135M-Instruct"
    named.symlink_to(smollm2)
    with served(named, tmp_path) as url:
        tab.set_default_timeout(300_000)
        tab.emulate_media(color_scheme=scheme)
        tab.goto(url)
        for count, text in enumerate(
            ("Write a Python function that reverses a string.", "How do I take care of a houseplant?"), 1
        ):
            ask(tab, text, end=False)
            playwright.expect(tab.locator(".turn")).to_have_count(2 * count)
            playwright.expect(tab.locator("#stop")).to_be_disabled(timeout=300_000)
        playwright.expect(tab.locator("#figures")).to_contain_text("of it active before")
        file = Path(str(PICTURE))
        tab.screenshot(path=str(file if scheme == "light" else file.with_stem(f"{file.stem}-dark")))
