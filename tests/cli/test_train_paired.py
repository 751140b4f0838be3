"""`ifprune train --stage pretrain` and `sft`: what they make is taken by `convert`, a kill loses nothing, bad input is
one line."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import yaml

from ifprune_convert.packing import quantization_of
from ifprune_convert.pipeline import Options
from ifprune_mlx import Instruction, load, make_selector
from ifprune_mlx.files import read_safetensors_header
from ifprune_mlx.predictor import Head, load_predictor
from ifprune_mlx.selection import top_k
from ifprune_mlx.train.adapter import Adapted
from ifprune_mlx.train.full import Full
from ifprune_mlx.train.records import Record, split
from tests.cli.process import run_here, start
from tests.ifprune_mlx.reference import TOLERANCE, logits
from tests.tiny import write_checkpoint
from tests.tiny_predictor import write_predictor

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "its", "dog", "ran", "to", "some", "big", "red", "house")
# Slow enough that a kill can be aimed.
_SLOW_STEPS = (
    "import time; from ifprune_mlx.train import paired; advance = paired.Run.advance; "
    "paired.Run.advance = lambda self: (time.sleep(0.15), advance(self))[1]"
)
_SLOW_MEASURES = (
    "import time; from ifprune_mlx.train import targets; attribution = targets.attribution; "
    "targets.attribution = lambda *given: (time.sleep(0.003), attribution(*given))[1]"
)
Command = list[str | Path]


def write(file: Path, rows: Sequence[dict[str, Any]]) -> str:
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return f"{file.stem}={file}"


def chats(domain: str, count: int) -> list[dict[str, Any]]:
    answer = "return x" if domain == "code" else "1 + 1"
    return [{"prompt": f"{domain} question {i}", "completion": answer} for i in range(count)]


def texts(domain: str, count: int) -> list[dict[str, Any]]:
    generator = random.Random(domain)
    return [{"text": f"{domain} {i} " + " ".join(generator.choices(WORDS, k=25))} for i in range(count)]


@pytest.fixture
def data(tmp_path: Path) -> dict[str, list[str]]:
    """Two domains of 30 chats, and of 20 texts, as --data options, by stage."""
    rows: dict[str, Callable[[str, int], list[dict[str, Any]]]] = {"sft": chats, "pretrain": texts}
    options: dict[str, list[str]] = {}
    for stage, make in rows.items():
        (tmp_path / stage).mkdir()
        for domain in ("code", "maths"):
            given = write(tmp_path / stage / f"{domain}.jsonl", make(domain, 30 if stage == "sft" else 20))
            options.setdefault(stage, []).extend(("--data", given))
    return options


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A predictor folder: a head on the model's first layer."""
    folder = tmp_path_factory.mktemp("predictor")
    mx.random.seed(11)
    arrays = [mx.random.normal(shape) for shape in ((8, 128), (8,), (256, 8), (256,))]
    Head(*arrays, (128, 128), "both", layers=1).save(folder / "head.safetensors")
    return folder


def command(stage: str, model: Path, output: Path, data: Sequence[str], *options: str | Path) -> Command:
    small = ["--iters", "7", "--batch-size", "2", "--max-seq-length", "64", "--lora-rank", "4", "--warmup", "2"]
    rates = ["--learning-rate", "1e-2", "--head-learning-rate", "1e-2", "--densities", "0.25,0.4-0.8", "--seed", "3"]
    often = ["--eval-prompts", "2", "--steps-per-eval", "3", "--held-out", "0.4", "--steps-per-report", "2"]
    return ["train", "--stage", stage, "--model", model, "--output", output, *data, *small, *rates, *often, *options]


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def settings(folder: Path) -> dict[str, Any]:
    """What the run in a folder did, from its state."""
    metadata = read_safetensors_header(folder / "state.safetensors").metadata
    found: dict[str, Any] = json.loads(metadata["run"])
    return found


def assert_alike(found: Any, wanted: Any) -> None:
    """The same JSON, numbers to 1e-5."""
    assert type(found) is type(wanted)
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert_alike(found[key], wanted[key])
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_alike(one, other)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-7)
    else:
        assert found == wanted


# What comes out.


