"""JSON that a training run reads back: bounded, and damaged in any way it ends in one line, or is left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from ifprune_mlx.errors import DataError
from ifprune_mlx.train import attribution, checkpointing, trainable
from ifprune_mlx.train.checkpointing import METRICS, STATE, cut_metrics, load_state, save_state

DEEP = b"[" * 100_000
BAD = {"deep": DEEP, "a list": b"[1]", "no JSON": b"{", "no UTF-8": b'"\xff"', "empty": b""}
READERS: dict[str, Callable[[Path], object]] = {
    "adapter_config.json": trainable._read_config,
    "targets.json": lambda file: attribution._description(file.parent),
}


def large(file: Path) -> None:
    """A gigabyte, of holes."""
    with file.open("wb") as out:
        out.truncate(1 << 30)


@pytest.mark.parametrize("kind", [*BAD, "large"])
@pytest.mark.parametrize("name", READERS)
def test_objects(tmp_path: Path, name: str, kind: str) -> None:
    file = tmp_path / name
    large(file) if kind == "large" else file.write_bytes(BAD[kind])
    with pytest.raises(DataError) as caught:
        READERS[name](file)
    assert str(file) in str(caught.value)
    assert "again" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_metrics_keep_the_lines_that_are_ones(tmp_path: Path) -> None:
    good, late = (json.dumps({"step": step}).encode() for step in (3, 9))
    lines = [good, late, b"[1]", b'{"step": "x"}', b'"\xff', DEEP, b"null", good, b'{"step": 1']
    (tmp_path / METRICS).write_bytes(b"\n".join(lines))
    cut_metrics(tmp_path, 5)
    assert (tmp_path / METRICS).read_bytes() == good + b"\n" + good + b"\n"
    large(tmp_path / METRICS)
    with pytest.raises(DataError, match="is larger than"):
        cut_metrics(tmp_path, 5)


@pytest.mark.parametrize("value", [DEEP.decode(), "{"])
def test_a_state_whose_position_is_damaged(tmp_path: Path, value: str) -> None:
    save_state(tmp_path, "{}", {"x": mx.zeros(1)}, step=1)
    assert load_state(tmp_path, "{}") is not None
    mx.save_safetensors(str(tmp_path / STATE), {"x": mx.zeros(1)}, {"run": "{}", "step": value})
    with pytest.raises(DataError, match="is damaged; remove it"):
        load_state(tmp_path, "{}")
    mx.save_safetensors(str(tmp_path / STATE), {"x": mx.zeros(1)}, {"run": value})
    with pytest.raises(DataError, match="other settings"):
        load_state(tmp_path, "{}")
    assert checkpointing._differences(value, "{}") == "other settings"
