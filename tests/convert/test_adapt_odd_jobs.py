"""Jobs of `adapt` whose data, folders or options are not the ordinary ones: they end well, or are refused at once."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ifprune_convert.adapt import Adaptation, AdaptConfig, adapt
from ifprune_convert.adapt.job import FILE, StageRecord
from ifprune_convert.adapt.plan import SHARES
from ifprune_convert.adapt.training import _rate
from ifprune_convert.adapt.workspace import Workspace
from ifprune_mlx.data.dataset import read_records, split
from ifprune_mlx.errors import IfpruneError
from tests.convert.test_adapt import SIZES, config_for, silent


def chats(file: Path, prompts: list[str]) -> Path:
    """A file of prompts."""
    file.write_text("".join(json.dumps({"prompt": text, "completion": "not looked at"}) + "\n" for text in prompts))
    return file


def job(config: AdaptConfig, **changes: Any) -> Adaptation:
    """Do a job of the given sizes."""
    return adapt(config, progress=silent, note=lambda line: None, sizes=SIZES | changes)


def held_out(name: str, file: Path) -> list[str]:
    return [record.instruction for record in read_records(file, name) if split(record, 0.2) == "valid"]


def test_a_prompt_of_two_domains_is_answered_once(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    (shared, *_) = held_out("code", config.data["code"])
    with config.data["maths"].open("a") as file:
        file.write(json.dumps({"prompt": shared.upper(), "completion": "not looked at"}) + "\n")
    done = job(config, answers=1000)
    curve = done.checkpoint.layout.curve
    assert curve is not None
    assert len(set(curve.prompts)) == len(curve.prompts)


def test_prompts_need_no_answers(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"prompt {number}"}) for number in range(60)]
    lines += [json.dumps({"messages": [{"role": "user", "content": f"message {number}"}]}) for number in range(60)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    config = config_for(tmp_path, data={"mine": tmp_path / "prompts.jsonl"}, until="answers")
    assert job(config).checkpoint.layout.ffns


def test_a_domain_that_is_held_out_as_a_whole_is_measured_only(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    (one, *_) = held_out("code", config.data["code"])
    config.data["code"].write_text(config.data["code"].read_text().replace(json.dumps(one), json.dumps("code 0!")))
    few = chats(tmp_path / "few.jsonl", [one])
    done = job(config_for(tmp_path, data={**config.data, "few": few}), answers=1000)
    assert done.report is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "all"}, "choose another name"),
        ({"output": Path()}, "give the name of a folder"),
        ({"output": Path("/")}, "give the name of a folder"),
    ],
)
def test_what_could_only_fail_after_hours_is_refused_at_once(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if "data" in changes:
        changes = {"data": {changes["data"]: chats(tmp_path / "prompts.jsonl", ["one"])}}
    with pytest.raises(IfpruneError, match=message):
        config_for(tmp_path, **changes)


def test_a_hidden_file_in_the_source_is_no_change_of_it(tmp_path: Path) -> None:
    job(config_for(tmp_path, until="convert"))
    (tmp_path / "source" / ".DS_Store").write_bytes(b"macOS")
    job(config_for(tmp_path, until="answers", overwrite=True))


def test_another_revision_can_be_given_to_go_on(tmp_path: Path) -> None:
    """Of which commit a job is, its record of the source says."""
    assert config_for(tmp_path).identity == config_for(tmp_path, revision="1234abcd").identity


def test_another_tolerance_chooses_anew_without_the_long_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = job(config_for(tmp_path))
    curve = first.checkpoint.layout.curve
    assert curve is not None
    for name in ("compare", "measure_curve"):  # the rows of the report are kept as well, also for a job that was killed
        monkeypatch.setattr(f"ifprune_convert.adapt.evaluation.{name}", None)
    wide = max(point.high for point in curve.points) + 1
    again = job(config_for(tmp_path, tolerance=wide, overwrite=True))
    assert again.checkpoint.layout.curve is not None
    assert again.checkpoint.layout.density == min(again.checkpoint.layout.curve.densities)


def test_a_kill_before_the_first_tick_does_not_block_the_same_command(tmp_path: Path) -> None:
    """The folder has a record from the first file in it on."""

    @contextmanager
    def dies(label: str, unit: str) -> Any:
        if label == "convert":
            assert (tmp_path / "out.adapt" / FILE).is_file()
            raise KeyboardInterrupt
        yield lambda done, total: None

    config = config_for(tmp_path, until="convert")
    with pytest.raises(KeyboardInterrupt):
        adapt(config, progress=dies, note=lambda line: None, sizes=SIZES)
    assert job(config).checkpoint.layout.ffns


def test_a_rate_is_of_what_was_done_now(tmp_path: Path) -> None:
    """Pieces that were there before the clock began say nothing of it."""
    now = [0.0]
    ws = Workspace(config_for(tmp_path), silent, print, lambda: now[0], {})
    asked: list[int] = []

    def do(count: int, mark: Any) -> None:
        asked.append(count)
        for done in range(64, count + 1):  # 64 were done before a kill
            mark(done, count)
            now[0] += 0.5

    record = StageRecord()
    assert _rate(ws, record, do, 1000) == pytest.approx(2.0)
    assert asked == [64, 128]
    assert _rate(ws, record, do, 1000) == pytest.approx(2.0)  # known
    assert asked == [64, 128]
    assert _rate(ws, StageRecord(), lambda count, mark: mark(count, count), 40) > 1e6  # all are there: no need of time


def test_a_job_that_ends_early_leaves_the_time_of_the_stages_behind(tmp_path: Path) -> None:
    ws = Workspace(config_for(tmp_path, hours=10, until="calibrate"), silent, print, lambda: 0.0, {})
    assert ws.seconds("answers") < 1.2 * SHARES["answers"] * 36000


def test_the_clock_of_a_killed_stage_is_kept(tmp_path: Path) -> None:
    now = [0.0]
    ws = Workspace(config_for(tmp_path), silent, print, lambda: now[0], {})
    with ws.job.working("heal"):
        now[0] = 30.0
        ws.job.save()
        assert json.loads((tmp_path / "out.adapt" / FILE).read_text())["stages"]["heal"]["seconds"] == 30.0
