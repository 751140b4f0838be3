"""`ifprune tasks`, and a named task on its way from `select --save` through `generate --task` and `chat`."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from ifprune_mlx import Checkpoint, Selection, TaskStore
from tests.cli.process import run, run_here
from tests.cli.test_generate import answer, succeed


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that ships a task, `code`."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    (folder / "tasks").mkdir()
    file = folder / "tasks" / "code.safetensors"
    select(folder, "write a function", "--selector", "random", "--density", "0.25", "--save-to", file)
    return folder


def select(model: Path, prompt: str, *more: str | Path) -> dict[str, Any]:
    return answer(succeed("select", "--model", model, "--prompt", prompt, "--json", *more))


def store(model: Path) -> TaskStore:
    return TaskStore(Checkpoint.open(model))


def test_tasks_are_listed(tiny_checkpoint: Path, copy: Path) -> None:
    done = succeed("tasks", "--model", tiny_checkpoint)
    assert (done.stdout, "--save NAME" in done.stderr) == ("", True)
    assert answer(succeed("tasks", "--model", tiny_checkpoint, "--json")) == {"tasks": []}
    saved = select(copy, "write a poem", "--density", "0.5", "--save", "poetry")
    shipped = Selection.load(copy / "tasks" / "code.safetensors")
    assert answer(succeed("tasks", "--model", copy, "--json"))["tasks"] == [
        {
            "name": "code",
            "shipped": True,
            "file": str(copy / "tasks" / "code.safetensors"),
            "selection": shipped.hash,
            "selector": "random",
            "density": 0.25,
        },
        {
            "name": "poetry",
            "shipped": False,
            "file": str(store(copy).folder / "poetry.safetensors"),
            "selection": saved["selection"],
            "selector": "activation",
            "density": 0.5,
        },
    ]
    done = succeed("tasks", "--model", copy)
    assert done.stdout.splitlines() == [
        f"code    shipped  {shipped.hash}, random, density 0.25",
        f"poetry  own      {saved['selection']}, activation, density 0.50",
    ]
    assert done.stderr == ""


def test_tasks_are_removed(copy: Path) -> None:
    for name in ("code", "poetry"):
        select(copy, f"write {name}", "--save", name)
    done = succeed("tasks", "--model", copy, "--remove", "code")
    assert done.stderr == "removed task code\n"
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["code", "shipped"], ["poetry", "own"]]
    value = answer(succeed("tasks", "--model", copy, "--remove", "poetry", "--json"))
    assert [row["name"] for row in value["tasks"]] == ["code"]
    for name, words in (("poetry", "no task poetry"), ("code", "comes with the checkpoint")):
        failed = run_here("tasks", "--model", copy, "--remove", name)
        assert (failed.returncode, failed.stdout) == (1, "")
        assert words in failed.stderr


def test_a_damaged_task_is_listed_as_such(copy: Path) -> None:
    select(copy, "write a poem", "--save", "poetry")
    file = store(copy).folder / "poetry.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    done = succeed("tasks", "--model", copy)
    assert done.stdout.splitlines()[1] == "poetry  own      cannot be used"
    assert str(file) in done.stderr
    assert answer(succeed("tasks", "--model", copy, "--json"))["tasks"][1]["selection"] is None
    # It hinders nobody who did not ask for it.
    done = succeed("select", "--model", copy, "--prompt", "x", "--json")
    assert answer(done)["overlap_with"].keys() == {"static", "code"}
    assert done.stderr.startswith("not compared with task poetry: ")
    assert answer(succeed("info", "--model", copy, "--json"))["tasks"] == ["code", "poetry"]


def test_info_shows_tasks(copy: Path) -> None:
    select(copy, "write a poem", "--save", "poetry")
    assert answer(succeed("info", "--model", copy, "--json"))["tasks"] == ["code", "poetry"]
    assert re.search(r"^tasks +code \(shipped\), poetry$", succeed("info", "--model", copy).stdout, re.MULTILINE)


def test_generate_on_a_task(copy: Path) -> None:
    base = ("generate", "--model", copy, "--max-tokens", "6", "--prompt", "hello", "--json")
    saved = select(copy, "write a poem", "--density", "0.5", "--save", "poetry")
    value = answer(succeed(*base, "--task", "poetry"))
    assert (value["selection"], value["density"]) == (saved["selection"], 0.5)
    file = store(copy).folder / "poetry.safetensors"
    assert value["text"] == answer(succeed(*base, "--selection", file))["text"]
    shipped = answer(succeed(*base, "--task", "code"))
    assert (shipped["selection"], shipped["selector"]) == (
        Selection.load(copy / "tasks" / "code.safetensors").hash,
        "random",
    )
    own = select(copy, "write a program", "--save", "code")
    assert answer(succeed(*base, "--task", "code"))["selection"] == own["selection"] != shipped["selection"]


def test_a_task_runs_no_predictor(copy: Path) -> None:
    # The learned selector cannot even be made here: asking for the default would fail.
    config = copy / "config.json"
    select(copy, "write a poem", "--save", "poetry")
    text = config.read_text()
    assert text.count('"selector": "activation"') == 1
    config.write_text(text.replace('"selector": "activation"', '"selector": "learned"   '))
    base = ("generate", "--model", copy, "--max-tokens", "4", "--prompt", "hello", "--json")
    assert "no trained predictor" in run_here(*base).stderr
    assert answer(succeed(*base, "--task", "poetry"))["finish_reason"] == "length"


def test_processes_share_tasks(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine"
    monkeypatch.setenv("IFPRUNE_DATA", str(mine))
    arguments = ("select", "--model", copy, "--density", "0.5", "--json", "--save", "poetry", "--prompt")
    saved = run(*arguments, "write a poem", cache=tmp_path / "cache", env={"IFPRUNE_DATA": str(mine)})
    assert (saved.returncode, saved.stderr) == (0, "")
    used = succeed("generate", "--model", copy, "--task", "poetry", "-m", "3", "--json", "--prompt", "x")
    assert answer(used)["selection"] == answer(saved)["selection"]
    files = [file.relative_to(mine) for file in mine.rglob("*") if file.is_file()]
    assert files == [Path("tasks") / Checkpoint.open(copy).id / "poetry.safetensors"]
