"""A predictor on its own, published without its model's weights and put into that model by somebody else."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from ifprune_convert.share import SharedPredictor, locate_predictor
from ifprune_mlx import Checkpoint
from ifprune_mlx.errors import PredictorError
from tests.hub_stub import serve
from tests.tiny import CONFIGS, make_model, write_checkpoint, write_source
from tests.tiny_predictor import write_predictor

from .tiny_adapter import write_adapter


def test_a_predictor_of_the_hub_with_its_adapter_and_prior(tmp_path: Path) -> None:
    base, other = write_source(tmp_path / "base"), write_source(tmp_path / "other", seed=5)
    predictor = write_predictor(tmp_path / "predictor")
    adapter = write_adapter(tmp_path / "adapter", base, noise=0.001)

    def line(model: Path, out: str, predictor: str | Path, *more: str | Path) -> list[str]:
        return [str(word) for word in ("convert", "--model", model, "--mlx-path", tmp_path / out, *more)] + [
            "--predictor",
            str(predictor),
        ]

    publish = ("--adapter", adapter, "--upload-predictor", "me/shared")
    lines = [
        line(base, "ours", predictor, *publish),
        line(other, "theirs", "me/shared"),
        line(base, "theirs", "me/shared"),
        line(base, "more", predictor, *publish),
        line(base, "more", "me/none"),
    ]
    code = (
        "import json, sys; from tests.cli.process import run_here; "
        "print(json.dumps([(one.returncode, one.stderr) for one in map(lambda line: run_here(*line), "
        "json.loads(sys.argv[1]))]))"
    )
    with serve() as hub:
        answers = json.loads(hub.client(tmp_path / "hf", code, json.dumps(lines), token="hf_writer"))
        files = dict(hub.repositories["me/shared"])
    published, mismatch, used, again, refused = answers
    assert published[0] == 0, published
    assert not any(str(tmp_path).encode() in data for data in files.values())
    assert not [file for file in files if file.startswith(("model-", "neurons-"))]
    assert {
        "predictor/head.safetensors",
        "adapter/adapters.safetensors",
        "prior.safetensors",
        "README.md",
    } <= files.keys()
    assert mismatch[0] == 1
    assert "was trained for a model with other neurons (FFN 0 differs)" in mismatch[1]
    assert used[0] == 0, used
    ours, theirs = (Checkpoint.open(tmp_path / name).manifest["files"] for name in ("ours", "theirs"))
    assert {name for name in ours if ours[name]["sha256"] != theirs[name]["sha256"]} == set()
    assert again[0] == 1
    assert "holds files, which are not overwritten" in again[1]
    assert refused[0] == 1
    assert "no such repository" in refused[1]


def test_a_predictor_fits_its_model_whatever_the_bits(tmp_path: Path) -> None:
    base = write_source(tmp_path / "base")
    model, packed = make_model(CONFIGS["llama"]), make_model(CONFIGS["llama"], seed=1)
    theirs = Checkpoint.open(write_checkpoint(tmp_path / "theirs"))
    check = SharedPredictor(prior=theirs.priors_file).check_neurons()
    for index, layer in enumerate(model.layers):
        weight = layer.mlp.down_proj.weight
        for bits in (8, 4, 3):
            rough = mx.dequantize(*mx.quantize(weight, 64, bits), 64, bits)
            check(index, np.array(mx.linalg.norm(rough, axis=0)))
        with pytest.raises(PredictorError, match="other neurons"):
            check(index, np.array(mx.linalg.norm(packed.layers[index].mlp.down_proj.weight, axis=0)))
    assert locate_predictor(str(base)) == SharedPredictor(base)
