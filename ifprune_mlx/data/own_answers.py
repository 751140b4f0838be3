"""The model's own answers to prompts, several at a time: chats to learn from that need no given answers.

Prompts are enough to train on any model, and its own answers are what it says by itself. An answer is sampled with
random numbers that the seed, the prompt and the position fix. It does not depend on the other prompts but for rounding.
Prompts are answered in blocks, each begun afresh, so that a call that goes on after a kill gives the same answers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count, takewhile
from pathlib import Path

import mlx.core as mx
from mlx import nn
from mlx_lm.generate import BatchGenerator
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.chat_template import render_messages
from ifprune_mlx.checkpoint.atomic_write import check_replaceable, write_atomic
from ifprune_mlx.data.dataset import Message, Record
from ifprune_mlx.errors import DataError, reason_of

_MARGIN = 8  # tokens that an answer may lose when its text is encoded again
_TURNS = 2  # batches a block: more keep the batch fuller, fewer lose less when killed
_IDLE = 4  # one in so many sequences may have ended before the others' cache is copied together
_START_OF_TEXT = 200  # characters of a plain text that are given


@dataclass
class _Sequence:
    """A prompt that is being answered."""

    index: int
    tokens: list[int]
    room: int  # tokens
    answer: list[int] = field(default_factory=list)
    ended: bool = False

    def take(self, token: int, ends: set[int]) -> bool:
        """Whether this token ends the answer; what comes after its end is not looked at."""
        if self.ended:
            return False
        if token not in ends:
            self.answer.append(token)
        self.ended = token in ends or len(self.answer) == self.room
        return self.ended


def own_answers(
    module: nn.Module,
    tokenizer: TokenizerWrapper,
    records: Sequence[Record],
    *,
    max_length: int,
    batch_size: int = 32,
    temperature: float = 0.7,
    seed: int = 0,
    progress: Callable[[int], object] = lambda done: None,
) -> Iterator[Record]:
    """Answer the first prompt of each chat, and give the chats with those answers in the order of the prompts.

    An answer may be a little longer than a chat of `max_length` tokens allows. So one that is cut off here is cut off
    by training as well, and never seems to end there. Prompts that leave no room, and blank answers, are left out. A
    model without a chat template continues the prompt as plain text. Of a plain text the start is the prompt.

    Args:
        module: mlx-lm's model, dense and able to decode sequences together.
        records: chats; their own answers are not looked at, and need not be there.
        temperature: 0 takes the likeliest token.
        progress: called with the number of prompts done, as each answer ends.

    Raises:
        PromptError: if the chat template refuses a prompt.
    """
    answering = _Answering(module, tokenizer, max_length, batch_size, temperature, seed)
    ended = count(1)
    for start in range(0, len(records), answering.block):
        chats = answering.answer(records[start : start + answering.block], lambda: progress(next(ended)))
        yield from (chat for chat in chats if chat is not None)


def write_own_answers(
    path: Path,
    module: nn.Module,
    tokenizer: TokenizerWrapper,
    records: Sequence[Record],
    *,
    max_length: int,
    batch_size: int = 32,
    temperature: float = 0.7,
    seed: int = 0,
    source: str = "",
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[Record]:
    """Write `own_answers` to a file of JSON lines; the same call goes on where one that was killed stopped.

    Until all are there they are in a file beside it, whose name ends in `.partial`, and which a killed call goes on
    with: it loses the block (two batches) that it was in, and the result is the same. Line N is for record N; it is
    empty where there is no answer. An answer is taken over only if prompt, settings and `source` are what they were,
    also from a finished file, so that more prompts after the same ones cost the new ones alone.

    Args:
        source: names the model's weights, so that another model's answers are not taken for this one's.
        progress: called with (prompts done, prompts), as each answer ends.

    Returns:
        The chats.

    Raises:
        DataError: if the file cannot be written, or the model answers none of the prompts.
        PromptError: as `own_answers`.
    """
    check_replaceable(path, error=DataError)
    answering = _Answering(module, tokenizer, max_length, batch_size, temperature, seed)
    settings = f"{source}/{max_length}/{batch_size}/{temperature}/{seed}"
    ids = [hashlib.sha256(f"{settings}/{record.key}".encode()).hexdigest()[:16] for record in records]
    partial = path.with_name(f"{path.name}.partial")
    known = {file: _known_lines(file, ids) for file in (partial, path)}
    begun = max(known, key=lambda file: len(known[file]))
    lines = known[begun]
    if begun == path and len(lines) == len(records):  # it may hold more
        progress(len(lines), len(records))
        return _found(path, lines, records)
    if len(lines) < len(records):
        del lines[len(lines) // answering.block * answering.block :]
    progress(len(lines), len(records))
    ended = count(len(lines) + 1)
    try:
        if begun == path or not lines:
            write_atomic(partial, lambda file: file.write_bytes(b"".join(lines)), DataError)
        with partial.open("r+b") as file:  # what is there is not written again: a kill could lose it
            file.truncate(sum(map(len, lines)))
            file.seek(0, os.SEEK_END)
            for start in range(len(lines), len(records), answering.block):
                part = records[start : start + answering.block]
                chats = answering.answer(part, lambda: progress(next(ended), len(records)))
                new = [_line(chat, name) for chat, name in zip(chats, ids[start:], strict=False)]
                file.writelines(new)
                file.flush()
                lines += new
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as exc:
        advice = "check permissions and free space, or write elsewhere"
        raise DataError(f"{path}: cannot be written ({reason_of(exc)}); {advice}") from exc
    return _found(path, lines, records)


def _found(path: Path, lines: Sequence[bytes], records: Sequence[Record]) -> list[Record]:
    """The chats that lines hold; raises DataError if there are none."""
    chats = [_read(line, record) for line, record in zip(lines, records, strict=True)]
    found = [chat for chat in chats if chat is not None]
    if not found:
        raise DataError(f"{path}: the model gave no answer to any of {len(records)} prompts; look at its chat template")
    return found


class _Answering:
    """Answers blocks of prompts with one model and one way of sampling."""

    def __init__(
        self,
        module: nn.Module,
        tokenizer: TokenizerWrapper,
        max_length: int,
        batch_size: int,
        temperature: float,
        seed: int,
    ) -> None:
        self._module, self._tokenizer, self._ends = module, tokenizer, set(tokenizer.eos_token_ids)
        self._max_length, self._batch_size, self._temperature, self._seed = max_length, batch_size, temperature, seed
        self.block = _TURNS * batch_size
        """Prompts that are answered together; a block's answers depend on no other's."""

    def answer(self, records: Sequence[Record], ended: Callable[[], object]) -> list[Record | None]:
        """A chat for each record, or None. `ended` is called once for each, as soon as it is known."""
        answers: list[Record | None] = [None] * len(records)
        waiting = []
        for index, record in enumerate(records):
            tokens = render_messages(self._tokenizer, _prompt(record))
            if (room := self._max_length + _MARGIN - len(tokens)) > _MARGIN:
                waiting.append(_Sequence(index, tokens, room))
            else:
                ended()
        # Taken from the end, the longest first: prompts are padded to the longest that they are read with.
        waiting.sort(key=lambda sequence: len(sequence.tokens))
        # Its own stop tokens would take each sequence out alone, and every time it copies the others' cache.
        generator = BatchGenerator(
            self._module, completion_batch_size=self._batch_size, prefill_batch_size=self._batch_size
        )
        running: dict[int, _Sequence] = {}
        try:
            while waiting or running:
                over = [uid for uid, sequence in running.items() if sequence.ended]
                if len(over) * _IDLE >= len(running):
                    generator.remove(over)
                    for uid in over:
                        del running[uid]
                    for _ in range(min(self._batch_size - len(running), len(waiting))):
                        sequence = waiting.pop()
                        sampler = _sampler(self._temperature, f"{self._seed}/{records[sequence.index].key}")
                        # No end of its own: it may go on for a while after it.
                        (uid,) = generator.insert([sequence.tokens], [1 << 30], samplers=[sampler])
                        running[uid] = sequence
                for response in generator.next()[1]:
                    sequence = running[response.uid]
                    if sequence.take(response.token, self._ends):
                        answers[sequence.index] = self._chat(records[sequence.index], sequence)
                        ended()
        finally:
            generator.close()
        return answers

    def _chat(self, record: Record, sequence: _Sequence) -> Record | None:
        if self._tokenizer.has_chat_template:
            text = self._tokenizer.decode(sequence.answer)
        else:
            # Decoded with what it continues: some tokenizers drop the space before the first word.
            before = self._tokenizer.decode(sequence.tokens)
            text = self._tokenizer.decode(sequence.tokens + sequence.answer)[len(before) :]
            if not text[:1].isspace():  # the chat could not be told from one whose answer begins a line
                return None
        if not text.strip():
            return None
        return replace(record, text=None, messages=(*_prompt(record), {"role": "assistant", "content": text}))


def _prompt(record: Record) -> list[Message]:
    """The messages before the first answer; the start of a plain text."""
    if record.text is not None:
        start = record.text[:_START_OF_TEXT]
        return [{"role": "user", "content": (start.rpartition(" ")[0] if start != record.text else start) or start}]
    return list(takewhile(lambda message: message["role"] != "assistant", record.messages))


def _sampler(temperature: float, seed: str) -> Callable[[mx.array], mx.array]:
    """Samples one sequence's tokens, whatever else is sampled."""
    if temperature == 0:
        return _greedy
    state = [mx.random.key(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big"))]

    def sample(logprobs: mx.array) -> mx.array:
        state[0], key = mx.random.split(state[0])
        return mx.random.categorical(logprobs / temperature, key=key)

    return sample


def _greedy(logprobs: mx.array) -> mx.array:
    """One function for all sequences, so that the generator calls it once."""
    return mx.argmax(logprobs, axis=-1)


def _line(chat: Record | None, name: str) -> bytes:
    if chat is None:
        return b"\n"
    return json.dumps({"messages": chat.messages, "domain": chat.domain, "id": name}).encode() + b"\n"


def _read(line: bytes, record: Record) -> Record | None:
    return replace(record, text=None, messages=tuple(json.loads(line)["messages"])) if line.strip() else None


def _known_lines(file: Path, ids: Sequence[str]) -> list[bytes]:
    """The first lines of a file that are whole and answers to these prompts."""
    found: list[bytes] = []
    with suppress(OSError, ValueError, TypeError, KeyError), file.open("rb") as lines:
        for line, name in zip(lines, ids, strict=False):
            if not line.endswith(b"\n") or (line.strip() and json.loads(line)["id"] != name):
                break
            found.append(line)
    return found
