"""Servers that several tests share; each test leaves them as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest

from tests.ifprune_mlx.serving.http.scripted import Scripted, scripted
from tests.ifprune_mlx.serving.http.serving import Served, serving, write_tool_checkpoint
from tests.tiny import write_checkpoint


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A tiny random model, with an empty prompt cache so that equal requests are computed alike."""
    folder = tmp_path_factory.mktemp("served")
    checkpoint = write_checkpoint(folder / "checkpoint")
    with serving(checkpoint, folder / "cache", "--ui", "--max-tokens", "16", "--prompt-cache-size", "0") as server:
        yield server


@pytest.fixture(scope="session")
def served_tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A tiny model that calls tools."""
    folder = tmp_path_factory.mktemp("tools")
    with serving(write_tool_checkpoint(folder / "checkpoint"), folder / "cache", "--dense") as server:
        yield server


@pytest.fixture(scope="session")
def scripted_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Scripted]]:
    """Servers whose answers are given, by the family of their chat template (see `FAMILIES`)."""
    with ExitStack() as servers:

        @cache
        def of(family: str) -> Scripted:
            return servers.enter_context(scripted(tmp_path_factory.mktemp(family), family))

        yield of


@pytest.fixture(scope="session")
def served_real(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The embedded SmolLM2 with its trained predictor."""
    with serving(smollm2, tmp_path_factory.mktemp("real")) as server:
        yield server
