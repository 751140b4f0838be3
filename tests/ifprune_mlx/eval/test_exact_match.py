"""Exact match: what is generated against stock greedy decoding, and when two answers are the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.generate import stream_generate as stock_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model as load_stock

from ifprune_mlx import DataError, Model, load
from ifprune_mlx.eval.exact_match import as_number, last_number, matches, normalized, read_exact, score_exact
from ifprune_mlx.eval.tasks import EncodedQuestion, Question, encode_question
from ifprune_mlx.selection.selection import top_k
from tests.ifprune_mlx.reference import mask_ffns
from tests.planted import write_sharp_checkpoint

KEEP, LIMIT = (64, 64), 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose FFNs decide what is said."""
    return write_sharp_checkpoint(tmp_path_factory.mktemp("sharp") / "checkpoint")


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Iterator[tuple[Model, TokenizerWrapper]]:
    model, tokenizer = load(checkpoint)
    yield model, tokenizer
    model.close()


def stock_model(checkpoint: Path) -> Any:
    """The stock mlx-lm model that the checkpoint was converted from."""
    return load_stock(checkpoint.with_name(f"source-of-{checkpoint.name}"))[0]


def said(tokenizer: TokenizerWrapper, stock: Any, question: EncodedQuestion) -> str:
    """What a stock model says to a question, by mlx-lm's own generation; its detokenizer loses some characters."""
    steps = stock_generate(stock, tokenizer, list(question.instruction.tokens), max_tokens=LIMIT)
    return str(tokenizer.decode([step.token for step in steps]))


def test_every_row_says_what_stock_greedy_decoding_says(
    checkpoint: Path, loaded: tuple[Model, TokenizerWrapper]
) -> None:
    model, tokenizer = loaded
    prompts = [f"say something about {word}" for word in ("rivers", "tea", "loops", "the moon", "seven")]
    blank = [encode_question(tokenizer, Question(prompt, ("?",))) for prompt in prompts]
    static = top_k(model.prior, KEEP, "static")
    dense_texts = [said(tokenizer, stock_model(checkpoint), question) for question in blank]
    static_texts = [said(tokenizer, mask_ffns(stock_model(checkpoint), static), item) for item in blank]
    assert dense_texts != static_texts
    # The wanted answers are what the dense model says to the first questions, and what the pruned one says to the rest.
    wanted = [*dense_texts[:3], *static_texts[3:]]
    encoded = [replace(item, source=Question("", (text,))) for item, text in zip(blank, wanted, strict=True)]
    rows = score_exact(model, tokenizer, "t", encoded, ["dense", "static"], KEEP, max_tokens=LIMIT)
    assert [(row.selector, row.metric) for row in rows] == [
        ("dense", "accuracy"), ("dense", "cut_off"), ("static", "accuracy"), ("static", "cut_off"),
    ]  # fmt: skip
    for row, texts in ((rows[0], dense_texts), (rows[2], static_texts)):
        assert row.per_question == tuple(
            float(matches(text, (other,))) for text, other in zip(texts, wanted, strict=True)
        )
        assert 0 < row.value < 1
    assert rows[1].per_question == (1.0,) * 5


def test_activation_goes_on_from_its_dense_prompt_and_others_are_measured_too(
    loaded: tuple[Model, TokenizerWrapper],
) -> None:
    model, tokenizer = loaded
    encoded = [encode_question(tokenizer, Question(prompt, ("1",))) for prompt in ("one", "a second one")]
    names = ["activation", "activation-sliced", "random", "mismatched"]
    seen: list[tuple[int, int]] = []
    rows = score_exact(
        model, tokenizer, "t", encoded, names, KEEP, max_tokens=3, progress=lambda *counts: seen.append(counts)
    )
    assert [row.selector for row in rows[::2]] == names
    assert seen == [(done, 8) for done in range(1, 9)]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 5-3=2", "2"),
        ("it is 1,000.50 dollars.", "1000.50"),
        ("from 7 to -4", "-4"),
        ("minus \N{MINUS SIGN}4", "-4"),
        ("10-4", "4"),
        ("(x)-3", "3"),
        ("1, 2, 3", "3"),
        ("1,2,3", "3"),
        ("about .5", "0.5"),
        ("$18.", "18"),
        ("12 eggs\n#### 7\n", "7"),
        ("7 #### none", None),
        ("no number", None),
        ("", None),
    ],
)
def test_the_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "number"),
    [("42", "42"), ("$1,234", "1234"), ("-3.0", "-3"), ("15%", "15"), ("3.", "3"), ("3 eggs", None), ("1/2", None)],
)
def test_a_wanted_answer_is_a_number_or_it_is_none(text: str, number: str | None) -> None:
    assert as_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "wanted", "same"),
    [
        ("That makes 18 dollars.", ["18"], True),
        ("18.00", ["18"], True),
        ("18 or 19", ["18"], False),
        ("eighteen", ["18"], False),
        ("The Onion!", ["onion"], True),
        ("It is an onion", ["onion"], False),
        ("\N{FULLWIDTH LATIN SMALL LETTER A}bc", ["garlic", "ABC"], True),
        ("", ["onion"], False),
    ],
)
def test_when_an_answer_is_right(text: str, wanted: list[str], same: bool) -> None:
    assert matches(text, wanted) is same


def test_normalized() -> None:
    assert normalized(" The  “Straße”,\na test. ") == "strasse test"
    assert normalized("A.") == "a"


def write(file: Path, *values: Any) -> Path:
    file.write_text("".join(f"{json.dumps(value)}\n" for value in values), encoding="utf-8")
    return file


def test_forms_of_lines(tmp_path: Path) -> None:
    file = write(
        tmp_path / "x.jsonl",
        {"question": "How many?", "answer": "16 - 9 = 7\n#### 7"},
        {"prompt": "p", "answer": 3.5},
        {"context": "c", "continuation": "Ann"},
        {"context": "c", "answer": "Onion", "aliases": ["Allium", "Onion", "(?"]},
    )
    assert read_exact(file) == [
        Question("How many?", ("7",)),
        Question("p", ("3.5",)),
        Question("c", ("Ann",)),
        Question("c", ("Onion", "Allium")),
    ]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"question": "q"}, "the answer is not text"),
        ({"answer": "a"}, "the prompt is not text"),
        ({"question": "", "answer": "a"}, "the question is blank"),
        ({"prompt": "q", "answer": True}, "the answer is not text"),
        ({"prompt": "q", "answer": "...", "aliases": ["a b"]}, "holds no word and no number"),
        ({"prompt": "q", "answer": "a", "aliases": "b"}, "aliases is no list"),
        ({"prompt": "q", "answer": "why\n#### "}, "holds no word and no number"),
    ],
)
def test_the_first_bad_line_ends_it(tmp_path: Path, value: Any, words: str) -> None:
    file = write(tmp_path / "x.jsonl", {"prompt": "q", "answer": "a"}, value)
    with pytest.raises(DataError, match=r"line 2: ") as caught:
        read_exact(file)
    assert words in str(caught.value)
