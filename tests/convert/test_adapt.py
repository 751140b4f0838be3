"""`adapt`: from a source to a checkpoint with a report, stage by stage, over kills; on tiny models of noise."""

from __future__ import annotations

import importlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from ifprune_convert.adapt import STAGES, Adaptation, AdaptConfig, adapt
from ifprune_convert.adapt.config import last_stage
from ifprune_convert.adapt.job import FILE, Job
from ifprune_convert.adapt.memory import Shapes, needs
from ifprune_convert.adapt.plan import SHARES, Budget, sized
from ifprune_convert.adapt.training import late
from ifprune_convert.adapt.workspace import Workspace
from ifprune_convert.folder_lock import alone
from ifprune_convert.pipeline import Options
from ifprune_convert.readers import open_source
from ifprune_mlx import load
from ifprune_mlx.checkpoint.format import Checkpoint
from ifprune_mlx.data.dataset import read_records, split
from ifprune_mlx.errors import DataError, IfpruneError
from tests.tiny import write_source

SIZES: dict[Any, int] = {"convert": 4, "answers": 80, "calibrate": 12, "select": 2, "heal": 2, "evaluate": 12}
SCRIPT = """
import sys
from tests.convert.test_adapt import run
run(sys.argv[1])
"""


@contextmanager
def silent(label: str, unit: str) -> Iterator[Any]:
    yield lambda done, total: None


def write_prompts(folder: Path, count: int = 50) -> dict[str, Path]:
    """Short prompts of two domains."""
    files = {}
    for domain in ("code", "maths"):
        files[domain] = folder / f"{domain}.jsonl"
        chats = [{"prompt": f"{domain} {number}?", "completion": "not looked at"} for number in range(count)]
        files[domain].write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return files


def config_for(folder: Path, **changes: Any) -> AdaptConfig:
    """A job on the source in a folder, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "source").exists():
        write_source(folder / "source", num_hidden_layers=3)
        write_prompts(folder)
    data = {name: folder / f"{name}.jsonl" for name in ("code", "maths")}
    settings: dict[str, Any] = {"model": folder / "source", "output": folder / "out", "data": data}
    return AdaptConfig(**settings | {"max_seq_length": 64} | changes)


def run(folder: str | Path, **changes: Any) -> Adaptation:
    """Adapt the tiny model in a folder."""
    return adapt(config_for(Path(folder), **changes), progress=silent, note=lambda line: None, sizes=SIZES)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Adaptation:
    """An undisturbed job."""
    return run(tmp_path_factory.mktemp("adapt"))


def test_the_result_is_a_checkpoint_whose_defaults_are_measured(finished: Adaptation) -> None:
    layout = finished.checkpoint.layout
    assert layout.curve is not None
    density, selector = layout.curve.choose(0.05)
    assert (layout.density, layout.selector) == (density, selector)
    assert finished.checkpoint.verify() == []
    model, _ = load(finished.checkpoint.path)
    assert model.checkpoint.id == finished.checkpoint.id
    model.close()


def test_the_report_shows_every_control(finished: Adaptation) -> None:
    assert finished.report is not None
    text = finished.report.read_text()
    for words in ("before", "strongest fixed selection", "another prompt", "95 % interval", "0.27", "Six answers"):
        assert words in text
    assert text.count("- dense: ") == 6
    assert "answer tokens" in text
    assert str(finished.checkpoint.path.parent / "source") in text
    assert (finished.report.parent / "curve.svg").is_file()


def test_a_finished_job_is_not_done_again(finished: Adaptation) -> None:
    began = time.monotonic()
    again = run(finished.checkpoint.path.parent)
    assert again.checkpoint.id == finished.checkpoint.id
    assert time.monotonic() - began < 2.0


def test_the_plan_knows_the_sizes_of_what_is_made(finished: Adaptation) -> None:
    work = finished.checkpoint.path.with_name("out.adapt")
    source = open_source(work.with_name("source"))
    shapes = Shapes.of(source, Options(dtype=mx.float32))  # as the source is
    healed = work / "healed"
    for known, file in (
        (shapes.adapter, healed / "adapters" / "learned" / "adapters.safetensors"),
        (shapes.head, healed / "predictor" / "head.safetensors"),
    ):
        assert known == pytest.approx(file.stat().st_size, rel=0.1), file  # and a header
    stored = Checkpoint.open(work / "base")
    assert shapes.weights == pytest.approx(stored.parameters * 4, rel=0.02)
    found = needs(shapes, 64, 12)
    assert all(one.memory > shapes.weights and one.disk >= shapes.weights for one in found.values())
    assert found["evaluate"].disk > found["heal"].disk > found["calibrate"].disk > found["convert"].disk


def test_held_out_prompts_are_in_no_training_data(finished: Adaptation) -> None:
    work = finished.checkpoint.path.with_name("out.adapt")
    curve = finished.checkpoint.layout.curve
    assert curve is not None

    records = [
        record for name in ("code", "maths") for record in read_records(work / "answers" / f"{name}.jsonl", name)
    ]
    held_out = {record.key for record in records if split(record, 0.2) == "valid"}
    assert set(curve.prompts) <= held_out
    assert len(records) > len(held_out) > 0


def test_it_stops_after_the_stage_that_is_named_and_goes_on_from_there(tmp_path: Path) -> None:
    early = run(tmp_path, until="calibrate")
    assert early.report is None
    assert not early.checkpoint.has_predictor
    assert early.checkpoint.layout.curve is not None
    measured = (tmp_path / "out.adapt" / "measured" / "prior.safetensors").stat().st_mtime_ns
    whole = run(tmp_path, overwrite=True)
    assert whole.report is not None
    assert (tmp_path / "out.adapt" / "measured" / "prior.safetensors").stat().st_mtime_ns == measured


def test_a_kill_before_an_early_result_is_in_place_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint comes into its place with its curve, or not at all; then the same command goes on."""
    module = importlib.import_module("ifprune_convert.adapt.result")
    kept = module.set_curve
    monkeypatch.setattr(module, "set_curve", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, until="answers")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(module, "set_curve", kept)
    early = run(tmp_path, until="answers")
    assert early.checkpoint.layout.curve is not None
    assert run(tmp_path, until="answers").checkpoint.id == early.checkpoint.id  # done already, and no refusal


