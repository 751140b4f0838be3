"""float16 for bfloat16 where the chip emulates bfloat16: by stand-in chip names, as MLX gives them."""

from __future__ import annotations

import logging
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from ifprune_convert.packing import quantization_of
from ifprune_convert.pipeline import Options
from ifprune_mlx import Checkpoint, DataError, load
from ifprune_mlx import model as module
from ifprune_mlx.bench.worker import Worker
from ifprune_mlx.model import default_dtype
from ifprune_mlx.train import stages
from tests.cli.process import run_here
from tests.ifprune_mlx.reference import random_selection
from tests.ifprune_mlx.train.configs import config
from tests.tiny import write_checkpoint

OLD = ["Apple M1", "Apple M1 Pro", "Apple M1 Ultra", "Apple M2", "Apple M2 Max"]
OTHERS = ["Apple M3", "Apple M4 Pro", "Apple M5", "Apple M10", "Apple M21", "Apple Paravirtual device", "AMD EPYC", ""]
SELECTION = random_selection((128, 128), (32, 64), 1)


@pytest.fixture(scope="module")
def brain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16."""
    return write_checkpoint(tmp_path_factory.mktemp("brain") / "checkpoint", options=Options(dtype=mx.bfloat16))


@pytest.fixture(autouse=True)
def m1(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine is an M1."""
    on(monkeypatch, "Apple M1 Pro")
    module._say_default_dtype.cache_clear()


def on(monkeypatch: pytest.MonkeyPatch, chip: str) -> None:
    monkeypatch.setattr(mx, "device_info", lambda *device: {"device_name": chip, "architecture": "applegpu_g13s"})


@pytest.mark.parametrize("chip", OLD + OTHERS)
def test_the_chips_name_decides(brain: Path, monkeypatch: pytest.MonkeyPatch, chip: str) -> None:
    on(monkeypatch, chip)
    model, _ = load(brain)
    assert model.dtype == (mx.float16 if chip in OLD else mx.bfloat16)
    model.close()


@pytest.mark.parametrize("residency", ["ram", "ssd"])
@pytest.mark.parametrize("quantized", [False, True])
def test_answers_are_nearer_to_float32s_than_those_of_bfloat16(
    brain: Path, tmp_path: Path, residency: str, quantized: bool
) -> None:
    packing = quantization_of("affine", 64, 4) if quantized else None
    folder = write_checkpoint(tmp_path / "x", options=Options(packing, dtype=mx.bfloat16)) if quantized else brain
    logits = []
    for dtype in (None, mx.bfloat16, mx.float32):
        model, _ = load(folder, dtype=dtype, residency=residency)
        assert model.dtype == (dtype or mx.float16)
        model.switch(SELECTION)
        out = model(mx.array([[5, 6, 7, 8]]))
        assert out.dtype == model.dtype
        logits.append(np.array(out.astype(mx.float32)))
        model.close()
    half, brain_half, exact = logits
    assert np.abs(half - exact).max() < 0.5 * np.abs(brain_half - exact).max()


def test_float32_and_float16_stay_what_they_are(tiny_checkpoint: Path, tmp_path: Path) -> None:
    half = write_checkpoint(tmp_path / "half", options=Options(dtype=mx.float16))
    for folder, dtype in ((tiny_checkpoint, mx.float32), (half, mx.float16)):
        assert default_dtype(Checkpoint.open(folder)) is None
        model, _ = load(folder)
        assert model.dtype == dtype
        model.close()


def test_gemma_keeps_bfloat16_whose_range_it_needs(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "gemma", "gemma2", Options(dtype=mx.bfloat16))
    assert default_dtype(Checkpoint.open(folder)) is None


def test_it_is_said_once_and_dtype_overrides_it(brain: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ifprune_mlx.model"):
        load(brain, dtype=mx.bfloat16)[0].close()
        assert caplog.records == []
        for _ in range(2):
            load(brain)[0].close()
    (record,) = caplog.records
    assert "--dtype bfloat16 keeps it" in record.getMessage()


@pytest.mark.parametrize("given", [(), ("--dtype", "bfloat16")])
def test_the_command_says_it(brain: Path, given: tuple[str, ...]) -> None:
    done = run_here("generate", "--model", brain, "--prompt", "a", "-m", "2", "--selector", "static", *given)
    assert done.returncode == 0
    assert ("float16 instead of the checkpoint's bfloat16" in done.stderr) == (not given)


def test_training_keeps_bfloat16(brain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def loaded(model: module.Model) -> None:
        seen.append(model.dtype)
        model.close()
        raise DataError("far enough")

    monkeypatch.setattr(stages, "check_kernels", loaded)
    for dtype in (None, "float16"):
        with pytest.raises(DataError, match="far enough"):
            stages.train(config(model=str(brain), stage="distill", dtype=dtype))
    assert seen == [mx.bfloat16, mx.float16]


def test_a_benchmark_measures_what_it_is_told(brain: Path) -> None:
    for dtype in (None, mx.float16):
        worker = Worker(brain, "ram", dtype)
        assert worker._model is not None
        assert worker._model.dtype == (dtype or mx.bfloat16)
        worker._model.close()
