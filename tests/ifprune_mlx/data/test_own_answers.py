"""A model's own answers, several at a time, against each alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from ifprune_mlx import load
from ifprune_mlx.data.dataset import Record
from ifprune_mlx.data.own_answers import own_answers
from ifprune_mlx.data.tokenize import encode

QUESTIONS = ["what is two and two", "code question 3", "a longer question about many things of the world", "hi"]


def record(text: str, answer: str = "given") -> Record:
    return Record(({"role": "user", "content": text}, {"role": "assistant", "content": answer}), "d")


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_together_as_alone(tiny_checkpoint: Path, temperature: float) -> None:
    """The order of prompts, the batch and the given answers make no difference; an answer fills what training reads."""
    model, tokenizer = load(tiny_checkpoint)
    records = [record(text) for text in QUESTIONS]

    def answers(given: list[Record], batch_size: int, seed: int = 0) -> dict[str, str]:
        found = own_answers(
            model.module, tokenizer, given, max_length=120, batch_size=batch_size, temperature=temperature, seed=seed
        )
        return {chat.instruction: chat.messages[-1]["content"] for chat in found}

    together = answers(records, 3)
    assert together.keys() == set(QUESTIONS)
    assert together == answers([record(text, "another") for text in reversed(QUESTIONS)], 1)
    assert (together == answers(records, 3, seed=1)) == (temperature == 0)
    for text, answer in together.items():
        example = encode(tokenizer, record(text, answer), 120)
        assert example is not None
        assert answer != "given"


def test_prompts_that_leave_no_room_are_left_out(tiny_checkpoint: Path) -> None:
    model, tokenizer = load(tiny_checkpoint)
    records = [record("word " * 200), record("short")]
    found = list(own_answers(model.module, tokenizer, records, max_length=64, batch_size=2))
    assert [chat.instruction for chat in found] == ["short"]
    assert [message["role"] for message in found[0].messages] == ["user", "assistant"]
