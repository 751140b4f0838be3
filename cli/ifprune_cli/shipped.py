"""Chats for commands that are given no data: prompts that come with the package, and the model's own answers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .console import progress

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ifprune_mlx.data.dataset import Record
    from ifprune_mlx.model import Model


def shipped_records(limit: int, max_length: int, seed: int) -> dict[str, list[Record]]:
    """`limit` prompts a domain, picked by the seed, whose characters take at most half of `max_length` tokens."""
    from ifprune_mlx.data.dataloader import shuffled
    from ifprune_mlx.data.shipped_prompts import shipped_prompts

    by_domain: dict[str, list[Record]] = {}
    for record in shipped_prompts():
        if 2 * len(record.instruction) <= max_length:
            by_domain.setdefault(record.domain, []).append(record)
    return {
        domain: [records[int(index)] for index in shuffled(len(records), f"{seed}/{domain}")[:limit]]
        for domain, records in by_domain.items()
    }


def without_answers(records: dict[str, list[Record]]) -> dict[str, list[Record]]:
    """The same as chats, for those that read prompts alone: a chat ends with an answer, and any will do."""
    answer = {"role": "assistant", "content": "Yes."}
    return {
        domain: [replace(record, messages=(*record.messages, answer)) for record in given]
        for domain, given in records.items()
    }


def with_own_answers(
    model: Model, tokenizer: TokenizerWrapper, records: dict[str, list[Record]], max_length: int, seed: int
) -> dict[str, list[Record]]:
    """The prompts with the dense model's answers; those that it answers with nothing are left out.

    Raises:
        DataError: if it answers none.
    """
    from ifprune_mlx import DataError
    from ifprune_mlx.data.own_answers import own_answers

    every = [record for given in records.values() for record in given]
    model.switch(None)
    chats: dict[str, list[Record]] = {}
    with progress("answer", "answers") as update:

        def ended(done: int) -> None:
            update(done, len(every))

        found = own_answers(model.module, tokenizer, every, max_length=max_length, seed=seed, progress=ended)
        for chat in found:
            chats.setdefault(chat.domain, []).append(chat)
    if not chats:
        raise DataError("the model answers none of the prompts that come with the package; give --data NAME=FILE.jsonl")
    return chats
