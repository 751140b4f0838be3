"""Markdown on the chat page: code is coloured and copied, and what is hostile stays text."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.ifprune_mlx.serving.http.browsing import answer_with, ask, expect
from tests.ifprune_mlx.serving.http.scripted import Scripted

# What would run, load, navigate or break something if it were let through.
HOSTILE = """\
<img src=x onerror="document.title='run'"><script>document.title='run'</script><b>bold</b> &amp; <style>*{color:red}

<iframe src="https://example.invalid/"></iframe>

![seen](https://example.invalid/pixel.png) ![](data:image/svg+xml,<svg/onload=alert(1)>)
[script](javascript:document.title='run') [data](data:text/html,<script>1</script>) [own](/v1/models)
[file](file:///etc/passwd) [fine](https://example.invalid/page "innocent") <javascript:alert(1)>

<form action="/x"><input name="key"></form><a id="send" name="message" href="javascript:1">x</a>

| a | b |
|:-:|--:|
| <svg onload=alert(1)> | `<b>` |

```html"><script>document.title='run'</script>
<script>document.title = 'run'</script>
```
"""
TAGS = ("img", "script", "style", "iframe", "svg", "form", "input", "object", "embed", "link", "meta", "math", "b")
# Texts on which parsers of Markdown are known to take very long, or to run out of stack.
SLOW = (
    "_a__b" * 4000,
    "[" * 20_000,
    "> " * 2000 + "a",
    "- " * 2000 + "a",
    "![" * 20_000,
    f"a{' ' * 50_000}b",
    "*a " * 20_000,
)


def assert_inert(tab: Any) -> None:
    """Nothing in the answer runs, loads, or takes a name of the page's own."""
    for tag in TAGS:
        assert tab.locator(f".content {tag}").count() == 0, tag
    assert tab.title() == "checkpoint"
    names = "all => all.flatMap(each => each.getAttributeNames())"
    assert set(tab.eval_on_selector_all(".content *", names)) <= {"class", "href", "title", "target", "rel", "type"}


def test_hostile_markdown_of_a_real_answer_is_inert(tab: Any, scripted_server: Callable[..., Scripted]) -> None:
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    server = scripted_server("thinking", "--ui", "--max-tokens", "3000")
    server.say(HOSTILE)
    tab.goto(server.served.url)
    ask(tab, HOSTILE)
    assert_inert(tab)
    assert tab.locator(".question").inner_text().strip() == HOSTILE.strip()
    assert tab.locator(".question *").count() == 0
    text = tab.locator(".content").inner_text()
    for shown in ("<script>document.title='run'</script><b>bold</b> & <style>", "image: seen", "<svg onload=alert(1)>"):
        assert shown in text
    links = tab.eval_on_selector_all(
        ".content a", "all => all.map(a => [a.getAttribute('href'), a.title, a.target, a.rel])"
    )
    outside = ["_blank", "noopener noreferrer"]
    led = {link[0]: link for link in links if link[0] is not None}
    assert set(led) == {f"https://example.invalid/{name}" for name in ("", "pixel.png", "page")}
    for address, link in led.items():
        assert link == [address, address, *outside]  # whatever title the answer gave
    assert all(url.startswith(server.served.url) for url in asked)


@pytest.mark.parametrize("language", ["python", "unheard-of"])
def test_a_code_block_of_a_megabyte_is_shown_as_it_is(tab: Any, page_server: str, language: str) -> None:
    code = "x = '<b>' # </code></pre><script>document.title='run'</script>\n" * 16_400
    assert len(code) > 1_000_000
    tab.goto(page_server)
    answer_with(tab, *(f"```{language}\n{code}```\n"[at : at + 50_000] for at in range(0, len(code) + 40, 50_000)))
    began = time.monotonic()
    tab.fill("#message", "code")
    tab.press("#message", "Enter")
    expect(tab.locator("#stop")).to_be_disabled()
    assert tab.evaluate("document.querySelector('pre').textContent") == code
    assert time.monotonic() - began < 30
    assert_inert(tab)


@pytest.mark.parametrize("text", SLOW, ids=range(len(SLOW)))
def test_no_markdown_holds_up_the_page(tab: Any, page_server: str, text: str) -> None:
    tab.goto(page_server)
    answer_with(tab, text)
    tab.fill("#message", "slow")
    began = time.monotonic()
    tab.press("#message", "Enter")
    expect(tab.locator("#stop")).to_be_disabled(timeout=30_000)
    expect(tab.locator(".content > *")).to_have_count(1, timeout=30_000)
    assert time.monotonic() - began < 30


def test_code_is_coloured_and_copied(tab: Any, page_server: str) -> None:
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.goto(page_server)
    answer_with(
        tab, "A **bold** word, `main.py`, and main.py:\n\n```pyth", "on\ndef f():\n    return '<b>'\n", "```\n\nend"
    )
    tab.fill("#message", "code")
    tab.press("#message", "Enter")
    expect(tab.locator("pre")).to_have_text("def f():\n    return '<b>'\n")
    assert tab.locator(".content strong").inner_text() == "bold"
    assert tab.locator(".content a").count() == 0  # a file's name is no link
    assert tab.locator("pre .hljs-keyword").all_inner_texts() == ["def", "return"]
    assert tab.locator(".code-bar span").inner_text() == "python"
    plain, keyword = (
        tab.locator(of).first.evaluate("e => getComputedStyle(e).color") for of in ("pre", "pre .hljs-keyword")
    )
    assert plain != keyword
    tab.click(".code-bar .copy")
    expect(tab.locator(".code-bar .copy")).to_have_text("Copied")
    assert tab.evaluate("navigator.clipboard.readText()") == "def f():\n    return '<b>'\n"


def test_what_is_selected_stays_so_while_the_answer_grows(tab: Any, page_server: str) -> None:
    tab.goto(page_server)
    shown = """async (texts) => {
      const { showMarkdown } = await import("/markdown.js");
      const box = document.createElement("div");
      const kept = [];
      for (const text of texts) { showMarkdown(box, text); kept.push(box.firstChild); }
      return [kept.every((block) => block === kept[0]), [...box.children].map((block) => block.innerText.trim())];
    }"""
    assert tab.evaluate(shown, ["one\n\ntw", "one\n\ntwo\n\n- a", "one\n\ntwo\n\n- a\n- b"]) == [
        True,
        ["one", "two", "a\nb"],
    ]