@pytest.mark.parametrize("stage", ["sft", "pretrain"])
def test_convert_takes_what_was_trained(
    stage: str, tiny_checkpoint: Path, tmp_path: Path, data: dict[str, list[str]], predictor: Path
) -> None:
    """Adapter, head and prior go into a checkpoint that selects and computes as the learned arm did."""
    out = tmp_path / "out"
    given = command(stage, tiny_checkpoint, out, data[stage], "--predictor", predictor, "--selector", "learned")
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
    adapted = Adapted(base, rank=4, scale=2.0)
    adapted.use(adapted.read(out / "adapters" / "learned"))
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
    full = Full(base)
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


# Kills.


def kill_after(arguments: Command, cache: Path, prelude: str, reached: Callable[[], bool], delay: float) -> None:
    """Start a run, and kill it (SIGKILL) so many seconds after it got there."""
    with start(arguments, cache, prelude=prelude) as process:
        deadline = time.monotonic() + 100
        while not reached() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(delay)
        assert process.poll() is None, process.communicate()[1].decode()
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize(("stage", "save_every"), [("sft", "1"), ("pretrain", "2")])
def test_kills_leave_no_trace_in_the_curve(
    stage: str, save_every: str, tiny_checkpoint: Path, tmp_path: Path, data: dict[str, list[str]], predictor: Path
) -> None:
    """Killed three times at arbitrary moments and run again, the metrics are those of an undisturbed run."""
    more = ["--predictor", predictor, "--save-every", save_every]
    done = run_here(*command(stage, tiny_checkpoint, tmp_path / "whole", data[stage], *more))
    assert done.returncode == 0, done.stderr
    killed = tmp_path / "killed"
    given = command(stage, tiny_checkpoint, killed, data[stage], *more)
    generator = random.Random(stage)
    for step in sorted(generator.sample(range(1, 5), 3)):

        def reached(step: int = step) -> bool:
            file = killed / "metrics.jsonl"
            return file.is_file() and f'{{"step": {step}, "tokens"' in file.read_text()

        kill_after(given, tmp_path, _SLOW_STEPS, reached, generator.uniform(0, 0.15))
    done = run_here(*given)
    assert done.returncode == 0, done.stderr
    assert "goes on after step" in done.stderr
    assert_alike(metrics(killed), metrics(tmp_path / "whole"))
    for name in ("adapters/learned/adapters", "adapters/static/adapters", "predictor/head"):
        ours, theirs = (mx.load(str(folder / f"{name}.safetensors")) for folder in (killed, tmp_path / "whole"))
        assert isinstance(ours, dict)
        assert isinstance(theirs, dict)
        for key, value in theirs.items():
            np.testing.assert_allclose(np.array(ours[key]), np.array(value), atol=1e-5, err_msg=key)
    assert not list(killed.rglob(".*"))


