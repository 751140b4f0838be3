"""What is computed the slow way is said once, and shown."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from ifprune_convert.packing import quantization_of
from ifprune_convert.pipeline import Options
from ifprune_mlx import slow_paths as registry
from ifprune_mlx.serving.engine.decoder import can_batch
from ifprune_mlx.slow_paths import ONE_AT_A_TIME, SCATTER, SLOW_PATHS, UNPACKED, slow_paths
from ifprune_mlx.sparse import inplace, quantized
from tests.cli.process import run_here
from tests.ifprune_mlx.generating import TOKENS, A
from tests.ifprune_mlx.reference import open_model
from tests.ifprune_mlx.serving.http.serving import serving
from tests.tiny import write_checkpoint


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_found", {})
    inplace.shared.cache_clear()
    quantized.right.cache_clear()
    yield
    inplace.shared.cache_clear()
    quantized.right.cache_clear()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = Options(quantization=quantization_of("affine", 64, 4))
    return write_checkpoint(tmp_path_factory.mktemp("slow") / "packed", options=options)


def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX does not see what is written to its buffers."""
    monkeypatch.setattr(inplace, "_seen", lambda *_: False)


def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's kernel multiplies by neuron-major rows wrongly, as some releases do on Metal."""
    plain: Callable[..., Any] = mx.quantized_matmul

    def doubled(*given: Any, transpose: bool = True, **settings: Any) -> mx.array:
        return plain(*given, transpose=transpose, **settings) * (1 if transpose else 2)

    monkeypatch.setattr(mx, "quantized_matmul", doubled)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))


@pytest.mark.parametrize(("name", "breaks"), [(SCATTER, unseen), (UNPACKED, wrong)])
def test_a_slow_path_is_said_once(
    packed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, breaks: Any
) -> None:
    breaks(monkeypatch)
    with caplog.at_level(logging.WARNING, "ifprune_mlx"):
        model = open_model(packed)
        for _ in range(2):
            model.switch(A)
            mx.eval(model(mx.array([TOKENS])))
            model.switch(None)
    found = [record for record in caplog.records if record.name == "ifprune_mlx.slow_paths"]
    assert [record.args[0] for record in found if isinstance(record.args, tuple)] == [name]
    assert set(slow_paths()) == {name}


def test_a_family_that_does_not_batch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = open_model(write_checkpoint(tmp_path / "checkpoint", "gemma2"))
    with caplog.at_level(logging.WARNING, "ifprune_mlx"):
        assert [can_batch(model) for _ in range(2)] == [False, False]
    (record,) = caplog.records
    assert ONE_AT_A_TIME in record.getMessage()
    assert "one request at a time" in record.getMessage()


def test_a_quick_way_is_not_said(packed: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = open_model(packed)
    with caplog.at_level(logging.WARNING, "ifprune_mlx"):
        model.switch(A)
        assert can_batch(model)
    assert (caplog.records, slow_paths()) == ([], {})


def test_info_tries_them_out(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads(run_here("info", "--model", packed, "--json").stdout)["slow_paths"] == []
    assert "slow here    nothing\n" in run_here("info", "--model", packed).stdout
    inplace.shared.cache_clear()
    unseen(monkeypatch)
    assert json.loads(run_here("info", "--model", packed, "--json").stdout)["slow_paths"] == [SCATTER]
    assert f"slow here    {SCATTER}: MLX does not see" in run_here("info", "--model", packed).stdout


def test_the_metrics_show_them(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "gemma2")
    with serving(checkpoint, tmp_path) as server:
        server.post("/v1/completions", {"prompt": "a", "max_tokens": 1, "ifprune": {"selector": "static"}})
        found = {
            name: server.get("/metrics").text.count(f'ifprune_slow_path{{path="{name}"}} 1.0') for name in SLOW_PATHS
        }
    assert found == {UNPACKED: 0, SCATTER: 0, ONE_AT_A_TIME: 1}
    assert sum(ONE_AT_A_TIME in line for line in server.stderr) == 1


# How much is said.


def test_verbose_and_the_environment_say_more(packed: Path, tmp_path: Path) -> None:
    arguments = ("generate", "--model", packed, "--prompt", "a", "-m", "1", "--json")
    quiet = run_here(*arguments)
    assert quiet.stderr == ""
    for done in (run_here(*arguments, "--verbose"), run_here(*arguments, env={"IFPRUNE_LOG": "debug"})):
        assert done.returncode == 0
        assert "ifprune: debug: switched to selection" in done.stderr
    assert run_here(*arguments).stderr == ""  # and the next command is quiet again


@pytest.mark.parametrize("command", ["generate", "info", "select", "tasks"])
def test_causes_are_hidden_unless_verbose(packed: Path, tmp_path: Path, command: str) -> None:
    shutil.copytree(packed, tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text("{")
    more = {"generate": ("--prompt", "a"), "select": ("--prompt", "a")}.get(command, ())
    arguments = (command, "--model", tmp_path / "broken", *more)
    quiet, loud = run_here(*arguments), run_here(*arguments, "--verbose")
    assert (quiet.returncode, loud.returncode) == (1, 1)
    (line,) = quiet.stderr.splitlines()
    assert loud.stderr.splitlines()[-1] == line
    assert "Traceback" in loud.stderr
    assert "JSONDecodeError" in loud.stderr  # the cause


def test_a_level_that_is_none_is_one_line(tmp_path: Path) -> None:
    done = run_here("tasks", env={"IFPRUNE_LOG": "loud"})
    assert done.returncode == 1
    assert done.stderr == "ifprune: error: IFPRUNE_LOG is 'loud'; set it to debug, info, warning or error\n"
