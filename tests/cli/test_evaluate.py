"""`ifprune evaluate` and `ifprune doctor` on the tiny checkpoint."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from ifprune_cli.doctor import NOT_DYNAMIC
from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from tests.cli.process import run_here
from tests.cli.test_generate import answer, succeed
from tests.tiny import write_checkpoint
from tests.tiny_predictor import write_predictor

WORDS = ["sort", "list", "sum", "river", "moon", "add", "tree", "loop", "song", "seven", "graph", "tea"]
ALL = [
    "dense", "learned", "static", "static-own", "activation", "activation-sliced", "random", "mismatched",
    "cross-domain", "oracle",
]  # fmt: skip
HEALED = {"healed-static": "static", "healed-dense": "dense"}


def write(file: Path, values: list[Any]) -> Path:
    file.write_text("".join(f"{json.dumps(value)}\n" for value in values), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    code = [{"prompt": f"write {word}", "completion": f"def {word}(): pass"} for word in WORDS]
    maths = [
        {"messages": [{"role": "user", "content": f"count {w}"}, {"role": "assistant", "content": f"{w}: {len(w)}"}]}
        for w in WORDS
    ]
    return {"code": write(folder / "code.jsonl", code), "maths": write(folder / "maths.jsonl", maths)}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tasks")
    pick = [{"query": f"which is a {word}?", "choices": [word, "stone", "x"], "gold": 0} for word in WORDS]
    begin = [
        {
            "context_options": [f"the {word} and the {word}", f"the {word} and the cup"],
            "continuation": "fell",
            "gold": 1,
        }
        for word in WORDS
    ]
    sums = [{"question": f"{i} and {i}?", "answer": f"{i} + {i} = {2 * i}\n#### {2 * i}"} for i in range(9)]
    values = {"pick": pick, "begin": begin, "sums": sums}
    return {name: write(folder / f"{name}.jsonl", lines) for name, lines in values.items()}


@pytest.fixture(scope="module")
def with_predictor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with an arbitrary predictor."""
    folder = tmp_path_factory.mktemp("predictor")
    write_checkpoint(folder / "plain")
    predictor = write_predictor(folder / "head")
    convert(open_source(folder / "source-of-plain"), folder / "checkpoint", Options(predictor=predictor))
    return folder / "checkpoint"


def options(files: dict[str, Path]) -> list[str]:
    return [option for name, file in files.items() for option in ("--data", f"{name}={file}")]


