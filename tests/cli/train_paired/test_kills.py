"""A kill of `ifprune train` loses nothing: run again, it gives the curve of an undisturbed run."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ifprune_mlx.selection.predictor import Head
from tests.cli.process import run_here, start
from tests.cli.train_paired.runs import Command, chats, command, metrics, write

# Slow enough that a kill can be aimed.
_SLOW_STEPS = (
    "import time; from ifprune_mlx.train.trainer import Trainer; advance = Trainer.advance; "
    "Trainer.advance = lambda self: (time.sleep(0.15), advance(self))[1]"
)
_SLOW_MEASURES = (
    "import time; from ifprune_mlx.train import attribution as module; attribution = module.attribution; "
    "module.attribution = lambda *given: (time.sleep(0.003), attribution(*given))[1]"
)


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
