"""Training from Python: one config, one function; a run that was stopped goes on, and bad settings are named."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ifprune_mlx import DataError, IfpruneError
from ifprune_mlx.selection.predictor import Head
from ifprune_mlx.train import TrainConfig, train
from ifprune_mlx.train.trainer import Trainer
from tests.cli.train_paired.runs import metrics
from tests.ifprune_mlx.train.configs import config


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    """Two domains of 30 chats."""
    files = {}
    for domain in ("code", "maths"):
        rows = [{"prompt": f"{domain} question {i}", "completion": f"{domain} {i}"} for i in range(30)]
        files[domain] = tmp_path / f"{domain}.jsonl"
        files[domain].write_text("\n".join(json.dumps(row) for row in rows))
    return files


def test_all_stages_train(tiny_checkpoint: Path, tmp_path: Path, data: dict[str, Path]) -> None:
    """Calibrate and distill share what they measured; the predictor goes into the arms of sft."""
    shared: dict[str, Any] = {"model": tiny_checkpoint, "data": data, "seed": 3}
    measuring = TrainConfig(stage="calibrate", output=tmp_path / "measured", layers=1, rank=8, **shared)
    lines: list[str] = []
    prior = train(measuring, report=lines.append)
    assert prior.path == tmp_path / "measured" / "prior.safetensors"
    assert prior.path.is_file()
    assert prior.figures["domains"] == ["code", "maths"]
    parts = {file: file.stat().st_mtime_ns for file in (tmp_path / "measured" / "targets").iterdir()}
    distilled = train(replace(measuring, stage="distill"), report=lines.append)
    assert parts == {file: file.stat().st_mtime_ns for file in (tmp_path / "measured" / "targets").iterdir()}
    assert Head.load(distilled.path / "head.safetensors").layers == 1
    assert distilled.to_dict()["explained"] == distilled.figures["explained"]
    assert [line for line in lines if line.startswith("code: ")] == [f"code: {sum_of(data, 'code')} chats"] * 2
    healing = TrainConfig(
        stage="sft",
        output=tmp_path / "healed",
        predictor=distilled.path,
        iters=2,
        batch_size=2,
        eval_prompts=0,
        **shared,
    )
    result = train(healing, report=lines.append)
    assert (result.path, result.figures["steps"], result.figures["collapsed"]) == (tmp_path / "healed", 2, False)
    assert (result.path / "adapters" / "learned" / "adapters.safetensors").is_file()


def sum_of(data: dict[str, Path], domain: str) -> int:
    """Chats of a domain that are trained on."""
    from ifprune_mlx.data.dataset import read_records, split

    return sum(split(record, 0.15) == "train" for record in read_records(data[domain], domain))


def test_a_stopped_run_goes_on_with_what_it_may_change(
    tiny_checkpoint: Path, tmp_path: Path, data: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after two steps, and gone on with in larger micro batches, checkpointed: the undisturbed losses."""
    whole = TrainConfig(
        stage="sft",
        model=tiny_checkpoint,
        data=data,
        output=tmp_path / "whole",
        selector=("static",),
        iters=4,
        batch_size=4,
        save_every=1,
        eval_prompts=0,
    )
    train(whole)
    advance = Trainer.advance

    def stops(trainer: Trainer) -> dict[str, Any]:
        if trainer.step == 2:
            raise KeyboardInterrupt
        return advance(trainer)

    stopped = replace(whole, output=tmp_path / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", stops)
        with pytest.raises(KeyboardInterrupt):
            train(stopped)
    lines: list[str] = []
    changed = replace(stopped, micro_batch_size=2, grad_checkpoint=True, save_every=9, steps_per_report=1)
    assert train(changed, report=lines.append).figures["steps"] == 4
    assert lines[0] == "goes on after step 2 of 4"
    for ours, theirs in zip(metrics(tmp_path / "stopped"), metrics(tmp_path / "whole"), strict=True):
        for domain, losses in theirs["arms"]["static"].items():
            assert ours["arms"]["static"][domain] == pytest.approx(losses, rel=1e-3, abs=1e-5)
    with pytest.raises(DataError, match="holds a run with another warmup;"):
        train(replace(changed, warmup=1))


def test_a_config_of_a_yaml_file(tmp_path: Path) -> None:
    """Names with - or _, lists, numbers that YAML takes for text; what is given beside the file counts."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "stage: sft\noutput: out\ndata: {code: code.jsonl}\nweight: {code: 2}\nselector: static\nlimit:\n"
        "densities: [0.25, 0.4-0.8]\nbatch-size: 4\nlearning_rate: 5e-3\n"
    )
    found = TrainConfig.from_yaml(file, batch_size=8)
    assert found == TrainConfig(
        stage="sft",
        output=Path("out"),
        data={"code": Path("code.jsonl")},
        weight={"code": 2.0},
        selector=("static",),
        densities="0.25,0.4-0.8",
        batch_size=8,
        learning_rate=5e-3,
    )
    assert found.density_ranges == ((0.25, 0.25), (0.4, 0.8))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch: 4", "batch is no setting of training"),
        ("json: true", "json is no setting of training"),
        ("iters: 4", "has no output or no data"),
        ("[]", "must hold options by name"),
        ("output: out\ndata: {}", "training needs data"),
        ("output: out\ndata: code.jsonl", "training needs data"),
    ],
)
def test_a_yaml_file_that_is_no_config_is_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(IfpruneError, match=words):
        TrainConfig.from_yaml(file)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"stage": "heal"}, "--stage heal: give one of calibrate, distill, pretrain, sft"),
        ({"dtype": "int8"}, "--dtype int8: give one of float16"),
        ({"iters": 0}, "--iters 0: give at least 1"),
        ({"iters": 1.5}, "--iters 1.5: give a whole number"),
        ({"iters": "many"}, "--iters many: give a whole number"),
        ({"batch_size": None}, "--batch-size None: give a whole number"),
        ({"held_out": 0.95}, "--held-out 0.95: give at least 0 and at most 0.9"),
        ({"learning_rate": float("nan")}, "--learning-rate nan: give at least 0"),
        ({"weight": {"b": 1}}, "--weight b: there is no --data b=FILE"),
        ({"weight": {"a": "much"}}, "--weight a: expected NAME=X"),
        ({"densities": "half"}, "--densities half: expected numbers or ranges"),
        ({"eval_prompts": 1}, "give 0, or 2 and more"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        config(**wrong)


def test_training_needs_a_model() -> None:
    with pytest.raises(DataError, match="training needs a model"):
        train(config())


def test_the_runtime_does_not_import_training() -> None:
    """Nor do the config and the names of `ifprune_mlx.train` import MLX before they are used."""
    code = (
        "import sys, ifprune_mlx; assert not any(name.startswith('ifprune_mlx.train') for name in sys.modules);"
        "from ifprune_mlx.train import TrainConfig; assert 'mlx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
