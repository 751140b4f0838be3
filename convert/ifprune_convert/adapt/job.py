"""What a job has done so far, in one file that is replaced at once: kill -9 loses a moment of it at most."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ifprune_mlx.checkpoint.atomic_write import write_atomic
from ifprune_mlx.checkpoint.regular_file import read_json_object
from ifprune_mlx.errors import DataError

FILE = "job.json"
_VERSION = 2
_SAVE_SECONDS = 10.0  # so much working time can be forgotten by a kill


@dataclass
class StageRecord:
    """One stage.

    Attributes:
        size: how much it does (answers, chats, steps, prompts); decided once, when it begins.
        done: whether it is complete.
        seconds: working time that it took.
        figures: what it found, JSON values.
    """

    size: int | None = None
    done: bool = False
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)


class Job:
    """The record of a job, and its clock.

    Args:
        folder: of the stages; made when there is something to keep.
        identity: what the job is; a folder of another one is refused.
        now: seconds that only grow.

    Raises:
        DataError: if the folder holds another job, or cannot be read.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], now: Callable[[], float] = time.monotonic) -> None:
        self.folder, self._now = folder, now
        self._identity = dict(identity)
        self._stages: dict[str, StageRecord] = {}
        self._running: tuple[StageRecord, float] | None = None  # and when it would have begun without a pause
        self._earlier, self._began, self._saved = 0.0, now(), now()
        if (folder / FILE).exists():
            self._restore()
        elif folder.exists() and any(folder.iterdir()):
            raise DataError(f"{folder}: is not of `ifprune adapt`; move it away, or give another --mlx-path")

    def start_clock(self) -> None:
        """What has passed so far does not count, such as a download."""
        self._began = self._now()

    @property
    def seconds(self) -> float:
        """Working time so far, over all processes of the job."""
        return self._earlier + self._now() - self._began

    def stage(self, name: str) -> StageRecord:
        """The record of a stage."""
        return self._stages.setdefault(name, StageRecord())

    @contextmanager
    def working(self, name: str) -> Iterator[StageRecord]:
        """A stage is worked on; when the block ends without an exception, it is done."""
        record = self.stage(name)
        self._running = record, self._now() - record.seconds
        try:
            yield record
            record.done = True
        finally:
            self.save()
            self._running = None

    def tick(self) -> None:
        """Work goes on: keep the clock."""
        if self._now() - self._saved >= _SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write the file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._saved = self._now()
        if self._running is not None:
            record, begun = self._running
            record.seconds = self._now() - begun
        value = {
            "version": _VERSION,
            "identity": self._identity,
            "seconds": self.seconds,
            "stages": {name: vars(record) for name, record in self._stages.items()},
        }
        text = json.dumps(value, indent=1) + "\n"
        write_atomic(self.folder / FILE, lambda file: file.write_text(text, encoding="utf-8"), DataError)

    def _restore(self) -> None:
        file = self.folder / FILE
        value = read_json_object(file, DataError)
        again = f"remove {self.folder} to begin again, or give another --mlx-path"
        if value.get("version") != _VERSION:
            raise DataError(f"{file}: was written by another release of ifprune-mlx; {again}")
        known = value.get("identity")
        if not isinstance(known, dict):
            raise DataError(f"{file}: is damaged; {again}")
        for name, wanted in self._identity.items():
            if known.get(name) != wanted:
                raise DataError(
                    f"{self.folder}: was begun with {name.replace('_', '-')} {known.get(name)!r}, not {wanted!r}; "
                    f"give the same, or {again}"
                )
        try:
            self._stages = {name: StageRecord(**record) for name, record in value["stages"].items()}
            self._earlier = float(value["seconds"])
        except (AttributeError, KeyError, TypeError, ValueError) as exc:
            raise DataError(f"{file}: is damaged; {again}") from exc
