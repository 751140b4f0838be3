"""`ifprune convert` on tiny dense models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ifprune_cli.convert import with_calibrate_value
from ifprune_mlx import Checkpoint
from tests.cli.process import run_here
from tests.tiny import write_source
from tests.tiny_gguf import CONFIG as GGUF_CONFIG
from tests.tiny_gguf import make_model, write_gguf

KEYS = {"path", "bytes", "seconds", "peak_rss", "ffns", "parameters", "quantization"}


def test_json_has_the_agreed_keys(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out"
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"prompt": "a", "completion": "b"}\n{"messages": [{"role": "user", "content": "c"}, '
                     '{"role": "assistant", "content": "d"}]}\n')  # fmt: skip
    options = ["-q", "--q-bits", "8", "--q-group-size", "32", "--dtype", "bfloat16", "--density", "0.5"]
    done = run_here("convert", "--model", source, "--mlx-path", out, *options, "--calibrate", chats, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    value = json.loads(done.stdout)
    assert value.keys() >= KEYS
    checkpoint = Checkpoint.open(out)
    files = [file for file in out.iterdir() if file.name not in ("manifest.json", "README.md")]
    assert value["path"] == str(out)
    assert value["bytes"] == sum(file.stat().st_size for file in files)
    assert value["quantization"] == {"group_size": 32, "bits": 8, "mode": "affine"}
    assert (value["ffns"], value["parameters"]) == (2, checkpoint.parameters)
    assert value["seconds"] > 0
    assert 10**7 < value["peak_rss"] < 10**10
    assert (checkpoint.layout.density, checkpoint.prior_method) == (0.5, "calibrated")


def test_plain_output_is_the_folder(tmp_path: Path) -> None:
    config = {**GGUF_CONFIG, "model_type": "llama"}
    source = write_gguf(tmp_path / "model.gguf", config, make_model(config))
    done = run_here("convert", "--hf-path", source, "--mlx-path", tmp_path / "a b" / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'a b' / 'out'}\n"
    assert "try: ifprune chat --model" in done.stderr
    assert Checkpoint.open(tmp_path / "a b" / "out").prior_method == "weights"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--calibrate"], ["--calibrate", "shipped"]),
        (["--calibrate", "-q"], ["--calibrate", "shipped", "-q"]),
        (["--calibrate", "chats.jsonl", "-q"], ["--calibrate", "chats.jsonl", "-q"]),
        (["-q", "--calibrate=chats.jsonl"], ["-q", "--calibrate=chats.jsonl"]),
    ],
)
def test_calibrate_may_stand_alone(given: list[str], expected: list[str]) -> None:
    assert with_calibrate_value(["convert", *given]) == ["convert", *expected]


def test_after_calibration_it_says_which_defaults_it_found(tmp_path: Path) -> None:
    source, out, chats = write_source(tmp_path / "source"), tmp_path / "out", tmp_path / "chats.jsonl"
    chats.write_text("".join(f'{{"prompt": "Count {i}.", "completion": "{i} and {7 * i}."}}\n' for i in range(60)))
    arguments = ("convert", "--model", source, "--mlx-path", out, "--calibrate", chats, "--overwrite")
    done = run_here(*arguments, "--tolerance", "100")
    assert (done.returncode, done.stdout) == (0, f"{out}\n")
    checkpoint = Checkpoint.open(out)
    assert checkpoint.layout.density == 0.27
    assert "held-out prompts with activation, static: about" in done.stderr
    assert f"default density 0.27, selector {checkpoint.layout.selector}; `ifprune info` shows" in done.stderr
    done = run_here(*arguments, "--tolerance", "0", "--json")
    assert json.loads(done.stdout)["density"] in (1, *(point.density for point in Checkpoint.open(out).curve.points))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tolerance", "0.1"), "give --calibrate as well"),
        (("--calibrate", "--tolerance", "nan"), "tolerance nan is not usable"),
        (("--calibrate", "--tolerance", "-1"), "tolerance -1 is not usable"),
    ],
)
def test_tolerances_that_are_refused(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    done = run_here("convert", "--model", write_source(tmp_path / "source"), "--mlx-path", tmp_path / "out", *options)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert words in done.stderr
    assert not (tmp_path / "out").exists()
