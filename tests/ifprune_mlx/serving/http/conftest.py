"""Servers that several tests share; each test leaves them as they were."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ifprune_convert.pipeline import Options
from tests.ifprune_mlx.serving.http.scripted import Scripted, scripted
from tests.ifprune_mlx.serving.http.serving import Served, serving, write_tool_checkpoint
from tests.tiny import write_checkpoint
from tests.tiny_predictor import write_predictor


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
def scripted_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Scripted]]:
    """Servers whose answers are given, by the family of their chat template (see `FAMILIES`) and more options."""
    with ExitStack() as servers:

        @cache
        def of(family: str, *options: str) -> Scripted:
            return servers.enter_context(scripted(tmp_path_factory.mktemp(family), family, *options))

        yield of


@pytest.fixture(scope="session")
def served_real(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The embedded SmolLM2 with its trained predictor."""
    with serving(smollm2, tmp_path_factory.mktemp("real")) as server:
        yield server


# Not for the session: playwright's event loop runs as long as it lives, and other tests start their own.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, through playwright; skips where one of them is missing."""
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next((found for name in names if (found := shutil.which(name))), None)
    if chromium is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as tools:
        # A BLAS that is preloaded for MLX starts threads in all of Chromium's processes, whose sandbox forbids it.
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        launched = tools.chromium.launch(executable_path=chromium, args=["--no-sandbox"], env=environment)
        yield launched
        launched.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """A page of its own in the browser, which must have nothing to complain of at the end but what `expected` names."""
    context = browser.new_context(viewport={"width": 1000, "height": 760})
    opened = context.new_page()
    complaints: list[str] = []
    opened.expected = [r"/icon\.svg: net::ERR_ABORTED"]  # Chromium asks for it again when the address changes
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("requestfailed", lambda request: complaints.append(f"{request.url}: {request.failure}"))
    opened.set_default_timeout(60_000)
    yield opened
    context.close()
    assert [text for text in complaints if not any(re.search(known, text) for known in opened.expected)] == []


@pytest.fixture(scope="session")
def page_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a random predictor and room for long conversations."""
    folder = tmp_path_factory.mktemp("page")
    options = Options(predictor=write_predictor(folder / "predictor"))
    return write_checkpoint(folder / "checkpoint", options=options, max_position_embeddings=8192)


@pytest.fixture(scope="session")
def page_server(page_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server with the chat page."""
    options = ("--ui", "--max-tokens", "60", "--log-level", "error")
    with serving(page_checkpoint, tmp_path_factory.mktemp("page-server"), *options) as server:
        yield server.url
