"""Training data keeps off the sources that are held out as unseen, by name and by text."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ifprune_mlx.data.dataset import Record, read_records
from tests.cli.process import ROOT, environment

UNSEEN = ROOT / "scripts" / "held_out" / "unseen"
DOMAINS = ("code", "maths", "general")


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Any:
    """scripts/check_leakage.py."""
    return script("check_leakage", monkeypatch)


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module(name)


def chat(prompt: str, answer: str) -> Record:
    return Record(({"role": "user", "content": prompt}, {"role": "assistant", "content": answer}))


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_unseen_sets_are_real_chats_of_several_sources(check: Any, domain: str) -> None:
    records = read_records(UNSEEN / f"{domain}.jsonl", domain, strict=True)
    assert len({record.key for record in records}) == len(records) >= 200
    assert all(len(record.messages) == 2 and len(record.messages[1]["content"]) >= 20 for record in records)
    # None of them is in a set of the seen sources, nor in what the package ships.
    seen = [file for folder in ("scripts/held_out", "convert") for file in (ROOT / folder).rglob("*.jsonl")]
    for file in (file for file in seen if file.parent != UNSEEN):
        check.HeldOut(records).check(read_records(file, "x", report=print), str(file))


@pytest.mark.parametrize(
    "name",
    [
        "apibench/tensorflow_eval.json", "apibench/torchhub_train.json", "llamafactory/glaive_toolcall_en_demo.json",
        "llm_foundry_eval/piqa.jsonl", "redpajama_sample/sample_stackexchange1.jsonl", "text2sql/advising.json",
        "gsm8k/../APIBench/x.json", "x/TAL-SCQ5K/en.jsonl", "ProofNet/valid.jsonl", "TheAlgorithms/sorts/heap.py",
    ],
)  # fmt: skip
def test_an_unseen_source_cannot_be_read_for_training(check: Any, name: str, tmp_path: Path) -> None:
    with pytest.raises(check.LeakageError, match="is held out as an unseen source; train on another"):
        check.TrainingData(tmp_path) / name


def test_other_sources_can(check: Any, tmp_path: Path) -> None:
    for name in ("text2sql/wikisql.json.bz2", "gsm8k/train.jsonl", "mbpp/mbpp.jsonl"):
        assert check.TrainingData(tmp_path) / name == tmp_path / name


def leaking() -> dict[str, Record]:
    """What shares text with a held-out chat, in several ways."""
    code, general = (read_records(UNSEEN / f"{name}.jsonl", name) for name in ("code", "general"))
    function = next(record for record in code if len(record.messages[1]["content"].split()) > 30)
    question = min(general, key=lambda record: len(record.instruction))
    part = " ".join(function.messages[1]["content"].split()[3:26])
    again = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}, *question.messages]
    return {
        "the prompt, in other case and spacing": chat(f"  {question.instruction.upper()} ", "Something else."),
        "the prompt, as a later turn": Record(tuple(again)),
        "a part of the answer, spaced otherwise": chat("What is this?", f"Perhaps: {part}"),
        "a part of the answer, as the prompt": chat(f"Explain this: {part}", "It is code."),
        "a part of the answer, as a plain text": Record((), "code", f"From a file. {part}"),
    }


@pytest.mark.parametrize("how", leaking())
def test_a_chat_with_text_of_an_unseen_source_is_found(check: Any, how: str) -> None:
    held_out = check.HeldOut.of_unseen_sources()
    fresh = chat("Name a river in Peru that is longer than the Rhine.", "The Marañón, which is one of the headwaters.")
    assert held_out.leak(fresh) is None
    held_out.check([fresh], "mine")
    with pytest.raises(check.LeakageError, match=r"mine: 1 chats are also held out:\n  .* shares "):
        held_out.check([fresh, leaking()[how]], "mine")


def test_nothing_is_written_when_a_chat_leaks(monkeypatch: pytest.MonkeyPatch, check: Any, tmp_path: Path) -> None:
    module, held_out = script("make_training_data", monkeypatch), check.HeldOut.of_unseen_sources()
    (first, *_) = read_records(UNSEEN / "maths.jsonl", "maths")
    chats = [("Add 2 and 3.", "2 + 3 = 5"), (first.instruction, "No."), ("Add 2 and 3.", "It is 5.")]
    with pytest.raises(check.LeakageError, match=r"maths\.jsonl: 1 chats are also held out"):
        module.write(tmp_path / "maths.jsonl", chats, held_out)
    assert not [*tmp_path.iterdir()]
    module.write(tmp_path / "maths.jsonl", [chats[0], chats[2]], held_out)
    assert [record.messages[1]["content"] for record in read_records(tmp_path / "maths.jsonl", "")] == ["2 + 3 = 5"]


def test_any_file_can_be_checked(tmp_path: Path) -> None:
    fresh, stale = tmp_path / "fresh.jsonl", tmp_path / "stale.jsonl"
    fresh.write_text(json.dumps({"prompt": "Add 2 and 3.", "completion": "5"}) + "\n")
    stale.write_text(fresh.read_text() + (UNSEEN / "code.jsonl").read_text().splitlines()[0] + "\n")

    def run(*files: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts" / "check_leakage.py"), *map(str, files)]
        return subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path), check=False)

    assert run(fresh).returncode == 0
    done = run(fresh, stale)
    assert done.returncode == 1
    assert f"{stale}: 1 chats are also held out:" in done.stdout
