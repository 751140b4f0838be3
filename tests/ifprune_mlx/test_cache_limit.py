"""MLX's cache limit while models are open, and after."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import mlx.core as mx
import pytest

from ifprune_mlx import load, model
from ifprune_mlx.device import Limits
from tests.tiny import write_checkpoint

HIGH, LOW = 1 << 50, 12345


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("limits") / "checkpoint")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A high limit, and no model open: other tests may have left theirs."""
    monkeypatch.setattr(model, "limits", Limits())
    before = mx.set_cache_limit(HIGH)
    yield
    mx.set_cache_limit(before)


def limit() -> int:
    found = mx.set_cache_limit(0)
    mx.set_cache_limit(found)
    return found


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_closed_in_any_order_the_last_one_gives_the_limit_back(checkpoint: Path, order: tuple[int, ...]) -> None:
    models = [load(checkpoint)[0] for _ in order]
    shared = limit()
    assert shared < HIGH
    for index in order:
        assert limit() == shared
        models[index].close()
        models[index].close()  # a second time changes nothing
    assert limit() == HIGH


def test_one_that_is_opened_later_counts_from_there(checkpoint: Path) -> None:
    first, _ = load(checkpoint)
    shared = limit()
    second, _ = load(checkpoint)
    first.close()
    third, _ = load(checkpoint)
    second.close()
    assert limit() == shared
    third.close()
    assert limit() == HIGH
    mx.set_cache_limit(LOW)
    fourth, _ = load(checkpoint)
    assert limit() == LOW  # a lower limit stays
    fourth.close()
    assert limit() == LOW


def test_a_model_that_is_dropped_counts_as_closed(checkpoint: Path) -> None:
    dropped, _ = load(checkpoint)
    other, _ = load(checkpoint)
    del dropped
    gc.collect()
    other.close()
    assert limit() == HIGH


@pytest.mark.parametrize("changed", [True, False])
def test_after_models_that_were_dropped_the_users_limit_counts(checkpoint: Path, changed: bool) -> None:
    dropped, _ = load(checkpoint)
    del dropped
    gc.collect()
    if changed:
        mx.set_cache_limit(HIGH + 1)
    other, _ = load(checkpoint)
    assert limit() < HIGH
    other.close()
    assert limit() == HIGH + changed
