"""Which selection each turn of a conversation uses, and how one changes one's mind."""

from __future__ import annotations

import pytest

from ifprune_mlx import (
    BudgetError,
    IfpruneError,
    SelectionError,
    make_selector,
)
from ifprune_mlx.prompt_cache import DENSE
from ifprune_mlx.selection.selectors import Instruction
from tests.ifprune_mlx.conversing import WIDTHS, Tiny, hash_of, say, session
from tests.ifprune_mlx.reference import random_selection


def test_first_selects_by_the_first_message_and_stays(tiny: Tiny) -> None:
    chat = session(tiny, policy="first")
    assert chat.selection is None
    assert [say(chat, text).selection for text in ("One", "Two", "Three")] == [hash_of(tiny, "One")] * 3
    assert chat.selection is not None
    assert chat.selection.hash == hash_of(tiny, "One")


def test_system_selects_by_the_system_prompt(tiny: Tiny) -> None:
    chats = [session(tiny, policy="system", system_prompt="Be brief.") for _ in range(2)]
    texts = (("One", "Two"), ("Three", "Four"))
    stats = [say(chat, text) for chat, both in zip(chats, texts, strict=True) for text in both]
    assert [entry.selection for entry in stats] == [hash_of(tiny, "Be brief.")] * 4
    chats[0].reset()
    assert say(chats[0], "Five").selection == hash_of(tiny, "Be brief.")
    chats[0].set_budget(0.5)
    assert say(chats[0], "Six").density == 0.5
    plain = session(tiny, policy="system")  # without one it is as `first`
    assert [say(plain, text).selection for text in ("One", "Two")] == [hash_of(tiny, "One")] * 2


def test_turn_selects_by_every_message(tiny: Tiny) -> None:
    chat = session(tiny, policy="turn")
    texts = ("One", "Two", "One")
    assert [say(chat, text).selection for text in texts] == [hash_of(tiny, text) for text in texts]


def test_task_uses_its_selection_whatever_is_said(tiny: Tiny) -> None:
    selection = random_selection(WIDTHS, (40, 40), seed=7, selector="static")
    chat = session(tiny, selection=selection)
    assert chat.policy == "task"
    assert chat.keep == selection.keep
    stats = [say(chat, text) for text in ("One", "Two")]
    assert [entry.selection for entry in stats] == [selection.hash] * 2
    assert stats[0].density == 40 / 128
    chat.reset()
    assert say(chat, "Three").selection == selection.hash
    with pytest.raises(IfpruneError, match="fixed"):
        chat.reselect()
    with pytest.raises(IfpruneError, match="fixed"):
        chat.set_budget(0.5)


def test_auto_switches_only_below_its_threshold(tiny: Tiny) -> None:
    one, two = (make_selector(tiny[0], "random").select(Instruction(t, ()), (32, 32)).selection for t in ("One", "Two"))
    agreement = two.agreement(one)
    assert -1 < agreement < 1
    for threshold, expected in ((agreement, one), (agreement + 1e-6, two), (-1.0, one), (1.1, two)):
        chat = session(tiny, policy="auto", switch_below=threshold)
        assert say(chat, "One").selection == one.hash  # the first message switches in any case
        stats = say(chat, "Two")
        assert stats.selection == expected.hash
        assert stats.overlap == pytest.approx(expected.overlap(one))
        assert (stats.reused_tokens > 0) == (expected is one)


def test_auto_compares_with_the_selection_of_its_own_conversation(tiny: Tiny) -> None:
    chat, other = session(tiny, policy="auto", switch_below=-1.0), session(tiny, policy="auto", switch_below=-1.0)
    say(chat, "One")
    say(other, "Other")  # makes another selection live in the model that both use
    assert say(chat, "Two").selection == hash_of(tiny, "One")
    chat.dense = True
    assert say(chat, "Three").selection is None
    chat.dense = False
    assert say(chat, "Four").selection == hash_of(tiny, "One")


