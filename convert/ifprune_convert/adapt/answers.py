"""The prompts of a job, and the model's own answers to them: what a predictor learns from, and is measured on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path

from ifprune_mlx.checkpoint.atomic_write import write_atomic
from ifprune_mlx.data.dataset import Record, read_records, split
from ifprune_mlx.data.shipped_prompts import shipped_prompts
from ifprune_mlx.errors import DataError

HELD_OUT = 0.2
"""Share of the prompts that nothing is trained on; a prompt's hash decides, as in `ifprune train --held-out`."""


def prompts(files: Mapping[str, Path], note: Callable[[str], object]) -> list[Record]:
    """The records whose prompts are answered, each prompt once, the domains in turn, so that any number of the first
    is varied.

    Args:
        files: by domain; none takes the prompts that ship.
    """
    if not files:
        return shipped_prompts()
    columns = []
    for name, file in files.items():
        by_key = {record.key: record for record in reversed(read_records(file, name, report=note, answers=False))}
        columns.append([by_key[key] for key in sorted(by_key, key=_place)])
    return in_turn(columns)


def write_domains(folder: Path, answers: Sequence[Record]) -> None:
    """Write the chats of each domain to a file, in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain in dict.fromkeys(chat.domain for chat in answers):
        chats = (json.dumps({"messages": chat.messages}) for chat in answers if chat.domain == domain)
        text = "".join(f"{chat}\n" for chat in chats)
        write_atomic(folder / f"{domain}.jsonl", _writer(text), DataError)


def first_of_each(chats: Sequence[Record]) -> list[Record]:
    """One chat of each prompt, whatever domain it is in."""
    return list({chat.key: chat for chat in reversed(chats)}.values())[::-1]


def training_files(folder: Path) -> dict[str, Path]:
    """Those files of `write_domains` that hold a chat to train on."""
    files = domain_files(folder).items()
    return {
        name: file for name, file in files if any(split(chat, HELD_OUT) == "train" for chat in read_records(file, name))
    }


def domain_files(folder: Path) -> dict[str, Path]:
    """What `write_domains` wrote, by domain."""
    return {file.stem: file for file in sorted(folder.glob("*.jsonl"))}


def every_answer(folder: Path) -> list[Record]:
    """All chats, the domains in turn."""
    return in_turn([read_records(file, name) for name, file in domain_files(folder).items()])


def held_out(folder: Path) -> list[Record]:
    """The chats that nothing is trained on, the domains in turn."""
    files = domain_files(folder).items()
    return in_turn(
        [[chat for chat in read_records(file, name) if split(chat, HELD_OUT) == "valid"] for name, file in files]
    )


def in_turn(columns: Sequence[Sequence[Record]]) -> list[Record]:
    """One of each, then the next of each."""
    return [record for record in chain.from_iterable(zip_longest(*columns)) if record is not None]


def _place(key: str) -> bytes:
    """Where a prompt stands in an order of no meaning. It is not that of the keys, whose lowest `split` holds out."""
    return hashlib.sha256(f"adapt/{key}".encode()).digest()


def _writer(text: str) -> Callable[[Path], object]:
    return lambda file: file.write_text(text, encoding="utf-8")
