"""The conversations that the chat page keeps in the browser: reloaded, searched, exported, deleted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.ifprune_mlx.serving.http.browsing import ask, bodies, expect


def titles(tab: Any) -> list[str]:
    found: list[str] = tab.locator(".open").all_inner_texts()
    return found


def test_a_conversation_is_kept_over_a_reload_and_goes_on(tab: Any, page_server: str) -> None:
    sent = bodies(tab)
    tab.goto(page_server)
    tab.select_option("#choice", "turn")
    tab.fill("#density", "0.5")
    tab.click("#settings summary")
    tab.fill("#system", "Be brief.")
    tab.check("#beside")
    ask(tab, "one")
    ask(tab, "two, about something else")
    expect(tab.locator("#figures")).to_contain_text("2 answers")
    seen = ("#conversation", "#figures", "#sentence")
    before = [tab.locator(part).inner_text() for part in seen]
    label = tab.get_attribute("#strip", "aria-label")
    assert "New neurons" in before[2]
    tab.reload()
    expect(tab.locator(".turn")).to_have_count(2)
    expect(tab.locator("#sentence")).to_have_text(before[2])
    assert [tab.locator(part).inner_text() for part in seen] == before
    assert tab.get_attribute("#strip", "aria-label") == label
    assert (tab.input_value("#choice"), tab.input_value("#density")) == ("turn", "0.5")
    assert tab.input_value("#system") == "Be brief."
    tab.uncheck("#beside")
    ask(tab, "three")
    expect(tab.locator("#figures")).to_contain_text("3 answers")
    assert [message["role"] for message in sent[-1]["messages"]] == ["system", *["user", "assistant"] * 2, "user"]


def test_a_conversation_whose_answer_was_under_way_is_kept_too(tab: Any, page_server: str) -> None:
    tab.expected += ["net::ERR_ABORTED"]
    tab.goto(page_server)
    tab.click("#settings summary")
    tab.fill("#max-tokens", "6000")
    ask(tab, "a long one", end=False)
    expect(tab.locator(".answer .content").last).not_to_be_empty()
    tab.reload()
    expect(tab.locator(".question")).to_have_text("a long one")
    assert tab.locator(".answer .content").inner_text() != ""
    assert tab.locator("#send").is_enabled()


def test_conversations_are_found_exported_and_deleted(tab: Any, page_server: str, tmp_path: Path) -> None:
    tab.goto(page_server)
    for text in ("about Cats\nand dogs", "about tea", "about <b>rain</b>"):
        tab.click("#new")
        expect(tab.locator(".turn")).to_have_count(0)
        ask(tab, text)
    assert titles(tab) == ["about <b>rain</b>", "about tea", "about Cats and dogs"]
    assert tab.locator(".open[aria-current]").inner_text() == "about <b>rain</b>"
    tab.fill("#search", "DOGS")
    assert titles(tab) == ["about Cats and dogs"]
    tab.click(".open")
    expect(tab.locator(".question")).to_have_text("about Cats\nand dogs")
    with tab.expect_download() as download:
        tab.click("#export")
    assert download.value.suggested_filename == "about-Cats-and-dogs.md"
    download.value.save_as(tmp_path / "chat.md")
    exported = (tmp_path / "chat.md").read_text()
    assert "## Question\n\nabout Cats\nand dogs\n\n## Answer\n\n" in exported
    tab.once("dialog", lambda dialog: dialog.dismiss())
    tab.click(".remove")
    assert titles(tab) == ["about Cats and dogs"]
    tab.once("dialog", lambda dialog: dialog.accept())
    tab.click(".remove")
    expect(tab.locator(".turn")).to_have_count(0)
    tab.fill("#search", "")
    assert titles(tab) == ["about <b>rain</b>", "about tea"]
    tab.reload()
    expect(tab.locator(".open")).to_have_count(2)
    tab.go_back()  # to the conversation before
    expect(tab.locator(".open")).to_have_count(2)


def test_two_tabs_keep_each_its_own_conversation(tab: Any, page_server: str) -> None:
    other = tab.context.new_page()
    for page in (tab, other):
        page.goto(page_server)
    ask(tab, "in one tab")
    ask(other, "in the other")
    for page in (tab, other):
        expect(page.locator(".open")).to_have_count(2)
        assert page.locator(".turn").count() == 1


def test_a_damaged_or_full_store_is_no_end(tab: Any, page_server: str) -> None:
    tab.goto(page_server)
    expect(tab.locator(".hint")).to_be_visible()  # a reload would break off what the page begins with
    tab.evaluate("localStorage.setItem('ifprune.chat.x', '{'); localStorage.setItem('ifprune.chat.y', '[]')")
    tab.goto(f"{page_server}/#x")
    tab.reload()
    expect(tab.locator(".hint")).to_be_visible()
    tab.evaluate(
        "for (let at = 0; at < 15; at += 1) try { localStorage.setItem(at, 'x'.repeat(1 << (22 - at))); } catch {}"
    )
    ask(tab, "Hello there")
    expect(tab.locator(".error").first).to_contain_text("no room for the conversation")
    assert tab.locator(".answer .figures").inner_text() != ""
