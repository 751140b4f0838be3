"""A saved conversation goes on where it was, and a damaged file changes nothing."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ifprune_mlx import (
    ChatFileError,
    Selection,
    Session,
    load,
)
from tests.ifprune_mlx.conversing import WIDTHS, Tiny, hash_of, say, session
from tests.ifprune_mlx.reference import random_selection
from tests.tiny import write_checkpoint


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
