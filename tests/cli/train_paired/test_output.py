"""What `ifprune train --stage pretrain` and `sft` make: `convert` takes it, and the figures are those of the arms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ifprune_convert.packing import quantization_of
from ifprune_convert.pipeline import Options
from ifprune_mlx import Instruction, load, make_selector
from ifprune_mlx.data.dataset import Record, split
from ifprune_mlx.selection.predictor import Head, load_predictor
from ifprune_mlx.selection.selection import top_k
from ifprune_mlx.train.full_finetune import FullModel
from ifprune_mlx.train.lora import LoRAModel
from tests.cli.process import run_here
from tests.cli.train_paired.runs import chats, command, metrics, settings, texts, write
from tests.ifprune_mlx.reference import TOLERANCE, logits
from tests.tiny import write_checkpoint
from tests.tiny_predictor import write_predictor


@pytest.mark.parametrize(("stage", "gains"), [("sft", True), ("pretrain", False)])
def test_convert_takes_what_was_trained(
    stage: str, gains: bool, tiny_checkpoint: Path, tmp_path: Path, data: dict[str, list[str]], predictor: Path
) -> None:
    """Adapter, head, gains and prior go into a checkpoint that selects and computes as the learned arm did."""
    out = tmp_path / "out"
    given = command(stage, tiny_checkpoint, out, data[stage], "--predictor", predictor, "--selector", "learned")
    given += ["--gain-learning-rate", "0.05"] * gains
    done = run_here(*given, "--selector", "static", "--selector", "none", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["stage"], result["steps"], result["path"]) == (stage, 7, str(out))
    assert result["tokens"] == metrics(out)[-2]["tokens"] > 0
    evaluations = [line for line in metrics(out) if "evaluation" in line]
    assert [line["step"] for line in evaluations] == [0, 3, 6, 7]
    rows = {"dense", "static", "activation-sliced", "random", "learned", "mismatched", "cross-domain"}
    assert evaluations[-1]["evaluation"].keys() == rows | {"healed-static", "healed-dense"}
    first, last = (line["evaluation"] for line in (evaluations[0], evaluations[-1]))
    assert all(first[name] == last[name] for name in ("dense", "static", "activation-sliced", "random"))
    assert all(first[name] != last[name] for name in ("learned", "healed-static", "healed-dense"))
    np.testing.assert_allclose(
        list(first["healed-dense"].values()), list(first["dense"].values()), rtol=1e-5
    )  # untrained
    np.testing.assert_allclose(list(first["healed-static"].values()), list(first["static"].values()), rtol=1e-5)
    assert "nats per token before the step" in done.stderr
    assert "learned - healed-static" in done.stderr

    source = tiny_checkpoint.with_name(f"source-of-{tiny_checkpoint.name}")
    parts = ["--predictor", out / "predictor", "--adapter", out / "adapters" / "learned"]
    done = run_here(
        "convert", "--model", source, "--mlx-path", tmp_path / "ifp", *parts, "--prior", out / "prior.safetensors"
    )
    assert done.returncode == 0, done.stderr
    converted, tokenizer = load(tmp_path / "ifp")
    base, _ = load(tiny_checkpoint)
    adapted = LoRAModel(base, rank=4, scale=2.0)
    adapted.use(adapted.read(out / "adapters" / "learned"))
    adapted.multiply(adapted.read_gains(out / "adapters" / "learned"))
    assert (out / "adapters" / "learned" / "gains.safetensors").exists() == gains
    trained = load_predictor(out / "predictor", base.module, tokenizer, 512, (128, 128))
    keep, text = converted.keep(0.25), "code question 3"
    wanted = top_k(trained.scores(text), keep, "learned")
    selection = make_selector(converted).select(Instruction(text, ()), keep).selection
    assert selection.hash == wanted.hash
    converted.switch(selection)
    base.switch(wanted)
    tokens = tokenizer.encode(text)
    np.testing.assert_allclose(logits(converted, tokens), logits(base, tokens), atol=10 * TOLERANCE)
    for ours, theirs in zip(converted.prior, mx.load(str(out / "prior.safetensors")).values(), strict=False):
        assert ours.shape == theirs.shape


def test_whole_weights_go_through_convert(
    tiny_checkpoint: Path, tmp_path: Path, data: dict[str, list[str]], predictor: Path
) -> None:
    """`--fine-tune-type full`, stopped and gone on with; the converted model computes what the static arm did. Its own
    learning rate is lower than that of adapters."""
    out = tmp_path / "out"
    given = command("sft", tiny_checkpoint, out, data["sft"], "--predictor", predictor, "--fine-tune-type", "full")
    place = given.index("--learning-rate")
    del given[place : place + 2]
    given += ["--eval-prompts", "0", "--grad-checkpoint"]
    done = run_here(*given)
    assert done.returncode == 0, done.stderr
    assert settings(out)["settings"]["learning_rate"] == 1e-4
    assert settings(out)["fine_tune_type"] == "full"
    done = run_here(*given)
    assert "goes on after step 7 of 7" in done.stderr
    source = tiny_checkpoint.with_name(f"source-of-{tiny_checkpoint.name}")
    adapter = out / "adapters" / "static"
    done = run_here("convert", "--model", source, "--mlx-path", tmp_path / "ifp", "--adapter", adapter)
    assert done.returncode == 0, done.stderr
    converted, tokenizer = load(tmp_path / "ifp")
    base, _ = load(tiny_checkpoint)
    tokens = tokenizer.encode("code question 3")
    before = logits(base, tokens)
    full = FullModel(base)
    full.use(full.read(adapter))
    selection = top_k(converted.prior, converted.keep(0.25), "static")
    converted.switch(selection)
    base.switch(selection)
    np.testing.assert_allclose(logits(converted, tokens), logits(base, tokens), atol=TOLERANCE)
    base.switch(None)
    assert np.abs(logits(base, tokens) - before).max() > 10 * TOLERANCE


def test_whole_weights_of_a_quantized_base_are_refused(tmp_path: Path, data: dict[str, list[str]]) -> None:
    """In one line that says what else to do."""
    quantized = Options(quantization=quantization_of("affine", 32, 4))
    folder = write_checkpoint(tmp_path / "checkpoint", options=quantized)
    given = command("sft", folder, tmp_path / "out", data["sft"], "--selector", "static", "--fine-tune-type", "full")
    done = run_here(*given)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "checkpoint: its weights are quantized" in line
    assert "--fine-tune-type lora" in line


def test_a_predictor_with_its_own_backbone_comes_out_whole(
    tiny_checkpoint: Path, tmp_path: Path, data: dict[str, list[str]]
) -> None:
    """The output's predictor folder is one that `convert` takes: backbone and tokenizer lie beside the head."""
    given = write_predictor(tmp_path / "predictor")
    done = run_here(*command("sft", tiny_checkpoint, tmp_path / "out", data["sft"], "--predictor", given))
    assert done.returncode == 0, done.stderr
    source = tiny_checkpoint.with_name(f"source-of-{tiny_checkpoint.name}")
    done = run_here(
        "convert", "--model", source, "--mlx-path", tmp_path / "ifp", "--predictor", tmp_path / "out" / "predictor"
    )
    assert done.returncode == 0, done.stderr
    old, new = (Head.load(folder / "predictor" / "head.safetensors") for folder in (tmp_path, tmp_path / "ifp"))
    assert not mx.array_equal(old.second, new.second)  # it learned


