"""What the commands answer on Macs of 8 to 64 GB, and that the command at a refusal's end is accepted there.

The command line is the real one, and the checkpoints have their real size, though no content (scripts/memory_table.py).
Just what would load or write the weights is cut off.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ifprune_convert import pipeline
from ifprune_mlx import BudgetError, Checkpoint, load, model
from ifprune_mlx.checkpoint.budget import check_files, resident_bytes
from ifprune_mlx.device import Device, Limits
from scripts.memory_table import EXAMPLES, MACS, table, write_examples
from tests.cli.process import run_here
from tests.ifprune_mlx.stand_in_gpu import StandInGPU

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
CASES = [(name, size) for name in EXAMPLES for size in MACS]


class Accepted(BaseException):
    """What would have been done: load with a residency, or convert."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hollow")
    for name in EXAMPLES:
        write_examples(folder, name)
    return folder


@pytest.fixture(autouse=True)
def cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_checkpoint(checkpoint: Checkpoint, *, residency: str, **options: Any) -> None:
        raise Accepted(residency)

    def new_folder(*arguments: Any, **options: Any) -> None:
        raise Accepted("convert")

    monkeypatch.setattr(model, "load_checkpoint", load_checkpoint)
    monkeypatch.setattr(pipeline, "new_folder", new_folder)
    monkeypatch.setattr(pipeline, "write_manifest", None)


def on(patch: pytest.MonkeyPatch, device: Device) -> None:
    assert device.working_set is not None
    StandInGPU(device.memory, device.working_set).install(patch)


def answer(*arguments: str | Path) -> tuple[bool, str]:
    """Whether a command of ours is accepted, and as what, or the refusal."""
    try:
        done = run_here(*arguments, stdin=b"Hello\n")
    except Accepted as accepted:
        return True, str(accepted)
    assert done.returncode == 1, done.stderr
    *notes, line = done.stderr.splitlines()
    assert line.startswith("ifprune: error: ")
    assert not any("error" in note for note in notes)
    return False, line


def command_of(refusal: str) -> list[str]:
    return shlex.split(refusal.rpartition(": ")[2])


def obey(patch: pytest.MonkeyPatch, device: Device, command: Sequence[str]) -> tuple[bool, str]:
    """Run a refusal's command, on the Mac whose setting it may change first."""
    words = list(command)
    if words[:2] == ["sudo", "sysctl"]:
        setting = re.fullmatch(r"iogpu\.wired_limit_mb=(\d+)", words[2])
        assert setting is not None
        assert words[3] == "&&"
        on(patch, device.raised(int(setting[1])))
        words = words[4:]
    assert words[0] == "ifprune"
    return answer(*words[1:])


def test_the_table_in_the_documentation_is_what_the_script_prints() -> None:
    page = (ROOT / "docs" / "guide" / "memory.md").read_text(encoding="utf-8")
    written = page.split("<!-- table -->\n")[1].split("\n<!-- end of table -->")[0]
    assert written == table(), "run: python -m scripts.memory_table, and put what it prints into docs/guide/memory.md"


@pytest.mark.parametrize(("name", "size"), CASES)
def test_every_refusal_ends_in_a_command_that_is_accepted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int
) -> None:
    device, example, path = MACS[size], EXAMPLES[name], folder / name
    on(monkeypatch, device)
    done = run_here("info", "--model", path, "--json")
    info = json.loads(done.stdout)
    checkpoint = Checkpoint.open(path)
    whole = resident_bytes(checkpoint, "ram", checkpoint.widths)
    assert info["usable_memory"] == device.usable
    assert [fit["fits"] for fit in info["fits"]] == [fit["resident"] <= device.usable for fit in info["fits"]]
    shown = run_here("info", "--model", path).stdout
    assert info["command"] in shown
    assert ("which does not fit" in shown) == (not all(fit["fits"] for fit in info["fits"]))

    packed = ("-q",) if example.quantization else ()
    loads: tuple[str | Path, ...] = ("generate", "-p", "Hello", "--model", path)
    asked: list[tuple[str | Path, ...]] = [
        loads,
        (*loads, "--residency", "ram"),
        (*loads, "--residency", "ssd", "--selector", "static"),
        (*loads, "--residency", "ssd", "--selector", "static", "--density", "0.9"),
        (*loads, "--memory", "4GB"),
        (*loads, "--memory", "4GB", "--residency", "ram"),
        (*loads, "--memory", "4GB", "--selector", "static", "--density", "0.5"),
        (*loads, "--memory", "40GB"),
        ("chat", "--model", path),
        ("evaluate", "--model", path, "--data", f"x={ROOT / 'scripts' / 'held_out' / 'code.jsonl'}"),
        ("convert", "--model", folder / f"{name}-source", "--mlx-path", folder / "out", *packed),
        ("convert", "--model", folder / f"{name}-source", "--mlx-path", folder / "out", *packed, "--calibrate"),
    ]
    for arguments in asked:
        on(monkeypatch, device)
        accepted, said = answer(*arguments)
        if arguments in (loads, asked[8], asked[9]):
            assert accepted == (whole <= device.usable)
        if not accepted:
            accepted, said = obey(monkeypatch, device, command_of(said))
        assert accepted, (arguments, said)
    on(monkeypatch, device)
    command = shlex.split(info["command"])
    assert obey(monkeypatch, device, command)[0]


