"""The prompts of a job, and the model's own answers to them: what a predictor learns from, and is measured on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.checkpoint.atomic_write import write_atomic
from ifprune_mlx.data.dataset import Record, read_records, split
from ifprune_mlx.data.own_answers import own_answers
from ifprune_mlx.errors import DataError
from ifprune_mlx.model import Model

HELD_OUT = 0.2
"""Share of the prompts that nothing is trained on; a prompt's hash decides, as in `ifprune train --held-out`."""


def prompts(
    files: Mapping[str, Path], shipped: Callable[[], Sequence[Record]], note: Callable[[str], object]
) -> list[Record]:
    """The records whose prompts are answered, each prompt once, the domains in turn, so that any number of the first
    is varied.

    Args:
        files: by domain; none takes `shipped`.
    """
    if files:
        records = [record for name, file in files.items() for record in read_records(file, name, report=note)]
    else:
        records = list(shipped())
    by_domain: dict[str, dict[str, Record]] = {}
    for record in records:
        by_domain.setdefault(record.domain, {}).setdefault(record.key, record)
    # In the order of the keys, which has no meaning.
    columns = [[domain[key] for key in sorted(domain)] for domain in by_domain.values()]
    return [record for record in chain.from_iterable(zip_longest(*columns)) if record is not None]


class Answers:
    """The file of answers: JSON lines in the order of the prompts, whatever order they were answered in.

    Until all are there they lie in `answers.partial.jsonl`, a line each as it was finished, so that a kill loses those
    in work alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._partial = folder / "answers.partial.jsonl"

    def write(
        self,
        model: Model,
        tokenizer: TokenizerWrapper,
        wanted: Sequence[Record],
        max_length: int,
        seed: int,
        progress: Callable[[int, int], None],
    ) -> None:
        """Answer prompts that have no answer yet, and write a file for each domain."""
        self.folder.mkdir(parents=True, exist_ok=True)
        known = {record.key: record for record in self._known()}
        missing = [record for record in wanted if record.key not in known]
        done = len(wanted) - len(missing)
        progress(done, len(wanted))
        with self._partial.open("a", encoding="utf-8") as lines:
            for chat in own_answers(model.module, tokenizer, missing, max_length=max_length, seed=seed):
                known[chat.key] = chat
                lines.write(json.dumps({"messages": chat.messages, "domain": chat.domain}) + "\n")
                lines.flush()
                done += 1
                progress(done, len(wanted))
        answered = [known[record.key] for record in wanted if record.key in known]
        if not answered:
            raise DataError("the model gave no answer to any prompt; look at its chat template")
        for domain in dict.fromkeys(record.domain for record in answered):
            text = "".join(json.dumps({"messages": chat.messages}) + "\n" for chat in answered if chat.domain == domain)
            write_atomic(self.file(domain), _writer(text), DataError)
        self._partial.unlink()

    def file(self, domain: str) -> Path:
        """The file of a domain."""
        return self.folder / f"{domain}.jsonl"

    @property
    def files(self) -> dict[str, Path]:
        """The files by domain."""
        return {file.stem: file for file in sorted(self.folder.glob("*.jsonl")) if file != self._partial}

    def held_out(self) -> list[Record]:
        """Chats that nothing is trained on, the domains in turn."""
        columns = [
            [record for record in read_records(file, name) if split(record, HELD_OUT) == "valid"]
            for name, file in self.files.items()
        ]
        return [record for record in chain.from_iterable(zip_longest(*columns)) if record is not None]

    def _known(self) -> Iterator[Record]:
        """What an earlier process answered; its last line may be half a line."""
        if not self._partial.exists():
            return
        whole = [line for line in self._partial.read_bytes().split(b"\n")[:-1] if line]
        text = b"".join(line + b"\n" for line in whole)
        write_atomic(self._partial, lambda file: file.write_bytes(text), DataError)
        for line in whole:
            value = json.loads(line)
            yield Record(tuple(value["messages"]), value["domain"])


def _writer(text: str) -> Callable[[Path], object]:
    return lambda file: file.write_text(text, encoding="utf-8")
