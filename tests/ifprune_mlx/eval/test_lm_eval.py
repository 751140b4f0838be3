"""lm-evaluation-harness: what it asks is answered as our own tasks are, and its figures are ours."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import yaml
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx import DataError, Model, generate, load
from ifprune_mlx.eval.metrics import TaskRow
from ifprune_mlx.eval.multiple_choice import ChoiceQuestion, encode_choices, option_scores, score_choices
from ifprune_mlx.eval.tasks import TASK_ROWS, RowSelections
from ifprune_mlx.selection.cache import SelectionCache
from ifprune_mlx.selection.selection import top_k
from ifprune_mlx.selection.selectors import ActivationSelector, Instruction, LearnedSelector
from tests.ifprune_mlx.reference import mask_ffns, source_model
from tests.tiny_predictor import write_predictor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from ifprune_mlx.eval.lm_eval import HarnessLM, _per_question, load_tasks, score_harness

pytestmark = pytest.mark.filterwarnings("ignore")

KEEP = (64, 64)
TOLERANCE = 1e-4
QUESTIONS = [
    ChoiceQuestion("Which one is wet?", (("", "sand"), ("", "the river"), ("", "x")), 1),
    ChoiceQuestion("What is two and two?", (("", "5"), ("", "four, or so they say")), 1),
    ChoiceQuestion("Who sings? " * 9, (("", "yes"), ("", "no"), ("", "the moon"), ("", "a stone")), 0),
    ChoiceQuestion("?", (("", "yes"), ("", "no")), 0),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("datasets.config.HF_CACHE_HOME", tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with an arbitrary predictor."""
    from ifprune_convert.pipeline import Options
    from tests.tiny import write_checkpoint

    folder = tmp_path_factory.mktemp("harness")
    return write_checkpoint(folder / "checkpoint", options=Options(predictor=write_predictor(folder / "head")))


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Iterator[tuple[Model, TokenizerWrapper]]:
    model, tokenizer = load(checkpoint)
    yield model, tokenizer
    model.close()