def test_kills_leave_no_trace_in_a_distilled_head(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Killed in the middle of three parts of its targets and run again, distilling gives the undisturbed head."""
    options = ["--data", write(tmp_path / "code.jsonl", chats("code", 260)), "--layers", "1", "--rank", "8"]
    given: Command = ["train", "--model", tiny_checkpoint, *options, "--output"]
    done = run_here(*given, tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    killed = tmp_path / "killed"
    generator = random.Random(0)
    for part in range(3):

        def reached(part: int = part) -> bool:
            before = [killed / "targets" / f"part-{i:05d}.safetensors" for i in range(part)]
            return (killed / "targets" / "targets.json").is_file() and all(file.is_file() for file in before)

        kill_after([*given, killed], tmp_path, _SLOW_MEASURES, reached, generator.uniform(0, 0.1))
    done = run_here(*given, killed)
    assert done.returncode == 0, done.stderr
    (ours,), (theirs,) = metrics(killed), metrics(tmp_path / "whole")
    assert_alike({**ours, "path": ""}, {**theirs, "path": ""})
    one, other = (Head.load(folder / "predictor" / "head.safetensors") for folder in (killed, tmp_path / "whole"))
    np.testing.assert_allclose(np.array(one.second), np.array(other.second), atol=1e-5)


# Configuration files.


def test_a_yaml_file_gives_options_that_the_command_line_overrides(
    tiny_checkpoint: Path, tmp_path: Path, predictor: Path
) -> None:
    """Names with - or _, domains and weights as mappings, lists as lists; what is given twice is the command line's."""
    for domain in ("code", "maths"):
        write(tmp_path / f"{domain}.jsonl", chats(domain, 30))
    config = {
        "stage": "sft",
        "model": str(tiny_checkpoint),
        "data": {domain: str(tmp_path / f"{domain}.jsonl") for domain in ("code", "maths")},
        "weight": {"code": 3},
        "predictor": str(predictor),
        "selector": ["static", "learned"],
        "densities": [0.25, "0.4-0.8"],
        "iters": 3,
        "batch-size": 2,
        "learning_rate": "5e-3",
        "lora-rank": 2,
        "lora_scale": 4.0,
        "teacher": 0.25,
        "eval_prompts": 0,
        "strict": True,
        "seed": 9,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    done = run_here("train", "--config", tmp_path / "run.yaml", "--iters", "2", "--output", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 2
    found = settings(tmp_path / "out")
    wanted = {
        "arms": ["static", "learned"],
        "densities": [[0.25, 0.25], [0.4, 0.8]],
        "iterations": 2,
        "batch_size": 2,
        "learning_rate": 5e-3,
        "seed": 9,
    }
    assert wanted.items() <= found["settings"].items()
    assert (found["rank"], found["scale"], found["objective"]["teacher"]) == (2, 4.0, 0.25)
    assert {domain for line in metrics(tmp_path / "out") for domain in line["arms"]["static"]} == {"code", "maths"}


def test_the_order_of_config_and_options_does_not_matter(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """An option before --config overrides it too; single values may stand where several are allowed."""
    given = write(tmp_path / "code.jsonl", chats("code", 30))
    text = f"stage: sft\ndata: {given}\nselector: none\niters: 5\noutput: {tmp_path / 'out'}\neval-prompts: 0\nlimit:\n"
    (tmp_path / "run.yaml").write_text(text)
    done = run_here("train", "--iters", "1", "--model", tiny_checkpoint, "-c", tmp_path / "run.yaml")
    assert done.returncode == 0, done.stderr
    assert settings(tmp_path / "out")["settings"]["iterations"] == 1
    assert settings(tmp_path / "out")["settings"]["arms"] == ["none"]


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("learning-rat: 1", 1, "learning-rat is no option of ifprune train"),
        ("config: other.yaml", 1, "config is no option"),
        ("- iters", 1, "must hold options by name"),
        ("", 1, "must hold options by name"),
        ("iters: [", 1, "is no YAML"),
        ("iters: many", 2, "'--iters': Input should be a valid integer"),
        ("iters: {a: 1}", 2, "'--iters': Input should be a valid integer"),
        ("stage: heal", 2, "'heal'"),
        ("strict: 3", 2, "strict"),
        (None, 1, "cannot be read"),
    ],
)
def test_a_bad_yaml_file_is_one_line(tmp_path: Path, text: str | None, code: int, words: str) -> None:
    """What is wrong with it is told with its name, before anything is loaded."""
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    done = run_here("train", "--config", file, "--output", tmp_path / "out")
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.splitlines()
    assert words in line
    assert code == 2 or line.startswith(f"ifprune: error: {file}: ")
    assert not (tmp_path / "out").exists()


# Bad input.


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        (["--densities", "half"], 1, "--densities half: expected numbers or ranges"),
        (["--densities", ""], 1, "expected numbers or ranges"),
        (["--densities", "0"], 1, "density 0 to 0: give numbers above 0 and at most 1"),
        (["--densities", "0.5,1.5"], 1, "density 1.5 to 1.5"),
        (["--densities", "0.8-0.2"], 1, "the lower first"),
        (["--densities", "nan"], 1, "above 0 and at most 1"),
        (["--weight", "code"], 1, "--weight code: expected NAME=X"),
        (["--weight", "code=much"], 1, "expected NAME=X"),
        (["--weight", "other=2"], 1, "there is no --data other=FILE"),
        (["--weight", "code=0"], 1, "give a number above 0"),
        (["--weight", "code=nan"], 1, "give a number above 0"),
        (["--selector", "static", "--selector", "static"], 1, "arms static, static: give each of"),
        (["--selector", "random"], 2, "'random'"),
        (["--selector", "learned"], 1, "give --predictor FOLDER"),
        (["--selector", "learned", "--predictor", "nowhere"], 1, "nowhere/head.safetensors"),
        (["--start", "nowhere"], 1, "nowhere/adapters/static/adapters.safetensors"),
        (["--eval-prompts", "1"], 1, "give 0, or 2 and more"),
        (["--epsilon", "0"], 1, "an epsilon above 0"),
        (["--teacher", "1.5"], 2, "--teacher"),
        (["--iters", "0"], 2, "--iters"),
        (["--learning-rate", "-1"], 2, "--learning-rate"),
        (["--max-seq-length", "16"], 1, "the answer begins after 16 tokens"),
        (["--data", "other=missing.jsonl"], 1, "missing.jsonl"),
        (["--model", "missing-model"], 1, "missing-model"),
    ],
)
def test_bad_input_is_one_line(
    tiny_checkpoint: Path, tmp_path: Path, data: dict[str, list[str]], changes: list[str], code: int, words: str
) -> None:
    """Whatever is wrong with a paired run ends it before its first step, in one line."""
    arms = [] if "--selector" in changes else ["--selector", "static"]
    given = command("sft", tiny_checkpoint, tmp_path / "out", data["sft"], *arms, *changes)
    done = run_here(*given)
    assert done.returncode == code, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ifprune: ")]
    assert words in line
    assert done.stdout == ""
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("stage", "of", "words"), [("pretrain", "sft", "give text"), ("sft", "pretrain", "give messages, or prompt")]
)
def test_data_of_the_other_stage_is_one_line(
    tiny_checkpoint: Path, tmp_path: Path, data: dict[str, list[str]], stage: str, of: str, words: str
) -> None:
    """Chats in pretrain, texts in sft: the domain and what is needed are named."""
    done = run_here(*command(stage, tiny_checkpoint, tmp_path / "out", data[of], "--selector", "static"))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert words in line
    assert "'code'" in line