def interrupt(*arguments: object) -> None:
    """Stands where a process is killed."""
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_kill_9_at_random_moments_changes_nothing(seed: int, tmp_path: Path, finished: Adaptation) -> None:
    """Each kill is followed by the same command; in the end the files are those of the undisturbed job."""
    config_for(tmp_path)
    chance = random.Random(seed)
    kills = 0
    while True:
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=Path(__file__).parents[2])
        try:
            assert process.wait(timeout=chance.uniform(1, 6) if kills < 8 else 300) == 0
            break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    files, wanted = (one.manifest["files"] for one in (Checkpoint.open(tmp_path / "out"), finished.checkpoint))
    assert kills
    assert files.keys() == wanted.keys()
    # The report names the source's folder, and the time that stages took.
    changed = [name for name in files if name != "REPORT.md" and files[name]["sha256"] != wanted[name]["sha256"]]
    assert changed == []


BAD = {
    "no hours": ({"hours": 0.0}, "--hours 0"),
    "hours that are no number": ({"hours": math.nan}, "--hours nan"),
    "endless hours": ({"hours": math.inf}, "--hours inf"),
    "tolerance that is no number": ({"tolerance": math.nan}, "tolerance nan"),
    "negative tolerance": ({"tolerance": -0.1}, "tolerance -0.1"),
    "no such stage": ({"until": "dream"}, "--stages dream"),
    "no such data": ({"data": {"code": Path("missing.jsonl")}}, "missing.jsonl: no such file"),
    "a domain that is a path": ({"data": {"../code": Path(__file__)}}, "name the domain"),
}