def write_task(folder: Path, name: str, lines: list[dict[str, Any]], **settings: Any) -> None:
    """A task of one's own: a YAML file and the JSON lines that it reads."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    base = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(base | settings))


def write_choices(folder: Path, name: str, questions: list[ChoiceQuestion]) -> None:
    lines = [{"query": q.prompt, "choices": [text for _, text in q.answers], "gold": q.gold} for q in questions]
    write_task(
        folder,
        name,
        lines,
        output_type="multiple_choice",
        doc_to_text="{{query}}",
        doc_to_choice="{{choices}}",
        doc_to_target="gold",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )


def request(kind: Any, index: int, *arguments: Any) -> Instance:
    return Instance(kind, {}, arguments, index, ("t", index, 1))


def ask(lm: HarnessLM, questions: list[ChoiceQuestion]) -> list[list[float]]:
    """Log likelihoods of all options, asked as lm-eval does."""
    contexts = [lm.apply_chat_template([{"role": "user", "content": question.prompt}]) for question in questions]
    pairs = [(c, text) for c, q in zip(contexts, questions, strict=True) for _, text in q.answers]
    said = iter(lm.loglikelihood([request("loglikelihood", index, *pair) for index, pair in enumerate(pairs)]))
    return [[next(said)[0] for _ in question.answers] for question in questions]


def ours(
    model: Model, tokenizer: TokenizerWrapper, questions: list[ChoiceQuestion], row: str, keep: tuple[int, ...]
) -> list[list[float]]:
    """The same as `ifprune_mlx.eval.multiple_choice` scores them."""
    encoded = [encode_choices(tokenizer, question) for question in questions]
    selections = RowSelections(model, "t", [question.instruction for question in encoded], [row], keep, 0)
    result = []
    for index, question in enumerate(encoded):
        means = option_scores(model, question, selections.switch(row, index))
        result.append([mean * len(option.tokens) for mean, option in zip(means, question.options, strict=True)])
    return result


def test_every_row_scores_options_as_choices_does(loaded: tuple[Model, TokenizerWrapper]) -> None:
    model, tokenizer = loaded
    lm = HarnessLM(model, tokenizer, "t", TASK_ROWS, KEEP)
    told = {}
    for row in TASK_ROWS:
        lm.row = row
        told[row] = ask(lm, QUESTIONS)
        for mine, theirs in zip(told[row], ours(model, tokenizer, QUESTIONS, row, KEEP), strict=True):
            assert mine == pytest.approx(theirs, abs=TOLERANCE)
    for row in TASK_ROWS[1:]:
        assert told[row][0] != pytest.approx(told["dense"][0], abs=TOLERANCE)


def test_a_context_selects_once_by_its_words(
    loaded: tuple[Model, TokenizerWrapper], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    for kind in (ActivationSelector, LearnedSelector):
        select = kind.select

        def counted(self: Any, instruction: Instruction, keep: Any, select: Any = select) -> Any:
            seen.append(instruction.text)
            return select(self, instruction, keep)

        monkeypatch.setattr(kind, "select", counted)
    model, tokenizer = loaded
    model.selection_cache = SelectionCache()  # other tests asked the same
    lm = HarnessLM(model, tokenizer, "t", ["learned", "activation"], KEEP)
    for row in ("learned", "activation"):
        lm.row = row
        seen.clear()
        ask(lm, QUESTIONS)
        assert seen == [question.prompt for question in QUESTIONS]


def test_greedy_means_the_likeliest(loaded: tuple[Model, TokenizerWrapper]) -> None:
    model, tokenizer = loaded
    lm = HarnessLM(model, tokenizer, "t", ["static"], KEEP)
    context = lm.apply_chat_template([{"role": "user", "content": "hello"}])
    tokens = list(tokenizer.encode(context, add_special_tokens=False))
    model.switch(top_k(model.prior, KEEP, "static"))
    said = []
    for _ in range(3):
        said.append(int(model(mx.array([[*tokens, *said]]))[0, -1].argmax().item()))
    greedy = tokenizer.decode(said)
    if list(tokenizer.encode(context + greedy, add_special_tokens=False)) != [*tokens, *said]:
        pytest.skip("this tiny model's likeliest tokens are no text")
    found = lm.loglikelihood([request("loglikelihood", i, context, text) for i, text in enumerate([greedy, "x" * 3])])
    assert [flag for _, flag in found] == [True, False]


def plain_sum(checkpoint: Path, selection: Any, tokens: list[int], start: int) -> float:
    stock = source_model(checkpoint)
    if selection is not None:
        mask_ffns(stock, selection)
    logits = np.array(stock(mx.array([tokens])))[0].astype(np.float64)
    return sum(
        logits[place - 1][tokens[place]] - np.log(np.exp(logits[place - 1]).sum())
        for place in range(start, len(tokens))
    )


def test_without_a_context_and_across_the_border(checkpoint: Path, loaded: tuple[Model, TokenizerWrapper]) -> None:
    model, tokenizer = loaded
    lm = HarnessLM(model, tokenizer, "t", ["dense"], KEEP)
    (nothing, _), (plain, _) = lm.loglikelihood(
        [request("loglikelihood", 0, "", "river"), request("loglikelihood", 1, "the ", "moon")]
    )
    tokens = list(tokenizer.encode("river", add_special_tokens=False))
    assert nothing == pytest.approx(plain_sum(checkpoint, None, [tokenizer.bos_token_id, *tokens], 1), abs=TOLERANCE)
    whole = list(tokenizer.encode("the moon", add_special_tokens=False))
    assert plain == pytest.approx(plain_sum(checkpoint, None, whole, 4), abs=TOLERANCE)


def test_a_long_context_loses_its_beginning_and_that_is_said(
    checkpoint: Path, loaded: tuple[Model, TokenizerWrapper]
) -> None:
    model, tokenizer = loaded
    said: list[str] = []
    lm = HarnessLM(model, tokenizer, "t", ["dense"], KEEP, report=said.append)
    context = "abc " * 200
    ((found, _),) = lm.loglikelihood([request("loglikelihood", 0, context, "end")])
    whole = list(tokenizer.encode(context + "end", add_special_tokens=False))[-513:]
    assert found == pytest.approx(plain_sum(checkpoint, None, whole, 510), abs=1e-4)
    assert said == ["task 't': prompts longer than the model's context lose their beginnings"]
    with pytest.raises(DataError, match="longer than the model's context of 512"):
        lm.loglikelihood([request("loglikelihood", 0, "a", "b" * 600)])


@pytest.mark.parametrize("length", [40, 300, 700])
def test_whole_texts(checkpoint: Path, loaded: tuple[Model, TokenizerWrapper], length: int) -> None:
    model, tokenizer = loaded
    text = "".join(chr(97 + (7 * i * i + i // 9) % 26) for i in range(length))
    tokens = list(tokenizer.encode(text, add_special_tokens=False))
    assert len(tokens) == length  # bytes
    lm = HarnessLM(model, tokenizer, "t", ["dense", "static", "learned", "activation"], KEEP)
    static = top_k(model.prior, KEEP, "static")
    learned = LearnedSelector(model, model.predictor).select(Instruction(text[:128], ()), KEEP).selection
    prefix = int(tokenizer.bos_token_id)
    # The first 512 tokens, then the rest with as much before it as the context holds.
    first, rest = [prefix, *tokens[:512]], tokens[length - 513 :] if length > 512 else []
    for row, selection in (("dense", None), ("static", static), ("learned", learned)):
        lm.row = row
        (found,) = lm.loglikelihood_rolling([request("loglikelihood_rolling", 0, text)])
        lead = 1 if row in ("dense", "static") else min(129, len(first))
        expected = plain_sum(checkpoint, static, first[:lead], 1)
        expected += plain_sum(checkpoint, selection, first, lead)
        expected += plain_sum(checkpoint, selection, rest, 513 - (length - 512)) if rest else 0.0
        assert found == pytest.approx(expected, abs=2e-3)
    lm.row = "activation"
    (found,) = lm.loglikelihood_rolling([request("loglikelihood_rolling", 0, text)])
    assert math.isfinite(found)


def test_answers_end_at_stop_strings_and_limits(loaded: tuple[Model, TokenizerWrapper]) -> None:
    model, tokenizer = loaded
    lm = HarnessLM(model, tokenizer, "t", ["learned"], KEEP)
    context = lm.apply_chat_template([{"role": "user", "content": "count river"}])
    messages = [{"role": "user", "content": "count river"}]
    whole = generate(model, tokenizer, messages, selector="learned", density=0.5, max_tokens=12)
    assert len(whole) > 4
    stop = whole[2:4]
    short, cut, plain = lm.generate_until(
        [
            request("generate_until", 0, context, {"until": ["never there"], "max_gen_toks": 12, "do_sample": False}),
            request("generate_until", 1, context, {"until": stop, "max_gen_toks": 12}),
            request("generate_until", 2, context, {"until": [], "max_gen_toks": 12, "temperature": 0.0}),
        ]
    )
    assert short == plain == whole
    assert cut == whole[: whole.index(stop)]


def test_a_yaml_task_gives_what_choices_gives(loaded: tuple[Model, TokenizerWrapper], tmp_path: Path) -> None:
    model, tokenizer = loaded
    write_choices(tmp_path / "mine", "wet", QUESTIONS)
    rows = ["dense", "learned", "activation", "mismatched"]
    (task,) = load_tasks(["wet"], [tmp_path / "mine"])
    seen: list[tuple[int, int]] = []
    found = score_harness(model, tokenizer, task, rows, KEEP, progress=lambda done, total: seen.append((done, total)))
    assert [(row.selector, row.task, row.metric) for row in found] == [
        (row, "wet", metric) for row in rows for metric in ("acc", "acc_norm")
    ]
    assert seen[-1] == (4 * 11, 4 * 11)
    assert seen == sorted(seen)
    for row in rows:
        sums = ours(model, tokenizer, QUESTIONS, row, KEEP)
        right = tuple(float(np.argmax(said) == q.gold) for said, q in zip(sums, QUESTIONS, strict=True))
        assert found[2 * rows.index(row)] == TaskRow(row, "wet", "acc", right)
    # The limit takes the first ones; another density goes through the same tasks again.
    again = score_harness(model, tokenizer, task, ["static"], (128, 128), limit=2)
    dense = score_choices(model, "t", [encode_choices(tokenizer, q) for q in QUESTIONS[:2]], ["dense"], KEEP)[0]
    assert len(again[0].per_question) == len(dense.per_question) == 2
    assert again[0].per_question == found[0].per_question[:2]


def test_groups_filters_and_metrics_of_the_whole(loaded: tuple[Model, TokenizerWrapper], tmp_path: Path) -> None:
    model, tokenizer = loaded
    write_choices(tmp_path, "one", QUESTIONS[:3])
    write_choices(tmp_path, "two", QUESTIONS[1:])
    (tmp_path / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["one", "two"]}))
    texts = [{"text": f"the river number {i} " * (i + 1)} for i in range(5)]
    write_task(
        tmp_path,
        "texts",
        texts,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    )
    write_task(
        tmp_path,
        "sums",
        [{"question": f"{i} and {i}?", "answer": str(2 * i)} for i in range(3)],
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 4},
        filter_list=[
            {"name": "first", "filter": [{"function": "take_first"}]},
            {
                "name": "number",
                "filter": [{"function": "regex", "regex_pattern": "([0-9]+)"}, {"function": "take_first"}],
            },
        ],
        metric_list=[{"metric": "exact_match"}],
    )
    group, rolling, sums = load_tasks(["both", "texts", "sums"], [tmp_path])
    found = score_harness(model, tokenizer, group, ["static"], KEEP)
    by_name = {(row.task, row.metric): row.per_question for row in found}
    assert by_name["both", "acc"] == by_name["one", "acc"] + by_name["two", "acc"]
    assert next(iter(by_name)) == ("both", "acc")
    rows = {row.metric: row for row in score_harness(model, tokenizer, rolling, ["dense"], KEEP)}
    lm = HarnessLM(model, tokenizer, "t", ["dense"], KEEP)
    nats = lm.loglikelihood_rolling([request("loglikelihood_rolling", i, t["text"]) for i, t in enumerate(texts)])
    bits = -sum(nats) / sum(len(t["text"]) for t in texts) / math.log(2)
    assert rows["bits_per_byte"].value == pytest.approx(bits, rel=1e-6)
    assert rows["byte_perplexity"].value == pytest.approx(2**bits, rel=1e-6)
    assert len(set(rows["byte_perplexity"].per_question)) == len(texts)
    names = [row.metric for row in score_harness(model, tokenizer, sums, ["dense"], KEEP)]
    assert names == ["exact_match,first", "exact_match,number"]


def test_a_metric_of_the_whole_set_has_the_right_spread() -> None:
    drawn = np.random.default_rng(0).normal(2.0, 0.5, 400)

    def perplexity(values: Any) -> float:
        return math.exp(float(np.mean(values)))

    for count in (150, 400):  # one question a part, and two
        values, own = _per_question(list(drawn[:count]), perplexity)
        assert (own, len(values)) == (False, count)
        assert np.mean(values) == pytest.approx(perplexity(drawn[:count]))
        error = perplexity(drawn[:count]) * drawn[:count].std() / math.sqrt(count)  # the delta method
        assert np.std(values) / math.sqrt(count) == pytest.approx(error, rel=0.15)
    assert _per_question([1.0, 0.0, 1.0], np.mean) == ((1.0, 0.0, 1.0), True)
    assert _per_question([(0.5, 2)], lambda items: items[0][0]) == ((0.5,), False)


def test_tasks_that_cannot_be_asked(tmp_path: Path) -> None:
    write_choices(tmp_path, "fine", QUESTIONS)
    write_task(tmp_path, "unsafe", [{"a": "b"}], doc_to_text="a", doc_to_target="a", unsafe_code=True)
    write_choices(tmp_path, "gone", QUESTIONS)
    (tmp_path / "gone.jsonl").unlink()
    (tmp_path / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["fine"]}))
    for names, folder, words in (
        (["no_such_task"], tmp_path, "lm-eval has no such task"),
        (["fine"], tmp_path / "none", "no such folder"),
        (["gone"], tmp_path, "gone: cannot be loaded"),
        (["unsafe"], tmp_path, "runs code that the model writes"),
        (["fine", "both"], tmp_path, "given twice"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            load_tasks(names, [folder])
        assert "\n" not in str(caught.value)