def test_unknown_settings_are_refused(tiny: Tiny) -> None:
    with pytest.raises(IfpruneError, match="unknown policy 'sometimes'; choose one of first, turn, auto, task"):
        session(tiny, policy="sometimes")
    with pytest.raises(IfpruneError, match="policy 'task' needs a fixed selection"):
        session(tiny, policy="task")
    with pytest.raises(IfpruneError, match="unknown selector 'best'"):
        session(tiny, selector="best")
    with pytest.raises(BudgetError):
        session(tiny, density=2)
    with pytest.raises(SelectionError, match="another model"):
        session(tiny, selection=random_selection((64,), (8,), seed=1))


def test_reset_forgets_and_selects_anew(tiny: Tiny) -> None:
    chat = session(tiny)
    say(chat, "One")
    chat.reset()
    assert (chat.messages, chat.selection, chat.stats, chat.history.tokens) == ([], None, None, [])
    stats = say(chat, "Two")
    assert stats.selection == hash_of(tiny, "Two")
    assert stats.reused_tokens == 0


def test_reselect_selects_by_the_next_message_or_by_what_is_given(tiny: Tiny) -> None:
    chat = session(tiny)
    say(chat, "One")
    chat.reselect()
    assert say(chat, "Two").selection == hash_of(tiny, "Two")
    chat.reselect("Something else")
    assert say(chat, "Three").selection == hash_of(tiny, "Something else")
    assert say(chat, "Four").selection == hash_of(tiny, "Something else")
    assert len(chat.messages) == 8


def test_a_new_budget_selects_by_the_instruction_that_selected_before(tiny: Tiny) -> None:
    chat = session(tiny)
    say(chat, "One")
    say(chat, "Two")
    chat.set_budget(density=0.5)
    assert chat.keep == (64, 64)
    stats = say(chat, "Three")
    assert (stats.selection, stats.density) == (hash_of(tiny, "One", 0.5), 0.5)
    with pytest.raises(BudgetError):
        chat.set_budget(density=float("nan"))
    assert chat.keep == (64, 64)
    assert say(chat, "Four").selection == hash_of(tiny, "One", 0.5)


def test_a_new_budget_selects_by_the_next_message_where_every_message_does(tiny: Tiny) -> None:
    for policy in ("turn", "auto"):
        chat = session(tiny, policy=policy, switch_below=-1.0)
        say(chat, "One")
        chat.set_budget(density=0.5)
        assert say(chat, "Two").selection == hash_of(tiny, "Two", 0.5)


def test_a_given_selection_is_used_from_the_next_message_on(tiny: Tiny) -> None:
    chat = session(tiny)
    given = random_selection(WIDTHS, (16, 16), seed=3, selector="static")
    chat.use(given)
    assert say(chat, "One").selection == given.hash
    with pytest.raises(SelectionError):
        chat.use(random_selection((64,), (8,), seed=3))
    assert say(chat, "Two").selection == given.hash


def test_dense_can_be_switched_on_and_off(tiny: Tiny) -> None:
    chat = session(tiny)
    say(chat, "One")
    chat.dense = True
    stats = say(chat, "Two")
    assert (stats.selector, stats.selection, stats.reused_tokens) == (DENSE, None, 0)
    assert [span.computed_by for span in chat.history.spans] == [DENSE]
    assert say(chat, "Three").reused_tokens > 0
    chat.dense = False
    stats = say(chat, "Four")
    assert (stats.selection, stats.reused_tokens) == (hash_of(tiny, "One"), 0)
    assert [span.computed_by for span in chat.history.spans] == [hash_of(tiny, "One")]


def test_a_conversation_may_begin_dense(tiny: Tiny) -> None:
    chat = session(tiny, dense=True)
    assert say(chat, "One").selection is None
    assert chat.selection is None
    chat.dense = False
    assert say(chat, "Two").selection == hash_of(tiny, "Two")
