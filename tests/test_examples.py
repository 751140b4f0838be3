"""The examples run as they stand: as processes, on a tiny checkpoint."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.process import environment

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str, checkpoint: Path, folder: Path) -> str:
    """What an example says, which must end well and complain of nothing."""
    arguments = [sys.executable, str(EXAMPLES / name), str(checkpoint)]
    done = subprocess.run(arguments, env=environment(folder), capture_output=True, check=False, timeout=300)
    assert (done.returncode, done.stderr.decode()) == (0, "")
    return done.stdout.decode()


def test_embed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    said = example("embed.py", tiny_checkpoint, tmp_path)
    assert said.count("\n> ") == said.count("[activation: ") == 2


def test_async_chat(tiny_checkpoint: Path, tmp_path: Path) -> None:
    said = example("async_chat.py", tiny_checkpoint, tmp_path)
    assert said.count("\n> ") == 3
    assert said.endswith(" ...\n")


def check_tasks(checkpoint: Path, folder: Path) -> None:
    """The first run saves the task; the second finds it, and says the same on the same selection."""
    first, second = (example("tasks.py", checkpoint, folder) for _ in range(2))
    (file,) = [entry for entry in folder.rglob("*") if entry.is_file()]
    assert file.name == "geography.safetensors"
    saved, _, rest = first.partition("\n")
    assert saved == f"saved to {file}"
    figures = re.compile(r"selected in [0-9.]+ ms, switched in [0-9]+ ms")
    assert figures.sub("", rest) == figures.sub("", second)
    assert len(set(re.findall(r"selection ([0-9a-f]{16})", first))) == 1
    # Looking the selection up is all that selecting takes.
    assert all(float(took) < 50 for took in re.findall(r"selected in ([0-9.]+) ms", first))


def test_tasks(tiny_checkpoint: Path, tmp_path: Path) -> None:
    check_tasks(tiny_checkpoint, tmp_path)


@pytest.mark.real
def test_tasks_on_the_embedded_model(smollm2: Path, tmp_path: Path) -> None:
    check_tasks(smollm2, tmp_path)
