"""The atlas' numbers against plain loops over prompts, layers and neurons, and what its charts show of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ifprune_convert.pipeline import Options
from ifprune_mlx import DataError, Instruction, Model, Selected, Selection, load, make_selector
from ifprune_mlx.data.tokenize import Example
from ifprune_mlx.eval.analysis import (
    BANDS,
    PARTS,
    Quality,
    Survey,
    difference_chart,
    overlap_chart,
    quality_chart,
    selections_chart,
    shared_chart,
    survey,
    time_answers,
    time_chart,
)
from ifprune_mlx.selection.predictor import SparsityPredictor
from tests.ifprune_mlx.reference import random_selection
from tests.tiny import write_checkpoint
from tests.tiny_predictor import write_predictor

WIDTHS, KEEP = (128, 128), (40, 64)


def chat(instruction: str, count: int = 5) -> Example:
    """A prompt of some tokens with an answer of two."""
    tokens = np.arange(10, 12 + count, dtype=np.int32)
    return Example(tokens, np.arange(count + 2) >= count, count, instruction, "", instruction)


class Planted:
    """Selects what it was given, and remembers what it was asked."""

    name = "planted"

    def __init__(self, selections: dict[str, Selection]) -> None:
        self.selections = selections
        self.asked: list[Instruction] = []

    def select(self, instruction: Instruction, keep: Any) -> Selected:
        self.asked.append(instruction)
        return Selected(self.selections[instruction.text])


def planted() -> tuple[dict[str, list[Example]], Planted]:
    data = {name: [chat(f"{name} {i}") for i in range(count)] for name, count in {"a": 3, "b": 2, "c": 1}.items()}
    every = [example.instruction for examples in data.values() for example in examples]
    return data, Planted({name: random_selection(WIDTHS, KEEP, seed) for seed, name in enumerate(every)})


@pytest.fixture
def found(tiny: tuple[Model, Any]) -> tuple[Survey, list[Selection]]:
    data, selector = planted()
    told: list[tuple[int, int]] = []
    result = survey(tiny[0], data, selector, KEEP, progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 6) for done in range(1, 7)]
    assert [asked.tokens for asked in selector.asked] == [(10, 11, 12, 13, 14)] * 6  # none of an answer
    return result, list(selector.selections.values())


def test_the_matrix_is_the_overlap_of_every_two(found: tuple[Survey, list[Selection]]) -> None:
    result, flat = found
    assert result.matrix == pytest.approx(np.array([[one.overlap(other) for other in flat] for one in flat]))
    assert np.diag(result.matrix) == pytest.approx(1)
    assert {name: len(keys) for name, keys in result.prompts.items()} == {"a": 3, "b": 2, "c": 1}
    across = result.overlap.domains["a"]["b"]
    assert across is not None
    assert across.mean() == pytest.approx(result.matrix[:3, 3:5].mean())


def test_every_neuron_is_somebodys(found: tuple[Survey, list[Selection]]) -> None:
    result, flat = found
    groups = {"a": flat[:3], "b": flat[3:5], "c": flat[5:]}
    for layer, width in enumerate(WIDTHS):
        counts = dict.fromkeys(BANDS, 0)
        for neuron in range(width):
            shares = [np.mean([neuron in one.ids[layer] for one in group]) for group in groups.values()]
            owners = sum(share >= 0.5 for share in shares)
            if owners == 3:
                counts["all domains"] += 1
            elif owners:
                counts["some domains"] += 1
            else:
                counts["single prompts" if max(shares) > 0 else "nobody"] += 1
        assert min(counts.values()) > 0
        assert {name: result.bands[name][layer] for name in BANDS} == pytest.approx(
            {name: count / width for name, count in counts.items()}
        )


def test_own_minus_others_is_paired_by_prompt(found: tuple[Survey, list[Selection]]) -> None:
    result, flat = found
    # A domain of one prompt has no pair of its own.
    assert [difference.domain for difference in result.differences] == ["a", "b", "all"]
    own = np.mean([flat[i].overlap(flat[j]) for i in range(3) for j in range(3) if i != j])
    others = np.mean([flat[i].overlap(flat[j]) for i in range(3) for j in range(3, 6)])
    first = result.differences[0]
    assert (first.a, first.b) == ("own", "others")
    assert first.mean == pytest.approx(own - others)
    assert first.low <= first.mean <= first.high


def test_charts_show_the_numbers(found: tuple[Survey, list[Selection]]) -> None:
    result, flat = found
    prompts, domains, *_ = overlap_chart(result).axes
    assert np.asarray(prompts.images[0].get_array()) == pytest.approx(result.matrix)
    means = domains.images[0].get_array().filled(np.nan)
    assert np.isnan(means[2, 2])  # one prompt has no other
    assert means[0, 1] == pytest.approx(result.matrix[:3, 3:5].mean())
    assert prompts.images[0].get_clim()[0] == pytest.approx(np.mean([40 / 128, 64 / 128]))
    (axes,) = shared_chart(result).axes
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == pytest.approx([100 * share for name in BANDS for share in result.bands[name]])
    # Of another density the overlap is not the same both ways.
    both = {"one": flat[0], "other": random_selection(WIDTHS, (20, 20), 9)}
    square = selections_chart("x", both).axes[0].images[0].get_array()
    assert square[0, 1] == pytest.approx(both["one"].overlap(both["other"]))
    assert square[1, 0] == pytest.approx(both["other"].overlap(both["one"]))


def test_the_difference_of_two_selections_is_drawn_layer_by_layer() -> None:
    one, other = random_selection(WIDTHS, (40, 64), 0), random_selection(WIDTHS, (20, 64), 1)
    (axes,) = difference_chart("x", one, other, "static").axes
    shared = [np.isin(mine, theirs).sum() for mine, theirs in zip(one.ids, other.ids, strict=True)]
    counts = [*shared, *(40 - shared[0], 64 - shared[1]), *(20 - shared[0], 64 - shared[1])]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([100 * count / 128 for count in counts])
    assert axes.get_ylim() == (0, 100)
    legend = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert legend == ["static only", "this prompt only", "both"]


def test_one_density_is_drawn_as_bars_that_the_legend_names() -> None:
    value = written()
    value["curve"] = value["curve"][:1]
    figure = quality_chart("model", Quality.of(value, "x"))
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["mean over domains", "code", "maths"]
    losses = [[1.5, 2.0, 9.0 - 0.5], [1.0, 1.5, 8.0], [2.0, 2.5, 9.0]]
    assert [bar.get_width() for bar in axes.patches] == [loss for domain in losses for loss in domain]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dense", "learned", "random"]
    assert figure.get_suptitle() == "model: loss of given answers"


def test_one_prompt_and_all_neurons_are_charts_too(tiny: tuple[Model, Any]) -> None:
    everything = random_selection(WIDTHS, WIDTHS, 0)
    result = survey(tiny[0], {"a": [chat("x")]}, Planted({"x": everything}), WIDTHS)
    assert result.differences == []
    assert result.bands["all domains"] == [1.0, 1.0]
    overlap_chart(result)
    shared_chart(result)
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize("selector", [None, "static", "random"])
def test_answers_are_timed_in_turn(tiny: tuple[Model, Any], selector: str | None) -> None:
    model, tokenizer = tiny
    data = {"a": [chat("one"), chat("two"), chat("three", 9)], "b": [chat("four", 7)]}
    told: list[tuple[int, int]] = []
    timings = time_answers(
        model, tokenizer, data, selector, 0.5, count=9, max_tokens=3, progress=lambda *given: told.append(given)
    )
    assert [(timing.domain, timing.prompt) for timing in timings] == [
        ("a", "one"), ("b", "four"), ("a", "two"), ("a", "three"),
    ]  # fmt: skip
    assert told == [(done, 4) for done in range(5)]
    assert [timing.prompt_tokens for timing in timings] == [5, 7, 5, 9]
    for timing in timings:
        assert 1 <= timing.completion_tokens <= 3
        assert min(timing.select_s, timing.prefill_s) > 0
    (axes,) = time_chart(timings, "x").axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(
        [getattr(timing, f"{part}_s") for timing in timings for part in PARTS]
    )
    assert [label.get_text() for label in axes.get_yticklabels()][2].startswith("a 2: 5 tokens in, ")
    assert len(time_answers(model, tokenizer, data, selector, None, count=1, max_tokens=1)) == 1


def test_what_was_selected_before_is_timed_as_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(predictor=write_predictor(tmp_path / "head"))
    model, tokenizer = load(write_checkpoint(tmp_path / "checkpoint", options=options))
    data = {"a": [chat("one"), chat("two")]}
    survey(model, data, make_selector(model, "learned"), KEEP)
    asked: list[str] = []
    scores = SparsityPredictor.scores

    def counted(self: SparsityPredictor, instruction: str) -> Any:
        asked.append(instruction)
        return scores(self, instruction)

    monkeypatch.setattr(SparsityPredictor, "scores", counted)
    time_answers(model, tokenizer, data, "learned", None, count=2, max_tokens=1)
    assert asked == ["two", "one", "two"]  # the first of them untimed
    # Everybody else still has the cache.
    survey(model, data, make_selector(model, "learned"), KEEP)
    assert asked == ["two", "one", "two"]


def written() -> dict[str, Any]:
    """As `ifprune evaluate --densities` writes it, as far as it is read."""
    losses = {"dense": (1.0, 1.0), "learned": (2.0, 1.5), "random": (9.0, 8.0)}
    points = [
        {
            "active_parameters": active,
            "rows": [
                {"selector": name, "domain": domain, "nll": values[place] + shift}
                for name, values in losses.items()
                for domain, shift in {"code": 0.0, "maths": 1.0}.items()
            ],
        }
        for place, active in enumerate((60, 90))
    ]
    return {"total_parameters": 120, "curve": points[::-1]}


def test_quality_is_read_and_drawn(tmp_path: Path) -> None:
    file = tmp_path / "quality.json"
    file.write_text(json.dumps(written()))
    quality = Quality.read(file)
    assert [active for active, _ in quality.curve] == [60, 90]
    assert quality.curve[0][1]["maths"] == {"dense": 2.0, "learned": 3.0, "random": 10.0}
    figure = quality_chart("model", quality)
    assert [axes.get_title("left") for axes in figure.axes[:3]] == ["mean over domains", "code", "maths"]
    dense, learned, _ = figure.axes[0].lines
    assert list(dense.get_ydata()) == [1.5, 1.5]
    assert [tuple(point) for point in learned.get_xydata()] == [(60, 2.5), (90, 2.0)]
    assert json.loads(json.dumps(quality.to_dict()))["curve"][0]["nll"]["code"]["random"] == 9.0
    # One domain has no mean.
    for point in (one := written())["curve"]:
        point["rows"] = [row for row in point["rows"] if row["domain"] == "code"]
    assert [axes.get_title("left") for axes in quality_chart("model", Quality.of(one, "x")).axes] == ["code"]


def without(selector: str | None) -> dict[str, Any]:
    value = written()
    for point in value["curve"]:
        point["rows"] = [row for row in point["rows"] if selector and row["selector"] == selector]
    return value


def uneven() -> dict[str, Any]:
    value = written()
    value["curve"][0]["rows"].pop()
    return value


BAD = {
    "one density": ({"density": 0.5, "rows": []}, "evaluate --densities"),
    "a list": ([1], "not what `ifprune evaluate"),
    "no numbers": ({"total_parameters": "x", "curve": []}, "not what `ifprune evaluate"),
    "no points": ({"total_parameters": 1, "curve": []}, "needs losses"),
    "tasks only": (without(None), "needs losses"),
    "dense only": (without("dense"), "nothing but dense"),
    "uneven": (uneven(), "of all densities the same"),
    "not a number": (json.loads(json.dumps(written()).replace("9.0", "NaN")), "not what `ifprune evaluate"),
    "infinite": ({"total_parameters": float("inf"), "curve": []}, "not what `ifprune evaluate"),
}


@pytest.mark.parametrize("name", BAD)
def test_other_json_is_refused(name: str, tmp_path: Path) -> None:
    value, words = BAD[name]
    file = tmp_path / "quality.json"
    file.write_text(json.dumps(value))
    with pytest.raises(DataError, match=words) as caught:
        Quality.read(file)
    assert str(file) in str(caught.value)


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "quality.json"
    for content in (b"{", b"\xff\xfe", b"[" * 100_000):
        file.write_bytes(content)
        with pytest.raises(DataError, match="not JSON"):
            Quality.read(file)
    with pytest.raises(DataError, match="cannot be read"):
        Quality.read(tmp_path)
