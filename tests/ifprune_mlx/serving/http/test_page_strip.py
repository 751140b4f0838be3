"""The strip of the chat page shows a selection as soon as it is made, against the conversation's selection before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.ifprune_mlx.serving.http.browsing import ask, colours, expect
from tests.ifprune_mlx.serving.http.serving import Served, eventually, serving
from tests.ifprune_mlx.serving.http.test_streaming import HELD, HELLO

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def hold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make this file, and the model stands still before every step."""
    return tmp_path_factory.mktemp("strip") / "hold"


@pytest.fixture(scope="module")
def held(hold: Path, page_checkpoint: Path) -> Iterator[Served]:
    """A server whose model can be held."""
    options = ("--ui", "--max-tokens", "5")
    with serving(page_checkpoint, hold.parent, *options, env={"HOLD": str(hold)}, prelude=HELD) as server:
        yield server


@pytest.fixture(autouse=True)
def goes_on(hold: Path) -> Iterator[None]:
    yield
    hold.unlink(missing_ok=True)


def test_the_strip_changes_before_the_first_token(tab: Any, held: Served, hold: Path) -> None:
    tab.goto(held.url)
    tab.select_option("#choice", "turn")
    for count, text in enumerate(("Hello there", "Something else"), 1):
        before = colours(tab)
        hold.touch()
        ask(tab, text, end=False)
        said = "of the neurons in each of 2 layers answer" if count == 1 else "New neurons"
        expect(tab.locator("#sentence")).to_contain_text(said)
        assert colours(tab) != before
        assert tab.locator(".content").last.inner_text() == ""
        expect(tab.locator(".waiting").last).to_contain_text("reading 0/")
        sentence = tab.locator("#sentence").inner_text()
        hold.unlink()
        expect(tab.locator("#figures")).to_contain_text(f"{count} answer")
        assert tab.locator("#sentence").inner_text() == sentence  # the answer's end says no other


@pytest.mark.parametrize("policy", ["turn", "first"])
def test_a_stream_says_its_selection_once_before_the_first_token(held: Served, policy: str) -> None:
    body = {"messages": HELLO, "stream": True, "ifprune": {"policy": policy, "density": 0.5}}
    lines = held.post(CHAT, body).text.split("\n\n")
    [at] = [at for at, line in enumerate(lines) if line.startswith(": selection ")]
    first_token = next(at for at, line in enumerate(lines) if '"finish_reason":null' in line and '"role"' not in line)
    assert at < first_token
    selection = lines[at].removeprefix(": selection ")
    assert f'"selection":"{selection}"' in "".join(lines[first_token:])
    assert held.get(f"/v1/ifprune/selections/{selection}").json()["hash"] == selection


def test_a_dense_stream_has_no_selection_to_say(held: Served) -> None:
    body = {"messages": HELLO, "stream": True, "ifprune": {"dense": True}}
    assert ": selection" not in held.post(CHAT, body).text


def test_what_other_clients_select_is_not_in_the_difference(tab: Any, held: Served) -> None:
    tab.goto(held.url)
    tab.select_option("#choice", "first")  # `auto` keeps what is live, whoever selected it
    ask(tab, "Hello there")
    other = {"messages": HELLO, "max_tokens": 2, "ifprune": {"density": 0.25}}
    httpx.post(held.url + CHAT, json=other, timeout=60)
    ask(tab, "And again")
    expect(tab.locator("#figures")).to_contain_text("2 answers")
    expect(tab.locator("#sentence")).to_contain_text("The same neurons as for the message before.")
    assert tab.locator("#figures").inner_text().endswith("neurons switched 0 times")


def test_the_selection_of_a_conversation_that_was_left_is_not_shown(tab: Any, page_server: str) -> None:
    """It may come after another one was opened."""
    tab.goto(page_server)
    tab.select_option("#choice", "turn")
    for count, text in enumerate(("one", "two, about something else"), 1):
        ask(tab, text)
        expect(tab.locator("#figures")).to_contain_text(f"{count} answer")
    asked: list[Any] = []
    tab.route("**/v1/ifprune/selections/*", lambda route: asked.append(route))  # noqa: PLW0108 (Playwright sets attributes on it)
    tab.reload()
    eventually(lambda: tab.wait_for_timeout(10) is None and bool(asked))
    tab.click("#new")
    with tab.expect_response("**/v1/ifprune/selections/*"):
        asked[0].continue_()
    tab.wait_for_timeout(100)
    assert len(asked) == 1
    assert tab.get_attribute("#strip", "aria-label") == "No selection yet"
    assert colours(tab) == {"0 0 0 0"}
