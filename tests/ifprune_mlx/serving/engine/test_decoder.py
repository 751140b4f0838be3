"""Which families mlx-lm decodes together without a sequence noticing the others: measured on tiny models."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import mlx.core as mx
import pytest

from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx import Model
from ifprune_mlx.serving.engine.decoder import batch_error, can_batch
from tests.family_configs import write_family
from tests.ifprune_mlx.reference import open_model


def family(folder: Path, model_type: str) -> Model:
    write_family(folder / "source", model_type)
    convert(open_source(folder / "source"), folder / "ifp", Options())
    return open_model(folder / "ifp")


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "lfm2", "phi3"])
def test_families_that_batch(tmp_path: Path, model_type: str) -> None:
    model = family(tmp_path, model_type)
    assert batch_error(model) < 1e-5
    assert can_batch(model)


# mlx-lm 0.31 and 0.32: gemma2 and recurrent_gemma overlook padding, afm7 quantizes keys by the largest of the batch.
@pytest.mark.parametrize("model_type", ["gemma2", "recurrent_gemma", "afm7"])
def test_families_whose_sequences_disturb_each_other(tmp_path: Path, model_type: str) -> None:
    model = family(tmp_path, model_type)
    assert batch_error(model) > 0.05
    assert not can_batch(model)


def test_a_cache_that_does_not_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family(tmp_path, "llama")
    from mlx_lm.models.cache import ConcatenateKVCache

    monkeypatch.setattr(
        "ifprune_mlx.serving.engine.decoder.make_prompt_cache",
        lambda module: [ConcatenateKVCache() for _ in module.layers],
    )
    assert batch_error(model) == math.inf


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_rounding_is_no_reason(tiny_checkpoint: Path, dtype: mx.Dtype) -> None:
    from ifprune_mlx import load

    model, _ = load(tiny_checkpoint, dtype=dtype)
    assert can_batch(model)
    model.close()


def test_the_cause_of_a_failed_trial_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be a mistake, and not the family's caches."""
    model = family(tmp_path, "llama")

    def broken(*_: object, **__: object) -> None:
        raise TypeError("no such argument")

    monkeypatch.setattr("mlx_lm.models.llama.Attention.__call__", broken)
    with caplog.at_level(logging.DEBUG, "ifprune_mlx.serving"):
        assert batch_error(model) == math.inf
    warning, detail = caplog.records
    assert warning.levelno == logging.WARNING
    assert warning.getMessage().endswith("decoding two sequences together failed: no such argument")
    assert detail.exc_info is not None
