"""`ifprune bench` from end to end, on noise of a tiny shape."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ifprune_cli.bench import _headline
from tests.cli.process import run_here
from tests.cli.test_evaluate import xml_texts
from tests.tiny import CONFIGS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def done(folder: Path) -> subprocess.CompletedProcess[str]:
    """A shape that is measured, drawn and written."""
    shape = folder / "config.json"
    shape.write_text(json.dumps(CONFIGS["llama"]))
    measured = ("--shape", str(shape), "-p", "16", "-g", "3", "-n", "1", "--details")
    files = ("--work", str(folder), "--json", str(folder / "bench.json"), "--plot", str(folder / "rates.svg"))
    done = run_here("bench", *measured, *files)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def result(done: subprocess.CompletedProcess[str], folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "bench.json").read_text())
    return value


def test_a_shape_is_measured_drawn_and_written(
    done: subprocess.CompletedProcess[str], result: dict[str, Any], folder: Path
) -> None:
    assert result["shape"] == str(folder / "config.json")
    assert len(result["rows"]) == 5
    assert "sliced decoding / a plain model of that size" in done.stdout
    assert "bytes of weights moved while decoding: 0" in done.stdout
    assert "down product, 1 " in done.stdout
    assert (folder / "rates.svg").read_text().lstrip().startswith("<?xml")
    assert sorted(file.name for file in folder.iterdir()) == ["bench.json", "config.json", "rates.svg"]


def test_the_headline_says_what_the_table_and_the_json_say(
    done: subprocess.CompletedProcess[str], result: dict[str, Any]
) -> None:
    head, table, *_ = done.stdout.split("\n\n")
    pattern = r"sliced (\S+)x mlx-lm dense in decoding, (\S+)x in reading, TTFT (\S+)x, memory (\S+)x \((\S+)x on ssd\)"
    found = re.fullmatch(pattern, head.splitlines()[0])
    assert found is not None, head
    rows = {row["name"]: row for row in result["rows"]}
    dense, sliced, ssd = rows["mlx-lm dense"], rows["sliced"], rows["sliced ssd"]
    wanted = [sliced[what] / dense[what] for what in ("decode_tok_s", "prefill_tok_s", "ttft_s", "rss")]
    wanted.append(ssd["rss"] / dense["rss"])
    headline = result["headline"]
    assert headline.pop("against") == "mlx-lm dense"
    assert list(headline) == ["decode", "prefill", "ttft", "memory", "memory_ssd"]
    assert list(headline.values()) == wanted
    assert [float(text) for text in found.groups()] == pytest.approx(wanted, abs=0.0051)
    # The table has the same figures, as far as it shows them.
    for name, row in rows.items():
        (line,) = [line for line in table.splitlines() if line[:14].rstrip() == name]
        read, decode, spread, _, ttft, memory = line[14:].split()[:6]
        assert float(read) == pytest.approx(row["prefill_tok_s"], abs=0.06)
        assert float(decode) == pytest.approx(row["decode_tok_s"], abs=0.006)
        assert float(spread) == pytest.approx(50 * row["decode_spread"], abs=0.51)
        assert float(ttft) == pytest.approx(row["ttft_s"], abs=6e-4)
        assert float(memory) == pytest.approx(row["rss"] / 1e9, rel=0.01)


def test_lines_of_the_table_fit_80_columns(done: subprocess.CompletedProcess[str]) -> None:
    _, *tables = done.stdout.split("\n\n")[:3]
    assert max(len(line) for table in tables for line in table.splitlines()) <= 80


def test_a_first_token_that_comes_later_is_said() -> None:
    row = {"prefill_tok_s": 1.0, "decode_tok_s": 1.0, "rss": 1, "select_s": 0.0, "switch_s": 0.0}
    rows = [{**row, "name": "dense", "ttft_s": 0.1}, {**row, "name": "sliced", "ttft_s": 0.15, "select_s": 0.06}]
    ratio = {"against": "dense", "decode": 1.0, "prefill": 1.0, "ttft": 1.5, "memory": 1.0, "memory_ssd": None}
    first, second = _headline({"headline": ratio, "rows": rows})
    assert first == "sliced 1.00x dense in decoding, 1.00x in reading, TTFT 1.50x, memory 1.00x"
    said = "the first token comes later: after 0.150 s instead of 0.100 s, of which 0.060 s select and switch"
    assert second == said
    assert _headline({"headline": {**ratio, "ttft": 0.9}, "rows": rows})[1:] == []


def test_every_bar_of_the_plot_is_a_measurement(
    done: subprocess.CompletedProcess[str], result: dict[str, Any], folder: Path
) -> None:
    texts = xml_texts(folder / "rates.svg")
    assert {f"{row['decode_tok_s']:.3g}" for row in result["rows"]} <= set(texts)
    assert "limit of the memory" not in texts
    assert any(text.startswith(f"{result['model']}: decoding") for text in texts)
