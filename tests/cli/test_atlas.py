"""`ifprune atlas`, and `ifprune select --plot`, on the tiny checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from ifprune_mlx import Selection
from tests.cli.process import run_here
from tests.cli.test_generate import answer, succeed

WORDS = ["sort", "list", "sum", "river", "moon"]
CHARTS = ["overlap", "shared", "quality", "time"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    found = {}
    for name, verb in {"code": "write", "maths": "count"}.items():
        lines = [json.dumps({"prompt": f"{verb} {word}", "completion": word}) for word in WORDS]
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("\n".join(lines))
    return found


def options(files: dict[str, Path]) -> list[str]:
    return [option for name, file in files.items() for option in ("--data", f"{name}={file}")]


def texts(file: Path) -> set[str]:
    return {item.text or "" for item in ElementTree.parse(file).getroot().iter("{http://www.w3.org/2000/svg}text")}


def test_all_charts_and_their_numbers(tiny_checkpoint: Path, files: dict[str, Path], tmp_path: Path) -> None:
    quality, out = tmp_path / "quality.json", tmp_path / "docs" / "images"
    rows = ["--selectors", "dense,static,random", "--densities", "0.25,0.5", "--limit", "2"]
    succeed("evaluate", "--model", tiny_checkpoint, *options(files), *rows, "--json", quality)
    few = ["--limit", "3", "--density", "0.5", "--timed", "3", "--max-tokens", "2"]
    arguments = ["atlas", "--model", tiny_checkpoint, *options(files), *few, "--evaluation", quality, "--out", out]
    done = succeed(*arguments, "--json")
    assert done.stdout.count("\n") == 1
    value = answer(done)
    expected = sorted(out / f"atlas-{name}{suffix}" for name in CHARTS for suffix in (".png", ".svg"))
    assert sorted(out.iterdir()) == expected == sorted(map(Path, value["files"]))
    assert (value["selector"], value["density"], value["chance"]) == ("activation", 0.5, 0.5)
    assert {name: len(keys) for name, keys in value["prompts"].items()} == {"code": 3, "maths": 3}
    matrix = value["matrix"]
    assert len(matrix) == 6
    pairs = [matrix[i][j] for i in range(3) for j in range(3) if i != j]
    assert value["overlap"]["domains"]["code"]["code"] == pytest.approx(sum(pairs) / 6)
    for layer in range(2):
        assert sum(shares[layer] for shares in value["neurons_of"].values()) == pytest.approx(1)
    assert [difference["domain"] for difference in value["differences"]] == ["code", "maths", "all"]
    curve = json.loads(quality.read_text())["curve"]
    assert [point["active_parameters"] for point in value["quality"]["curve"]] == [
        point["active_parameters"] for point in curve
    ]
    assert value["quality"]["curve"][0]["nll"]["code"]["static"] == next(
        row["nll"] for row in curve[0]["rows"] if (row["selector"], row["domain"]) == ("static", "code")
    )
    assert [timing["domain"] for timing in value["time"]] == ["code", "maths", "code"]
    for timing in value["time"]:
        assert min(timing["select_s"], timing["prefill_s"]) > 0
    assert {"code", "maths", "every two prompts"} <= texts(out / "atlas-overlap.svg")
    assert {"layer (a domain selects a neuron if at least half of its prompts do)", "nobody"} <= texts(
        out / "atlas-shared.svg"
    )
    assert {"checkpoint: loss of given answers", "mean over domains", "static"} <= texts(out / "atlas-quality.svg")
    assert {"seconds", "select", "switch", "prefill", "decode"} <= texts(out / "atlas-time.svg")
    assert "a prompt shares " in done.stderr
    # What is selected is the same again, drawn in the same bytes, into a folder that is there already.
    before = {file: file.read_bytes() for file in expected}
    plain = succeed(*arguments)
    assert plain.stdout.splitlines() == value["files"]
    for name in ("overlap", "shared", "quality"):
        for file in (out / f"atlas-{name}.png", out / f"atlas-{name}.svg"):
            assert file.read_bytes() == before[file]


def test_charts_that_need_more_are_left_out(tiny_checkpoint: Path, files: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["--data", f"code={files['code']}", "--limit", "1", "--timed", "0", "--selector", "static"]
    done = succeed("atlas", "--model", tiny_checkpoint, *arguments, "--out", tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"atlas-{name}{suffix}" for name in ("overlap", "shared") for suffix in (".png", ".svg")
    ]
    assert "no chart of quality: it needs --evaluation" in done.stderr


def select(checkpoint: Path, *more: Any) -> dict[str, Any]:
    done = succeed("select", "--json", "--model", checkpoint, "--prompt", "sort $a$ list", "--density", "0.5", *more)
    return answer(done)


def test_a_selection_is_drawn_beside_the_static_one(tiny_checkpoint: Path, tmp_path: Path) -> None:
    plain = select(tiny_checkpoint)
    drawn = select(tiny_checkpoint, "--plot", tmp_path / "x.svg")
    assert drawn["selection"] == plain["selection"]
    found = texts(tmp_path / "x.svg")
    assert {'"sort $a$ list" against static', "layer (activation, density 0.50)", "static only"} <= found
    select(tiny_checkpoint, "--plot", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_several_selections_are_drawn_as_overlaps(tiny_checkpoint: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.safetensors"
    select(tiny_checkpoint, "--save-to", saved)
    long = "a prompt that is longer than a name in the chart can be"
    more = ["--with-prompt", f"{long} 1", "--with-prompt", f"{long} 2", "--compare", saved]
    value = select(tiny_checkpoint, *more, "--plot", tmp_path / "x.svg")
    found = texts(tmp_path / "x.svg")
    names = [name for name in found if name.startswith("a prompt that is longer")]
    assert len(names) == 2  # told apart
    assert {"sort $a$ list", "static", "selected by", *names} <= found
    assert Selection.load(saved).hash == value["selection"]
    for share in value["overlap_with"].values():
        assert f"{share:.2f}" in found


def test_without_matplotlib_one_line_says_what_to_install(
    tiny_checkpoint: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    data = ["--data", f"code={files['code']}"]
    for arguments in (
        ["select", "--prompt", "x", "--plot", tmp_path / "x.png"],
        ["evaluate", *data, "--plot", tmp_path / "x.png"],
        ["atlas", *data, "--out", tmp_path / "out"],
    ):
        done = run_here(*arguments, "--model", tiny_checkpoint)
        assert done.returncode == 1
        assert done.stderr == "ifprune: error: plots need the package matplotlib; pip install 'ifprune-mlx[plots]'\n"
        assert list(tmp_path.iterdir()) == []
    # Whoever draws nothing needs none.
    succeed("select", "--prompt", "x", "--model", tiny_checkpoint)


def test_without_data_the_shipped_prompts_are_drawn(tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = succeed("atlas", "--model", tiny_checkpoint, "--limit", "2", "--timed", "0", "--out", tmp_path, "--json")
    assert "prompts that come with the package" in done.stderr
    assert {name: len(keys) for name, keys in answer(done)["prompts"].items()} == {"code": 2, "maths": 2, "general": 2}
