"""Training shows progress from the start, answers Ctrl-C at once with how to go on, and saves every few minutes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ifprune_cli.console import progress
from ifprune_mlx.train import TrainConfig, train, trainer
from ifprune_mlx.train.step import Arm
from ifprune_mlx.train.trainer import Trainer
from tests.cli.process import environment, start
from tests.cli.terminal import Terminal


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"prompt": f"question {i}", "completion": f"{i} + {i}"} for i in range(30)]
    file = tmp_path / "maths.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


@pytest.fixture
def config(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        stage="sft",
        model=tiny_checkpoint,
        data={"maths": data},
        output=tmp_path / "run",
        selector=("static",),
        iters=6,
        batch_size=2,
        save_every=1000,
        steps_per_report=1000,
        eval_prompts=0,
    )


def losses(folder: Path) -> list[Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["arms"] for line in lines if "arms" in line]


@pytest.fixture
def stopped(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A run that Ctrl-C has stopped within its fourth step: what it told."""
    advance, told = Trainer.advance, list[str]()

    def stops(run: Trainer) -> dict[str, Any]:
        if run.step == 3:
            raise KeyboardInterrupt
        return advance(run)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", stops)
        with pytest.raises(KeyboardInterrupt):
            train(config, report=told.append)
    return told


def test_ctrl_c_loses_no_whole_step(config: TrainConfig, stopped: list[str]) -> None:
    """Saved at the third step, though no state was due before the end; gone on with, it is the undisturbed run."""
    assert stopped[-1] == "stopped at step 3 of 6; the state of step 3 is saved"
    told: list[str] = []
    train(config, report=told.append)
    assert told[0] == "goes on after step 3 of 6"
    whole = replace(config, output=config.output.with_name("whole"))
    train(whole)
    assert losses(config.output) == losses(whole.output)


def test_ctrl_c_while_the_arms_change_saves_nothing_half_done(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One arm has made the step, the other has not: such a state is none."""
    step, told, made = Arm.step, list[str](), list[str]()

    def stops(arm: Arm, clip: float) -> float:
        made.append(arm.name)
        if made.count("none") == 3:
            raise KeyboardInterrupt
        return step(arm, clip)

    both = replace(config, selector=("static", "none"))
    with monkeypatch.context() as patch:
        patch.setattr(Arm, "step", stops)
        with pytest.raises(KeyboardInterrupt):
            train(replace(both, save_every=1), report=told.append)
    assert told[-1] == "stopped at step 2 of 6; the state of step 2 is saved"
    train(both, report=told.append)
    whole = replace(both, output=config.output.with_name("whole"))
    train(whole)
    assert losses(config.output) == losses(whole.output)


def test_a_state_is_written_when_minutes_have_passed(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long `save_every` steps take, no more than five minutes and a step are lost."""
    saves, save = [], Trainer.save

    def saved(run: Trainer) -> None:
        saves.append(run.step)
        save(run)

    monkeypatch.setattr(Trainer, "save", saved)
    assert trainer._SAVE_SECONDS <= 300
    monkeypatch.setattr(trainer, "_SAVE_SECONDS", 0.0)
    train(config)
    assert saves == [1, 2, 3, 4, 5, 6]


def test_the_first_step_is_reported_at_once(config: TrainConfig) -> None:
    told: list[str] = []
    train(config, report=told.append)
    assert [line.partition(":")[0] for line in told if line.startswith("step ")] == ["step 1/6", "step 6/6"]


def test_measuring_is_shown_chat_by_chat(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """Not after 64 chats, which can take minutes."""
    seen: list[int] = []

    @contextmanager
    def shown(label: str, unit: str) -> Iterator[Any]:
        yield lambda done, total: seen.append(done) if label == "measure" else None

    settings = TrainConfig(
        stage="calibrate", model=tiny_checkpoint, data={"maths": data}, output=tmp_path / "out", layers=1
    )
    train(settings, progress=shown, report=lambda line: None)
    assert seen[:3] == [1, 2, 3]
    assert seen == sorted(seen)


def test_the_command_says_how_to_go_on(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """A process with SIGINT: a line at once, the saved step, the way to go on, code 130; the same command goes on."""
    out = tmp_path / "run"
    command = ["train", "--model", tiny_checkpoint, "--data", f"maths={data}", "--output", out, "--stage", "sft"]
    command += ["--selector", "static", "--iters", "100000", "--eval-prompts", "0", "--save-every", "100000"]
    with start(command, tmp_path, prelude="pass") as process:
        assert process.stderr is not None
        before: list[str] = []
        for line in process.stderr:
            before.append(line.decode())
            if line.startswith(b"step 1/"):
                break
        process.send_signal(signal.SIGINT)
        lines = process.stderr.read().decode().splitlines()
        assert process.wait(timeout=60) == 130
    assert "stopping ..." in lines
    (stopped,) = [line for line in lines if line.startswith("stopped at step ")]
    step = stopped.split()[3]
    assert stopped == f"stopped at step {step} of 100000; the state of step {step} is saved"
    assert lines[-2:] == [f"the same command goes on from what is in {out}", "interrupted"]
    with start(command, tmp_path, prelude="pass") as process:
        assert process.stderr is not None
        first = next(line for line in process.stderr if line.startswith(b"goes on"))
        process.kill()
    assert first.decode() == f"goes on after step {step} of 100000\n"


def test_a_terminal_shows_progress_and_answers_ctrl_c(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """A spinner before anything is loaded, then a bar with what is left; Ctrl-C is told of in words."""
    how = ["--data", f"maths={data}", "--output", str(tmp_path / "run"), "--stage", "sft", "--selector", "static"]
    how += ["--iters", "100000", "--eval-prompts", "0", "--save-every", "100000"]
    with Terminal(tiny_checkpoint, tmp_path, *how, command="train") as terminal:
        terminal.expect(rb"loading\x1b")
        terminal.expect(rb"step 1/100000: static")
        terminal.expect(rb"train \[ +\] 0 % \([0-9.]+ steps/s, [0-9.]+ (s|min|h) left\)")
        terminal.send("\x03")
        terminal.expect(rb"stopping \.\.\..*stopped at step \d+ of 100000; .*the same command goes on .*interrupted")


def test_ctrl_c_is_answered_while_python_waits(tmp_path: Path) -> None:
    """A thread says so while the main one is within a call that no signal handler can interrupt, as MLX's are."""
    code = (
        "import hashlib, signal; from ifprune_cli.console import interrupt_seen, note\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with interrupt_seen('stopping ...'):\n"
        "    note('ready')\n"
        "    hashlib.pbkdf2_hmac('sha256', b'a', b'b', 100_000_000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], env=environment(tmp_path), stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == b"ready\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        timer = threading.Timer(30, process.kill)
        timer.start()
        assert process.stderr.readline() == b"stopping ...\n"
        timer.cancel()
        assert process.poll() is None  # still within the call
        process.kill()


def test_progress_in_a_pipe_becomes_rarer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight hours of training are a line a minute, not six thousand; the times are in units that suit them."""
    now = [0.0]
    monkeypatch.setattr("ifprune_cli.console.time.monotonic", lambda: now[0])
    with progress("train", "steps") as update:
        for second in range(8 * 3600):
            now[0] = float(second)
            update(second, 8 * 3600)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: 0 % (1.0 steps/s, 8.0 h left)"
    assert 470 < len(lines) < 490
