"""The prompts that ship with the package: varied, readable, small, and none that a test set holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ifprune_mlx.data.dataset import read_records
from ifprune_mlx.data.shipped_prompts import shipped_prompts
from tests.cli.process import ROOT
from tests.test_training_data import script

FOLDER = ROOT / "ifprune_mlx" / "data"
LINES = [json.loads(line) for line in (FOLDER / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]


def test_any_first_part_is_varied_and_always_the_same() -> None:
    every = shipped_prompts()
    assert shipped_prompts(7) == every[:7]
    assert [record.domain for record in every[:6]] == ["code", "maths", "general"] * 2
    for domain in ("code", "maths", "general"):
        assert sum(record.domain == domain for record in every) == 1200
    assert len({line["source"] for line in LINES[:30]}) >= 20
    assert all([message["role"] for message in record.messages] == ["user"] for record in every)


def test_each_prompt_is_there_once_and_short() -> None:
    every = shipped_prompts()
    assert len({record.key for record in every}) == len(every)
    assert max(len(record.instruction) for record in every) <= 700
    assert (FOLDER / "prompts.jsonl").stat().st_size < 1_000_000


def test_every_source_has_its_licence_beside_it() -> None:
    table = (FOLDER / "PROMPTS.md").read_text(encoding="utf-8")
    subjects = {
        "counting-probability", "geometry", "intermediate-algebra", "number-theory", "prealgebra", "precalculus",
    }  # fmt: skip
    assert {line["source"] for line in LINES if f"`{line['source']}`" not in table} == subjects


def test_none_of_them_is_held_out_or_calibrated_on(monkeypatch: pytest.MonkeyPatch) -> None:
    every = shipped_prompts()
    kept: list[Path] = [*(ROOT / "scripts" / "held_out").glob("*.jsonl")]
    kept.append(ROOT / "convert" / "ifprune_convert" / "data" / "calibration.jsonl")
    keys = {record.key for file in kept for record in read_records(file, file.stem)}
    assert not keys & {record.key for record in every}
    script("check_leakage", monkeypatch).HeldOut.of_unseen_sources().check(every, "shipped prompts")
