"""Losses under selections against a plain masked model, and what each row selects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx_lm.models.cache import make_prompt_cache

from ifprune_mlx import DataError, IfpruneError, Instruction, Model, Selected, Selection, make_selector
from ifprune_mlx.data.tokenize import Example
from ifprune_mlx.eval.evaluation import Evaluation
from ifprune_mlx.eval.losses import ROWS, answer_nll, available_rows, compare, derangement
from ifprune_mlx.selection.selection import top_k
from ifprune_mlx.sparse.importance import fuse_ranks
from tests.ifprune_mlx.reference import mask_ffns, open_model, random_selection, source_model
from tests.planted import Table

TOLERANCE = 1e-5
WIDTHS, KEEP = (128, 128), (64, 64)
Data = dict[str, list[Example]]


def example(key: str, prompt: int, answer: int, seed: int) -> Example:
    """Arbitrary tokens."""
    tokens = np.random.default_rng(seed).integers(3, 250, size=prompt + answer).astype(np.int32)
    return Example(tokens, np.arange(len(tokens)) >= prompt, prompt, f"text of {key}", "", key)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Iterator[Model]:
    model = open_model(tiny_checkpoint)
    yield model
    model.close()


@pytest.fixture(scope="module")
def data() -> Data:
    return {
        name: [example(f"{name}{i}", 5 + i, 9 + 2 * i, 10 * index + i) for i in range(count)]
        for index, (name, count) in enumerate({"code": 4, "maths": 3}.items())
    }


@pytest.fixture(scope="module")
def table(data: Data) -> Table:
    texts = [item.instruction for examples in data.values() for item in examples]
    return Table({text: random_selection(WIDTHS, KEEP, 50 + i) for i, text in enumerate(texts)})


@pytest.fixture(scope="module")
def everything(model: Model, data: Data, table: Table) -> Evaluation:
    names = [name for name in ROWS if name != "learned"]
    return compare(model, data, names, KEEP, matched=table, seed=3)


class Spy(nn.Module):
    """A down projection that keeps what it is given."""

    def __init__(self, down: nn.Module) -> None:
        super().__init__()
        self.down = down
        self.seen: list[Any] = []

    def __call__(self, x: mx.array) -> mx.array:
        self.seen.append(np.array(x[0]))
        return self.down(x)


def plain_loss(checkpoint: Path, item: Example, selection: Selection | None, dense_until: int = 0) -> float:
    """Mean loss by the stock model, masked."""
    log_probabilities, places = (
        plain_log_probabilities(checkpoint, item, selection, dense_until),
        np.flatnonzero(item.mask),
    )
    return float(-log_probabilities[places - 1, item.tokens[places]].mean())


def plain_acceptance(checkpoint: Path, item: Example, selection: Selection | None, dense_until: int = 0) -> float:
    """Mean over the answer's tokens of the sum of the smaller probabilities, masked and dense."""
    given = (plain_log_probabilities(checkpoint, item, chosen, dense_until) for chosen in (selection, None))
    pruned, dense = (np.exp(values[np.flatnonzero(item.mask) - 1]) for values in given)
    return float(np.minimum(pruned, dense).sum(axis=-1).mean())


