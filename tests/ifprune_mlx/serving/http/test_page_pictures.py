"""Pictures of the chat page with the real model, for the docs and to be looked at: light, dark and narrow."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.ifprune_mlx.serving.http.browsing import ask, expect, served_page

PICTURE = os.environ.get("IFPRUNE_PAGE_PICTURE")  # the file for the light one; the others stand beside it
QUESTIONS = (
    "Write a Python function that reverses a string. Put it in a Markdown code block.",
    "How do I take care of a houseplant?",
    "What is the capital of Denmark?",
)


@pytest.mark.real
@pytest.mark.skipif(PICTURE is None, reason="IFPRUNE_PAGE_PICTURE names no file for pictures of the page")
def test_pictures(tab: Any, smollm2: Path, tmp_path: Path) -> None:
    file, named = Path(str(PICTURE)), tmp_path / "SmolLM2-135M-Instruct"
    named.symlink_to(smollm2)
    with served_page(named, tmp_path, "--max-tokens", "90", "--policy", "turn") as url:
        tab.set_default_timeout(300_000)
        tab.goto(url)
        for count, text in enumerate(QUESTIONS, 1):
            tab.locator("#beside").set_checked(count == len(QUESTIONS))
            ask(tab, text, end=False)
            expect(tab.locator("#stop")).to_be_disabled(timeout=300_000)
            if count == 2:
                tab.screenshot(path=str(file))
                tab.emulate_media(color_scheme="dark")
                tab.screenshot(path=str(file.with_stem(f"{file.stem}-dark")))
                tab.emulate_media(color_scheme="light")
        expect(tab.locator("#figures")).to_contain_text("3 answers")
        tab.screenshot(path=str(file.with_stem(f"{file.stem}-beside")))
        tab.set_viewport_size({"width": 390, "height": 800})
        tab.screenshot(path=str(file.with_stem(f"{file.stem}-narrow")))
        tab.click("#show-chats")
        tab.screenshot(path=str(file.with_stem(f"{file.stem}-chats")))
        tab.set_viewport_size({"width": 1000, "height": 760})
        tab.click("#settings summary")
        tab.screenshot(path=str(file.with_stem(f"{file.stem}-settings")))
