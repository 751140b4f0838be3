"""A model's own answers, several at a time, against each alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ifprune_mlx import load
from ifprune_mlx.chat_template import plain_text, without_template
from ifprune_mlx.data.dataset import Record, read_records
from ifprune_mlx.data.own_answers import own_answers, write_own_answers
from ifprune_mlx.data.tokenize import encode
from ifprune_mlx.errors import DataError

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


SETTINGS: dict[str, Any] = {"max_length": 96, "batch_size": 2}


def written(path: Path, checkpoint: Path, records: list[Record], **more: Any) -> list[Record]:
    model, tokenizer = load(checkpoint)
    return write_own_answers(path, model.module, tokenizer, records, **{**SETTINGS, **more})


def many() -> list[Record]:
    """More than two blocks, and one that leaves no room."""
    return [record("word " * 200 if index == 3 else f"question {index} " * (1 + index % 3)) for index in range(11)]


def test_a_stopped_call_goes_on_and_gives_the_same_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    whole, pieces = tmp_path / "whole.jsonl", tmp_path / "pieces.jsonl"
    steps: list[tuple[int, int]] = []
    chats = written(whole, tiny_checkpoint, many(), progress=lambda done, total: steps.append((done, total)))
    assert steps == [(done, 11) for done in range(12)]
    assert [chat.instruction for chat in chats] == [r.instruction for r in many() if "word" not in r.instruction]
    assert [chat.messages for chat in read_records(whole, "d")] == [chat.messages for chat in chats]

    def stop_at(most: int) -> Any:
        def progress(done: int, total: int) -> None:
            if done == most:
                raise KeyboardInterrupt

        return progress

    for most in (2, 6, 9, 10):
        with pytest.raises(KeyboardInterrupt):
            written(pieces, tiny_checkpoint, many(), progress=stop_at(most))
        assert not pieces.exists()
        with (tmp_path / "pieces.jsonl.partial").open("ab") as partial:
            partial.write(b'{"messages": [{"ro')  # as a kill in a write leaves it
    steps.clear()
    assert written(pieces, tiny_checkpoint, many(), progress=lambda *at: steps.append(at)) == chats
    assert steps[0] == (8, 11)
    assert pieces.read_bytes() == whole.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pieces.jsonl", "whole.jsonl"]


def test_a_finished_file_is_taken_as_it_is_and_more_prompts_are_added(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file, steps = tmp_path / "x.jsonl", list[int]()
    first = written(file, tiny_checkpoint, many()[:8])
    assert written(file, tiny_checkpoint, many()[:8], progress=lambda done, total: steps.append(done)) == first
    assert steps == [8]
    assert written(file, tiny_checkpoint, many(), progress=lambda done, total: steps.append(done))[:7] == first
    assert steps[1] == 8


@pytest.mark.parametrize("other", [{"seed": 1}, {"temperature": 0.1}, {"max_length": 98}, {"source": "another"}])
def test_answers_of_other_settings_are_not_taken_over(
    tiny_checkpoint: Path, tmp_path: Path, other: dict[str, Any]
) -> None:
    file, steps = tmp_path / "x.jsonl", list[int]()
    written(file, tiny_checkpoint, many()[:4])
    written(file, tiny_checkpoint, many()[:4], **other, progress=lambda done, total: steps.append(done))
    assert steps[0] == 0


def test_a_folder_in_the_way_is_said(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="folder"):
        written(tmp_path, tiny_checkpoint, many()[:1])
    with pytest.raises(DataError, match="cannot be written"):
        written(tmp_path / "none" / "x.jsonl", tiny_checkpoint, many()[:1])


def test_without_a_template_an_answer_continues_its_prompt(tiny_checkpoint: Path) -> None:
    """Training reads the very text that the model read and wrote."""
    model, tokenizer = load(tiny_checkpoint)
    plain = without_template(tokenizer)
    # Few of the random model's answers begin with a space, and the others are left out.
    records = [record(f"{index}.") for index in range(96)]
    chats = list(own_answers(model.module, plain, records, max_length=16, batch_size=96, temperature=2.0))
    assert 0 < len(chats) < len(records)
    for chat in chats:
        assert chat.text is None
        assert chat.messages[1]["content"][:1].isspace()
        assert plain_text(plain, chat.messages) == chat.messages[0]["content"] + chat.messages[1]["content"]


def test_the_start_of_a_plain_text_is_answered(tiny_checkpoint: Path) -> None:
    model, tokenizer = load(tiny_checkpoint)
    text = Record((), "t", "once upon a time " * 20)
    (chat,) = own_answers(model.module, tokenizer, [text], max_length=260, batch_size=1)
    assert (chat.text, chat.domain) == (None, "t")
    assert text.text is not None
    assert 180 < len(chat.instruction) <= 200
    assert text.text.startswith(chat.instruction)
