"""Fuzzes everything that reads a file or a request: `python -m tests.fuzz --seconds 600`.

Hypothesis draws damage to a sound input. A child process with a limit of time and memory uses the input as people do.
A signal, a hang, too much memory, an exception that is not the product's own, control characters on the terminal, and
anything half-written are findings: the input is kept, with the command that does it again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky

from tests.fuzz.mutations import damage
from tests.fuzz.worker import Worker

_CASE = "case.json"


class _OverError(Exception):
    """The time is over; raised where hypothesis would go on."""


class Fuzz:
    """One campaign.

    Attributes:
        cases: inputs tried so far, by target.
        findings: what went wrong, by a short name; one input of each is kept.
    """

    def __init__(self, corpus: Path, scratch: Path, keep: Path) -> None:
        self._corpus, self._scratch, self._keep = corpus, scratch, keep
        self._worker = Worker(corpus, scratch)
        self.cases: dict[str, int] = {}
        self.findings: dict[str, str] = {}

    def campaign(self, seconds: float, start: int, targets: list[str]) -> None:
        """Damage and use inputs until the time is over; `start` fixes all that is drawn."""
        end = time.monotonic() + seconds
        sound = {target: self._corpus / target for target in targets}
        files = {
            target: sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
            for target, folder in sound.items()
        }
        folder = self._scratch / "case"

        @seed(start)
        @settings(max_examples=1 << 30, deadline=None, database=None, phases=[Phase.generate], print_blob=False,
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(st.data(), st.sampled_from(targets), st.integers(0, 10_000))
        def example(data: st.DataObject, target: str, variant: int) -> None:
            if time.monotonic() > end:
                raise _OverError
            file = data.draw(st.sampled_from(files[target]))
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(sound[target], folder)
            damage(data.draw, folder / file)
            (self._scratch / _CASE).write_text(json.dumps({"target": target, "file": str(file), "variant": variant}))
            self._try(target, folder, variant)

        try:
            example()
        except (_OverError, Flaky):  # hypothesis wonders why an input that it has drawn before ends early
            if time.monotonic() <= end:
                raise
        finally:
            self._worker.end()

    def _try(self, target: str, folder: Path, variant: int) -> None:
        kept = self._scratch / "kept"  # what the target writes must not change what is kept
        shutil.rmtree(kept, ignore_errors=True)
        _copy(folder, kept)
        self.cases[target] = self.cases.get(target, 0) + 1
        wrong = self._worker.run(target, folder, variant)
        name = f"{target}-{_short(wrong)}"
        if not wrong or name in self.findings:
            return
        self.findings[name] = wrong
        place = self._keep / f"{len(self.findings):02d}-{target}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        _copy(kept, place / "input")
        shutil.copyfile(self._scratch / _CASE, place / _CASE)
        (place / "wrong.txt").write_text(wrong, encoding="utf-8", errors="backslashreplace")
        last = wrong.strip().splitlines()[-1][:300].encode("ascii", "backslashreplace").decode()
        print(f"{place}: {last}\n  again: {sys.executable} -m tests.fuzz --reproduce {place}", flush=True)


def _copy(source: Path, target: Path) -> None:
    """Copy a case; pipes are made anew, and holes stay holes."""

    def copy(at: str, to: str) -> None:
        if Path(at).is_fifo():
            os.mkfifo(to)
        elif Path(at).stat().st_size > 1 << 30:
            with Path(to).open("wb") as out:
                out.truncate(Path(at).stat().st_size)
        else:
            shutil.copyfile(at, to)

    shutil.copytree(source, target, symlinks=True, copy_function=copy)


def _short(wrong: str) -> str:
    """What tells a finding from others: its last line of code in the product, and the kind of what was raised."""
    lines = wrong.strip().splitlines()
    places = [line.split(", in ")[0] for line in lines if line.startswith("  File ") and "ifprune_" in line]
    kind = next((line.split(":")[0] for line in reversed(lines) if line and not line.startswith(" ")), "")
    return f"{places[-1] if places else ''}{kind[:60]}"


def reproduce(place: Path, corpus: Path, scratch: Path) -> str:
    """Do a kept case again; returns what went wrong."""
    case = json.loads((place / _CASE).read_text())
    folder = scratch / "case"
    _copy(place / "input", folder)
    worker = Worker(corpus, scratch)
    try:
        return worker.run(case["target"], folder, case["variant"])
    finally:
        worker.end()


def main(arguments: list[str] | None = None) -> int:
    """Run a campaign; 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, help="fixes what is drawn; without it, another one each time")
    parser.add_argument("--only", action="append", help="a target; repeatable")
    parser.add_argument("--keep", type=Path, default=Path(".cache/fuzz"), help="folder for what is found")
    parser.add_argument("--reproduce", type=Path, metavar="FOLDER", help="do a kept case again")
    given_ = parser.parse_args(arguments)
    start = random.randrange(1 << 20) if given_.seed is None else given_.seed
    with tempfile.TemporaryDirectory(prefix="ifprune-fuzz-") as name:
        from tests.fuzz.corpus import write_corpus
        from tests.fuzz.targets import TARGETS

        corpus, scratch = Path(name) / "corpus", Path(name) / "scratch"
        scratch.mkdir()
        write_corpus(corpus)
        if given_.reproduce is not None:
            wrong = reproduce(given_.reproduce, corpus, scratch)
            print(wrong.encode("ascii", "backslashreplace").decode() or "nothing goes wrong")
            return int(bool(wrong))
        fuzz = Fuzz(corpus, scratch, given_.keep)
        print(f"seed {start}", flush=True)
        fuzz.campaign(given_.seconds, start, given_.only or list(TARGETS))
    counts = ", ".join(f"{count} {target}" for target, count in fuzz.cases.items())
    print(f"{sum(fuzz.cases.values())} inputs ({counts}), {len(fuzz.findings)} findings")
    return int(bool(fuzz.findings))


if __name__ == "__main__":
    sys.exit(main())
