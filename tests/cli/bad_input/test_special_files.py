"""Options that name a pipe or a device: every one ends in a line that names it, and nothing waits for ever."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.bad_input.table import Place
from tests.cli.process import Argument, run_here
from tests.hub_stub import HubStub

Command = Callable[[Place, Path], list[Argument]]


def sound(at: Place) -> str:
    """A domain of chats."""
    file = at / "sound.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    return f"a={file}"


def training(at: Place, *more: Argument) -> list[Argument]:
    return ["train", "--model", at.sound, "--data", sound(at), "--output", at / "out", *more]


# By the suffix of the file.
COMMANDS: dict[str, tuple[str, Command]] = {
    "selection": (".safetensors", lambda at, file: at.generate(at.sound, "--selection", file)),
    "compare": (".safetensors", lambda at, file: at.select("--compare", file)),
    "save-to": (".safetensors", lambda at, file: at.select("--save-to", file)),
    "plot": (".png", lambda at, file: at.select("--plot", file)),
    "selection-cache": ("", lambda at, file: at.select("--selection-cache", file)),
    "load": (".json", lambda at, file: ["chat", "--model", at.sound, "--load", file]),
    "model": ("", lambda at, file: at.generate(file)),
    "info": ("", lambda at, file: ["info", "--model", file]),
    "convert": (".gguf", lambda at, file: at.convert(file)),
    "mlx-path": ("", lambda at, file: ["convert", "--model", at.source, "--mlx-path", file, "--overwrite"]),
    "export": ("", lambda at, file: ["export", "--model", at.sound, "--mlx-path", file, "--overwrite"]),
    "prior": (".safetensors", lambda at, file: at.convert(at.source, "--prior", file)),
    "adapter": ("", lambda at, file: at.convert(at.source, "--adapter", file)),
    "predictor": ("", lambda at, file: at.convert(at.source, "--predictor", file)),
    "calibrate": (".jsonl", lambda at, file: at.convert(at.source, "--calibrate", file)),
    "config": (".yaml", lambda at, file: ["train", "--config", file, "--output", at / "out"]),
    "train": (".jsonl", lambda at, file: [*training(at), "--data", f"b={file}"]),
    "backbone": ("", lambda at, file: training(at, "--backbone", file)),
    "data": (".jsonl.gz", lambda at, file: ["evaluate", "--model", at.sound, "--data", f"b={file}"]),
    "choices": (".jsonl", lambda at, file: ["evaluate", "--model", at.sound, "--choices", f"b={file}"]),
    "exact": (".jsonl.bz2", lambda at, file: ["evaluate", "--model", at.sound, "--exact", f"b={file}"]),
    "doctor": (".jsonl", lambda at, file: ["doctor", "--model", at.sound, "--data", f"b={file}"]),
    "evaluation": (
        ".json",
        lambda at, file: ["atlas", "--data", sound(at), "--evaluation", file, "--out", at / "out"],
    ),
    "bench-json": (".json", lambda at, file: ["bench", "--model", at.sound, "--json", file]),
    "work": ("", lambda at, file: ["bench", "--model", at.sound, "--work", file]),
}


@pytest.mark.parametrize("kind", ["fifo", "/dev/zero"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_pipe_or_a_device(tmp_path: Path, shared: Path, hub: HubStub, name: str, kind: str) -> None:
    at = Place(tmp_path, shared, hub)
    suffix, build = COMMANDS[name]
    file = at / f"special{suffix}"
    if kind == "fifo":
        os.mkfifo(file)
    else:
        file.symlink_to(kind)
    arguments = [str(part) for part in build(at, file)]
    before = sorted(tmp_path.iterdir())
    done = run_here(*arguments, env={"IFPRUNE_DATA": str(shared / "data")})
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ifprune: ")]
    assert str(file) in line
    assert sorted(tmp_path.iterdir()) == before
