"""A server of two ranks in place of a client suite's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ifprune_mlx.serving.http.serving import Served, serving
from tests.tiny import write_checkpoint


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """As the suites have it."""
    folder = tmp_path_factory.mktemp("ranks")
    checkpoint = write_checkpoint(folder / "checkpoint")
    with serving(
        checkpoint, folder / "cache", "--ui", "--max-tokens", "16", "--prompt-cache-size", "0", ranks=2
    ) as server:
        yield server
