"""Conversations: which selection each turn uses, what is kept of the history, and what errors leave behind."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ifprune_mlx import (
    BudgetError,
    ChatFileError,
    IfpruneError,
    Model,
    PromptError,
    Selection,
    SelectionError,
    Session,
    load,
    make_selector,
)
from ifprune_mlx.prompt_cache import DENSE
from ifprune_mlx.selection.selectors import Instruction
from tests.ifprune_mlx.generating import Broken, asked, assert_in_step, failing, letters
from tests.ifprune_mlx.reference import random_selection
from tests.tiny import write_checkpoint

Tiny = tuple[Model, Any]
WIDTHS = (128, 128)


def session(tiny: Tiny, **options: Any) -> Session:
    """A conversation in letters, so that its tokens are those of its text; each text has a selection of its own."""
    defaults = {"selector": "random", "density": 0.25, "logits_processors": [letters]}
    return Session(*tiny, **(defaults | options))


def say(chat: Session, text: str, max_tokens: int = 4) -> Any:
    """Ask, and return the figures."""
    chat.ask(text, max_tokens=max_tokens)
    assert chat.stats is not None
    assert_in_step(chat.history)
    return chat.stats


def hash_of(tiny: Tiny, text: str, density: float = 0.25, seed: int = 0) -> str:
    """What the random selector chooses for a text."""
    chosen = make_selector(tiny[0], "random", seed=seed).select(Instruction(text, ()), tiny[0].keep(density))
    return chosen.selection.hash


# Policies.


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


# History.


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


# Changing one's mind.


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


# What goes wrong.


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


# Saving and loading.


def test_a_saved_conversation_goes_on_where_it_was(tiny: Tiny, tmp_path: Path) -> None:
    chat = session(tiny, system_prompt="Sei kurz: ä, 東京.")
    say(chat, "One 😀")
    say(chat, "Two")
    chat.save(tmp_path / "chat.json")
    other = session(tiny)
    say(other, "Something else")
    other.load(tmp_path / "chat.json")
    assert (other.messages, other.system_prompt, other.policy) == (chat.messages, chat.system_prompt, "first")
    assert other.selection is not None
    assert chat.selection is not None
    assert other.selection.hash == chat.selection.hash
    assert (other.selection.selector, other.history.tokens) == ("random", [])
    assert other.ask("Three", max_tokens=8) == chat.ask("Three", max_tokens=8)
    other.set_budget(density=0.5)  # selects by the first message, which was saved with the chat
    assert say(other, "Four").selection == hash_of(tiny, "One 😀", 0.5)


@pytest.mark.parametrize(("state", "said"), [("empty", False), ("dense", True), ("task", True), ("task", False)])
def test_every_kind_of_conversation_can_be_saved(tiny: Tiny, tmp_path: Path, state: str, said: bool) -> None:
    selection = random_selection(WIDTHS, (40, 40), seed=7, selector="static")
    chat = session(tiny, dense=state == "dense", selection=selection if state == "task" else None)
    if said:
        say(chat, "One")
    chat.save(tmp_path / "chat.json")
    other = session(tiny, policy="turn")
    other.load(tmp_path / "chat.json")
    assert (other.dense, other.policy, other.messages) == (chat.dense, chat.policy, chat.messages)
    if state == "task":
        other.reset()
    expected = {"empty": hash_of(tiny, "Two"), "dense": None, "task": selection.hash}
    assert say(other, "Two").selection == expected[state]


def test_saving_into_a_folder_that_is_not_there_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ChatFileError, match="cannot be written"):
        session(tiny).save(tmp_path / "missing" / "chat.json")


def changed(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state | changes


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {name: value for name, value in state.items() if name != key}


def with_selection(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state | {"selection": state["selection"] | changes}


def tampered_mask(state: dict[str, Any]) -> dict[str, Any]:
    masks = list(state["selection"]["masks"])
    bits = bytearray(base64.b64decode(masks[1]))
    bits[0] ^= 0b1000
    masks[1] = base64.b64encode(bits).decode()
    return state | {"selection": state["selection"] | {"masks": masks}}


EMPTY_MASK = base64.b64encode(bytes(16)).decode()
FULL_MASK = base64.b64encode(b"\xff" * 16).decode()
DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another format": changed(format=2),
    "format missing": without("format"),
    "another checkpoint": changed(checkpoint="0" * 16),
    "checkpoint missing": without("checkpoint"),
    "messages missing": without("messages"),
    "messages no list": changed(messages=3),
    "messages of text": changed(messages=["Hello"]),
    "a message without a role": changed(messages=[{"content": "Hello"}]),
    "an unknown role": changed(messages=[{"role": "root", "content": "Hello"}]),
    "policy missing": without("policy"),
    "an unknown policy": changed(policy="sometimes"),
    "a policy of another type": changed(policy=["first"]),
    "dense missing": without("dense"),
    "system prompt missing": without("system_prompt"),
    "a system prompt of another type": changed(system_prompt=3),
    "instruction missing": without("instruction"),
    "selection missing": without("selection"),
    "a selection of another type": changed(selection="all of them"),
    "a task without its selection": changed(policy="task", selection=None),
    "a tampered mask": tampered_mask,
    "a mask that is no base64": with_selection(masks=["???", "???"]),
    "a mask of another type": with_selection(masks=[1, 2]),
    "a mask too short": with_selection(masks=[base64.b64encode(b"\xff").decode(), FULL_MASK]),
    "an empty mask": with_selection(masks=[EMPTY_MASK, FULL_MASK]),
    "a mask missing": with_selection(masks=[FULL_MASK]),
    "masks missing": with_selection(masks=None),
    "another hash": with_selection(hash="0" * 16),
    "another width": with_selection(widths=[128, 120]),
    "a huge width": with_selection(widths=[128, 10**15]),
    "an absurd width": with_selection(widths=[128, 10**30]),
    "a negative width": with_selection(widths=[128, -128]),
    "a width of text": with_selection(widths=["wide", "wider"]),
    "a list": lambda state: [state],
    "nothing": lambda state: None,
}


@pytest.fixture
def saved(tiny: Tiny, tmp_path: Path) -> Path:
    chat = session(tiny)
    say(chat, "Saved")
    chat.save(tmp_path / "chat.json")
    return tmp_path / "chat.json"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_and_the_conversation_goes_on(tiny: Tiny, saved: Path, damage: str) -> None:
    saved.write_text(json.dumps(DAMAGES[damage](json.loads(saved.read_text()))))
    assert_refused(tiny, saved)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"not JSON", b'{"format": 1', b"\xff\xfe\x00", b"[" * 100_000, b"NaN", b"\x80"],
    ids=["empty", "a brace", "text", "cut", "not UTF-8", "deep", "NaN", "a byte"],
)
def test_a_file_that_is_no_json_is_refused_and_the_conversation_goes_on(
    tiny: Tiny, saved: Path, content: bytes
) -> None:
    saved.write_bytes(content)
    assert_refused(tiny, saved)


def test_a_missing_file_or_a_folder_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    assert_refused(tiny, tmp_path / "missing.json")
    assert_refused(tiny, tmp_path)


def assert_refused(tiny: Tiny, path: Path) -> None:
    chat = session(tiny, system_prompt="Be brief.")
    say(chat, "One")
    before = json.dumps(state_of(chat))
    with pytest.raises(ChatFileError) as caught:
        chat.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert json.dumps(state_of(chat)) == before
    assert say(chat, "Two").reused_tokens > 0


def state_of(chat: Session) -> list[Any]:
    selection: Selection | None = chat.selection
    return [
        chat.messages,
        chat.system_prompt,
        chat.policy,
        chat.dense,
        selection and selection.hash,
        chat.history.tokens,
    ]


def test_a_chat_of_another_checkpoint_is_refused(tiny: Tiny, saved: Path, tmp_path: Path) -> None:
    other = session(load(write_checkpoint(tmp_path / "other", rope_theta=500.0)))
    with pytest.raises(ChatFileError, match="another model"):
        other.load(saved)


def test_masks_give_back_any_selection(tiny: Tiny, tmp_path: Path) -> None:
    chat = session(tiny)
    for seed in range(20):
        keep = np.random.default_rng(seed).integers(1, 129, size=2).tolist()
        given = random_selection(WIDTHS, keep, seed=seed)
        chat.use(given)
        chat.save(tmp_path / "chat.json")
        chat.reset()
        chat.load(tmp_path / "chat.json")
        assert chat.selection is not None
        assert chat.selection.hash == given.hash
    assert mx.get_active_memory() > 0
