"""Examples of several domains: those to train on, and held-out ones to evaluate on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.data.dataloader import shuffled
from ifprune_mlx.data.dataset import Record, read_records, split
from ifprune_mlx.data.tokenize import Example, chunked, encode_all
from ifprune_mlx.errors import DataError


class DomainSplits:
    """The chats or texts of every domain, split by prompt, in an order that the seed fixes.

    Args:
        files: JSON lines, by domain.
        max_length: most tokens of a chat, or of two neighbouring chunks of a text.
        texts: read plain texts, as pairs of chunks, instead of chats.
        held_out: share of the prompts that is never trained on.
        limit: most records of each domain.
        strict: as `read_records` takes it.
        report: receives what was left out and why, a line each.

    Raises:
        DataError: if a file cannot be used, here or while examples are made.
    """

    def __init__(
        self,
        files: Mapping[str, Path],
        tokenizer: TokenizerWrapper,
        max_length: int,
        *,
        texts: bool = False,
        held_out: float,
        limit: int | None,
        seed: int,
        strict: bool,
        report: Callable[[str], object],
    ) -> None:
        self._tokenizer, self._max_length, self._texts, self._report = tokenizer, max_length, texts, report
        self._records: dict[tuple[str, str], list[Record]] = {}
        for name, file in files.items():
            records = read_records(file, name, strict=strict, report=report)
            for part in ("train", "valid"):
                kept = [record for record in records if split(record, held_out) == part]
                order = shuffled(len(kept), f"{seed}-{name}")
                self._records[name, part] = [kept[index] for index in order][:limit]

    def train(self, domain: str) -> list[Example]:
        """The examples of one domain to train on."""
        return self._encoded(self._records[domain, "train"], self._report)

    def valid(self, domain: str, count: int) -> list[Example]:
        """Up to `count` held-out examples of one domain, one of each prompt or text: a neighbouring chunk of the same
        text would not be another prompt."""
        found: list[Example] = []
        by_key = {record.key: record for record in reversed(self._records[domain, "valid"])}
        for record in reversed(by_key.values()):
            if len(found) == count:
                break
            try:
                found += self._encoded([record], lambda line: None)[:1]
            except DataError:  # its answer begins after the most tokens, or it is shorter than one chunk
                continue
        return found

    def _encoded(self, records: list[Record], report: Callable[[str], object]) -> list[Example]:
        if not self._texts:
            return encode_all(self._tokenizer, records, self._max_length, report)
        size = self._max_length // 2
        pairs = [pair for record in records for pair in chunked(self._tokenizer, record, size)]
        if not pairs:
            raise DataError(f"no text is longer than one chunk of {size} tokens; give longer texts")
        return pairs