def test_a_finished_run_is_left_as_it_is(
    tiny_checkpoint: Path, tmp_path: Path, data: dict[str, list[str]], predictor: Path
) -> None:
    """Run again, it says so and trains nothing."""
    given = command("sft", tiny_checkpoint, tmp_path / "out", data["sft"], "--predictor", predictor)
    assert run_here(*given).returncode == 0
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    done = run_here(*given)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'out'}\n"
    assert "goes on after step 7 of 7" in done.stderr
    assert before == {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}


def test_chats_computed_together_give_the_same_curve(
    tiny_checkpoint: Path, tmp_path: Path, data: dict[str, list[str]], predictor: Path
) -> None:
    """Up to rounding."""
    for folder, more in (("alone", []), ("together", ["--micro-batch-size", "3"])):
        given = command("sft", tiny_checkpoint, tmp_path / folder, data["sft"], "--predictor", predictor)
        assert run_here(*given, "--eval-prompts", "0", *more).returncode == 0
    alone, together = ([line["arms"] for line in metrics(tmp_path / name)] for name in ("alone", "together"))
    for one, other in zip(alone, together, strict=True):
        for arm in one:
            for domain in one[arm]:
                assert other[arm][domain] == pytest.approx(one[arm][domain], rel=1e-3, abs=1e-5)