@pytest.mark.parametrize("name", BAD)
def test_settings_out_of_range_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    changes, words = BAD[name]
    with pytest.raises(IfpruneError) as caught:
        config_for(tmp_path, **changes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_job_in_the_same_place_is_refused(tmp_path: Path) -> None:
    run(tmp_path, until="convert")
    with pytest.raises(DataError, match=r"was begun with seed 0, not 1; give the same, or remove"):
        run(tmp_path, seed=1, overwrite=True)


def test_a_source_that_has_changed_is_refused(tmp_path: Path) -> None:
    run(tmp_path, until="convert")
    write_source(tmp_path / "source", num_hidden_layers=3, intermediate_size=192)
    with pytest.raises(IfpruneError, match="has changed since"):
        run(tmp_path, overwrite=True)


def test_an_earlier_checkpoint_is_kept_without_overwrite(tmp_path: Path) -> None:
    run(tmp_path, until="convert")
    before = Checkpoint.open(tmp_path / "out").id
    with pytest.raises(IfpruneError, match="--overwrite"):
        run(tmp_path)
    assert Checkpoint.open(tmp_path / "out").id == before


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.adapt").mkdir()
    (tmp_path / "out.adapt" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="is not of `ifprune adapt`"):
        run(tmp_path)
    assert sorted(file.name for file in (tmp_path / "out.adapt").iterdir()) == ["thesis.txt"]


def test_two_at_once_do_not_work_on_one_job(tmp_path: Path) -> None:
    with alone(tmp_path / "out.adapt", lambda: None), pytest.raises(DataError, match="another process works on it"):
        run(tmp_path)
    assert sorted(file.name for file in tmp_path.glob("out*")) == []


def test_a_place_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(IfpruneError, match=r"cannot be written .*; choose another place"):
        run(tmp_path, output=tmp_path / "file" / "out")


def test_an_output_that_cannot_be_replaced_leaves_no_folder_of_stages(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(IfpruneError):
        run(tmp_path)
    assert not (tmp_path / "out.adapt").exists()


def test_too_few_prompts_say_what_to_do(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    write_prompts(tmp_path, 10)
    with pytest.raises(DataError, match="more prompts, or shorter ones"):
        adapt(config, progress=silent, note=lambda line: None, sizes=SIZES)


def test_the_clock_counts_work_of_all_processes(tmp_path: Path) -> None:
    now = [100.0]
    job = Job(tmp_path / "job", {"seed": 1}, lambda: now[0])
    with job.working("convert") as record:
        now[0] += 30
        job.tick()  # keeps the clock, then the process is killed
        now[0] += 3
    assert (job.seconds, record.seconds, record.done) == (33, 33, True)
    now[0] += 1000
    later = Job(tmp_path / "job", {"seed": 1}, lambda: now[0])
    assert later.seconds == 33
    assert later.stage("convert").done


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 2}', '{"version": 1, "identity": {}, "stages": 3}'])
def test_a_damaged_record_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(DataError) as caught:
        Job(tmp_path, {})
    assert str(tmp_path) in str(caught.value)


def test_the_budget_gives_the_stages_behind_what_is_left() -> None:
    budget, spent = Budget(10), 0.0
    for stage in STAGES:
        spent += budget.seconds(stage, spent)
    assert spent == pytest.approx(36000)
    assert budget.seconds("heal", 40000) == 0
    # A stage that takes twice its share takes it from all others alike.
    late = budget.seconds("heal", 36000 * (SHARES["convert"] + 0.5))
    assert late < budget.seconds("heal", 36000 * SHARES["convert"])


def test_few_hours_leave_each_stage_its_least() -> None:
    """The rest is divided over the others by their shares; a stage that takes too much takes it from these."""
    budget = Budget(0.25, {"answers": 100.0, "heal": 30.0, "evaluate": 300.0})
    assert sum(budget.parts.values()) == pytest.approx(900)
    assert budget.parts["evaluate"] == 300.0
    assert budget.parts["select"] / budget.parts["heal"] == pytest.approx(SHARES["select"] / SHARES["heal"])
    assert budget.parts["answers"] == pytest.approx(600 * SHARES["answers"] / (1 - SHARES["evaluate"]))
    assert budget.end("heal") == pytest.approx(600)
    assert budget.seconds("heal", 500) == pytest.approx(100)
    assert budget.seconds("heal", 700) == 0
    assert budget.seconds("evaluate", 700) == pytest.approx(200)
    assert Budget(0.01, {"answers": 100.0, "evaluate": 300.0}).parts["evaluate"] == 300.0


def test_a_stage_ends_when_those_behind_it_need_the_time() -> None:
    budget, spent = Budget(10), 0.0
    for stage in STAGES:
        spent += budget.seconds(stage, spent)
        assert budget.end(stage) == pytest.approx(spent)  # by the plan, neither earlier nor later


def test_training_goes_on_within_its_part_of_the_hours_and_not_beyond(tmp_path: Path) -> None:
    now = [0.0]
    ws = Workspace(config_for(tmp_path, hours=10), silent, print, lambda: now[0], {})
    for stage in ("select", "heal"):
        now[0] = ws.budget.end(stage) - 60
        assert not late(ws, stage)
        now[0] = ws.budget.end(stage) + 0.06 * 36000
        assert late(ws, stage)


def test_too_few_answers_are_asked_for_anew(tmp_path: Path) -> None:
    """A size that was too small is forgotten, so that the same command with more hours goes on."""
    config = config_for(tmp_path)
    write_prompts(tmp_path, 10)
    with pytest.raises(DataError):
        adapt(config, progress=silent, note=lambda line: None, sizes=SIZES)
    write_prompts(tmp_path, 50)
    assert run(tmp_path, until="answers").checkpoint.layout.curve is not None


def test_sizes_have_bounds() -> None:
    assert sized("answers", 1e9, 100) == 6000
    assert sized("answers", 0, 100) == 96
    assert sized("heal", 100, 0.5) == 50


def test_the_last_of_the_named_stages_counts() -> None:
    assert last_stage(None) == "evaluate"
    assert last_stage("convert,calibrate") == "calibrate"
    assert last_stage("distill, answers") == "distill"
    with pytest.raises(IfpruneError, match="nothing is no stage"):
        last_stage("convert,")
