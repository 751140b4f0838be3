"""Says which chats of a training file are also in the held-out sets of unseen sources; exit code 1 if any is.

    python scripts/check_leakage.py FILE...

A chat leaks if a prompt of it is a held-out prompt, whatever its case and spacing, or if it shares 13 words in a row
with a held-out chat. `scripts/make_training_data.py` checks all that it writes; check any other file before training.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ifprune_mlx.data.dataset import Record, read_records

UNSEEN = Path(__file__).parent / "held_out" / "unseen"
# Folders and files of the data, and repositories, that no training run reads: scripts/make_unseen.py samples them.
SOURCES = (
    "apibench",
    "llamafactory",
    "llm_foundry_eval",
    "redpajama_sample",
    "text2sql/advising.json",
    "ProofNet",
    "TAL-SCQ5K",
    "TheAlgorithms",
)
WORDS_IN_A_ROW = 13


class LeakageError(Exception):
    """Training data and the sets of unseen sources overlap."""


class TrainingData:
    """A folder of data; `folder / name` is a path in it, and a LeakageError for a source that is held out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __truediv__(self, name: str) -> Path:
        path = f"/{Path(name).as_posix()}/".casefold()
        held_out = [source for source in SOURCES if f"/{source}/".casefold() in path]
        if held_out:
            raise LeakageError(f"{name}: {held_out[0]} is held out as an unseen source; train on another")
        return self.folder / name


class HeldOut:
    """The prompts and the 13-word sequences of held-out chats."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._keys: set[str] = set()
        self._sequences: set[tuple[str, ...]] = set()
        for record in records:
            self._keys |= _keys(record)
            self._sequences.update(_sequences(record))

    @classmethod
    def of_unseen_sources(cls) -> HeldOut:
        """The committed sets."""
        return cls(record for file in sorted(UNSEEN.glob("*.jsonl")) for record in read_records(file, file.stem))

    def leak(self, record: Record) -> str | None:
        """What a record shares with the held-out chats; None if nothing."""
        if self._keys & _keys(record):
            return "the prompt"
        shared = next((words for words in _sequences(record) if words in self._sequences), None)
        return None if shared is None else f"{' '.join(shared)!r}"

    def check(self, records: Iterable[Record], name: str) -> None:
        """Raises LeakageError, with the first leaks, if a record shares anything with the held-out chats."""
        leaks = [(record, shared) for record in records if (shared := self.leak(record)) is not None]
        if leaks:
            first = [f"  {record.instruction[:70]!r} shares {shared}" for record, shared in leaks[:5]]
            raise LeakageError("\n".join([f"{name}: {len(leaks)} chats are also held out:", *first]))


def _texts(record: Record) -> list[str]:
    return [record.text] if record.text is not None else [message["content"] for message in record.messages]


def _keys(record: Record) -> set[str]:
    """A key for every prompt of a chat, not only the first."""
    asked = [message for message in record.messages if message["role"] == "user"]
    return {record.key, *(Record((message,)).key for message in asked)}


def _sequences(record: Record) -> Iterator[tuple[str, ...]]:
    """Every 13 words in a row of the prompts and of the answers."""
    for text in _texts(record):
        words = re.findall(r"\w+", text.casefold())
        yield from zip(*(words[start:] for start in range(WORDS_IN_A_ROW)), strict=False)


def main() -> None:
    """Check files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    held_out, failed = HeldOut.of_unseen_sources(), False
    for file in parser.parse_args().files:
        try:
            held_out.check(read_records(file, file.stem, report=print), str(file))
            print(f"{file}: shares nothing with the unseen sources")
        except LeakageError as exc:
            print(exc)
            failed = True
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
