"""Bad input through the real command line: runs the tables of the files beside it, one for each command.

Each case builds its input in a folder of its own. The process must then end with 1 or 2, print nothing on stdout and
one error line on stderr that says what, where and what to do, and leave the folder as it found it: no output, no
half-written file, no hidden leftover.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest

from tests.cli.bad_input.table import Bad, Check, Place
from tests.cli.process import run
from tests.hub_stub import HubStub, serve
from tests.tiny import write_checkpoint


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


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shared: Path, hub: HubStub
) -> Iterator[dict[str, Future[Outcome]]]:
    """The processes of the file's selected cases, as many at a time as there are cores."""
    items = [item for item in request.session.items if item.path == request.path and isinstance(item, pytest.Function)]
    names = [str(item.callspec.params["name"]) for item in items if hasattr(item, "callspec")]

    def execute(bad: Bad, folder: Path, before: dict[str, str]) -> Outcome:
        arguments = bad.arguments
        done = run(*arguments, cache=shared / "cache", stdin=bad.stdin, env=bad.env, prelude=bad.prelude)
        return Outcome(bad, done, before, contents(folder))

    started: dict[str, Future[Outcome]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name in names:
            place = Place(tmp_path_factory.mktemp(name), shared, hub)
            bad = request.module.TABLE[name](place)
            started[name] = pool.submit(execute, bad, place.folder, contents(place.folder))
        yield started
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def check(outcomes: dict[str, Future[Outcome]]) -> Check:
    """Checks the outcome of the case of a name."""

    def check_outcome(name: str) -> None:
        outcome = outcomes[name].result()
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
