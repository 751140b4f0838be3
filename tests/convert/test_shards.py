"""Weights that are whole are converted, and it is said what was odd: a stale index, a tensor that lies in two files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx.errors import SourceError
from tests.convert.test_safetensors_reader import CONFIG, INDEX, SHARDS, make_model, parameters, write_folder


def index(path: Path, placed: dict[str, str]) -> None:
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def read_index(path: Path) -> dict[str, str]:
    return dict(json.loads((path / INDEX).read_text())["weight_map"])


def load_all(path: Path) -> dict[str, mx.array]:
    tensors: dict[str, mx.array] = {}
    for file in path.glob("model*.safetensors"):
        found = mx.load(str(file))
        assert isinstance(found, dict)
        tensors |= found
    mx.eval(tensors)
    return tensors


def saved_anew_in_one_file(path: Path) -> None:
    tensors = load_all(path)
    for shard in SHARDS:
        (path / shard).unlink()
    mx.save_safetensors(str(path / "model.safetensors"), tensors)


def saved_anew_in_two(path: Path) -> None:
    tensors = load_all(path)
    for shard in SHARDS:
        (path / shard).unlink()
    names = sorted(tensors)
    for number, part in ((1, names[:5]), (2, names[5:])):
        file = path / f"model-0000{number}-of-00002.safetensors"
        mx.save_safetensors(str(file), {name: tensors[name] for name in part})


def one_file_beside_old_shards(path: Path) -> None:
    mx.save_safetensors(str(path / "model.safetensors"), load_all(path))
    (path / SHARDS[1]).unlink()


def tensors_elsewhere(path: Path) -> None:
    placed = read_index(path)
    index(path, {name: SHARDS[(SHARDS.index(shard) + 1) % 3] for name, shard in placed.items()})


def names_that_are_gone(path: Path) -> None:
    index(path, read_index(path) | {"model.layers.9.gone.weight": SHARDS[0]})


def a_shard_left_out(path: Path) -> None:
    index(path, {name: shard for name, shard in read_index(path).items() if shard != SHARDS[2]})


STALE = [
    saved_anew_in_one_file,
    saved_anew_in_two,
    one_file_beside_old_shards,
    tensors_elsewhere,
    names_that_are_gone,
    a_shard_left_out,
]


@pytest.mark.parametrize("change", STALE, ids=lambda change: change.__name__)
def test_a_stale_index(tmp_path: Path, change: Callable[[Path], None]) -> None:
    weights = parameters(make_model(CONFIG))
    path = write_folder(tmp_path / "source", weights, sharded=True)
    change(path)
    lines: list[str] = []
    source = open_source(path)
    assert any("without it" in line or "and equal" in line for line in source.notes), source.notes
    for name, weight in weights.items():
        assert mx.array_equal(source.take(name), weight), name
    convert(open_source(path), tmp_path / "out", Options(), note=lines.append)
    assert set(source.notes) <= set(lines)


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_tensor_in_two_files(tmp_path: Path, name: str, indexed: bool) -> None:
    weights = parameters(make_model(CONFIG))
    path = write_folder(tmp_path / "source", weights, sharded=True, index=indexed)
    for shard in SHARDS:
        held = mx.load(str(path / shard))
        assert isinstance(held, dict)
        mx.eval(held)
        mx.save_safetensors(str(path / shard), held | {name: weights[name]})
    source = open_source(path)
    assert [f"{name}: in several files, and equal" in note for note in source.notes] == [True]
    assert mx.array_equal(source.take(name), weights[name])
    for other in (weights[name] * 2, weights[name].astype(mx.float16), weights[name][:1]):
        mx.save_safetensors(str(path / SHARDS[2]), held | {name: other})
        with pytest.raises(SourceError, match=f"tensor {name} is in both .* and they differ; remove the stale one"):
            open_source(path)


def test_what_is_not_whole_is_refused_for_what_is_missing(tmp_path: Path) -> None:
    whole = write_folder(tmp_path / "source", parameters(make_model(CONFIG)), sharded=True)
    for change in (names_that_are_gone, tensors_elsewhere, a_shard_left_out):
        path = Path(shutil.copytree(whole, tmp_path / change.__name__))
        change(path)
        (path / SHARDS[0]).unlink()
        with pytest.raises(SourceError, match=f"lacks {SHARDS[0]}; download the missing weight files"):
            open_source(path)
