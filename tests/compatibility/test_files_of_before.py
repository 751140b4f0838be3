"""What the code of commit 3018b37 wrote loads today, and gives the same selections, logits and answers.

`make_files.py` made the files, with that commit.
"""

from __future__ import annotations

import json
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ifprune_mlx import History, Instruction, Model, Selection, Session, TaskStore, load, make_selector, stream_generate
from ifprune_mlx.selection.cache import SelectionCache

HERE = Path(__file__).parent
EXPECTED = json.loads((HERE / "expected.json").read_text(encoding="utf-8"))
TEXT, TOKENS = EXPECTED["text"], EXPECTED["tokens"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(HERE / "files.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "files"


@pytest.fixture
def learned(files: Path) -> tuple[Model, Any]:
    """The checkpoint that the selection, the task, the chat and the prompt cache belong to."""
    return load(files / "learned", dtype=mx.float32)


def assert_logits(model: Model, expected: Sequence[float]) -> None:
    """Of the token after TOKENS, under what is active."""
    found = np.array(model(mx.array([TOKENS]))[0, -1])[: len(expected)]
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("name", EXPECTED["checkpoints"])
def test_a_checkpoint_selects_and_answers_as_before(files: Path, name: str) -> None:
    expected = EXPECTED["checkpoints"][name]
    model, tokenizer = load(files / name, dtype=mx.float32)
    assert (model.checkpoint.id, list(model.keep())) == (expected["id"], expected["keep"])
    assert model.checkpoint.layout.order == ("frequency" if name == "records" else None)
    assert_logits(model, expected["dense"])
    for selector, then in expected["selected"].items():
        instruction = Instruction(TEXT, tuple(tokenizer.encode(TEXT)))
        selection = make_selector(model, selector, seed=3).select(instruction, model.keep()).selection
        assert selection.hash == then["hash"], selector
        model.switch(selection)
        assert_logits(model, then["logits"])
        answer = stream_generate(model, tokenizer, TOKENS, selection=selection, max_tokens=8)
        assert [response.token for response in answer] == then["answer"], selector


@pytest.mark.parametrize("name", EXPECTED["checkpoints"])
def test_with_residency_ssd_it_gives_the_same(files: Path, name: str) -> None:
    then = EXPECTED["checkpoints"][name]["selected"]["static"]
    model, _ = load(files / name, dtype=mx.float32, residency="ssd")
    model.switch(make_selector(model, "static").select(Instruction(TEXT, ()), model.keep()).selection)
    assert_logits(model, then["logits"])


def test_a_selection_file_and_a_task(files: Path, learned: tuple[Model, Any]) -> None:
    task = TaskStore(learned[0].checkpoint, files / "data").load("haiku")
    selection = Selection.load(files / "selection.safetensors")
    assert {task.hash, selection.hash} == {EXPECTED["selection"]}


def test_a_cached_selection_is_found(files: Path, learned: tuple[Model, Any]) -> None:
    model, _ = learned
    cache = SelectionCache(files / "cache")
    model.selection_cache = cache
    found = make_selector(model, "learned").select(Instruction(TEXT, ()), model.keep()).selection
    assert (found.hash, cache.hits, cache.misses) == (EXPECTED["learned"], 1, 0)


def test_a_saved_chat_goes_on(files: Path, learned: tuple[Model, Any]) -> None:
    chat = Session(*learned)
    chat.load(files / "chat.json")
    assert chat.messages == EXPECTED["chat"]["messages"]
    assert chat.selection is not None
    assert chat.selection.hash == EXPECTED["learned"]
    answer = [response.token for response in chat.stream("And snow?", max_tokens=6)]
    assert answer == EXPECTED["chat"]["second_answer"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="mlx-lm 0.31 does not read the prompt caches of 0.32")
def test_a_prompt_cache_goes_on_and_knows_what_computed_it(files: Path, learned: tuple[Model, Any]) -> None:
    model, tokenizer = learned
    history = History.load(files / "prompt.safetensors", model)
    assert history.tokens == TOKENS
    assert [[span.tokens, span.computed_by] for span in history.spans] == EXPECTED["prompt_cache"]["spans"]
    selection = Selection.load(files / "selection.safetensors")
    answer = stream_generate(
        model, tokenizer, [60, 61], prompt_cache=history, selection=selection, on_switch="keep", max_tokens=6
    )
    assert [response.token for response in answer] == EXPECTED["prompt_cache"]["goes_on"]
