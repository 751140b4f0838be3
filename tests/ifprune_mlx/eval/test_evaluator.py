"""`evaluate` from Python: what a configuration must hold, and when results come."""

from __future__ import annotations

import json
import shutil
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest

from ifprune_mlx import DataError, IfpruneError, Model, load
from ifprune_mlx.eval import EvalConfig, evaluate
from ifprune_mlx.eval.evaluation import Evaluation
from ifprune_mlx.eval.evaluator import encode_domains, read_domains
from ifprune_mlx.eval.losses import compare

WORDS = ["sort", "list", "sum", "river"]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "code.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": f"write {w}", "completion": f"def {w}(): pass"}) + "\n" for w in WORDS)
    )
    return file


def test_every_density_is_given_as_soon_as_it_is_complete(tiny_checkpoint: Path, chats: Path) -> None:
    config = EvalConfig(
        tiny_checkpoint, data={"code": chats}, selectors=("static", "dense"), densities=(0.75, 0.25), limit=3
    )
    told: list[str] = []
    seen: list[Evaluation] = []

    def loaded(path: Any) -> Any:
        told.append(f"load {Path(path).name}")
        return load(path)

    def complete(evaluation: Evaluation) -> None:
        told.append(f"density {evaluation.density}")
        seen.append(evaluation)

    result = evaluate(config, load=loaded, on_evaluation=complete)
    assert told == ["load checkpoint", "density 0.75", "density 0.25"]
    assert result.evaluations == tuple(seen)
    assert result.active_parameters[1] < result.active_parameters[0] < result.total_parameters
    assert result.model == tiny_checkpoint.name
    # What it is made of gives the same.
    model, tokenizer = load(tiny_checkpoint)
    examples = encode_domains(
        model, tokenizer, read_domains({"code": chats}, print), limit=3, max_length=512, seed=0, report=print
    )
    again = compare(model, examples, ["static", "dense"], model.keep(0.25))
    model.close()
    assert again.nll("static") == pytest.approx(seen[1].nll("static"), abs=1e-5)


def test_every_density_is_complete_before_the_next_with_healed_checkpoints_as_well(
    tiny_checkpoint: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (shutil.copytree(tiny_checkpoint, tmp_path / name) for name in ("one", "two"))
    told: list[str] = []
    close = Model.close
    monkeypatch.setattr(Model, "close", lambda model: (told.append("close"), close(model)))

    def loaded(path: Any) -> Any:
        told.append(f"load {Path(path).name}")
        return load(path)

    config = EvalConfig(
        tiny_checkpoint,
        {"code": chats},
        selectors=("dense", "static"),
        densities=(0.5, 0.25),
        healed_static=one,
        healed_dense=two,
    )
    result = evaluate(config, load=loaded, on_evaluation=lambda found: told.append(f"density {found.density}"))
    loads = ["load checkpoint", "close", "load one", "close", "load two"]
    assert told == [*loads, "density 0.5", "close", *loads, "density 0.25", "close"]
    for found in result.evaluations:
        assert found.selectors == ["dense", "static", "healed-static", "healed-dense"]
        assert found.acceptance("healed-static") == pytest.approx(found.acceptance("static"), abs=1e-5)
        assert found.acceptance("healed-dense") == pytest.approx(1, abs=1e-5)
    # Without `dense` nothing is measured for its sake.
    (found,) = evaluate(replace(config, selectors=("static",), densities=(0.5,)), load=loaded).evaluations
    assert found.selectors == ["static", "healed-static", "healed-dense"]
    assert found.acceptance("healed-static") is None


def test_a_configuration_is_checked_when_it_is_made_and_stays_as_it_is(chats: Path) -> None:
    with pytest.raises(DataError, match="evaluate needs data"):
        EvalConfig("x")
    with pytest.raises(IfpruneError, match="unknown selector 'statik'"):
        EvalConfig("x", {"code": chats}, selectors=("statik",))
    with pytest.raises(IfpruneError, match="none that tasks can be measured with"):
        EvalConfig("x", choices={"x": chats}, selectors=("oracle",))
    with pytest.raises(IfpruneError, match="evaluate needs a model"):
        evaluate(EvalConfig(data={"code": chats}))
    config = EvalConfig("x", {"code": chats})
    with pytest.raises(FrozenInstanceError):
        config.limit = 3  # type: ignore[misc]
