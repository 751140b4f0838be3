"""Verdicts on planted answers: dynamic is only who gives a prompt what its own answer was written on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pytest

from ifprune_mlx import DataError, Instruction, Model, Selected, Selection, make_selector
from ifprune_mlx.data.tokenize import Example
from ifprune_mlx.eval.diagnose import Diagnosis, diagnose
from ifprune_mlx.selection.predictor import PredictorError
from ifprune_mlx.selection.selection import top_k
from tests.ifprune_mlx.reference import open_model
from tests.planted import Table, plant, random_selection, write_sharp_checkpoint

KEEP = (64, 64)
COUNT = 10
Selections = dict[str, dict[str, Selection]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    model = open_model(write_sharp_checkpoint(tmp_path_factory.mktemp("sharp") / "checkpoint"))
    yield model
    model.close()


def around(model: Model, core: Selection, share: float, generator: np.random.Generator) -> Selection:
    """Arbitrary neurons, but for `share` of the core's."""
    ids = []
    for kept, width in zip(core.ids, core.widths, strict=True):
        stays = generator.permutation(kept)[: int(share * len(kept))]
        others = generator.permutation(np.setdiff1d(np.arange(width), stays))[: len(kept) - len(stays)]
        ids.append(np.sort([*stays, *others]).astype(np.int32))
    return Selection(tuple(ids), core.widths, "planted")


@pytest.fixture(scope="module")
def own(model: Model) -> Selections:
    """Every prompt's own selection: two thirds of what its domain needs, and neurons of its own."""
    generator = np.random.default_rng(0)
    cores = {domain: random_selection(model, KEEP, generator) for domain in ("code", "maths")}
    return {
        domain: {f"{domain} {i}": around(model, core, 0.67, generator) for i in range(COUNT)}
        for domain, core in cores.items()
    }


@pytest.fixture(scope="module")
def data(model: Model, own: Selections) -> dict[str, list[Example]]:
    return {domain: plant(model, chosen, domain, seed=1, answer=12) for domain, chosen in own.items()}


def judged(
    model: Model, data: Mapping[str, list[Example]], selections: Mapping[str, Mapping[str, Selection]]
) -> Diagnosis:
    return diagnose(model, data, Table({k: v for chosen in selections.values() for k, v in chosen.items()}), KEEP)


def domain_means(own: Selections) -> dict[str, Selection]:
    """The neurons that most prompts of a domain need."""
    return {
        domain: top_k(
            [
                np.sum([np.isin(np.arange(128), selection.ids[layer]) for selection in chosen.values()], axis=0).astype(
                    np.float32
                )
                for layer in range(2)
            ],
            KEEP,
            "mean",
        )
        for domain, chosen in own.items()
    }


def test_a_selector_that_knows_its_prompt_is_dynamic(
    model: Model, data: dict[str, list[Example]], own: Selections
) -> None:
    found = judged(model, data, own)
    assert found.verdict == "dynamic"
    assert found.explanation.startswith("dynamic: ")
    assert "matched - mismatched is -" in found.explanation
    assert "\n" not in found.explanation
    value = found.to_dict()
    assert value.keys() >= {
        "verdict", "matched_nll", "mismatched_nll", "cross_domain_nll", "static_nll",
        "overlap_within", "overlap_across",
    }  # fmt: skip
    assert value["matched_nll"] < value["mismatched_nll"] < value["cross_domain_nll"]
    assert value["overlap_within"] > value["overlap_across"]
    assert value["domains"] == {"code": COUNT, "maths": COUNT}
    assert {difference["domain"] for difference in value["differences"]} == {"code", "maths", "all"}
    # One domain is enough, and has no other to compare with.
    alone = diagnose(model, {"code": data["code"]}, Table(own["code"]), KEEP).to_dict()
    assert (alone["verdict"], alone["cross_domain_nll"], alone["overlap_across"]) == ("dynamic", None, None)


def test_the_prior_alone_is_static(model: Model, data: dict[str, list[Example]]) -> None:
    found = diagnose(model, data, make_selector(model, "static"), KEEP)
    assert found.verdict == "static"
    assert "the same neurons" in found.explanation
    assert found.to_dict()["matched_nll"] == found.to_dict()["static_nll"]


def test_domain_means_are_static(model: Model, data: dict[str, list[Example]], own: Selections) -> None:
    means = domain_means(own)
    found = judged(model, data, {domain: dict.fromkeys(chosen, means[domain]) for domain, chosen in own.items()})
    assert found.verdict == "static"
    value = found.to_dict()
    # Though they are better than another domain's, and than the static selection.
    assert value["matched_nll"] == value["mismatched_nll"] < min(value["cross_domain_nll"], value["static_nll"])


def test_domain_means_with_noise_are_static(model: Model, data: dict[str, list[Example]], own: Selections) -> None:
    means, generator = domain_means(own), np.random.default_rng(5)
    noisy = {
        domain: {text: around(model, means[domain], 0.8, generator) for text in chosen}
        for domain, chosen in own.items()
    }
    found = judged(model, data, noisy)
    assert found.verdict == "static"
    assert "though better than that of another domain's" in found.explanation
    assert found.to_dict()["agreement_within"] < 0.9


def test_selections_dealt_out_within_a_domain_are_static(
    model: Model, data: dict[str, list[Example]], own: Selections
) -> None:
    dealt = {
        domain: dict(zip(chosen, [*list(chosen.values())[3:], *list(chosen.values())[:3]], strict=True))
        for domain, chosen in own.items()
    }
    assert judged(model, data, dealt).verdict == "static"


def test_arbitrary_selections_are_broken(model: Model, data: dict[str, list[Example]]) -> None:
    found = diagnose(model, data, make_selector(model, "random", seed=77), KEEP)
    assert found.verdict == "broken"
    assert "no better than arbitrary neurons" in found.explanation


def test_scores_that_are_no_numbers_are_broken(model: Model, data: dict[str, list[Example]]) -> None:
    class Poisoned:
        name = "learned"

        def select(self, instruction: Instruction, keep: object) -> Selected:
            raise PredictorError("the predictor's scores contain NaN or infinity")

    found = diagnose(model, data, Poisoned(), KEEP)
    assert (found.verdict, found.density, found.evaluation) == ("broken", 0.5, None)
    assert "NaN" in found.explanation
    value = found.to_dict()
    assert value["verdict"] == "broken"
    assert all(value[key] is None for key in ("matched_nll", "mismatched_nll", "static_nll", "overlap_within"))


def test_at_full_density_everything_is_static(model: Model, data: dict[str, list[Example]]) -> None:
    assert diagnose(model, data, make_selector(model, "random"), (128, 128)).verdict == "static"


def test_too_few_prompts_are_refused(model: Model, data: dict[str, list[Example]], own: Selections) -> None:
    with pytest.raises(DataError, match="4 prompts are too few"):
        diagnose(model, {"code": data["code"][:4]}, Table(own["code"]), KEEP)


def test_planting_is_deterministic(model: Model, own: Selections) -> None:
    once, again = (plant(model, own["code"], "code", seed=1, answer=4) for _ in range(2))
    assert [item.tokens.tolist() for item in once] == [item.tokens.tolist() for item in again]
    assert all(item.mask.sum() == 4 for item in once)
