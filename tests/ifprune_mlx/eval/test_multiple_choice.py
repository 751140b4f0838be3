"""Multiple choice: likelihoods of options against the plain masked model, and what is read from files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx import DataError, IfpruneError, Instruction, Model, Selection, load, make_selector
from ifprune_mlx.eval.multiple_choice import ChoiceQuestion, encode_choices, read_choices, score_choices
from ifprune_mlx.eval.tasks import TASK_ROWS, EncodedQuestion, pick_questions
from ifprune_mlx.selection.selection import top_k
from tests.ifprune_mlx.reference import mask_ffns, source_model

TOLERANCE = 1e-5
KEEP = (64, 64)
QUESTIONS = [
    ChoiceQuestion("Which one is wet?", (("", "sand"), ("", "the river"), ("", "x")), 1),
    ChoiceQuestion("What is two and two?", (("", "5"), ("", "four, or so they say")), 1),
    ChoiceQuestion("The cup did not fit the box as the", (("cup", "was large."), ("box", "was large.")), 0),
    ChoiceQuestion("?", (("", "yes"), ("", "no")), 0),
]


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> Iterator[tuple[Model, TokenizerWrapper]]:
    model, tokenizer = load(tiny_checkpoint)
    yield model, tokenizer
    model.close()


@pytest.fixture(scope="module")
def encoded(loaded: tuple[Model, TokenizerWrapper]) -> list[EncodedQuestion]:
    return [encode_choices(loaded[1], question) for question in QUESTIONS]


def plain_scores(
    checkpoint: Path, tokenizer: TokenizerWrapper, question: ChoiceQuestion, selection: Selection | None, dense: bool
) -> list[float]:
    """Every option on its own: the whole text in one pass of the stock model, masked, with numpy's log softmax.

    Args:
        dense: read the prompt but for its last token before the mask is put on.
    """
    scores = []
    for lead, scored in question.answers:
        text = f"<|im_start|>user\n{question.prompt}<|im_end|>\n<|im_start|>assistant\n"
        prompt = tokenizer.encode(text, add_special_tokens=False)
        # Every byte is a token of the tiny tokenizer.
        option = tokenizer.encode(f"{lead} {scored}" if lead else scored, add_special_tokens=False)
        start = len(prompt) + len(lead.encode())
        tokens = [*prompt, *option]
        stock = source_model(checkpoint)
        cache = make_prompt_cache(stock)
        parts = [np.array(stock(mx.array([prompt[:-1]]), cache=cache))[0]] if dense else []
        if selection is not None:
            mask_ffns(stock, selection)
        parts.append(np.array(stock(mx.array([tokens[len(prompt) - 1 :] if dense else tokens]), cache=cache))[0])
        logits = np.concatenate(parts).astype(np.float64)
        total = 0.0
        for place in range(start, len(tokens)):
            row = logits[place - 1]
            total += row[tokens[place]] - np.log(np.exp(row).sum())
        scores.append(total / (len(tokens) - start))
    return scores


def selections(model: Model, encoded: list[EncodedQuestion], row: str) -> list[Selection | None]:
    """What a row selects for every question, made here."""
    if row == "dense":
        return [None] * len(encoded)
    if row == "static":
        return [top_k(model.prior, KEEP, "static")] * len(encoded)
    selector = make_selector(model, row, seed=3)
    return [selector.select(question.instruction, KEEP).selection for question in encoded]


def test_every_row_equals_the_masked_stock_model(
    tiny_checkpoint: Path, loaded: tuple[Model, TokenizerWrapper], encoded: list[EncodedQuestion]
) -> None:
    model, tokenizer = loaded
    rows = ["dense", "static", "activation", "activation-sliced", "random"]
    found = score_choices(model, "t", encoded, rows, KEEP, seed=3)
    assert [(row.selector, row.metric) for row in found] == [(r, m) for r in rows for m in ("accuracy", "margin")]
    assert {row.task for row in found} == {"t"}
    by_name = {(row.selector, row.metric): row.per_question for row in found}
    for row in rows:
        chosen = selections(model, encoded, row.removesuffix("-sliced"))
        margins = []
        for question, selection in zip(QUESTIONS, chosen, strict=True):
            scores = plain_scores(tiny_checkpoint, tokenizer, question, selection, row == "activation")
            others = [score for index, score in enumerate(scores) if index != question.gold]
            margins.append(scores[question.gold] - max(others))
        assert by_name[row, "margin"] == pytest.approx(margins, abs=TOLERANCE)
        assert by_name[row, "accuracy"] == tuple(float(margin > 0) for margin in margins)


def test_mismatched_takes_the_selection_of_another_question(
    tiny_checkpoint: Path, loaded: tuple[Model, TokenizerWrapper], encoded: list[EncodedQuestion]
) -> None:
    model, tokenizer = loaded
    twin = ChoiceQuestion(QUESTIONS[0].prompt, (("", "fire"), ("", "rain")), 1)
    questions = [*QUESTIONS[:3], twin]
    both = [*encoded[:3], encode_choices(tokenizer, twin)]
    chosen = selections(model, both, "activation")
    for seed in range(3):
        (_, margins) = score_choices(model, "t", both, ["mismatched"], KEEP, seed=seed)
        for question, margin in zip(questions, margins.per_question, strict=True):
            possible = []
            for other, selection in zip(questions, chosen, strict=True):
                if other.prompt == question.prompt:
                    continue
                scores = plain_scores(tiny_checkpoint, tokenizer, question, selection, False)
                gold = scores.pop(question.gold)
                possible.append(gold - max(scores))
            assert min(abs(margin - value) for value in possible) < TOLERANCE


def test_the_same_seed_gives_the_same_rows(
    loaded: tuple[Model, TokenizerWrapper], encoded: list[EncodedQuestion]
) -> None:
    model, _ = loaded
    rows = ["random", "mismatched"]
    one, same, other = (score_choices(model, "t", encoded, rows, KEEP, seed=seed) for seed in (3, 3, -4))
    for index in (1, 3):
        assert same[index].per_question == pytest.approx(one[index].per_question, abs=TOLERANCE)
        assert other[index].per_question != pytest.approx(one[index].per_question, abs=TOLERANCE)


def test_a_tie_is_no_right_answer(loaded: tuple[Model, TokenizerWrapper]) -> None:
    model, tokenizer = loaded
    question = encode_choices(tokenizer, ChoiceQuestion("same?", (("", "yes"), ("", "yes")), 0))
    accuracy, margin = score_choices(model, "t", [question], ["dense"], KEEP)
    assert (accuracy.per_question, margin.per_question) == ((0.0,), (0.0,))


def test_progress_counts_questions_times_rows(
    loaded: tuple[Model, TokenizerWrapper], encoded: list[EncodedQuestion]
) -> None:
    seen: list[tuple[int, int]] = []
    score_choices(
        loaded[0], "t", encoded, ["dense", "static"], KEEP, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(done, 8) for done in range(1, 9)]


def test_mismatched_needs_another_question(
    loaded: tuple[Model, TokenizerWrapper], encoded: list[EncodedQuestion]
) -> None:
    with pytest.raises(DataError, match="task 't' has no two different questions"):
        score_choices(loaded[0], "t", [encoded[0], encoded[0]], ["mismatched"], KEEP)


def test_a_likelihood_that_is_no_number_is_an_error(tiny_checkpoint: Path, encoded: list[EncodedQuestion]) -> None:
    broken, _ = load(tiny_checkpoint)
    broken.module.model.norm.weight = broken.module.model.norm.weight * float("nan")
    with pytest.raises(IfpruneError, match="dense, task 't', question 1: a likelihood is not a finite number"):
        score_choices(broken, "t", encoded, ["dense"], KEEP)
    broken.close()


def test_what_is_asked_depends_on_seed_and_questions_alone(loaded: tuple[Model, TokenizerWrapper]) -> None:
    _, tokenizer = loaded
    told: list[str] = []

    def texts(questions: list[ChoiceQuestion], seed: int, limit: int | None, context: int | None = None) -> list[str]:
        found = pick_questions(
            "t",
            questions,
            lambda question: encode_choices(tokenizer, question),
            context=context,
            limit=limit,
            seed=seed,
            report=told.append,
        )
        return [item.instruction.text for item in found]

    many = [ChoiceQuestion(f"question {i}", (("", "a"), ("", "b")), 0) for i in range(20)]
    assert texts(many, 0, 5) == texts(many[::-1], 0, 5)
    assert len(set(texts(many, 0, 5))) == 5
    assert texts(many, 0, 5) != texts(many, 1, 5)
    assert sorted(texts(many, 0, None)) == sorted(question.prompt for question in many)
    assert told == []
    long = ChoiceQuestion("long " * 30, (("", "a"), ("", "b" * 9)), 0)
    assert len(texts([*many, long], 0, None, context=100)) == 20
    assert told == ["task 't': 1 of 21 questions left out: longer than the model's context of 100 tokens"]
    with pytest.raises(DataError, match=r"1 of 1 questions left out: longer .* none is left"):
        texts([long], 0, None, context=100)
    # The last token of the longest option counts.
    length = encode_choices(tokenizer, long).length
    assert texts([long], 0, None, context=length)
    with pytest.raises(DataError):
        texts([long], 0, None, context=length - 1)


def write(file: Path, *values: Any) -> Path:
    file.write_text("".join(f"{json.dumps(value)}\n" for value in values), encoding="utf-8")
    return file


def test_both_forms_are_read(tmp_path: Path, loaded: tuple[Model, TokenizerWrapper]) -> None:
    begins = ["Ann thanked Eve, since Eve", "Ann thanked Eve, since Ann"]
    file = write(
        tmp_path / "x.jsonl",
        {"query": "Q: 1?\n", "choices": ["a", "b"], "gold": 1, "category": "ignored"},
        {"context_options": begins, "continuation": "had helped.", "gold": 0},
        {"context_options": ["one two", "one two three"], "continuation": "four", "gold": 0},
    )
    plain, schema, shorter = read_choices(file)
    assert plain == ChoiceQuestion("Q: 1?\n", (("", "a"), ("", "b")), 1)
    assert schema == ChoiceQuestion("Ann thanked Eve, since", (("Eve", "had helped."), ("Ann", "had helped.")), 0)
    # Words are not cut.
    assert shorter == ChoiceQuestion("one", (("two", "four"), ("two three", "four")), 0)
    encoded = encode_choices(loaded[1], schema)
    assert [loaded[1].decode(option.tokens[option.start :]) for option in encoded.options] == [" had helped."] * 2
    assert encoded.instruction == Instruction(schema.prompt, encoded.instruction.tokens)


GOOD = {"query": "q", "choices": ["a", "b"], "gold": 0}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1], "no JSON object"),
        (GOOD | {"query": " "}, "the query is blank"),
        (GOOD | {"query": None}, "the query is not text"),
        (GOOD | {"choices": ["a"]}, "choices is no list of two options or more"),
        (GOOD | {"choices": ["a", 3]}, "option 1 of choices is not text"),
        (GOOD | {"choices": "ab"}, "choices is no list"),
        (GOOD | {"gold": 2}, "gold is no index of its 2 options"),
        (GOOD | {"gold": True}, "gold is no index"),
        (GOOD | {"gold": "a"}, "gold is no index"),
        (
            {"context_options": ["b c", "a c"], "continuation": "d", "gold": 0},
            "all context_options begin with is blank",
        ),
        ({"context_options": ["a b", "a c"], "gold": 0}, "the continuation is not text"),
        ({"messages": []}, "the query is not text"),
        (GOOD | {"query": "\ud800"}, "surrogate"),
    ],
)
def test_the_first_bad_line_ends_it(tmp_path: Path, value: Any, words: str) -> None:
    file = write(tmp_path / "x.jsonl", GOOD, value)
    with pytest.raises(DataError) as caught:
        read_choices(file)
    assert str(caught.value).startswith(f"{file}, line 2: ")
    assert words in str(caught.value)
    assert "expected query, choices and gold" in str(caught.value)


def test_the_rows_of_a_task_are_those_that_need_no_answer() -> None:
    assert set(TASK_ROWS) == {
        "dense", "learned", "static", "activation", "activation-sliced", "random", "mismatched",
    }  # fmt: skip