def plain_log_probabilities(
    checkpoint: Path, item: Example, selection: Selection | None, dense_until: int
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """By the stock model, masked, in one pass, with numpy's log softmax: float64 `[tokens, vocabulary]`.

    Args:
        dense_until: tokens that are read before the mask is put on.
    """
    stock = source_model(checkpoint)
    cache = make_prompt_cache(stock)
    head = [np.array(stock(mx.array(item.tokens[None, :dense_until]), cache=cache))[0]] if dense_until else []
    if selection is not None:
        mask_ffns(stock, selection)
    rest = np.array(stock(mx.array(item.tokens[None, dense_until:]), cache=cache))[0]
    logits = np.concatenate([*head, rest]).astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def plain_importance(checkpoint: Path, model: Model, item: Example) -> list[Any]:
    """GRIFFIN's statistic at the positions that predict the answer, from the stock model's activations."""
    stock = source_model(checkpoint)
    for layer in stock.model.layers:
        layer.mlp.down_proj = Spy(layer.mlp.down_proj)
    mx.eval(stock(mx.array(item.tokens[None])))
    places = np.flatnonzero(item.mask) - 1
    result = []
    for layer, norms in zip(stock.model.layers, model.down_norms, strict=True):
        rows = layer.mlp.down_proj.seen[0][places]
        rows = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
        result.append((np.sqrt((rows**2).mean(axis=0)) * norms).astype(np.float32))
    return result


def rows(result: Evaluation, selector: str) -> dict[str, tuple[float, ...]]:
    return {row.domain: row.per_prompt for row in result.rows if row.selector == selector}


def check(
    checkpoint: Path, data: Data, result: Evaluation, name: str, selections: Mapping[str, Selection | None]
) -> None:
    """Every loss of a row equals the plain one under these selections, by key."""
    found = rows(result, name)
    for domain, examples in data.items():
        expected = [plain_loss(checkpoint, item, selections[item.key]) for item in examples]
        assert found[domain] == pytest.approx(expected, abs=TOLERANCE)


def by_key(data: Data) -> list[Example]:
    return [item for examples in data.values() for item in examples]


def test_rows_that_need_no_other_prompt_equal_the_masked_stock_model(
    tiny_checkpoint: Path, model: Model, data: Data, table: Table, everything: Evaluation
) -> None:
    items = by_key(data)
    check(tiny_checkpoint, data, everything, "dense", {item.key: None for item in items})
    static = top_k(model.prior, KEEP, "static")
    check(tiny_checkpoint, data, everything, "static", {item.key: static for item in items})
    check(
        tiny_checkpoint, data, everything, "matched", {item.key: table.selections[item.instruction] for item in items}
    )
    arbitrary = make_selector(model, "random", seed=3)
    chosen = {item.key: arbitrary.select(Instruction(item.instruction, ()), KEEP).selection for item in items}
    check(tiny_checkpoint, data, everything, "random", chosen)


def test_activation_keeps_its_dense_prompt_and_its_sliced_twin_does_not(
    tiny_checkpoint: Path, model: Model, data: Data, everything: Evaluation
) -> None:
    chooser = make_selector(model, "activation")
    chosen = {}
    for domain, examples in data.items():
        found = rows(everything, "activation")[domain]
        for item, loss in zip(examples, found, strict=True):
            prompt = tuple(item.tokens[: item.prompt_length].tolist())
            selection = chooser.select(Instruction(item.instruction, prompt), KEEP).selection
            chosen[item.key] = selection
            expected = plain_loss(tiny_checkpoint, item, selection, dense_until=item.prompt_length - 1)
            assert loss == pytest.approx(expected, abs=TOLERANCE)
    check(tiny_checkpoint, data, everything, "activation-sliced", chosen)
    assert rows(everything, "activation") != rows(everything, "activation-sliced")


def test_mismatched_and_cross_domain_take_the_selection_of_another_prompt(
    tiny_checkpoint: Path, data: Data, table: Table, everything: Evaluation
) -> None:
    assert everything.matched == "table"
    for name, elsewhere in (("mismatched", False), ("cross-domain", True)):
        for domain, examples in data.items():
            for item, loss in zip(examples, rows(everything, name)[domain], strict=True):
                others = [
                    other
                    for place, candidates in data.items()
                    for other in candidates
                    if (place != domain) == elsewhere and other is not item
                ]
                possible = [plain_loss(tiny_checkpoint, item, table.selections[other.instruction]) for other in others]
                assert min(abs(loss - value) for value in possible) < TOLERANCE
                assert abs(loss - plain_loss(tiny_checkpoint, item, table.selections[item.instruction])) > TOLERANCE


def test_oracle_and_own_prior_come_from_the_answers(
    tiny_checkpoint: Path, model: Model, data: Data, everything: Evaluation
) -> None:
    oracle, own = {}, {}
    for examples in data.values():
        seen = {item.key: plain_importance(tiny_checkpoint, model, item) for item in examples}
        for item in examples:
            oracle[item.key] = top_k(fuse_ranks(seen[item.key], model.prior, 0.5), KEEP, "oracle")
            others = [other for other in examples if other is not item]
            weights = [other.mask.sum() for other in others]
            pooled = [
                np.sqrt(np.average([seen[other.key][layer] ** 2 for other in others], axis=0, weights=weights))
                for layer in range(2)
            ]
            own[item.key] = top_k([values.astype(np.float32) for values in pooled], KEEP, "static-own")
    check(tiny_checkpoint, data, everything, "oracle", oracle)
    check(tiny_checkpoint, data, everything, "static-own", own)


def test_oracle_changes_with_the_answer_and_activation_does_not(model: Model) -> None:
    one = example("x", 6, 12, seed=1)
    tokens = one.tokens.copy()
    tokens[-6:] = tokens[-6:][::-1]
    other = Example(tokens, one.mask, one.prompt_length, one.instruction, "", "y")
    chosen: dict[str, list[str]] = {"oracle": [], "activation": []}
    for item in (one, other):
        for name, hashes in chosen.items():
            compare(model, {"d": [item]}, [name], KEEP)  # leaves the selection of the last row active
            assert model.selection is not None
            hashes.append(model.selection.hash)
    assert chosen["oracle"][0] != chosen["oracle"][1]
    assert chosen["activation"][0] == chosen["activation"][1]


def test_a_long_chat_with_several_answers_is_read_in_chunks(
    tiny_checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = np.random.default_rng(0).integers(3, 250, size=500).astype(np.int32)
    mask = np.zeros(500, bool)
    mask[40:60] = mask[290:300] = mask[480:] = True
    item = Example(tokens, mask, 480, "a chat", "", "k")
    selection = random_selection(WIDTHS, KEEP, 4)
    model.switch(selection)
    seen: list[int] = []
    forward = Model.__call__

    def counted(self: Model, tokens: mx.array, **options: Any) -> mx.array:
        seen.append(tokens.shape[1])
        return forward(self, tokens, **options)

    monkeypatch.setattr(Model, "__call__", counted)
    losses = answer_nll(model, tokens, mask)
    assert losses.shape == (50,)
    assert losses.dtype == np.float32
    assert float(losses.mean()) == pytest.approx(plain_loss(tiny_checkpoint, item, selection), abs=TOLERANCE)
    # 39 tokens before the first that predicts an answer, then 256 at most.
    assert np.cumsum(seen).tolist() == [39, 295, 499]


def test_progress_ends_where_it_said_it_would(model: Model, data: Data, table: Table) -> None:
    for names in (["dense"], ["activation"], ["oracle", "static-own"], ["mismatched", "static"], list(ROWS[2:])):
        seen: list[tuple[int, int]] = []
        compare(model, data, names, KEEP, matched=table, progress=lambda done, total: seen.append((done, total)))  # noqa: B023
        done, total = zip(*seen, strict=True)
        assert len(set(total)) == 1
        assert done[-1] == total[0]
        assert all(a < b for a, b in pairwise(done))


@pytest.mark.parametrize("count", [2, 3, 10, 101])
def test_a_derangement_moves_everyone_and_its_seed_fixes_it(count: int) -> None:
    for seed in range(20):
        partner = derangement(count, np.random.default_rng(seed))
        assert sorted(partner) == list(range(count))
        assert not np.any(partner == np.arange(count))
        assert np.array_equal(partner, derangement(count, np.random.default_rng(seed)))


def test_the_same_seed_gives_the_same_evaluation(
    model: Model, data: Data, table: Table, everything: Evaluation
) -> None:
    names = ["random", "mismatched", "cross-domain"]
    again = compare(model, data, names, KEEP, matched=table, seed=3)
    other = compare(model, data, names, KEEP, matched=table, seed=-4)
    for name in names:
        losses, same, different = (sum(rows(found, name).values(), ()) for found in (everything, again, other))
        # Neurons lie in other slots, and so add up in another order; nothing else differs.
        assert same == pytest.approx(losses, abs=TOLERANCE)
        assert different != pytest.approx(losses, abs=TOLERANCE)


def test_the_result_as_json(data: Data, everything: Evaluation) -> None:
    value = everything.to_dict()
    assert value.keys() == {"density", "matched", "seed", "rows", "tasks", "overlap", "differences", "prompts"}
    assert (value["density"], value["matched"], value["tasks"]) == (0.5, "table", [])
    names = [name for name in ROWS if name != "learned"]
    assert [(row["selector"], row["domain"]) for row in value["rows"]] == [(n, d) for n in names for d in data]
    for row in value["rows"]:
        assert row.keys() == {
            "selector", "domain", "nll", "nll_tokens", "acceptance", "tokens", "n", "per_prompt",
            "acceptance_per_prompt",
        }  # fmt: skip
        assert 0 < row["acceptance"] <= 1 + 1e-6
        assert row["acceptance"] == pytest.approx(
            np.average(row["acceptance_per_prompt"], weights=[int(item.mask.sum()) for item in data[row["domain"]]])
        )
        tokens = [int(item.mask.sum()) for item in data[row["domain"]]]
        assert (row["n"], row["tokens"]) == (len(tokens), sum(tokens))
        assert row["nll"] == pytest.approx(sum(row["per_prompt"]) / row["n"])
        total = sum(n * loss for n, loss in zip(tokens, row["per_prompt"], strict=True))
        assert row["nll_tokens"] == pytest.approx(total / row["tokens"])
    assert value["overlap"].keys() == {"table", "activation"}
    assert value["prompts"] == {domain: [item.key for item in examples] for domain, examples in data.items()}
    pairs = len(names) * (len(names) - 1) // 2
    assert len(value["differences"]) == 3 * pairs
    for found in value["differences"]:
        assert found.keys() == {"a", "b", "domain", "mean", "low", "high"}
        gap = everything.nll(found["a"], found["domain"]) - everything.nll(found["b"], found["domain"])
        assert found["mean"] == pytest.approx(gap)
        assert found["low"] <= found["mean"] <= found["high"]
    there, back = everything.difference("static", "random"), everything.difference("random", "static")
    assert there is not None
    assert back is not None
    assert (there.mean, there.low, there.high) == (-back.mean, -back.high, -back.low)
    assert everything.difference("static", "nonesuch") is None


def test_rows_of_another_model_join_under_a_new_name(model: Model, data: Data, everything: Evaluation) -> None:
    healed = compare(model, data, ["static"], KEEP)
    joined = everything.with_rows(healed, {"healed-static": "static"})
    assert joined.selectors == [*everything.selectors, "healed-static"]
    found = joined.difference("healed-static", "static")
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((0, 0, 0), abs=TOLERANCE)
    with pytest.raises(IfpruneError, match="same answers"):
        everything.with_rows(compare(model, {"code": data["code"]}, ["static"], KEEP), {"healed-static": "static"})


def test_rows_join_only_where_they_were_measured(everything: Evaluation) -> None:
    """A domain without rows, other answers, no such row, a name that is taken: each in one line."""
    maths = [row for row in everything.rows if row.domain == "maths"]
    shorter = tuple(replace(row, tokens=tuple(count - 1 for count in row.tokens)) for row in everything.rows)
    for other in (
        replace(everything, rows=tuple(maths)),
        replace(everything, rows=()),
        replace(everything, rows=shorter),
    ):
        with pytest.raises(IfpruneError, match="did not measure the same answers"):
            everything.with_rows(other, {"again": "static"})
        with pytest.raises(IfpruneError, match="did not measure the same answers"):
            other.with_rows(everything, {"again": "static"})
    with pytest.raises(IfpruneError, match="the other evaluation has no row 'learned'; measure it, too"):
        everything.with_rows(everything, {"again": "learned"})
    with pytest.raises(IfpruneError, match="there is a row 'static' already"):
        everything.with_rows(everything, {"static": "dense"})


def test_acceptance_equals_a_plain_one_in_float64(
    tiny_checkpoint: Path, data: Data, table: Table, everything: Evaluation
) -> None:
    static = top_k(open_model(tiny_checkpoint).prior, KEEP, "static")
    by_row = {row.selector: {} for row in everything.rows}  # type: dict[str, dict[str, Row]]
    for row in everything.rows:
        by_row[row.selector][row.domain] = row
    for domain, items in data.items():
        for name in ("dense", "static", "matched"):
            chosen = {"dense": None, "static": static}
            expected = [
                plain_acceptance(tiny_checkpoint, item, chosen.get(name, table.selections[item.instruction]))
                for item in items
            ]
            row = by_row[name][domain]
            assert row.accepted == pytest.approx(expected, abs=TOLERANCE)
            mean = np.average(expected, weights=[int(item.mask.sum()) for item in items])
            assert row.acceptance == pytest.approx(mean, abs=TOLERANCE)
        assert max(by_row["static"][domain].accepted or ()) < 0.999
    assert everything.acceptance("static") == pytest.approx(
        np.mean([row.acceptance for row in by_row["static"].values()])
    )


def test_acceptance_of_a_prompt_that_is_read_densely_and_of_a_long_answer(tiny_checkpoint: Path, model: Model) -> None:
    item = example("long", 20, 300, 8)  # more positions than are read at once
    found = compare(model, {"x": [item]}, ["activation", "dense", "static"], KEEP)
    chosen = make_selector(model, "activation").select(
        Instruction(item.instruction, tuple(item.tokens[:20].tolist())), KEEP
    )
    expected = plain_acceptance(tiny_checkpoint, item, chosen.selection, dense_until=19)
    assert found.acceptance("activation") == pytest.approx(expected, abs=TOLERANCE)
    assert found.acceptance("dense") == pytest.approx(1, abs=TOLERANCE)
    without = compare(model, {"x": [item]}, ["activation", "static"], KEEP)
    assert without.acceptance("static") is None
    assert without.to_dict()["rows"][0]["acceptance_per_prompt"] is None
    assert without.nll("activation") == pytest.approx(found.nll("activation"), abs=TOLERANCE)


def test_which_rows_there_are(model: Model) -> None:
    assert "learned" not in available_rows(model, 2)
    assert set(ROWS) - set(available_rows(model, 2)) == {"learned", "matched"}
    assert set(available_rows(model, 2)) - set(available_rows(model, 1)) == {"cross-domain"}


@pytest.mark.parametrize(
    ("names", "counts", "error", "words"),
    [
        (["statik"], {"a": 2}, IfpruneError, "unknown selector 'statik'"),
        ([], {"a": 2}, IfpruneError, "no selectors"),
        (["dense"], {}, DataError, "at least one domain"),
        (["dense"], {"a": 2, "b": 0}, DataError, "domain 'b' has no prompts"),
        (["dense"], {"all": 2}, DataError, "'all'"),
        (["mismatched"], {"a": 2, "b": 1}, DataError, "domain 'b' has 1 usable"),
        (["static-own"], {"a": 1}, DataError, "domain 'a' has 1 usable"),
        (["cross-domain"], {"a": 2}, DataError, "two domains"),
        (["learned"], {"a": 2}, IfpruneError, "no trained predictor"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    model: Model, names: list[str], counts: dict[str, int], error: type[IfpruneError], words: str
) -> None:
    data = {name: [example(f"{name}{i}", 4, 4, i) for i in range(count)] for name, count in counts.items()}
    with pytest.raises(error, match=words):
        compare(model, data, names, KEEP)


def test_a_repeated_prompt_is_refused(model: Model) -> None:
    item = example("k", 4, 4, 0)
    with pytest.raises(DataError, match="repeats a prompt"):
        compare(model, {"a": [item, item]}, ["dense"], KEEP)


def test_a_loss_that_is_no_number_is_an_error(tiny_checkpoint: Path) -> None:
    broken = open_model(tiny_checkpoint)
    broken.module.model.norm.weight = broken.module.model.norm.weight * float("nan")
    with pytest.raises(IfpruneError, match=r"dense, domain 'a', prompt 1: the loss is not a finite number"):
        compare(broken, {"a": [example("k", 4, 4, 0)]}, ["dense"], KEEP)
    broken.close()


def test_a_prompt_of_another_domain_is_never_the_same_prompt(model: Model) -> None:
    class Own:
        name = "own"

        def select(self, instruction: Instruction, keep: Sequence[int]) -> Selected:
            return Selected(random_selection(WIDTHS, keep, int(instruction.text.removeprefix("text of k"))))

    same = [example(f"k{i}", 4, 6, i) for i in range(3)]
    for seed in range(5):
        found = compare(model, {"a": same, "b": same}, ["matched", "cross-domain"], KEEP, matched=Own(), seed=seed)
        for domain in "ab":
            pairs = zip(rows(found, "matched")[domain], rows(found, "cross-domain")[domain], strict=True)
            assert all(abs(own - other) > TOLERANCE for own, other in pairs)
