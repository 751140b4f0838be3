"""Bad input to `ifprune adapt`: settings, models, data and places that it cannot use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import hub_stub
from tests.cli.bad_input.table import Bad, Check, Place, Table, cut, edit_json
from tests.cli.bad_input.test_convert_hub import EveryTime
from tests.cli.process import Argument, full_disk, run_here
from tests.hub_stub import HubStub, command_lines
from tests.tiny import write_source

TABLE = Table()
case = TABLE.case


def adapt(at: Place, source: Argument, *more: Argument) -> list[Argument]:
    return ["adapt", "--json", "--model", source, "--mlx-path", at / "out", *more]


def template(folder: Path, text: str) -> Path:
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(chat_template=text))
    return folder


@case
def no_hours(at: Place) -> Bad:
    return Bad(adapt(at, at.source, "--hours", "0"), ("--hours 0: give a number above 0",))


@case
def hours_that_are_no_number(at: Place) -> Bad:
    return Bad(adapt(at, at.source, "--hours", "nan"), ("--hours nan: give a number above 0",))


@case
def hours_in_words(at: Place) -> Bad:
    return Bad(adapt(at, at.source, "--hours", "eight"), ("--hours", "valid number"), code=2)


@case
def tolerance_that_is_no_number(at: Place) -> Bad:
    return Bad(adapt(at, at.source, "--tolerance", "nan"), ("tolerance nan",))


@case
def tolerance_below_nothing(at: Place) -> Bad:
    return Bad(adapt(at, at.source, "--tolerance", "-0.1"), ("tolerance -0.1",))


@case
def stage_that_there_is_not(at: Place) -> Bad:
    return Bad(adapt(at, at.source, "--stages", "convert,dream"), ("dream is no stage; choose from convert",))


@case
def memory_that_is_no_size(at: Place) -> Bad:
    return Bad(adapt(at, at.source, "--memory", "much"), ("--memory 'much'", "6GB"))


@case
def bits_without_quantizing(at: Place) -> Bad:
    return Bad(adapt(at, at.source, "--q-bits", "4"), ("--quantize (-q)",))


@case
def data_that_is_not_there(at: Place) -> Bad:
    return Bad(adapt(at, at.source, "--data", f"code={at / 'none.jsonl'}"), ("none.jsonl: no such file",))


@case
def data_without_a_name(at: Place) -> Bad:
    return Bad(adapt(at, at.source, "--data", at / "none.jsonl"), ("NAME=FILE",))


@case
def data_that_holds_no_prompts(at: Place) -> Bad:
    (at / "code.jsonl").write_text("print('hello')\n" * 20)
    return Bad(adapt(at, at.source, "--data", f"code={at / 'code.jsonl'}"), ("code.jsonl",))


@case
def model_that_is_not_there(at: Place) -> Bad:
    return Bad(adapt(at, at / "none.gguf"), ("none.gguf", "no such file"))


@case
def checkpoint_instead_of_a_model(at: Place) -> Bad:
    return Bad(adapt(at, at.sound), (str(at.sound), "IFP checkpoint"))


@case
def family_that_mlx_lm_lacks(at: Place) -> Bad:
    folder = at.dense(model_type="gpt9")
    return Bad(adapt(at, folder), (str(folder), "has no model_type 'gpt9'"))


@case
def gguf_of_another_architecture(at: Place) -> Bad:
    file = at.gguf(general__architecture="gpt9")
    return Bad(adapt(at, file), (str(file), "gpt9"))


@case
def gguf_that_is_cut_short(at: Place) -> Bad:
    file = at.gguf()
    cut(file, file.stat().st_size // 2)
    return Bad(adapt(at, file), (str(file), "cut short", "again"))


@case
def model_without_tokenizer(at: Place) -> Bad:
    folder = at.dense()
    (folder / "tokenizer.json").unlink()
    return Bad(adapt(at, folder), (str(folder), "tokenizer"))


@case
def template_that_raises(at: Place) -> Bad:
    return Bad(adapt(at, template(at.dense(), "{{ raise_exception('no') }}")), ("chat template", "no"))


@case
def template_that_does_not_end(at: Place) -> Bad:
    endless = "{% for a in range(100000) %}{% for b in range(100000) %}a{% endfor %}{% endfor %}"
    folder = template(at.dense(), endless)
    return Bad(adapt(at, folder), (str(folder), "chat template"))


@case
def disk_that_fills_up(at: Place) -> Bad:
    return Bad(adapt(at, at.dense()), ("cannot be written", "free space"), prelude=full_disk(100_000))


@case
def disk_that_is_too_small(at: Place) -> Bad:
    usage = "type('Usage', (), {'free': 1000})"
    prelude = f"from ifprune_convert.adapt import run; run.shutil.disk_usage = lambda path: {usage}"
    return Bad(adapt(at, at.dense()), ("GB of disk", "free some space", "--mlx-path"), prelude=prelude)


@case
def memory_that_is_too_little(at: Place) -> Bad:
    return Bad(adapt(at, at.source, "--memory", "200kB"), (str(at.source), "GB may be used; quantize with -q"))


@case
def folder_of_another_in_its_place(at: Place) -> Bad:
    (at / "out").mkdir()
    (at / "out" / "thesis.txt").write_text("mine")
    return Bad(adapt(at, at.source, "--overwrite"), (str(at / "out"), "is not an IFP checkpoint"))


@case
def folder_of_another_where_its_stages_lie(at: Place) -> Bad:
    (at / "out.adapt").mkdir()
    (at / "out.adapt" / "thesis.txt").write_text("mine")
    return Bad(adapt(at, at.source), (str(at / "out.adapt"), "is not of `ifprune adapt`", "--mlx-path"))


@case
def record_of_another_release(at: Place) -> Bad:
    (at / "out.adapt").mkdir()
    (at / "out.adapt" / "job.json").write_text(json.dumps({"version": 99}))
    return Bad(adapt(at, at.source), ("job.json", "another release", "remove"))


@case
def place_below_a_file(at: Place) -> Bad:
    (at / "file").write_text("")
    arguments = ["adapt", "--json", "--model", at.source, "--mlx-path", at / "file" / "out"]
    return Bad(arguments, (str(at / "file"), "cannot be written"))


@case
def upload_to_no_repository(at: Place) -> Bad:
    return Bad(adapt(at, at.source, "--upload-repo", "mine"), ("--upload-repo mine", "OWNER/NAME"))


@case
def download_that_breaks_off(at: Place) -> Bad:
    folder = at.dense()
    (folder / "model.safetensors").rename(folder / "model-halved.safetensors")
    at.hub.cut = EveryTime(at.hub.cut, **{"model-halved.safetensors": 1000})
    name = at.upload(folder)
    return Bad(adapt(at, name), (name, "model-halved.safetensors cannot be downloaded", "try again"), env=at.online)


@case
def repository_of_pickles(at: Place) -> Bad:
    name = at.upload(at.source)
    files = at.hub.repositories[name]
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    return Bad(adapt(at, name), (name, "as Python pickles only"), env=at.online)


@case
def model_of_the_hub_larger_than_the_disk(at: Place) -> Bad:
    name = at.upload(at.source)
    at.hub.sizes[name, "model.safetensors"] = 10**18
    return Bad(adapt(at, name), (name, "TB to download", "free some space"), env=at.online)


@pytest.mark.parametrize("name", TABLE)
def test_bad_input(name: str, check: Check) -> None:
    check(name)


def test_a_model_of_the_hub_that_has_changed(tmp_path: Path, hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/moving", write_source(tmp_path / "source"))
    line = ["adapt", "--json", "--model", "org/moving", "--stages", "convert", "--mlx-path", tmp_path / "out"]
    ((code, told),) = command_lines(hub, tmp_path / "hub", [line])
    assert code == 0, told
    before = sorted(tmp_path.glob("out*/*"))
    monkeypatch.setattr(hub_stub, "COMMIT", "b5" * 20)
    ((code, told),) = command_lines(hub, tmp_path / "hub", [[*line, "--stages", "heal", "--overwrite"]])
    assert code == 1
    assert told.splitlines()[-1].startswith("ifprune: error: ")
    assert "has changed since" in told.splitlines()[-1]
    assert "--revision" in told.splitlines()[-1]
    assert sorted(tmp_path.glob("out*/*")) == before


def test_a_job_of_other_settings(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    line = ["adapt", "--json", "--model", str(source), "--stages", "convert", "--mlx-path", str(tmp_path / "out")]
    assert run_here(*line).returncode == 0
    done = run_here(*line, "--overwrite", "--seed", "1")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "was begun with seed 0, not 1; give the same, or remove" in done.stderr.splitlines()[-1]
