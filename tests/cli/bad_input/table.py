"""What the tables of bad input are made of: a case, its folder, and sound inputs to damage in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ifprune_mlx import Checkpoint, Selection, TaskStore
from ifprune_mlx.checkpoint.format_writer import write_manifest
from ifprune_mlx.checkpoint.safetensors_io import load_arrays
from tests.cli.process import Argument
from tests.hub_stub import HubStub
from tests.tiny_gguf import CONFIG as GGUF_CONFIG
from tests.tiny_gguf import make_model, write_gguf

MODEL, NEURONS = "model-00001-of-00001.safetensors", "neurons-00002-of-00002.safetensors"

Edit = Callable[[dict[str, Any], dict[str, tuple[Any, Any]]], None]


@dataclass(frozen=True)
class Bad:
    """A command that must fail, what its error line must contain, and what stderr must not contain anywhere."""

    arguments: list[Argument]
    words: tuple[str, ...]
    code: int = 1
    stdin: bytes = b""
    env: dict[str, str] = field(default_factory=dict)
    prelude: str | None = None
    absent: tuple[str, ...] = ("Traceback",)


class Place:
    """A case's own folder, and sound inputs to damage in it."""

    def __init__(self, folder: Path, shared: Path, hub: HubStub) -> None:
        self.folder = folder
        self.hub = hub
        self._shared = shared

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    @property
    def sound(self) -> Path:
        """A sound checkpoint, shared by all cases."""
        return self._shared / "checkpoint"

    @property
    def source(self) -> Path:
        """A sound dense folder, shared by all cases."""
        return self._shared / "source-of-checkpoint"

    @property
    def online(self) -> dict[str, str]:
        """The environment in which `hub` is the hub; what is downloaded lies outside the case's folder."""
        return self.hub.env(self._shared / "hub" / self.folder.name)

    def checkpoint(self) -> Path:
        """A copy of the checkpoint, to be damaged."""
        return Path(shutil.copytree(self.sound, self / "checkpoint"))

    def dense(self, **changes: Any) -> Path:
        """A copy of the dense folder, its config changed."""
        folder = Path(shutil.copytree(self.source, self / "dense"))
        edit_json(folder / "config.json", lambda config: config.update(changes))
        return folder

    def gguf(self, edit: Edit | None = None, **metadata: Any) -> Path:
        """A GGUF file, its metadata changed (`__` for a dot; None takes it away), and then what `edit` changes."""

        def change(values: dict[str, Any], tensors: dict[str, tuple[Any, Any]]) -> None:
            for key, value in metadata.items():
                values[key.replace("__", ".")] = value
                if value is None:
                    del values[key.replace("__", ".")]
            if edit is not None:
                edit(values, tensors)

        config = {**GGUF_CONFIG, "model_type": "llama"}
        return write_gguf(self / "model.gguf", config, make_model(config), edit=change)

    def upload(self, folder: Path) -> str:
        """Put a folder's files on the hub; returns the name of the repository, which is the case's own."""
        name = f"org/{self.folder.name}"
        self.hub.add(name, folder)
        return name

    def generate(self, model: Argument, *more: Argument, prompt: Argument = "hello") -> list[Argument]:
        return ["generate", "--json", "--model", model, "--prompt", prompt, *more]

    def convert(self, source: Argument, *more: Argument) -> list[Argument]:
        return ["convert", "--json", "--model", source, "--mlx-path", self / "out", *more]

    def select(self, *more: Argument) -> list[Argument]:
        return ["select", "--json", "--model", self.sound, "--prompt", "hello", *more]


Case = Callable[[Place], Bad]
Check = Callable[[str], None]


class Table(dict[str, Case]):
    """Cases by name."""

    def case(self, build: Case) -> Case:
        """Decorator: put a case into the table."""
        self[build.__name__] = build
        return build


def edit_json(file: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def edit_tensors(file: Path, change: Callable[[dict[str, mx.array]], object]) -> None:
    """Change a checkpoint's tensors; the manifest is made to agree."""
    arrays = load_arrays(file)
    mx.eval(arrays)
    change(arrays)
    mx.save_safetensors(str(file), arrays, {"format": "mlx"})
    write_manifest(file.parent, source="test", licence=None)


def cut(file: Path, count: int = 100) -> None:
    file.write_bytes(file.read_bytes()[:-count])


def selection(at: Place, *widths: int) -> Path:
    """A selection file of 8 neurons in each of so many FFNs."""
    file = at / "s.safetensors"
    ids = tuple(np.arange(8, dtype=np.int32) for _ in widths)
    Selection(ids, widths, "static").save(file)
    return file


def task(at: Place, name: str = "poetry") -> Path:
    """A task of the sound checkpoint in a data folder of the case's own, which `own_data` names."""
    ids = tuple(np.arange(8, dtype=np.int32) for _ in range(2))
    return TaskStore(Checkpoint.open(at.sound), at / "data").save(name, Selection(ids, (128, 128), "static"))


def own_data(at: Place) -> dict[str, str]:
    return {"IFPRUNE_DATA": str(at / "data")}
