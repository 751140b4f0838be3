"""`ifprune train --config`: options from a YAML file, which the command line overrides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.cli.process import run_here
from tests.cli.train_paired.runs import chats, metrics, settings, write


def test_a_yaml_file_gives_options_that_the_command_line_overrides(
    tiny_checkpoint: Path, tmp_path: Path, predictor: Path
) -> None:
    """Names with - or _, domains and weights as mappings, lists as lists; what is given twice is the command line's."""
    for domain in ("code", "maths"):
        write(tmp_path / f"{domain}.jsonl", chats(domain, 30))
    config = {
        "stage": "sft",
        "model": str(tiny_checkpoint),
        "data": {domain: str(tmp_path / f"{domain}.jsonl") for domain in ("code", "maths")},
        "weight": {"code": 3},
        "predictor": str(predictor),
        "selector": ["static", "learned"],
        "densities": [0.25, "0.4-0.8"],
        "iters": 3,
        "batch-size": 2,
        "learning_rate": "5e-3",
        "lora-rank": 2,
        "lora_scale": 4.0,
        "teacher": 0.25,
        "eval_prompts": 0,
        "strict": True,
        "seed": 9,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    done = run_here("train", "--config", tmp_path / "run.yaml", "--iters", "2", "--output", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 2
    found = settings(tmp_path / "out")
    wanted = {
        "arms": ["static", "learned"],
        "densities": [[0.25, 0.25], [0.4, 0.8]],
        "iterations": 2,
        "batch_size": 2,
        "learning_rate": 5e-3,
        "seed": 9,
    }
    assert wanted.items() <= found["settings"].items()
    assert (found["rank"], found["scale"], found["objective"]["teacher"]) == (2, 4.0, 0.25)
    assert {domain for line in metrics(tmp_path / "out") for domain in line["arms"]["static"]} == {"code", "maths"}


def test_the_order_of_config_and_options_does_not_matter(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """An option before --config overrides it too; single values may stand where several are allowed."""
    given = write(tmp_path / "code.jsonl", chats("code", 30))
    text = f"stage: sft\ndata: {given}\nselector: none\niters: 5\noutput: {tmp_path / 'out'}\neval-prompts: 0\nlimit:\n"
    (tmp_path / "run.yaml").write_text(text)
    done = run_here("train", "--iters", "1", "--model", tiny_checkpoint, "-c", tmp_path / "run.yaml")
    assert done.returncode == 0, done.stderr
    assert settings(tmp_path / "out")["settings"]["iterations"] == 1
    assert settings(tmp_path / "out")["settings"]["arms"] == ["none"]


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("learning-rat: 1", 1, "learning-rat is no option of ifprune train"),
        ("config: other.yaml", 1, "config is no option"),
        ("- iters", 1, "must hold options by name"),
        ("", 1, "must hold options by name"),
        ("iters: [", 1, "is no YAML"),
        ("iters: many", 2, "'--iters': Input should be a valid integer"),
        ("iters: {a: 1}", 2, "'--iters': Input should be a valid integer"),
        ("stage: heal", 2, "'heal'"),
        ("strict: 3", 2, "strict"),
        (None, 1, "cannot be read"),
    ],
)
def test_a_bad_yaml_file_is_one_line(tmp_path: Path, text: str | None, code: int, words: str) -> None:
    """What is wrong with it is told with its name, before anything is loaded."""
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    done = run_here("train", "--config", file, "--output", tmp_path / "out")
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.splitlines()
    assert words in line
    assert code == 2 or line.startswith(f"ifprune: error: {file}: ")
    assert not (tmp_path / "out").exists()