def test_everything_in_one_table_and_one_file(with_predictor: Path, files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    arguments = ["evaluate", "--model", with_predictor, *options(files), "--density", "0.5", "--limit", "3"]
    done = succeed(*arguments, "--json", out, "--healed-static", with_predictor, "--healed-dense", with_predictor)
    value = json.loads(out.read_text())
    assert out.read_text().count("\n") == 1
    assert (value["density"], value["matched"]) == (0.5, "learned")
    names = [*ALL, "healed-static", "healed-dense"]
    assert [row["selector"] for row in value["rows"]] == [name for name in names for _ in range(2)]
    assert {(row["domain"], row["n"], len(row["per_prompt"])) for row in value["rows"]} == {
        ("code", 3, 3),
        ("maths", 3, 3),
    }
    nll = {(row["selector"], row["domain"]): row["nll"] for row in value["rows"]}
    assert nll["healed-dense", "code"] == pytest.approx(nll["dense", "code"], abs=1e-5)
    assert nll["healed-static", "maths"] == pytest.approx(nll["static", "maths"], abs=1e-5)
    accepted = {(row["selector"], row["domain"]): row["acceptance"] for row in value["rows"]}
    assert accepted["healed-static", "code"] == pytest.approx(accepted["static", "code"], abs=1e-5)
    assert value["overlap"].keys() == {"learned", "activation"}
    # The table says the same.
    lines = done.stdout.splitlines()
    for name in names:
        (line,) = [line for line in lines if line.split()[:1] == [name] and line.split()[1] != "-"]
        figures = [float(cell) for cell in line.split()[1:]]
        both, shares = ([of[name, domain] for domain in ("code", "maths")] for of in (nll, accepted))
        assert figures == pytest.approx([*both, sum(both) / 2, sum(shares) / 2], abs=6e-4)
    assert lines[1].split() == ["code", "maths", "all", "accepted"]
    assert any(line.startswith("learned - mismatched ") for line in lines)
    assert any(line.startswith("learned - healed-static ") for line in lines)
    assert "selections that learned made from another prompt" in done.stderr
    assert "activation reads the prompt densely" in done.stderr
    assert "accepted: the share of a pruned draft's tokens" in done.stderr


def test_json_on_stdout_is_one_line(tiny_checkpoint: Path, files: dict[str, Path]) -> None:
    names = "static, mismatched,dense"
    done = succeed("evaluate", "--model", tiny_checkpoint, *options(files), "--selectors", names, "--json", "-")
    assert done.stdout.count("\n") == 1
    value = answer(done)
    assert [row["selector"] for row in value["rows"][::2]] == ["static", "mismatched", "dense"]
    assert {row["n"] for row in value["rows"]} == {len(WORDS)}
    assert value["matched"] == "activation"


def test_the_pick_depends_on_seed_and_prompts_alone(
    tiny_checkpoint: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    lines = files["code"].read_text().splitlines(keepends=True)
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("".join([*lines[5:], *lines[:5], *lines]))

    def picked(file: Path, seed: int) -> list[str]:
        arguments = ["--selectors", "dense", "--limit", "4", "--seed", str(seed), "--json", "-"]
        done = succeed("evaluate", "--model", tiny_checkpoint, "--data", f"x={file}", *arguments)
        assert ("which repeat the prompt of another" in done.stderr) == (file == shuffled)
        keys: list[str] = answer(done)["prompts"]["x"]
        return keys

    assert picked(files["code"], 0) == picked(shuffled, 0)
    assert len(set(picked(files["code"], 0))) == 4
    assert picked(files["code"], 0) != picked(files["code"], 1)


def test_what_is_left_out_is_said(tiny_checkpoint: Path, tmp_path: Path) -> None:
    good = [{"prompt": f"p{i}", "completion": "c"} for i in range(2)]
    file = write(tmp_path / "x.jsonl", [*good, {"prompt": "no answer"}, {"prompt": "long " * 50, "completion": "c"}])
    arguments = ["--data", f"x={file}", "--selectors", "dense", "--max-length", "60"]
    done = succeed("evaluate", "--model", tiny_checkpoint, *arguments)
    assert f"{file}, line 3: " in done.stderr
    assert "domain 'x': 1 of 3 chats left out: the answer begins after 60 tokens" in done.stderr
    assert "(2 x)" in done.stdout


def xml_texts(file: Path) -> list[str]:
    root = ElementTree.parse(file).getroot()
    return [item.text or "" for item in root.iter("{http://www.w3.org/2000/svg}text")]


def test_tasks_in_tables_and_json(with_predictor: Path, tasks: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    arguments = ["--choices", f"pick={tasks['pick']}", "--choices", f"begin={tasks['begin']}"]
    arguments += ["--exact", f"sums={tasks['sums']}", "--max-tokens", "4", "--limit", "3", "--density", "0.5"]
    arms = ["--healed-static", str(with_predictor), "--healed-dense", str(with_predictor)]
    done = succeed("evaluate", "--model", with_predictor, *arguments, *arms, "--json", out)
    value = json.loads(out.read_text())
    # There are no losses without --data, and all that the JSON always has.
    assert (value["rows"], value["overlap"], value["differences"], value["prompts"]) == ([], {}, [], {})
    assert (value["density"], value["matched"]) == (0.5, "learned")
    rows = ["dense", "learned", "static", "activation", "activation-sliced", "random", "mismatched"]
    metrics = {"pick": ["accuracy", "margin"], "begin": ["accuracy", "margin"], "sums": ["accuracy", "cut_off"]}
    expected = {(row, task, m) for row in [*rows, *HEALED] for task, names in metrics.items() for m in names}
    found = {(row["selector"], row["task"], row["metric"]): row for row in value["tasks"]}
    assert found.keys() == expected
    assert len(value["tasks"]) == len(expected)
    for (selector, _, metric), row in found.items():
        assert row["n"] == len(row["per_question"]) == 3
        assert row["value"] == pytest.approx(sum(row["per_question"]) / 3)
        assert row["low"] <= row["value"] <= row["high"]
        assert (row["minus_static"] is None) == (selector == "static")
        assert metric == "margin" or 0 <= row["value"] <= 1
    for task, names in metrics.items():
        for metric in names:
            for name, other in HEALED.items():
                both = found[name, task, metric]["per_question"], found[other, task, metric]["per_question"]
                assert both[0] == pytest.approx(both[1], abs=1e-5)
            # The table says the same.
            label = metric.replace("_", "-")
            block = done.stdout[done.stdout.index(f"{task}, {label} (3 questions), density 0.500") :].split("\n\n")[0]
            told = {line.split()[0]: line.split() for line in block.splitlines()[2:]}
            assert list(told) == [*rows, *HEALED]
            for name, cells in told.items():
                assert float(cells[1]) == pytest.approx(found[name, task, metric]["value"], abs=6e-4)
                assert len(cells) == (4 if name == "static" else 7)
    assert "selections that learned made from another prompt" in done.stderr


def test_losses_and_tasks_go_together_and_only_sensible_rows_do_tasks(
    tiny_checkpoint: Path, files: dict[str, Path], tasks: dict[str, Path]
) -> None:
    arguments = ["--data", f"code={files['code']}", "--choices", f"pick={tasks['pick']}", "--limit", "2"]
    done = succeed("evaluate", "--model", tiny_checkpoint, *arguments, "--selectors", "oracle,static", "--json", "-")
    value = answer(done)
    assert [row["selector"] for row in value["rows"]] == ["oracle", "static"]
    assert [(row["selector"], row["metric"]) for row in value["tasks"]] == [
        ("static", "accuracy"),
        ("static", "margin"),
    ]


def test_questions_that_do_not_fit_are_said(tiny_checkpoint: Path, tmp_path: Path) -> None:
    questions = [{"query": query, "choices": ["a", "b"], "gold": 0} for query in ("short", "long " * 120)]
    file = write(tmp_path / "x.jsonl", questions)
    done = succeed("evaluate", "--model", tiny_checkpoint, "--choices", f"x={file}", "--selectors", "dense")
    assert "task 'x': 1 of 2 questions left out: longer than the model's context of 512 tokens" in done.stderr
    assert "x, accuracy (1 questions)" in done.stdout


def test_a_curve_of_densities_with_its_chart(
    with_predictor: Path, files: dict[str, Path], tasks: dict[str, Path], tmp_path: Path
) -> None:
    out, plot = tmp_path / "result.json", tmp_path / "chart.svg"
    names = "dense,learned,static,mismatched"
    arguments = ["--model", with_predictor, *options(files), "--choices", f"pick={tasks['pick']}", "--limit", "3"]
    arguments += ["--selectors", names]
    many = ["--densities", "0.75,0.25,0.5", "--json", out, "--plot", plot, "--healed-dense", with_predictor]
    done = succeed("evaluate", *arguments, *many)
    value = json.loads(out.read_text())
    assert value.keys() == {"total_parameters", "curve"}
    points = value["curve"]
    assert [point["density"] for point in points] == [0.75, 0.25, 0.5]
    active = [point["active_parameters"] for point in points]
    assert active[1] < active[2] < active[0] < value["total_parameters"]
    # 128 neurons in 2 FFNs, each of 3 x 64 weights.
    assert value["total_parameters"] - active[2] == 2 * 64 * 3 * 64
    # Each is what a run at its density gives.
    single = answer(succeed("evaluate", *arguments, "--density", "0.25", "--json", "-"))
    assert single.keys() == points[1].keys() - {"active_parameters"}
    for mine, theirs in zip(single["rows"] + single["tasks"], [
        row for row in points[1]["rows"] + points[1]["tasks"] if row["selector"] != "healed-dense"
    ], strict=True):  # fmt: skip
        key = "per_prompt" if "nll" in mine else "per_question"
        assert mine[key] == pytest.approx(theirs[key], abs=1e-5)
    for density in ("0.750", "0.250", "0.500"):
        assert f"density {density}" in done.stdout
        assert f"overlap of learned's selections, density {density}: " in done.stderr
    texts = xml_texts(plot)
    assert {"mean over domains", "code", "maths", *names.split(","), "healed-dense"} <= set(texts)
    assert "checkpoint: loss of given answers" in texts


def test_a_chart_of_one_density_and_one_domain(tiny_checkpoint: Path, files: dict[str, Path], tmp_path: Path) -> None:
    plot = tmp_path / "chart.svg"
    arguments = ["--data", f"code={files['code']}", "--selectors", "dense,static", "--limit", "2", "--plot", plot]
    succeed("evaluate", "--model", tiny_checkpoint, *arguments)
    assert {"code", "dense", "static", "checkpoint: loss of given answers"} <= set(xml_texts(plot))
    assert "mean over domains" not in xml_texts(plot)


def test_doctor_judges_an_arbitrary_predictor(with_predictor: Path, files: dict[str, Path]) -> None:
    arguments = ["doctor", "--model", with_predictor, *options(files), "--density", "0.5", "--limit", "6"]
    done = succeed(*arguments, "--json")
    assert done.stdout.count("\n") == 1
    value = answer(done)
    assert value["verdict"] in ("static", "broken")
    assert (value["selector"], value["density"]) == ("learned", 0.5)
    assert value["domains"] == {"code": 6, "maths": 6}
    for key in ("matched_nll", "mismatched_nll", "cross_domain_nll", "static_nll"):
        assert value[key] > 0
    assert 0 < value["overlap_across"] <= 1
    plain = succeed(*arguments)
    assert plain.stdout == f"{value['explanation']}\n"
    assert "nats per answer token: matched " in plain.stderr
    # A script that wants to know asks for it.
    assert run_here(*arguments, "--strict").returncode == NOT_DYNAMIC


def test_doctor_calls_a_predictor_of_nan_broken(tmp_path: Path, files: dict[str, Path]) -> None:
    write_checkpoint(tmp_path / "plain")
    predictor = write_predictor(tmp_path / "head", poison=True)
    convert(open_source(tmp_path / "source-of-plain"), tmp_path / "checkpoint", Options(predictor=predictor))
    value = answer(succeed("doctor", "--model", tmp_path / "checkpoint", *options(files), "--json"))
    assert (value["verdict"], value["matched_nll"]) == ("broken", None)
    assert "NaN" in value["explanation"]


def test_doctor_without_data_takes_the_shipped_prompts_and_says_so(tiny_checkpoint: Path) -> None:
    arguments = ["--density", "0.5", "--limit", "4", "--max-length", "200", "--json"]
    done = succeed("doctor", "--model", tiny_checkpoint, *arguments)
    assert "the dense model's own answers to them" in done.stderr
    value = answer(done)
    assert value["selector"] == "activation"
    assert value["domains"] == {"code": 4, "maths": 4, "general": 4}


CODE = "code={code}"
BAD = {
    "no data": (["evaluate"], ("--data",)),
    "no name": (["evaluate", "--data", "{code}"], ("NAME=FILE",)),
    "a name twice": (["evaluate", "--data", CODE, "--data", CODE], ("given twice",)),
    "no such file": (["evaluate", "--data", "x={folder}/none.jsonl"], ("none.jsonl", "cannot be read")),
    "no such model": (["evaluate", "--data", CODE, "--model", "{folder}/none"], ("none", "give a model: its folder")),
    "no such arm": (
        ["evaluate", "--data", CODE, "--healed-static", "{folder}/none"],
        ("none", "give a model: its folder"),
    ),
    "an arm of other tokens": (["evaluate", "--data", CODE, "--healed-dense", "{other}"], ("other tokens",)),
    "a folder that is none": (["evaluate", "--data", CODE, "--json", "{folder}/none/x.json"], ("no such folder",)),
    "an unknown selector": (["evaluate", "--data", CODE, "--selectors", "dense,statik"], ("'statik'", "static-own")),
    "no selectors": (["evaluate", "--data", CODE, "--selectors", ","], ("empty",)),
    "learned without a predictor": (["evaluate", "--data", CODE, "--selectors", "learned"], ("no trained predictor",)),
    "one domain": (["evaluate", "--data", CODE, "--selectors", "cross-domain"], ("two domains",)),
    "one prompt": (["evaluate", "--data", CODE, "--selectors", "mismatched", "--limit", "1"], ("has 1 usable",)),
    "the name all": (["evaluate", "--data", "all={code}"], ("'all'",)),
    "plain text": (["evaluate", "--data", "x={text}"], ("plain text", "'x'")),
    "nothing in reach": (["evaluate", "--data", CODE, "--max-length", "5"], ("none is left",)),
    "a density above 1": (["evaluate", "--data", CODE, "--density", "2"], ("density 2",)),
    "two kinds of density": (
        ["evaluate", "--data", CODE, "--density", "0.5", "--densities", "0.5,0.75"],
        ("--density and --densities",),
    ),
    "densities that are no numbers": (["evaluate", "--data", CODE, "--densities", "0.5;0.7"], ("0.5;0.7", "0.27,0.5")),
    "densities out of range": (["evaluate", "--data", CODE, "--densities", "0.5,2"], ("density 2",)),
    "densities that round alike": (
        ["evaluate", "--data", CODE, "--densities", "0.5,0.51"],
        ("same number of neurons",),
    ),
    "a chart as PDF": (["evaluate", "--data", CODE, "--plot", "{folder}/x.pdf"], ("x.pdf", ".png or .svg")),
    "a chart in no folder": (["evaluate", "--data", CODE, "--plot", "{folder}/none/x.svg"], ("no such folder",)),
    "a chart without losses": (
        ["evaluate", "--choices", "x={choices}", "--plot", "{folder}/x.svg"],
        ("--plot draws losses", "--data"),
    ),
    "a task without a file": (["evaluate", "--choices", "{choices}"], ("--choices", "NAME=FILE")),
    "a task twice": (
        ["evaluate", "--choices", "x={choices}", "--choices", "x={choices}"],
        ("--choices", "task 'x' is given twice"),
    ),
    "a task of two kinds": (
        ["evaluate", "--choices", "x={choices}", "--exact", "x={choices}"],
        ("task 'x'", "another name"),
    ),
    "chats as choices": (["evaluate", "--choices", "x={code}"], ("code.jsonl, line 1", "expected query, choices")),
    "chats as exact": (["evaluate", "--exact", "x={code}"], ("code.jsonl, line 1", "the answer is not text")),
    "no such task file": (["evaluate", "--exact", "x={folder}/none"], ("none", "cannot be read")),
    "rows that tasks cannot have": (
        ["evaluate", "--choices", "x={choices}", "--selectors", "oracle"],
        ("--selectors", "static", "mismatched"),
    ),
    "one question": (
        ["evaluate", "--choices", "x={choices}", "--selectors", "mismatched"],
        ("task 'x'", "mismatched needs another"),
    ),
    "a predictor for a task": (
        ["evaluate", "--choices", "x={choices}", "--selectors", "learned"],
        ("no trained predictor",),
    ),
    "doctor: too few": (["doctor", "--data", CODE, "--limit", "4"], ("too few for a verdict",)),
    "doctor: no predictor": (["doctor", "--data", CODE, "--selector", "learned"], ("no trained predictor",)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, tiny_checkpoint: Path, files: dict[str, Path], tmp_path: Path) -> None:
    arguments, words = BAD[name]
    places = {
        "code": files["code"],
        "folder": tmp_path,
        "text": write(tmp_path / "text.jsonl", [{"text": "once upon a time"}]),
        "other": tmp_path / "other",
        "choices": write(tmp_path / "choices.jsonl", [{"query": "q", "choices": ["a", "b"], "gold": 0}]),
    }
    if "{other}" in arguments:
        shutil.copytree(tiny_checkpoint, places["other"])
        settings = places["other"] / "tokenizer_config.json"
        changed = settings.read_text().replace("assistant", "robot    ")
        settings.write_text(changed)
    filled = [argument.format(**places) for argument in arguments]
    model = [] if "--model" in filled else ["--model", str(tiny_checkpoint)]
    done = run_here(*filled, *model)
    lines = [line for line in done.stderr.splitlines() if line.startswith("ifprune: ")]
    assert done.returncode == 1
    assert (len(lines), done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    assert all(word in lines[0] for word in words), lines


def write_yaml_task(folder: Path, name: str, data: Path) -> None:
    """A task of lm-evaluation-harness that reads a file of multiple choice questions."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: '{data}'}}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{query}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: gold\n"
    )


@pytest.mark.filterwarnings("ignore")
def test_tasks_of_the_harness_stand_beside_our_own(
    with_predictor: Path, tasks: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    for name in ("theirs", "more"):
        write_yaml_task(tmp_path / "mine", name, tasks["pick"])
    arguments = [
        "--lm-eval",
        "theirs, more",
        "--lm-eval-tasks",
        tmp_path / "mine",
        "--choices",
        f"pick={tasks['pick']}",
    ]
    arguments += ["--selectors", "dense,learned,mismatched", "--limit", "3", "--densities", "0.25,0.5"]
    done = succeed("evaluate", "--model", with_predictor, *arguments, "--healed-static", with_predictor, "--json", "-")
    for point in answer(done)["curve"]:
        rows = {(row["selector"], row["task"], row["metric"]): row for row in point["tasks"]}
        for name in ("theirs", "more"):
            for row in ("dense", "learned", "mismatched", "healed-static"):
                assert rows[row, name, "acc"]["n"] == 3
        assert rows["dense", "theirs", "acc"]["value"] == rows["dense", "more", "acc"]["value"]
    table = succeed("evaluate", "--model", with_predictor, *arguments).stdout
    assert "theirs, acc (3 questions), density 0.250: as lm-evaluation-harness defines it" in table
    taken = ["--lm-eval", "theirs", "--lm-eval-tasks", tmp_path / "mine", "--choices", f"theirs={tasks['pick']}"]
    done = run_here("evaluate", "--model", with_predictor, *taken)
    assert (done.returncode, "another task is called 'theirs'" in done.stderr) == (1, True)


def test_without_the_harness_one_line_says_what_to_install(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "ifprune_mlx.eval.lm_eval", raising=False)
    done = run_here("evaluate", "--model", tiny_checkpoint, "--lm-eval", "arc_easy")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "--lm-eval needs the package lm_eval; pip install 'ifprune-mlx[evaluate]'" in done.stderr
    done = run_here("evaluate", "--model", tiny_checkpoint, "--lm-eval-tasks", ".", "--data", "x=y")
    assert "name some of them with --lm-eval" in done.stderr
