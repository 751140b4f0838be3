"""`--overwrite` replaces only what the same command wrote, whole and with nothing beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ifprune_convert.export import export_selection
from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx import Checkpoint, IfpruneError
from tests.ifprune_mlx.reference import random_selection
from tests.tiny import write_checkpoint, write_source


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def out(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "out"))


def web_app(folder: Path) -> None:
    shutil.rmtree(folder)
    (folder / "icons").mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"name": "app", "start_url": "/"}))


def build_of_another_tool(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"files": {"main.js": {"size": 3, "sha256": "0"}}}))
    (folder / "main.js").write_text("abc")


def neurons_alone(folder: Path) -> None:
    for file in folder.iterdir():
        if not file.name.startswith("neurons-"):
            file.unlink()


def thesis_beside(folder: Path) -> None:
    (folder / "thesis.txt").write_text("years of work")


def repository_around(folder: Path) -> None:
    (folder / ".git" / "objects").mkdir(parents=True)
    (folder / ".git" / "objects" / "ab12").write_text("history")


def damaged(folder: Path) -> None:
    file = next(folder.glob("neurons-*"))
    file.write_bytes(file.read_bytes()[:-1])


def another_format(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["ifpruning"]["format_version"] = 99
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "make",
    [web_app, build_of_another_tool, neurons_alone, thesis_beside, repository_around, damaged, another_format],
    ids=lambda make: make.__name__,
)
def test_convert_leaves_other_folders_alone(tmp_path: Path, out: Path, make: Callable[[Path], None]) -> None:
    make(out)
    before = content(out)
    with pytest.raises(IfpruneError, match=r"so --overwrite does not replace it; choose another folder"):
        convert(open_source(write_source(tmp_path / "source")), out, Options(overwrite=True))
    assert content(out) == before


def test_what_was_put_there_meanwhile_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def meanwhile(stage: str, done: int, total: int) -> None:
        if done == total:
            out.mkdir()
            (out / "thesis.txt").write_text("years of work")

    with pytest.raises(IfpruneError, match="is not an IFP checkpoint"):
        convert(open_source(write_source(tmp_path / "source")), out, Options(overwrite=True), meanwhile)
    assert content(out) == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize("spoil", ["thesis.pdf", "figures/one.png", "model-extra.safetensors", "no shards", "dense"])
def test_export_leaves_other_folders_alone(tmp_path: Path, tiny_checkpoint: Path, spoil: str) -> None:
    checkpoint, out = Checkpoint.open(tiny_checkpoint), tmp_path / "out"
    selection = random_selection(checkpoint.widths, [64, 64], 5)
    if spoil == "dense":
        write_source(out)
    else:
        export_selection(checkpoint, selection, out)
        if spoil == "no shards":
            next(out.glob("model-*")).unlink()
        else:
            (out / spoil).parent.mkdir(exist_ok=True)
            (out / spoil).write_bytes(b"years of work")
    before = content(out)
    with pytest.raises(IfpruneError, match="was not written by `ifprune export`"):
        export_selection(checkpoint, selection, out, overwrite=True)
    assert content(out) == before


def test_both_replace_what_they_wrote(tmp_path: Path, out: Path) -> None:
    (out / ".DS_Store").write_bytes(b"")
    (out / "README.md").write_text("a card that was edited")
    done = convert(open_source(write_source(tmp_path / "source", seed=7)), out, Options(overwrite=True))
    assert done.checkpoint.id != Checkpoint.open(write_checkpoint(tmp_path / "first")).id
