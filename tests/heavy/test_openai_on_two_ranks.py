"""The client suite of `tests/ifprune_mlx/serving/http/test_openai.py` against a server of two ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ifprune_mlx.serving.http.serving import Served, serving
from tests.ifprune_mlx.serving.http.test_openai import *  # noqa: F403
from tests.tiny import write_checkpoint

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """As the suite has it."""
    folder = tmp_path_factory.mktemp("ranks")
    checkpoint = write_checkpoint(folder / "checkpoint")
    with serving(
        checkpoint, folder / "cache", "--ui", "--max-tokens", "16", "--prompt-cache-size", "0", ranks=2
    ) as server:
        yield server
