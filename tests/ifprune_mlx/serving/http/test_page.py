"""The chat page of `ifprune serve --ui`: asking, stopping, settings, and what the server refuses."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.ifprune_mlx.serving.http.browsing import answer_with, ask, bodies, colours, expect, served_page
from tests.ifprune_mlx.serving.http.scripted import Scripted
from tests.ifprune_mlx.serving.http.serving import eventually

KEY = "a key of some length"
BLANK, KEPT, ENTERED, LEFT = "0 0 0 0", "107 163 214 255", "213 94 0 255", "27 37 48 255"


def test_a_chat_with_its_selections(tab: Any, page_server: str) -> None:
    tab.goto(page_server)
    expect(tab.locator("#model")).to_have_text("checkpoint")
    expect(tab.locator(".hint")).to_contain_text("Your first message selects the neurons")
    tab.select_option("#choice", "turn")
    expect(tab.locator(".hint")).to_contain_text("Each message selects the neurons")
    tab.fill("#density", "0.25")
    ask(tab, "Hello there")
    assert tab.locator(".question").inner_text() == "Hello there"
    assert tab.locator(".hint").count() == 0
    assert tab.locator(".ending").inner_text() == "[cut off]"
    figures = tab.locator(".answer .figures").inner_text()
    assert all(part in figures for part in ("60 tokens", "density 0.25", "prefill", "active"))
    assert tab.get_attribute("#strip", "aria-label") == "25 % of 2 layers' neurons are active"
    assert tab.locator("#sentence").inner_text().startswith("25 % of the neurons in each of 2 layers answer")
    assert colours(tab) == {KEPT, BLANK}
    ask(tab, "Something else: 1 + 1 = 2, 2 + 2 = 4.")
    expect(tab.locator("#figures")).to_contain_text("2 answers, 120 tokens")
    expect(tab.locator("#sentence")).to_contain_text(re.compile(r"New neurons: \d+ % of those in use came in, \d+ %"))
    assert colours(tab) == {KEPT, BLANK, ENTERED, LEFT}
    assert tab.locator(".turn").count() == 2
    tab.click("#new")
    expect(tab.locator(".turn")).to_have_count(0)
    assert tab.locator("#figures").inner_text().strip() == ""  # nothing of another conversation
    assert colours(tab) == {BLANK}
    assert tab.get_attribute("#strip", "aria-label") == "No selection yet"


def test_the_first_message_selects_for_all_where_that_is_chosen(tab: Any, page_server: str) -> None:
    sent = bodies(tab)
    tab.goto(page_server)
    tab.select_option("#choice", "first")
    ask(tab, "one")
    ask(tab, "two, which is about something else")
    expect(tab.locator("#figures")).to_contain_text("2 answers, 120 tokens")
    assert [body["ifprune"]["policy"] for body in sent] == ["first", "first"]
    sentence = "The same neurons as for the message before. Your first message selects the neurons that answer."
    expect(tab.locator("#sentence")).to_contain_text(sentence)
    assert tab.locator("#figures").inner_text().endswith("neurons switched 0 times")


@pytest.mark.parametrize(
    ("options", "chosen", "density"),
    [(("--policy", "auto", "--density", "0.5"), "auto", "0.5"), (("--dense",), "dense", "0.5")],
)
def test_the_server_s_options_are_the_page_s_defaults(
    tab: Any, page_checkpoint: Path, tmp_path: Path, options: tuple[str, ...], chosen: str, density: str
) -> None:
    with served_page(page_checkpoint, tmp_path, *options) as url:
        tab.goto(url)
        expect(tab.locator("#choice")).to_have_value(chosen)
        assert tab.locator("#density").is_disabled() == (chosen == "dense")
        if chosen != "dense":
            assert tab.input_value("#density") == density


def test_the_whole_conversation_is_sent(tab: Any, page_server: str) -> None:
    sent = bodies(tab)
    tab.goto(page_server)
    ask(tab, "one")
    tab.fill("#density", "0.5")
    ask(tab, "two")
    expect(tab.locator("#figures")).to_contain_text("2 answers")
    tab.select_option("#choice", "dense")
    assert tab.locator("#density").is_disabled()
    ask(tab, "three")
    expect(tab.locator(".answer .figures").last).to_contain_text("all neurons")
    assert [body["ifprune"] for body in sent[1:]] == [{"policy": "auto", "density": 0.5}, {"dense": True}]
    assert [message["role"] for message in sent[2]["messages"]] == ["user", "assistant", "user", "assistant", "user"]
    assert tab.get_attribute("#strip", "aria-label") == "All neurons are active"


def test_settings_are_sent(tab: Any, page_server: str) -> None:
    sent = bodies(tab)
    tab.goto(page_server)
    tab.click("#settings summary")
    tab.fill("#max-tokens", "0")
    tab.fill("#message", "one")
    tab.press("#message", "Enter")
    assert tab.evaluate("document.activeElement.id") == "max-tokens"  # which is told to be above 0
    assert sent == []
    for name, value in (
        ("system", "Be brief."),
        ("temperature", "0.7"),
        ("max-tokens", "7"),
        ("stop-strings", "END\nUser:"),
    ):
        tab.fill(f"#{name}", value)
    ask(tab, "one")
    [body] = sent
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["max_tokens"], body["stop"]) == (0.7, 7, ["END", "User:"])
    assert "7 tokens" in tab.locator(".answer .figures").inner_text()


def test_dense_stands_beside_sliced(tab: Any, page_server: str) -> None:
    sent = bodies(tab)
    tab.goto(page_server)
    tab.fill("#density", "0.25")
    tab.check("#beside")
    ask(tab, "More")
    sliced, dense = tab.locator(".answer").all()
    assert (sliced.locator("h2").inner_text(), dense.locator("h2").inner_text()) == ("Sliced", "Dense")
    assert "density 0.25" in sliced.locator(".figures").inner_text()
    assert "all neurons" in dense.locator(".figures").inner_text()
    assert sliced.bounding_box()["x"] < dense.bounding_box()["x"]
    assert tab.get_attribute("#strip", "aria-label") == "25 % of 2 layers' neurons are active"
    assert "1 answer, 60 tokens" in tab.locator("#figures").inner_text()
    assert [body.pop("ifprune") for body in sent] == [{"policy": "auto", "density": 0.25}, {"dense": True}]
    assert sent[0] == sent[1]
    ask(tab, "Hello there")  # the sliced answer is the one that goes on
    expect(tab.locator("#figures")).to_contain_text("2 answers")
    kept = tab.evaluate("JSON.parse(Object.values(localStorage)[0]).turns[0]")
    assert kept["answer"]["figures"]["selection"] != kept["beside"]["figures"]["selection"] is None
    assert kept["answer"]["content"] != kept["beside"]["content"]
    assert sent[2]["messages"][1]["content"] == kept["answer"]["content"]


def test_thoughts_are_folded(tab: Any, scripted_server: Callable[..., Scripted]) -> None:
    server = scripted_server("thinking", "--ui")
    server.say("<think>\nI *wonder*.\n</think>\n\nYes.")
    tab.goto(server.served.url)
    ask(tab, "Well?")
    assert tab.locator(".content").inner_text() == "Yes."
    assert not tab.locator(".thoughts div").is_visible()
    tab.click(".thoughts summary")
    assert tab.locator(".thoughts div").inner_text().strip() == "I *wonder*."


def test_it_is_used_by_the_keyboard_alone(tab: Any, page_server: str) -> None:
    def reach(check: str) -> None:
        for _ in range(40):
            if tab.evaluate(f"document.activeElement.matches({check!r})"):
                return
            tab.keyboard.press("Tab")
        raise AssertionError(check)

    tab.goto(page_server)
    expect(tab.locator("#message")).to_be_focused()
    answer_with(tab, "```python\nprint(1)\n```\n")
    tab.keyboard.type("first one")
    tab.keyboard.press("Enter")
    expect(tab.locator("pre")).to_have_text("print(1)\n")
    expect(tab.locator("#message")).to_be_focused()
    tab.unroute("**/v1/chat/completions")
    reach("#choice")
    tab.keyboard.type("each")  # picks the option
    reach("#beside")
    tab.keyboard.press("Space")
    reach("#settings summary")
    tab.keyboard.press("Enter")
    reach("#max-tokens")
    tab.keyboard.type("5")
    reach("#message")
    tab.keyboard.type("second one")
    tab.keyboard.press("Enter")
    expect(tab.locator("#figures")).to_contain_text("5 tokens")
    assert tab.locator(".answers.two").count() == 1
    reach("pre ~ *, .code-bar .copy")
    tab.keyboard.press("Enter")
    expect(tab.locator(".code-bar .copy")).to_have_text(re.compile("Copied|Selected"))
    reach("#new")
    tab.keyboard.press("Enter")
    expect(tab.locator(".turn")).to_have_count(0)
    reach(".open")
    tab.keyboard.press("Enter")
    expect(tab.locator(".question").first).to_have_text("first one")
    reach(".remove")
    tab.once("dialog", lambda dialog: dialog.accept())
    tab.keyboard.press("Enter")
    expect(tab.locator(".open")).to_have_count(0)


def test_stop_ends_the_answer_here_and_in_the_server(tab: Any, page_server: str) -> None:
    tab.expected += ["net::ERR_ABORTED"]

    def cancelled() -> float:
        with urllib.request.urlopen(f"{page_server}/metrics", timeout=60) as response:
            return float(re.search(rb"ifprune\w*cancelled\w* ([0-9.]+)", response.read())[1])

    tab.goto(page_server)
    tab.click("#settings summary")
    tab.fill("#max-tokens", "6000")
    before = cancelled()
    stops = (lambda: tab.click("#stop"), lambda: tab.keyboard.press("Escape"))
    for stop in stops:
        ask(tab, "Tell me a long story", end=False)
        expect(tab.locator(".answer .content").last).to_have_text(re.compile("....", re.DOTALL))
        assert tab.locator("#send").is_disabled()
        stop()
        expect(tab.locator(".ending").last).to_have_text("[stopped]")
        assert tab.locator("#send").is_enabled()
        if stop is not stops[-1]:
            tab.click("#new")
    eventually(lambda: cancelled() == before + 2)


def test_inline_scripts_and_html_are_blocked_by_the_policy(tab: Any, page_server: str) -> None:
    # Guards the other tests: violations do reach the console.
    tab.expected += ["Content Security Policy", "requires 'TrustedHTML'", "requires 'TrustedScript'", "csp$"]
    tab.goto(page_server)
    with pytest.raises(Exception, match="TrustedHTML"):
        tab.evaluate("document.body.insertAdjacentHTML('beforeend', '<p style=\"color: red\">')")
    with pytest.raises(Exception, match="TrustedScript"):
        tab.evaluate(
            "document.body.append(Object.assign(document.createElement('script'), {text: 'document.title=1'}))"
        )
    tab.evaluate("document.body.append(Object.assign(document.createElement('img'), {src: 'http://127.0.0.1:1/'}))")
    expect(tab.locator("#model")).to_have_text("checkpoint")
    assert tab.title() == "checkpoint"


def test_a_key_is_asked_for_where_the_server_wants_one(tab: Any, page_checkpoint: Path, tmp_path: Path) -> None:
    tab.expected += ["401"]
    with served_page(page_checkpoint, tmp_path, "--api-key", KEY, "--max-tokens", "20") as url:
        tab.goto(url)
        expect(tab.locator("#key-form")).to_be_visible()
        for key, hidden in (("wrong", False), (KEY, True)):
            tab.fill("#key", key)
            tab.press("#key", "Enter")
            expect(tab.locator("#key")).to_have_value("" if not hidden else KEY)
            expect(tab.locator("#key-form")).to_be_visible(visible=not hidden)
        ask(tab, "Hello there")
        assert tab.locator(".error").count() == 0
        kept = tab.evaluate("JSON.stringify({...localStorage}) + JSON.stringify({...sessionStorage})")
        assert "Hello there" in kept
        assert KEY not in kept


def test_an_error_of_the_server_is_shown_and_leaves_the_conversation(tab: Any, page_server: str) -> None:
    tab.expected += ["400"]
    sent = bodies(tab)
    tab.goto(page_server)
    tab.fill("#density", "0.25")
    ask(tab, "x" * 9000, end=False)
    expect(tab.locator(".error")).to_be_visible()
    ask(tab, "Hello there")
    assert tab.locator(".answer .figures:not(:empty)").count() == 1
    assert sent[1]["messages"] == [{"role": "user", "content": "Hello there"}]
    assert json.dumps(sent[1]).count("xxx") == 0


def test_nothing_can_be_set_before_the_server_has_said_what_it_offers(tab: Any, page_server: str) -> None:
    held: list[Any] = []

    def hold(route: Any) -> None:
        held.append(route)

    tab.route("**/v1/ifprune/tasks", hold)
    with tab.expect_request("**/v1/ifprune/tasks"):
        tab.goto(page_server)
    for name in ("choice", "density", "beside", "message", "send", "new"):
        assert tab.locator(f"#{name}").is_disabled(), name
    eventually(lambda: tab.wait_for_timeout(10) is None and bool(held))
    held[0].continue_()
    tab.select_option("#choice", "turn")
    ask(tab, "Hello there")
    assert tab.input_value("#choice") == "turn"
    assert tab.locator(".turn").count() == 1