def test_a_mac_that_would_do_with_another_setting_is_told_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(32 * GIB, 16 * GIB)
    on(monkeypatch, device)
    accepted, said = answer("generate", "-p", "Hello", "--model", folder / "9b")
    assert not accepted
    setting = re.search(r"\(more after `sudo sysctl iogpu\.wired_limit_mb=(\d+)`\)", said)
    assert setting is not None
    on(monkeypatch, device.raised(int(setting[1])))
    assert answer("generate", "-p", "Hello", "--model", folder / "9b") == (True, "ram")
    on(monkeypatch, device.raised(int(setting[1]) - 2))
    assert not answer("generate", "-p", "Hello", "--model", folder / "9b")[0]
    on(monkeypatch, MACS[8])
    assert "iogpu" not in answer("generate", "-p", "Hello", "--model", folder / "9b")[1]


def test_where_only_another_setting_helps_the_command_begins_with_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(8 * GIB, 2 * GIB)  # its owner set a low limit
    on(monkeypatch, device)
    accepted, said = answer("generate", "-p", "Hello", "--model", folder / "9b")
    assert not accepted
    command = command_of(said)
    assert command[:3] == ["sudo", "sysctl", f"iogpu.wired_limit_mb={4 << 10}"]
    assert obey(monkeypatch, device, command) == (True, "ssd")


def test_what_is_too_large_at_any_density_ends_in_what_is_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, Device(2 * GIB, GIB))
    accepted, said = answer("generate", "-p", "Hello", "--model", folder / "9b")
    assert not accepted
    assert "it is too large even with --residency ssd, convert its source with -q or fewer --q-bits" in said
    assert command_of(said) == ["ifprune", "chat"]
    done = run_here("info", "--model", folder / "9b", "--json")
    assert json.loads(done.stdout)["command"] == "ifprune chat"
    monkeypatch.setattr("ifprune_cli.loading.checkpoint_path", lambda *_, **__: folder / "smollm2")  # the embedded one
    assert answer("chat") == (True, "ram")


@pytest.mark.parametrize("size", MACS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_download_asks_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int) -> None:
    """The files' sizes and the layout are all that is known then, and the answer is that for the whole checkpoint."""
    path, device = folder / name, MACS[size]
    on(monkeypatch, device)
    checkpoint = Checkpoint.open(path)
    sizes = {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}
    for residency, memory in ((None, None), ("ram", None), ("ram", 4 * 10**9), (None, 4 * 10**9)):
        try:
            check_files("org/name", sizes, residency, memory, lambda: checkpoint.layout)
        except BudgetError as exc:
            command = [str(path) if word == "org/name" else word for word in command_of(str(exc))]
            assert obey(monkeypatch, device, command)[0], command
            with pytest.raises(BudgetError):
                load(path, residency=residency, memory=memory)
        else:
            with pytest.raises(Accepted):
                load(path, residency=residency, memory=memory)


def test_a_switch_asks_too(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model on `ssd` takes no selection that there is no room for, and what it had stays active."""
    monkeypatch.undo()
    from tests.ifprune_mlx.reference import random_selection

    monkeypatch.setattr(model, "limits", Limits())
    checkpoint = Checkpoint.open(tiny_checkpoint)
    small = resident_bytes(checkpoint, "ssd", (64, 64))
    on(monkeypatch, Device(64 * GIB, small * 10 // 9 + 2))
    loaded, _ = load(tiny_checkpoint, residency="ssd")
    fitting = random_selection((128, 128), (64, 64), seed=1)
    loaded.switch(fitting)
    with pytest.raises(
        BudgetError, match=r"this fits: ifprune chat .*--density 0\.53 --selector static --residency ssd$"
    ):
        loaded.switch(random_selection((128, 128), (72, 64), seed=2))
    with pytest.raises(BudgetError, match=r"weights may take"):
        loaded.keep()
    assert loaded.keep(0.5) == (64, 64)
    assert loaded.selection is fitting
    loaded.close()


def test_the_command_works_on_a_small_machine(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real model, really loaded and asked: refused, and then as the refusal says."""
    monkeypatch.undo()
    checkpoint = Checkpoint.open(tiny_checkpoint)
    on(monkeypatch, Device(64 * GIB, resident_bytes(checkpoint, "ssd", (96, 96)) * 10 // 9 + 2))
    refused = run_here("generate", "-p", "Hello", "--model", tiny_checkpoint)
    assert refused.returncode == 1
    command = command_of(refused.stderr.strip())
    assert command[-5:] == ["0.78", "--selector", "static", "--residency", "ssd"]
    done = run_here(*command[1:], "-m", "4", stdin=b"Hello\n")
    assert done.returncode == 0, done.stderr
