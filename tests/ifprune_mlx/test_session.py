"""What is kept of a conversation's history, and what is read again."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from ifprune_mlx import (
    load,
)
from ifprune_mlx.prompt_cache import DENSE
from tests.ifprune_mlx.conversing import Tiny, hash_of, say, session
from tests.tiny import write_checkpoint


def test_turns_reuse_what_was_read_before(tiny: Tiny) -> None:
    chat = session(tiny)
    stats = [say(chat, text) for text in ("One", "Two", "Three")]
    assert stats[0].reused_tokens == 0
    for before, after in pairwise(stats):
        # All that was read and said before: the answer's tokens are those of its text.
        assert after.reused_tokens == before.prompt_tokens + before.completion_tokens
    assert {span.computed_by for span in chat.history.spans} == {hash_of(tiny, "One")}


@pytest.mark.parametrize("policy", ["first", "turn"])
def test_answers_equal_those_of_a_conversation_read_anew(tiny: Tiny, tmp_path: Path, policy: str) -> None:
    chat = session(tiny, policy=policy)
    for text in ("One", "Two"):
        say(chat, text)
    chat.save(tmp_path / "chat.json")
    anew = session(tiny, policy=policy)
    anew.load(tmp_path / "chat.json")
    assert chat.ask("Three", max_tokens=12) == anew.ask("Three", max_tokens=12)


def test_a_switch_reads_the_history_again_or_keeps_it(tiny: Tiny) -> None:
    again, keep = session(tiny, policy="turn"), session(tiny, policy="turn", on_switch="keep")
    for text in ("One", "Two"):
        stats = say(again, text)
    assert stats.reused_tokens == 0
    assert [span.computed_by for span in again.history.spans] == [hash_of(tiny, "Two")]
    for text in ("One", "Two"):
        stats = say(keep, text)
    assert stats.reused_tokens > 0
    assert [span.computed_by for span in keep.history.spans] == [hash_of(tiny, "One"), hash_of(tiny, "Two")]


@pytest.mark.parametrize("on_switch", ["reprefill", "keep"])
@pytest.mark.parametrize("policy", ["first", "turn", "auto"])
def test_the_activation_selector_keeps_its_dense_prefill(tiny: Tiny, policy: str, on_switch: str) -> None:
    chat = session(tiny, policy=policy, selector="activation", on_switch=on_switch)
    first = say(chat, "One")
    assert [span.computed_by for span in chat.history.spans] == [DENSE, first.selection]
    second = say(chat, "Two words more")
    computed_by = [span.computed_by for span in chat.history.spans]
    assert second.reused_tokens == second.prompt_tokens - 1 or policy == "first"
    if policy == "first":
        assert second.selection == first.selection
        assert computed_by == [DENSE, first.selection]
    elif on_switch == "reprefill":
        assert computed_by == [DENSE, second.selection]
    else:
        assert computed_by == [DENSE, first.selection, DENSE, second.selection]


def test_the_system_prompt_comes_first_and_selects_nothing(tiny: Tiny) -> None:
    chat = session(tiny, system_prompt="Be brief.")
    assert say(chat, "One").selection == hash_of(tiny, "One")
    assert tiny[1].decode(chat.history.tokens).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]


def test_a_bounded_cache_stays_bounded(tmp_path: Path) -> None:
    chat = session(load(write_checkpoint(tmp_path / "checkpoint", "qwen2")), policy="turn", max_kv_size=32)
    for text in ("One", "Two", "Three"):
        say(chat, text)
        assert [cache.max_size for cache in chat.history.kv] == [32, 32]
    chat.reset()
    assert [cache.max_size for cache in chat.history.kv] == [32, 32]
