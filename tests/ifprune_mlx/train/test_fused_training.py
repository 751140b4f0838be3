"""Training a family whose gate and up are one leaf: what was trained, converted, computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx.model import Model
from ifprune_mlx.train.full_finetune import FullModel
from ifprune_mlx.train.lora import LoRAModel
from ifprune_mlx.train.trainable import TrainableModel
from tests.family_configs import write_family
from tests.ifprune_mlx.reference import open_model, random_selection

TOKENS = [1, 40, 300, 7, 7, 99, 250, 3]


@pytest.fixture(scope="module", params=["phi3", "glm4"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fused") / request.param
    write_family(folder, request.param)
    return folder


def logits(model: Model) -> np.ndarray:
    return np.array(model(mx.array([TOKENS]))[0])


@pytest.mark.parametrize("make", [lambda model: LoRAModel(model, rank=4, scale=2.0), FullModel], ids=["lora", "full"])
def test_what_was_trained_computes_the_same_once_converted(
    source: Path, tmp_path: Path, make: Callable[[Model], TrainableModel]
) -> None:
    convert(open_source(source), tmp_path / "base", Options())
    model = open_model(tmp_path / "base")
    before = logits(model)
    tuned = make(model)
    mx.random.seed(3)
    parameters = {name: array + 0.1 * mx.random.normal(array.shape) for name, array in tuned.initial.items()}
    tuned.use(parameters)
    tuned.save(tmp_path / "adapter", parameters)
    convert(open_source(source), tmp_path / "trained", Options(adapter=tmp_path / "adapter"))
    trained = open_model(tmp_path / "trained")
    assert np.abs(logits(model) - before).max() > 0.1
    assert np.abs(logits(model) - logits(trained)).max() < 1e-3

    widths = [spec.d_ffn for spec in trained.checkpoint.layout.ffns]
    selection = random_selection(widths, [width // 2 for width in widths], seed=1)
    tuned.choose([mx.array(ids) for ids in selection.ids])
    trained.switch(selection)
    assert np.abs(logits(model) - logits(trained)).max() < 1e-3