def test_a_collapsed_run_stops_and_can_be_converted(
    tiny_checkpoint: Path, tmp_path: Path, data: dict[str, list[str]]
) -> None:
    """A head that says the same to every prompt is told at the first evaluation; what there is was saved."""
    folder, out = tmp_path / "predictor", tmp_path / "out"
    folder.mkdir()
    constant = Head(mx.zeros((8, 64)), None, mx.zeros((256, 8)), mx.random.normal((256,)), (128, 128), layers=1)
    constant.save(folder / "head.safetensors")
    given = command("sft", tiny_checkpoint, out, data["sft"], "--predictor", folder, "--stop-on-collapse", "--json")
    done = run_here(*given)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["collapsed"], result["steps"]) == (True, 0)
    assert "COLLAPSED: any two prompts of a domain select the same neurons" in done.stderr
    assert (out / "adapters" / "learned" / "adapters.safetensors").is_file()
    assert run_here(*given).returncode == 0
    assert [line["step"] for line in metrics(out)] == [0]


def test_without_a_learned_arm_no_predictor_is_needed(
    tiny_checkpoint: Path, tmp_path: Path, data: dict[str, list[str]]
) -> None:
    """The static and dense arms stand on the checkpoint alone."""
    given = command("sft", tiny_checkpoint, tmp_path / "out", data["sft"], "--selector", "static", "--selector", "none")
    done = run_here(*given, "--teacher", "0")
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "out")[1]["arms"].keys() == {"static", "none"}
    assert not (tmp_path / "out" / "predictor").exists()
    assert {folder.name for folder in (tmp_path / "out" / "adapters").iterdir()} == {"static", "none"}


def held_out(row: dict[str, Any]) -> bool:
    return split(Record((), text=row.get("text", row.get("prompt"))), 0.4) == "valid"


@pytest.mark.parametrize(("stage", "count"), [("sft", 1), ("pretrain", 0)])
def test_too_few_held_out_prompts_are_not_evaluated_on(
    stage: str, count: int, tiny_checkpoint: Path, tmp_path: Path, predictor: Path
) -> None:
    """A domain with one held-out chat, or whose held-out texts are too short, is trained all the same, and told."""
    if stage == "sft":
        held = [row for row in chats("code", 30) if held_out(row)][:1]
        rows = [row for row in chats("code", 30) if not held_out(row)] + held
    else:
        rows = [row if not held_out(row) else {"text": row["text"][:7]} for row in texts("code", 20)]
        rows = [row for row in rows if len(row["text"]) > 7 or held_out(row)]
    given = ["--data", write(tmp_path / "code.jsonl", rows), "--predictor", predictor]
    done = run_here(*command(stage, tiny_checkpoint, tmp_path / "out", given))
    assert done.returncode == 0, done.stderr
    assert f"code: held out are {count} prompts, too few to evaluate on" in done.stderr
    assert [line["step"] for line in metrics(tmp_path / "out")] == list(range(1, 8))