def test_no_data_is_one_line(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Nothing to train on."""
    done = run_here(*command("sft", tiny_checkpoint, tmp_path / "out", []))
    assert done.returncode == 1
    assert "give --data NAME=FILE.jsonl" in done.stderr


def test_the_head_does_not_learn_into_its_own_beginning(
    tiny_checkpoint: Path, tmp_path: Path, data: dict[str, list[str]], predictor: Path
) -> None:
    """`--predictor OUTPUT/predictor` would be overwritten, so that the run could not be gone on with."""
    out = tmp_path / "out"
    (out / "predictor").mkdir(parents=True)
    (out / "predictor" / "head.safetensors").write_bytes((predictor / "head.safetensors").read_bytes())
    done = run_here(*command("sft", tiny_checkpoint, out, data["sft"], "--predictor", out / "predictor"))
    assert done.returncode == 1
    assert "give another --output" in done.stderr


def test_a_run_that_goes_wild_keeps_its_last_state(
    tiny_checkpoint: Path, tmp_path: Path, data: dict[str, list[str]]
) -> None:
    """A learning rate that makes the loss NaN ends the run in one line, before NaN is saved."""
    wild = ["--selector", "static", "--learning-rate", "1e30", "--save-every", "1", "--eval-prompts", "0"]
    done = run_here(*command("sft", tiny_checkpoint, tmp_path / "out", data["sft"], *wild))
    assert done.returncode == 1
    assert "the gradient of arm static is not a number; lower the learning rate" in done.stderr
    arrays = mx.load(str(tmp_path / "out" / "adapters" / "static" / "adapters.safetensors"))
    assert isinstance(arrays, dict)
    assert all(bool(mx.all(mx.isfinite(array))) for array in arrays.values())


def test_another_run_in_the_folder_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, data: dict[str, list[str]]
) -> None:
    """What differs is named; nothing is lost."""
    given = command("sft", tiny_checkpoint, tmp_path / "out", data["sft"], "--selector", "static")
    assert run_here(*given).returncode == 0
    before = metrics(tmp_path / "out")
    done = run_here(*given, "--iters", "8", "--lora-rank", "2")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ifprune: ")]
    assert "holds a run with another iterations, rank" in line or "another rank, iterations" in line
    assert metrics(tmp_path / "out") == before
