"""Fixtures of the serving engine's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ifprune_mlx import load
from tests.ifprune_mlx.serving.engine.engines import Tiny
from tests.tiny import write_checkpoint


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    """A tiny model whose context holds long answers."""
    folder = tmp_path_factory.mktemp("roomy")
    model, tokenizer = load(write_checkpoint(folder / "checkpoint", max_position_embeddings=4096))
    yield model, tokenizer
    model.close()
