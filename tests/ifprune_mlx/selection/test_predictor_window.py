"""What of an instruction the predictor reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ifprune_mlx import PredictorError, SparsityPredictor
from tests.ifprune_mlx.selection.predictor_folders import TEXT, make_head, write_predictor
from tests.ifprune_mlx.selection.predictor_reference import reference_tokens


def without_template(folder: Path) -> Path:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_without_a_chat_template_the_words_alone_are_read(tmp_path: Path) -> None:
    predictor = SparsityPredictor.load(without_template(write_predictor(tmp_path / "predictor")))
    assert predictor.tokens("Hi") == reference_tokens("Hi")[6:8]
    with pytest.raises(PredictorError, match="at least one token"):
        predictor.scores("")


# A long instruction. Around a message the template has 6 tokens before, and 13 after it.

BEFORE, AFTER = len("<user\n"), len(">\n<assistant\n")


@pytest.mark.parametrize("text", ["a" * 700 + "b" * 700, "x" * 1400, "y\n" * 700 + "x", "x\n<|im_start|>" * 400])
@pytest.mark.parametrize(("window", "limit"), [(None, 256), (41, 41), (BEFORE + AFTER + 1, 20), (9999, 512)])
def test_a_long_instruction_keeps_its_head_its_tail_and_all_of_its_template(
    tmp_path: Path, text: str, window: int | None, limit: int
) -> None:
    predictor = SparsityPredictor.load(write_predictor(tmp_path / "predictor"))
    if window is not None:
        predictor.window = window
    whole = predictor.tokenizer.apply_chat_template(messages(text), add_generation_prompt=True)
    assert len(whole) > 1000
    message, room = whole[BEFORE:-AFTER], limit - BEFORE - AFTER
    cut = message[: room // 2] + message[-(room - room // 2) :]
    assert predictor.tokens(text) == whole[:BEFORE] + cut + whole[-AFTER:]
    assert len(predictor.tokens(text)) == limit
    assert np.isfinite(predictor.scores(text)[0]).all()


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("size", [20, 40, 80])
def test_an_instruction_that_just_fits_is_read_whole(tmp_path: Path, size: int) -> None:
    folder = write_predictor(tmp_path / "predictor")
    text = "abcde" * (size // 5)
    fits = SparsityPredictor.load(folder, select_window=size + BEFORE + AFTER)
    assert fits.tokens(text) == reference_tokens(text)
    assert len(fits.tokens(text + "f")) == fits.window
    assert fits.with_head(make_head(bias=True)).window == fits.window


def test_words_alone_are_cut_evenly(tmp_path: Path) -> None:
    predictor = SparsityPredictor.load(without_template(write_predictor(tmp_path / "predictor")), select_window=10)
    assert predictor.tokens("abcdefghijklmno") == reference_tokens("abcdeklmno")[BEFORE:-AFTER]


@pytest.mark.parametrize("window", [1, BEFORE + AFTER])
def test_a_window_without_room_for_the_instruction_is_refused(tmp_path: Path, window: int) -> None:
    predictor = SparsityPredictor.load(write_predictor(tmp_path / "predictor"), select_window=window)
    with pytest.raises(PredictorError, match=rf"reads {window} tokens, .* alone has 19; give --select-window 51"):
        predictor.scores(TEXT)


def test_what_lies_outside_the_window_does_not_matter(tmp_path: Path) -> None:
    predictor = SparsityPredictor.load(write_predictor(tmp_path / "predictor"), select_window=99)  # room for 80
    head, tail = "Sort these numbers, please, in place: 123", "4 5 6. Answer in one line, with commas!!"
    assert (len(head), len(tail)) == (41, 40)
    one, other, near = (
        predictor.scores(text)[0] for text in (head + "1 " * 99 + tail, head + "2 " * 70 + tail, head + "1 " * 99)
    )
    assert np.array_equal(one, other)
    assert not np.array_equal(one, near)
    predictor.window = 9999
    assert not np.array_equal(one, predictor.scores(head + "1 " * 99 + tail)[0])
