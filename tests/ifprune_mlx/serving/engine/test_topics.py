"""Policy `auto` follows a conversation's topics, at the cost of one selector a message, whoever else asks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ifprune_mlx import Selection
from ifprune_mlx.selection.selectors import Instruction, Selected
from ifprune_mlx.serving.engine.decoder import BatchDecoder
from ifprune_mlx.serving.engine.engine import Engine
from ifprune_mlx.serving.engine.request import Request, SelectionParams, from_rank, to_rank
from ifprune_mlx.serving.engine.topics import Topics
from ifprune_mlx.serving.http.chat_rendering import ChatRenderer, Conversation
from tests.ifprune_mlx.serving.engine.engines import A, Tiny, ask, make_request, outputs_of, serving, stats_of

WIDTHS, KEEP = (128, 128), (64, 64)


def neurons_from(first: int) -> Selection:
    return Selection((np.arange(first, first + 64, dtype=np.int32),) * 2, WIDTHS, "static")


# One agrees with the next, but the first not with the third.
OWN = {"one": neurons_from(0), "two": neurons_from(12), "three": neurons_from(24), "four": neurons_from(60)}
FOLLOWED = ["one", "one", "three", "four"]  # whose selection each message has


class _ByText:
    """A selector that knows these texts, and how often it was asked."""

    def __init__(self) -> None:
        self.name, self.asked = "static", list[str]()

    def select(self, instruction: Instruction, keep: Sequence[int]) -> Selected:
        self.asked.append(instruction.text)
        return Selected(OWN[instruction.text])


@pytest.fixture
def selector(monkeypatch: pytest.MonkeyPatch) -> _ByText:
    selector = _ByText()
    monkeypatch.setattr("ifprune_mlx.serving.engine.active_selection.make_selector", lambda *given: selector)
    return selector


def conversation(count: int, **changes: Any) -> Request:
    """After so many messages of the user."""
    texts = tuple(OWN)[:count]
    params = SelectionParams(selector="static", density=0.5, policy="auto")
    return replace(make_request(selection_params=params, **changes), instruction=texts[-1], earlier=texts[:-1])


def test_what_is_kept_counts_and_not_what_a_message_before_chose() -> None:
    topics, texts, found = Topics(WIDTHS), tuple(OWN), list[Selection]()
    for count, text in enumerate(texts):
        found.append(topics.follow("static", KEEP, texts[: count + 1], found[-1] if found else None, OWN[text]))
    assert [one.hash for one in found] == [OWN[text].hash for text in FOLLOWED]
    for count in range(1, 5):
        known, selection = topics.come_to("static", KEEP, (*texts[:count], "else"))
        assert (known, selection and selection.hash) == (count, found[count - 1].hash)
    for other in (("learned", KEEP, texts), ("static", (64, 65), texts), ("static", KEEP, ("on", "etwo"))):
        assert topics.come_to(*other) == (0, None)


def test_a_message_costs_one_selector_whoever_else_asks(tiny: Tiny, selector: _ByText) -> None:
    with serving(tiny) as engine:
        for count, text in enumerate(FOLLOWED, 1):
            ask(engine, make_request(selection=A))  # another client's
            assert ask(engine, conversation(count))[1].selection == OWN[text].hash
        assert selector.asked == list(OWN)
        ask(engine, conversation(4))  # asked again
        assert selector.asked == list(OWN)
    with serving(tiny) as engine:  # it was not there when the conversation began
        assert ask(engine, conversation(4))[1].selection == OWN["four"].hash
    assert selector.asked == list(OWN) * 2


def test_others_go_on_while_a_long_conversation_selects(
    tiny: Tiny, selector: _ByText, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of the decoder lies between any two runs of the selector."""
    step = BatchDecoder.step

    def counted(self: BatchDecoder) -> Any:
        selector.asked.append("step")
        return step(self)

    monkeypatch.setattr(BatchDecoder, "step", counted)

    async def both(engine: Engine) -> None:
        running = engine.stream(make_request(selection=A, max_tokens=400))
        await anext(running)
        assert stats_of(await outputs_of(engine, conversation(4))).selection == OWN["four"].hash
        await running.aclose()

    with serving(tiny, patience=0) as engine:
        asyncio.run(asyncio.wait_for(both(engine), 60))
    said = selector.asked
    assert [text for text in said if text != "step"] == list(OWN)
    assert all(said[said.index(text) - 1] == "step" for text in OWN)


def test_ranks_hear_of_the_messages_before() -> None:
    told = json.loads(json.dumps(to_rank(conversation(3))))
    assert (from_rank(told).earlier, from_rank(told).instruction) == (("one", "two"), "three")


def test_what_a_request_says_of_its_conversation(tiny: Tiny) -> None:
    said = [("user", "one"), ("assistant", "ok"), ("user", " "), ("assistant", "?"), ("user", "three")]
    messages = [{"role": role, "content": content} for role, content in said]
    renderer = ChatRenderer(*tiny)
    for policy, instruction, earlier in (("first", "one", ()), ("turn", "three", ()), ("auto", "three", ("one",))):
        [prompt] = renderer.conversation(Conversation(messages), policy)
        assert (prompt.instruction, prompt.earlier) == (instruction, earlier)
