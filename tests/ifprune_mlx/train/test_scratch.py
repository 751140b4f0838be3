"""A predictor from scratch learns what is there, goes on where it was killed, and is what `convert` takes."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from ifprune_mlx import DataError, Instruction, load, make_selector
from ifprune_mlx.selection.predictor import SparsityPredictor
from ifprune_mlx.train.attribution import Targets, log_importance
from ifprune_mlx.train.distill import distill
from ifprune_mlx.train.scratch import Result, ScratchRun, Settings, backbone_config, train_scratch
from tests.cli.process import run_here, start
from tests.tiny import VOCABULARY, write_tokenizer

WIDTHS = (24, 40)
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
SETTINGS = Settings(iterations=60, batch_size=16, learning_rate=5e-3, warmup=5, rank=4)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerWrapper:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


def measured(count: int = 80, signal: float = 1.0) -> tuple[Targets, list[str]]:
    """Chats of two kinds, whose words tell which neurons their answers need."""
    generator = np.random.default_rng(5)
    kinds = generator.normal(size=(2, sum(WIDTHS)))
    rows = [signal * kinds[i % 2] + 0.1 * generator.normal(size=sum(WIDTHS)) for i in range(count)]
    importance = np.exp(np.array(rows)).astype(np.float16)
    features = generator.normal(size=(count, 8)).astype(np.float32)
    texts = [("river " if i % 2 else "7 + ") * (1 + i % 3) for i in range(count)]
    return Targets(features, importance, ["x"] * count, 1, WIDTHS), texts


def begin(tokenizer: TokenizerWrapper, folder: Path, settings: Settings = SETTINGS, signal: float = 1.0) -> ScratchRun:
    targets, texts = measured(signal=signal)
    return ScratchRun(targets, texts, CONFIG, tokenizer, settings, folder)


def curve(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def test_it_begins_at_the_prior_and_learns_what_words_tell(tokenizer: TokenizerWrapper, tmp_path: Path) -> None:
    run = begin(tokenizer, tmp_path)
    said: list[str] = []
    assert run.advance()["loss"] == pytest.approx(1.0, abs=0.2)  # of a batch; of all it is 1
    result = train_scratch(run, steps_per_eval=20, report=said.append)
    assert result.explained > 0.9
    assert [line.split(":")[0] for line in said[1:]] == ["step 20/60", "step 40/60", "step 60/60"]
    # On noise features a ridge finds nothing of it.
    targets, _ = measured()
    assert max(distill(targets, rank=4).explained.values()) < 0.2


def test_where_words_tell_nothing_it_finds_nothing(tokenizer: TokenizerWrapper, tmp_path: Path) -> None:
    assert train_scratch(begin(tokenizer, tmp_path, signal=0.0), steps_per_eval=10).explained < 0.1


@pytest.mark.parametrize("pooling", ["last", "mean", "both"])
def test_the_folder_predicts_what_was_evaluated(tokenizer: TokenizerWrapper, tmp_path: Path, pooling: str) -> None:
    run = begin(tokenizer, tmp_path, replace(SETTINGS, pooling=pooling, iterations=30))
    result = train_scratch(run, steps_per_eval=30)
    targets, texts = measured()
    predictor = SparsityPredictor.load(tmp_path / "predictor")
    wanted = log_importance(targets.importance, WIDTHS)
    mean = wanted[run.train].mean(axis=0)
    left = total = 0.0
    for row in run.valid:
        left += ((np.concatenate(predictor.scores(texts[row])) - wanted[row]) ** 2).sum()
        total += ((mean - wanted[row]) ** 2).sum()
    assert result == Result(pytest.approx(1 - left / total, abs=1e-4), 30, run.parameters)


def test_a_resumed_run_repeats_the_undisturbed_one(tokenizer: TokenizerWrapper, tmp_path: Path) -> None:
    settings = replace(SETTINGS, iterations=24)
    whole = begin(tokenizer, tmp_path / "whole", settings)
    train_scratch(whole, steps_per_eval=6, save_every=5)

    def stop(done: int, total: int) -> None:
        if done == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_scratch(begin(tokenizer, tmp_path / "cut", settings), steps_per_eval=6, save_every=5, progress=stop)
    run = begin(tokenizer, tmp_path / "cut", settings)
    assert run.step == 10
    train_scratch(run, steps_per_eval=6, save_every=5)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    for name in ("state.safetensors", "predictor/model.safetensors", "predictor/head.safetensors"):
        one, other = (mx.load(str(tmp_path / folder / name)) for folder in ("whole", "cut"))
        assert one.keys() == other.keys()
        for key, array in one.items():
            assert mx.array_equal(array, other[key]), key
    # A finished run is read, and nothing is done.
    assert train_scratch(begin(tokenizer, tmp_path / "cut", settings)).step == run.best[1]
    with pytest.raises(DataError, match="another learning rate"):
        begin(tokenizer, tmp_path / "cut", replace(settings, learning_rate=1e-4))
    with pytest.raises(DataError, match="another importance"):
        begin(tokenizer, tmp_path / "cut", settings, signal=0.5)


def test_configs(tokenizer: TokenizerWrapper, tmp_path: Path) -> None:
    small = backbone_config("small", tokenizer)
    assert (small["num_hidden_layers"], small["hidden_size"], small["vocab_size"]) == (4, 256, 259)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({name: value for name, value in CONFIG.items() if name != "vocab_size"}))
    assert backbone_config(str(file), tokenizer)["vocab_size"] == 259
    file.write_text(json.dumps(CONFIG | {"vocab_size": 100}))
    with pytest.raises(DataError, match="vocab_size is 100, the model's tokenizer needs 259"):
        backbone_config(str(file), tokenizer)
    with pytest.raises(DataError, match="no such file"):
        backbone_config(str(tmp_path / "none.json"), tokenizer)
    targets, texts = measured()
    with pytest.raises(DataError, match="no model can be made of it"):
        ScratchRun(targets, texts, {"model_type": "none of these"}, tokenizer, SETTINGS, tmp_path / "x")
    few, texts = measured(19)
    with pytest.raises(DataError, match="too few"):
        ScratchRun(few, texts, CONFIG, tokenizer, SETTINGS, tmp_path / "x")


def test_killed_at_the_command_line_it_goes_on_and_convert_takes_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    file, config = tmp_path / "chats.jsonl", tmp_path / "config.json"
    rows = [{"prompt": f"question {i}", "completion": "yes" if i % 2 else f"{i} + {i}"} for i in range(40)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    config.write_text(json.dumps(CONFIG))

    def command(out: Path) -> list[str | Path]:
        options = ["--layers", "1", "--rank", "4", "--iters", "400", "--steps-per-eval", "100", "--save-every", "7"]
        where = ["--model", tiny_checkpoint, "--data", f"x={file}", "--output", out, "--backbone-config", config]
        return ["train", *where, *options, "--json"]

    whole = run_here(*command(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    with start([str(part) for part in command(tmp_path / "cut")], tmp_path / "cache") as process:
        lines, metrics = 0, tmp_path / "cut" / "metrics.jsonl"
        while lines < 20 and process.poll() is None:
            time.sleep(0.02)
            lines = len(metrics.read_text().splitlines()) if metrics.is_file() else 0
        process.kill()
    assert process.returncode == -9
    done = run_here(*command(tmp_path / "cut"))
    assert done.returncode == 0, done.stderr
    assert "goes on after step" in done.stderr
    assert "a ridge on the first 1 layers explains" in done.stderr
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    result, same = (json.loads(each.stdout.splitlines()[-1]) for each in (done, whole))
    assert (result["explained"], result["ridge_explained"]) == (same["explained"], same["ridge_explained"])
    source = tiny_checkpoint.with_name(f"source-of-{tiny_checkpoint.name}")
    done = run_here("convert", "--model", source, "--mlx-path", tmp_path / "ifp", "--predictor", result["path"])
    assert done.returncode == 0, done.stderr
    model, _ = load(tmp_path / "ifp")
    selector = make_selector(model)
    assert selector.name == "learned"
    assert selector.select(Instruction("question 3", ()), model.keep(0.25)).selection.keep == model.keep(0.25)
    both = run_here(*command(tmp_path / "both"), "--backbone", tmp_path)
    assert "contradict each other" in both.stderr
