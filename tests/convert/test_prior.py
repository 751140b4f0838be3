"""A ready prior from a file, in place of one from the weights or from calibration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from ifprune_convert.calibrate import read_prior
from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx import Checkpoint, load
from ifprune_mlx.errors import SourceError
from tests.tiny import write_source

Change = Callable[[dict[str, mx.array]], object]


def arrays(file: Path) -> dict[str, mx.array]:
    loaded = mx.load(str(file))
    assert isinstance(loaded, dict)
    return loaded


def write_prior(file: Path, widths: tuple[int, ...] = (128, 128), change: Change = lambda tensors: None) -> Path:
    mx.random.seed(3)
    tensors = {f"prior.{index}": mx.random.uniform(shape=(width,)) for index, width in enumerate(widths)}
    change(tensors)
    mx.save_safetensors(str(file), tensors)
    return file


def converted(source: Path, out: Path, prior: Path) -> Checkpoint:
    return convert(open_source(source), out, Options(prior=prior)).checkpoint


def test_the_prior_is_the_files(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    file = write_prior(tmp_path / "prior.safetensors")
    checkpoint = converted(source, tmp_path / "out", file)
    stored, given = arrays(checkpoint.priors_file), arrays(file)
    assert all(mx.array_equal(stored[name], given[name]) for name in given)
    assert checkpoint.prior_method == "calibrated"
    # Everything else is as without it, the norms of the down rows too.
    plain = convert(open_source(source), tmp_path / "plain", Options()).checkpoint
    assert all(mx.array_equal(stored[f"down_norm.{i}"], arrays(plain.priors_file)[f"down_norm.{i}"]) for i in range(2))
    files = plain.manifest["files"]
    assert {name for name, entry in checkpoint.manifest["files"].items() if entry != files[name]} == {
        "priors.safetensors"
    }
    model, _ = load(checkpoint.path)
    assert all(np.array_equal(ours, np.array(given[f"prior.{i}"])) for i, ours in enumerate(model.prior))
    model.close()


@pytest.mark.parametrize("method", ["weights", "calibrated"])
def test_another_checkpoints_own_file(tmp_path: Path, method: str) -> None:
    source = write_source(tmp_path / "source")
    first = convert(open_source(source), tmp_path / "first", Options()).checkpoint
    tensors = arrays(first.priors_file)
    file = tmp_path / "priors.safetensors"
    mx.save_safetensors(str(file), tensors, {"method": method})
    second = converted(source, tmp_path / "second", file)
    assert second.prior_method == method
    assert {name for name, array in arrays(second.priors_file).items() if mx.array_equal(array, tensors[name])} == set(
        tensors
    )


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    file = write_prior(
        tmp_path / "prior.safetensors",
        change=lambda tensors: tensors.update({"prior.1": mx.full((128,), 0.5, mx.float16)}),
    )
    prior, _ = read_prior(file, [128, 128])
    assert [values.dtype for values in prior] == [np.float32] * 2
    assert (prior[1] == 0.5).all()


@pytest.mark.parametrize(
    ("widths", "change", "words"),
    [
        ((128,), lambda tensors: None, r"lacks prior\.1, and the model has 2 FFNs"),
        ((128, 128, 128), lambda tensors: None, r"holds prior\.2, and the model has 2 FFNs"),
        ((128, 128), lambda tensors: tensors.update({"gate.0": mx.zeros((128,))}), r"holds gate\.0"),
        ((128, 96), lambda tensors: None, r"prior\.1 is F32 \[96\], and the model needs F32 \[128\]"),
        ((128, 128), lambda tensors: tensors.update({"prior.0": mx.zeros((128,), mx.int32)}), r"prior\.0 is I32"),
        ((128, 128), lambda tensors: tensors.update({"prior.0": mx.full((128,), mx.nan)}), r"prior\.0 holds NaN"),
        ((128, 128), lambda tensors: tensors.update({"prior.0": mx.full((128,), mx.inf)}), r"prior\.0 holds NaN"),
        ((128, 128), lambda tensors: tensors.update({"prior.1": tensors["prior.1"] - 0.5}), r"prior\.1 .* negative"),
    ],
)
def test_what_is_refused(tmp_path: Path, widths: tuple[int, ...], change: Change, words: str) -> None:
    source = write_source(tmp_path / "source")
    file = write_prior(tmp_path / "prior.safetensors", widths, change)
    with pytest.raises(SourceError, match=f"{file}: .*{words}.*; (give|measure)"):
        converted(source, tmp_path / "out", file)
    assert not (tmp_path / "out").exists()
