"""Bad input to `ifprune chat`."""

from __future__ import annotations

import pytest

from tests.cli.bad_input.table import Bad, Check, Place, Table, cut, own_data, task
from tests.cli.process import Argument

TABLE = Table()
case = TABLE.case


# Named tasks.


@case
def task_in_a_folder_for_chat(at: Place) -> Bad:
    return Bad(["chat", "--model", at.sound, "--task", "a/b"], ("'a/b' cannot name a task", "use letters"))


@case
def task_and_policy(at: Place) -> Bad:
    arguments: list[Argument] = ["chat", "--model", at.sound, "--task", "poetry", "--policy", "turn"]
    return Bad(arguments, ("--task and --policy", "give one of them"))


@case
def corrupt_task_to_chat_on(at: Place) -> Bad:
    file = task(at)
    cut(file, 3)
    words = ("task poetry", str(file), "cut short", "again")
    return Bad(["chat", "--model", at.sound, "--task", "poetry"], words, env=own_data(at))


# Saved chats.


def chat(at: Place, text: str) -> list[Argument]:
    (at / "chat.json").write_text(text)
    return ["chat", "--model", at.sound, "--load", at / "chat.json"]


@case
def corrupt_saved_chat(at: Place) -> Bad:
    return Bad(chat(at, '{"format": 1, "messages": [{"ro'), (str(at / "chat.json"), "not a saved chat", "give a file"))


@case
def saved_chat_of_another_kind(at: Place) -> Bad:
    return Bad(chat(at, '{"messages": []}'), (str(at / "chat.json"), "not a saved chat", "give a file"))


# Models.


@case
def gguf_to_chat_with(at: Place) -> Bad:
    file = at.gguf()
    return Bad(["chat", "--no-convert", "--model", file], (str(file), "is a GGUF file", "ifprune convert --model"))


@case
def private_model_to_chat_with(at: Place) -> Bad:
    words = ("private/model", "no such repository on the hub, or a private one", "hf auth login")
    return Bad(["chat", "--model", "private/model"], words, env=at.online)


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name: str, check: Check) -> None:
    check(name)
