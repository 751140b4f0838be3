"""A predictor on its own, published without its model's weights and put into that model by somebody else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_convert.share import SharedPredictor, locate_predictor, upload_predictor
from ifprune_mlx import Checkpoint
from ifprune_mlx.errors import IfpruneError, PredictorError
from tests.hub_stub import command_lines, serve
from tests.tiny import write_source
from tests.tiny_predictor import write_predictor

from .tiny_adapter import write_adapter


def test_a_predictor_of_the_hub_with_its_adapter_and_prior(tmp_path: Path) -> None:
    base, other = write_source(tmp_path / "base"), write_source(tmp_path / "other", seed=5)
    predictor = write_predictor(tmp_path / "predictor")
    adapter = write_adapter(tmp_path / "adapter", base)
    line = ["convert", "--model", base, "--mlx-path"]
    shared = ["convert", "--predictor", "me/shared", "--mlx-path", tmp_path / "theirs", "--model"]
    with serve() as hub:
        publish = [*line, tmp_path / "ours", "--predictor", predictor, "--adapter", adapter, "--upload-predictor"]
        lines = [[*publish, "me/shared"], [*shared, other], [*shared, base], [*publish[:3], "x", *publish[4:], "me/shared"]]
        home = tmp_path / "hf"
        code = (
            "import json, sys; from tests.cli.process import run_here; "
            "done = [run_here(*line) for line in json.loads(sys.argv[1])]; "
            "print(json.dumps([(one.returncode, one.stderr) for one in done]))"
        )
        given = json.dumps([[str(word) for word in one] for one in lines])
        published, mismatch, used, again = json.loads(hub.client(home, code, given, token="hf_writer"))
        files = set(hub.repositories["me/shared"])
        (refused,) = command_lines(hub, home, [["convert", "--model", base, "--predictor", "me/none"]])
    assert published[0] == 0, published
    assert not [file for file in files if file.startswith(("model-", "neurons-"))]
    assert {"predictor/head.safetensors", "adapter/adapters.safetensors", "prior.safetensors", "README.md"} <= files
    assert mismatch[0] == 1
    assert "was trained for a model with other neurons (FFN 0 differs)" in mismatch[1]
    assert used[0] == 0, used
    ours, theirs = (Checkpoint.open(tmp_path / name).manifest["files"] for name in ("ours", "theirs"))
    assert {name for name in ours if ours[name]["sha256"] != theirs[name]["sha256"]} == set()
    assert again[0] == 1
    assert "holds files, which are not overwritten" in again[1]
    assert refused[0] == 1
    assert "no such repository" in refused[1]
