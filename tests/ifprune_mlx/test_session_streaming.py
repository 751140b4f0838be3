"""Answers that fail, are cancelled or are no longer listened to leave a conversation in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ifprune_mlx import (
    PromptError,
)
from tests.ifprune_mlx.conversing import WIDTHS, Tiny, say, session
from tests.ifprune_mlx.generating import Broken, asked, assert_in_step, failing, letters
from tests.ifprune_mlx.reference import random_selection


@pytest.mark.parametrize(
    ("text", "reason"), [("", "is empty"), (" \n\t", "is empty"), ("x" * 600, "context holds 512")]
)
def test_a_message_that_cannot_be_answered_changes_nothing(tiny: Tiny, text: str, reason: str) -> None:
    chat = session(tiny)
    say(chat, "One")
    before = (list(chat.messages), chat.selection, list(chat.history.tokens))
    with pytest.raises(PromptError, match=reason):
        chat.ask(text)
    assert (chat.messages, chat.selection, chat.history.tokens) == before
    assert say(chat, "Two").reused_tokens > 0


@pytest.mark.parametrize("after", [0, 3])
def test_an_error_in_the_middle_of_an_answer_changes_no_message(tiny: Tiny, after: int) -> None:
    processors: list[Callable[..., Any]] = [letters]
    chat = session(tiny, logits_processors=processors)
    say(chat, "One")
    before = (list(chat.messages), chat.selection)
    processors.append(failing(after))
    with pytest.raises(Broken):
        chat.ask("Two", max_tokens=9)
    assert (chat.messages, chat.selection) == before
    assert_in_step(chat.history)
    processors.pop()
    said = chat.ask("Two", max_tokens=9)
    fresh = session(tiny)
    say(fresh, "One")
    assert said == fresh.ask("Two", max_tokens=9)


def test_a_cancelled_answer_keeps_what_was_said(tiny: Tiny) -> None:
    chat = session(tiny)
    said = ""
    for response in chat.stream("One", max_tokens=50):
        said += response.text
        if response.generation_tokens == 3:
            chat.cancel()
    assert response.finish_reason == "cancelled"
    assert len(said) == 4  # the token in work at the time is still said
    assert chat.messages == [{"role": "user", "content": "One"}, {"role": "assistant", "content": said}]
    assert chat.stats is not None
    assert chat.stats.completion_tokens == 4
    read = len(chat.history.tokens)
    assert say(chat, "Two").reused_tokens == read


def test_an_answer_that_nobody_listens_to_any_more_is_kept_so_far(tiny: Tiny) -> None:
    chat = session(tiny)
    for response in chat.stream("One", max_tokens=50):
        if response.generation_tokens == 2:
            break
    assert [len(message["content"]) for message in chat.messages] == [3, 2]
    assert chat.selection is not None
    assert say(chat, "Two").reused_tokens > 0


@pytest.mark.parametrize(
    ("selector", "times"), [("random", 0), ("random", 1), ("random", 3), ("activation", 0), ("activation", 1)]
)
def test_cancelling_before_the_first_token_changes_nothing(tiny: Tiny, selector: str, times: int) -> None:
    tiny[0].switch(random_selection(WIDTHS, (24, 24), seed=5))  # what an earlier conversation left live
    chat = session(tiny, selector=selector, prefill_step_size=4)
    cancel = asked(times)

    def progress(done: int, total: int) -> None:
        if cancel():
            chat.cancel()

    (response,) = chat.stream("One and a half", progress=progress, max_tokens=4)
    assert (response.finish_reason, response.text) == ("cancelled", "")
    assert (chat.messages, chat.selection) == ([], None)
    assert_in_step(chat.history)
    said = chat.ask("Two", max_tokens=4)
    assert said == session(tiny, selector=selector).ask("Two", max_tokens=4)
