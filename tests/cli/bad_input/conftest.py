"""Bad input through the command line: runs the tables of the files beside it, one for each command.

Each case builds its input in a folder of its own. The command must then end with 1 or 2, print nothing on stdout and
one error line on stderr that says what, where and what to do, and leave the folder as it found it: no output, no
half-written file, no hidden leftover. Some cases of a table run as real processes, as a user's do: those that change
the process or what libraries read when they are imported, and the first few; the others run within this one, which is
twenty times quicker.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest

from tests.cli.bad_input.table import Bad, Check, Place
from tests.cli.process import run, run_here
from tests.hub_stub import HubStub, serve
from tests.tiny import write_checkpoint

REAL_PROCESSES = 2  # of each table, whatever the cases need


@dataclass(frozen=True)
class Outcome:
    """What a case's process did, and its folder before and after."""

    bad: Bad
    done: subprocess.CompletedProcess[str]
    before: dict[str, str]
    after: dict[str, str]


def contents(folder: Path) -> dict[str, str]:
    """Every file and folder below `folder`, hidden ones too, with a hash of what is in it."""
    return {
        str(entry.relative_to(folder)): sha256(entry.read_bytes()).hexdigest() if entry.is_file() else "folder"
        for entry in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all cases may read: a sound checkpoint and its source."""
    folder = tmp_path_factory.mktemp("shared")
    write_checkpoint(folder / "checkpoint")
    return folder


@pytest.fixture(scope="session")
def hub() -> Iterator[HubStub]:
    """A hub for all cases; each puts its own repositories there."""
    with serve() as stub:
        yield stub


def needs_process(bad: Bad) -> bool:
    """Whether a case changes its process, or the environment that libraries read when they are imported."""
    texts = all(isinstance(argument, str | Path) for argument in bad.arguments)
    return bad.prelude is not None or not texts or any(not name.startswith("IFPRUNE_") for name in bad.env)


@pytest.fixture
def check(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shared: Path, hub: HubStub
) -> Check:
    """Runs the case of a name and checks its outcome."""

    def execute(name: str) -> Outcome:
        table = request.module.TABLE
        place = Place(tmp_path_factory.mktemp(name), shared, hub)
        bad = table[name](place)
        before = contents(place.folder)
        if needs_process(bad) or list(table).index(name) < REAL_PROCESSES:
            done = run(*bad.arguments, cache=shared / "cache", stdin=bad.stdin, env=bad.env, prelude=bad.prelude)
        else:
            texts = [str(argument) for argument in bad.arguments if not isinstance(argument, bytes)]
            cache = {"IFPRUNE_CACHE": str(shared / "cache"), "IFPRUNE_DATA": str(shared / "cache" / "data")}
            done = run_here(*texts, stdin=bad.stdin, env={**cache, **bad.env})
        return Outcome(bad, done, before, contents(place.folder))

    def check_outcome(name: str) -> None:
        outcome = execute(name)
        done = outcome.done
        for word in outcome.bad.absent:
            assert word not in done.stderr, done.stderr
        errors = [line for line in done.stderr.splitlines() if line.startswith("ifprune: ")]
        assert len(errors) == 1, done.stderr
        assert done.stderr.splitlines()[-1] == errors[0]
        assert done.returncode == outcome.bad.code
        assert errors[0].startswith("ifprune: error: ") or done.returncode == 2
        for word in outcome.bad.words:
            assert word in errors[0]
        assert done.stdout == ""
        assert outcome.after == outcome.before

    return check_outcome
