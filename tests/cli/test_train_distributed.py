"""`ifprune train` shared by several processes, started by `mlx.launch` on this machine, is one process's training."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ifprune_mlx.selection.predictor import Head
from ifprune_mlx.train.trainer import Trainer
from tests.cli.process import environment, run, run_here

LAUNCH = Path(sys.executable).with_name("mlx.launch")
pytestmark = pytest.mark.skipif(not LAUNCH.is_file(), reason="mlx.launch is not installed beside this Python")


def free_port(count: int) -> int:
    """The first of `count` neighbouring ports of the loopback device that nobody listens on."""
    for _ in range(50):
        sockets: list[socket.socket] = []
        try:
            first = socket.socket()
            sockets.append(first)
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            for offset in range(1, count):
                sockets.append(socket.socket())
                sockets[-1].bind(("127.0.0.1", port + offset))
            return port
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
    raise RuntimeError("no free ports")


def launch(
    arguments: Sequence[str | Path], cache: Path, *, own: str = "", **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line in two processes, joined to a ring.

    Args:
        own: more arguments, in which a shell knows `$MLX_RANK`.
        env: changes to the environment.
    """
    command_line = shlex.join([sys.executable, "-m", "ifprune_cli.main", *map(str, arguments)])
    program = ["bash", "-c", f"exec {command_line} {own}"]
    ring = ["-n", "2", "--backend", "ring", "--starting-port", str(free_port(2))]
    return subprocess.run(
        [LAUNCH, *ring, "--", *program],
        env=environment(cache, **env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.fixture
def arguments(tiny_checkpoint: Path, tmp_path: Path) -> list[str | Path]:
    """A run of all three arms with a learning head and evaluations, but for --output."""
    options: list[str | Path] = []
    for domain in ("code", "maths"):
        answer = "return x" if domain == "code" else "1 + 1 is 2"
        rows = [{"prompt": f"{domain} question {i}", "completion": answer * (1 + i % 3)} for i in range(30)]
        file = tmp_path / f"{domain}.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows))
        options += ["--data", f"{domain}={file}"]
    mx.random.seed(11)
    (tmp_path / "predictor").mkdir()
    arrays = [mx.random.normal(shape) for shape in ((8, 128), (8,), (256, 8), (256,))]
    Head(*arrays, (128, 128), "both", layers=1).save(tmp_path / "predictor" / "head.safetensors")
    for arm in ("learned", "static", "none"):
        options += ["--selector", arm]
    options += ["--predictor", tmp_path / "predictor", "--head-learning-rate", "1e-2", "--learning-rate", "1e-2"]
    options += ["--iters", "6", "--batch-size", "4", "--lora-rank", "4", "--densities", "0.25,0.4-0.8", "--warmup", "2"]
    options += ["--eval-prompts", "2", "--steps-per-eval", "3", "--save-every", "2", "--max-seq-length", "64"]
    return ["train", "--stage", "sft", "--model", tiny_checkpoint, "--json", *options]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(value: Any) -> list[float]:
    """All numbers in JSON, in order, but for seconds."""
    if isinstance(value, dict):
        return [number for key in value if key != "seconds" for number in numbers(value[key])]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [float(value)] if isinstance(value, int | float) else []


def test_two_processes_train_as_one(arguments: list[str | Path], tmp_path: Path) -> None:
    """The same global batch: the same curve and weights; one process writes, evaluates and reports."""
    # Without a preloaded BLAS, whose products differ by the number of rows: Adam moves a weight that has next to no
    # gradient by its sign.
    alone = run(*arguments, "--output", tmp_path / "one", cache=tmp_path, env={"LD_PRELOAD": ""})
    assert alone.returncode == 0, alone.stderr
    done = launch([*arguments, "--output", tmp_path / "two"], tmp_path, LD_PRELOAD="")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [line["step"] for line in two] == [line["step"] for line in one] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    assert [line.keys() for line in two] == [line.keys() for line in one]
    for ours, theirs in zip(two, one, strict=True):
        np.testing.assert_allclose(numbers(ours), numbers(theirs), rtol=1e-4, atol=1e-5)
    (result,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert (result["steps"], result["tokens"]) == (6, one[-2]["tokens"])
    assert done.stderr.count("evaluation at step 6") == 1
    for name in ("adapters/learned/adapters", "predictor/head"):
        weights = [mx.load(str(tmp_path / run / f"{name}.safetensors")) for run in ("two", "one")]
        for key in weights[1]:
            np.testing.assert_allclose(*(np.array(arrays[key]) for arrays in weights), atol=1e-3, err_msg=str(key))
    assert not list((tmp_path / "two").rglob(".*"))


def test_a_run_goes_on_with_more_processes(arguments: list[str | Path], tmp_path: Path) -> None:
    """What one process began two finish, on the same curve."""
    out = tmp_path / "out"
    assert run_here(*arguments, "--output", tmp_path / "one").returncode == 0
    advance = Trainer.advance

    def stops(trainer: Trainer) -> dict[str, Any]:
        if trainer.step == 4:
            raise KeyboardInterrupt
        return advance(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "advance", stops)
        assert run_here(*arguments, "--output", out).returncode == 130
    done = launch([*arguments, "--output", out], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("goes on after step 4 of 6") == 1
    for ours, theirs in zip(metrics(out), metrics(tmp_path / "one"), strict=True):
        np.testing.assert_allclose(numbers(ours), numbers(theirs), rtol=1e-4, atol=1e-5)


def test_all_processes_stop_at_a_collapse(arguments: list[str | Path], tmp_path: Path) -> None:
    """Only one evaluates; the others hear of it, and nobody waits for ever."""
    head = tmp_path / "constant"
    head.mkdir()
    constant = Head(mx.zeros((8, 64)), None, mx.zeros((256, 8)), mx.random.normal((256,)), (128, 128), layers=1)
    constant.save(head / "head.safetensors")
    options = ["--predictor", head, "--stop-on-collapse", "--output", tmp_path / "out"]
    done = launch([*arguments, *options], tmp_path)
    assert done.returncode == 0, done.stderr
    (result,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert (result["collapsed"], result["steps"]) == (True, 0)


def test_processes_that_disagree_are_refused(arguments: list[str | Path], tmp_path: Path) -> None:
    """Machines that share no disk may begin with other settings, data or states; no step is taken then."""
    done = launch(arguments, tmp_path, own=f"--seed $MLX_RANK --output {shlex.quote(str(tmp_path))}/out-$MLX_RANK")
    assert "the processes of this run begin with other data, settings or states" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out-*/*"))


def test_stages_that_measure_run_in_one_process(arguments: list[str | Path], tmp_path: Path) -> None:
    """They would all write the same files: refused before anything is written."""
    done = launch([*arguments, "--output", tmp_path / "out", "--stage", "calibrate"], tmp_path)
    assert "--stage calibrate runs in one process" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
