"""Every way in which a predictor's files can be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from ifprune_convert.pipeline import Options
from ifprune_mlx import PredictorError, SparsityPredictor
from ifprune_mlx.selection.predictor import Head
from tests.ifprune_mlx.selection.predictor_folders import (
    TEXT,
    WIDTHS,
    head_with,
    settings_with,
    wide_head,
    write_predictor,
)
from tests.tiny import write_checkpoint


def without_settings(folder: Path) -> None:
    tensors = mx.load(str(folder / "head.safetensors"))
    mx.eval(tensors)
    mx.save_safetensors(str(folder / "head.safetensors"), tensors)


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9]) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def config_with(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return spoil


DEFECTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no head": (remove("head.safetensors"), "has no head.safetensors"),
    "no config": (remove("config.json"), "has no config.json"),
    "no backbone": (remove("model.safetensors"), "backbone cannot be loaded"),
    "no tokenizer": (remove("tokenizer.json"), "has no tokenizer"),
    "no folder": (shutil.rmtree, "has no config.json"),
    "head cut short": (cut("head.safetensors"), "cut short"),
    "backbone cut short": (cut("model.safetensors"), "cut short"),
    "config no JSON": (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    "config of another width": (config_with(hidden_size=32), "cannot be loaded"),
    "an unknown family": (config_with(model_type="nonesuch"), "cannot be loaded"),
    "head1 missing": (head_with(head1_weight=None), "must hold head1.weight and head2.weight"),
    "head2 missing": (head_with(head2_weight=None), "must hold head1.weight and head2.weight"),
    "an unknown tensor": (head_with(head3_weight=mx.ones(3)), "must hold head1.weight and head2.weight"),
    "head1 of another rank": (head_with(head1_weight=mx.ones((8, 64))), r"need head2 \[256, 8\]"),
    "head1 a vector": (head_with(head1_weight=mx.ones(16)), "do not belong together"),
    "head1 a number": (head_with(head1_weight=mx.array(1.0)), "do not belong together"),
    "head1 for another backbone": (head_with(head1_weight=mx.ones((16, 48))), "head1 reads 48 values, .* gives 64"),
    "head2 of another width": (head_with(head2_weight=mx.ones((255, 16))), "with 256 neurons need head2"),
    "head2 transposed": (head_with(head2_weight=mx.ones((16, 256))), "with 256 neurons need head2"),
    "bias of another length": (head_with(head1_bias=mx.ones(15)), r"bias has shape \[15\], expected \[16\]"),
    "bias a matrix": (head_with(head2_bias=mx.ones((256, 1))), r"bias has shape \[256, 1\], expected \[256\]"),
    "no settings": (without_settings, "no predictor settings"),
    "settings without widths": (settings_with(widths=None), "no predictor settings"),
    "widths no numbers": (settings_with(widths=["wide"]), "no predictor settings"),
    "a newer format": (settings_with(format_version=3), "predictor format 3, this release reads 1 and 2; update"),
    "a format with a quantization": (settings_with(format_version=2), "no predictor settings"),
    "an unknown pooling": (settings_with(pooling="max"), "unknown pooling 'max'"),
    "an unknown activation": (settings_with(activation="tanh"), "unknown .* activation 'tanh'"),
    "another pooling": (settings_with(pooling="both"), "head1 reads 64 values, the backbone gives 64 per token"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defective_predictor_is_refused_with_one_line_that_names_it(tmp_path: Path, defect: str) -> None:
    folder = write_predictor(tmp_path / "predictor")
    spoil, reason = DEFECTS[defect]
    spoil(folder)
    with pytest.raises(PredictorError, match=reason) as caught:
        SparsityPredictor.load(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


PACKED_DEFECTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no scales": (head_with(head2_scales=None), "must hold .* head2.scales"),
    "no offsets": (head_with(head2_biases=None), "must hold .* head2.biases"),
    "scales of another group": (head_with(head2_scales=mx.ones((256, 2))), r"must both be \[256, 1\]"),
    "rows as floats": (head_with(head2_weight=mx.ones((256, 16))), "does not fit the quantization"),
    "rows of another width": (head_with(head2_weight=mx.ones((256, 8))), r"need head2 \[256, 16\]"),
    "a mode without offsets": (
        settings_with(quantization={"group_size": 32, "bits": 8, "mode": "mxfp8"}),
        "cannot have the quantization",
    ),
    "a group that does not divide": (
        settings_with(quantization={"group_size": 128, "bits": 8, "mode": "affine"}),
        "cannot have the quantization",
    ),
    "an unknown mode": (
        settings_with(quantization={"group_size": 32, "bits": 8, "mode": "new"}),
        "no predictor settings",
    ),
    "an unknown setting": (
        settings_with(quantization={"group_size": 32, "bits": 8, "mode": "affine", "x": 1}),
        "no predictor settings",
    ),
    "no quantization": (settings_with(quantization=None), "no predictor settings"),
    "an older format": (settings_with(format_version=1), "must hold head1.weight and head2.weight"),
}


@pytest.mark.parametrize("defect", PACKED_DEFECTS)
def test_a_defective_quantized_head_is_refused(tmp_path: Path, defect: str) -> None:
    file = tmp_path / "head.safetensors"
    wide_head().quantized(8).save(file)
    spoil, reason = PACKED_DEFECTS[defect]
    spoil(tmp_path)
    with pytest.raises(PredictorError, match=reason) as caught:
        Head.load(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["head1.weight", "head2.weight", "backbone"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_found_when_scoring(tmp_path: Path, where: str, bad: float) -> None:
    folder = write_predictor(tmp_path / "predictor")
    path = folder / ("model.safetensors" if where == "backbone" else "head.safetensors")
    tensors, metadata = mx.load(str(path), return_metadata=True)
    mx.eval(tensors)
    name = "model.layers.1.mlp.down_proj.weight" if where == "backbone" else where
    tensors[name][3] = bad
    mx.save_safetensors(str(path), tensors, metadata)
    with pytest.raises(PredictorError, match="NaN or infinity"):
        SparsityPredictor.load(folder).scores(TEXT)


@pytest.mark.parametrize("widths", [(128,), (64, 192), (128, 128, 128)])
def test_a_predictor_for_another_model_is_refused(tmp_path: Path, widths: tuple[int, ...]) -> None:
    folder = write_predictor(tmp_path / "predictor", widths=widths)
    predictor = SparsityPredictor.load(folder)
    predictor.head.check_widths(widths, folder)
    with pytest.raises(PredictorError, match="trained for another model") as caught:
        predictor.head.check_widths(WIDTHS, folder)
    assert str(caught.value).startswith(str(folder))
    with pytest.raises(PredictorError, match="trained for another model"):
        write_checkpoint(tmp_path / "checkpoint", options=Options(predictor=folder))
    assert not (tmp_path / "checkpoint").exists()
