"""Training and evaluation data: chats and texts from JSON lines, as token ids, in batches that every run makes alike.

Nothing here draws a random number that its seed, the data and the position do not fix: a run that resumes, or that is
shared by several processes, sees what one undisturbed process sees. Knows tokenizers, not models or losses.

    records = read_records("code.jsonl", "code", report=print)
    train = [record for record in records if split(record, 0.02) == "train"]
    mixture = Mixture({"code": (encode_all(tokenizer, train, 512, print), 1.0), ...}, seed=0)
    for batch in batches(mixture, 32): ...
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import math
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BufferedIOBase
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.errors import DataError, PromptError
from ifprune_mlx.prompts import render_messages

Message = dict[str, str]

_EXPECTED = "messages, prompt and completion, or text"


@dataclass(frozen=True)
class Record:
    """One chat, or one plain text for pretraining.

    Attributes:
        messages: of a chat, ending with the assistant's; empty for a text.
        domain: label of what it is about, such as `code`; the reader of the file decides.
        text: of a plain text, else None.
    """

    messages: tuple[Message, ...]
    domain: str = ""
    text: str | None = None

    @cached_property
    def instruction(self) -> str:
        """What a selector reads: the first user message; all of a plain text."""
        if self.text is not None:
            return self.text
        return next((message["content"] for message in self.messages if message["role"] == "user"), "")

    @cached_property
    def key(self) -> str:
        """Hash (16 hexadecimal digits) of the instruction; case, spacing and Unicode form make no difference."""
        normal = " ".join(unicodedata.normalize("NFKC", self.instruction).casefold().split())
        return hashlib.sha256(normal.encode()).hexdigest()[:16]


def read_records(
    path: str | Path, domain: str, *, strict: bool = False, report: Callable[[str], object] | None = None
) -> list[Record]:
    """Read JSON lines as mlx-lm does: `prompt` and `completion`, `messages`, or `text`; other keys are ignored.

    A chat is read up to its last answer, since nothing is learned from what follows. A file may be packed as .gz
    or .bz2. Empty lines are passed over.

    Args:
        strict: make a line that cannot be used fatal.
        report: is told "file, line N: reason" of every line that is skipped. Without it such a line is fatal too:
            nothing is left out in silence.

    Raises:
        DataError: if the file cannot be read, is not UTF-8, holds no usable line, or (see above) has a bad line.
    """
    path = Path(path)
    records, first_bad = [], None
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            records.append(_record(line, domain))
        except _BadLine as exc:
            bad = f"{path}, line {number}: {exc}"
            if strict or report is None:
                raise DataError(bad) from None
            first_bad = first_bad or bad
            report(bad)
    if not records:
        raise DataError(
            f"{path}: holds no chats or texts; give JSON lines with {_EXPECTED}"
            if first_bad is None
            else f"{path}: no line of it can be used; the first reason is {first_bad}"
        )
    return records


def split(record: Record, share: float) -> str:
    """`valid` for about `share` of all instructions, else `train`: by the record's key alone.

    So an instruction is never in both, and stays where it is whatever else is read, in whatever order. A larger
    share only moves records from train to valid.
    """
    return "valid" if int(record.key, 16) / 16 ** len(record.key) < share else "train"


@dataclass(frozen=True, eq=False)
class Encoded:
    """Token ids to learn from.

    Attributes:
        tokens: int32 `[n]`.
        mask: bool `[n]`, True for the tokens that are to be predicted (token i from those before it); never the first.
        prompt_length: index of the first token of the last answer.
        instruction: the text that selects.
        domain: the record's.
        key: tells it apart from others; the record's, and of a chunk its number with it.
    """

    tokens: npt.NDArray[np.int32]
    mask: npt.NDArray[np.bool_]
    prompt_length: int
    instruction: str
    domain: str
    key: str


def encode(tokenizer: TokenizerWrapper, record: Record, max_length: int) -> Encoded | None:
    """Token ids of a chat, with every answer to be predicted, cut off after `max_length`.

    The prompt of the first answer is encoded exactly as at inference (`prompts.render_messages`), and what the chat
    template adds is never split from what it adds it to, so that no token spans the border of a prompt and an answer.
    An answer ends with its end-of-turn token; without a template, the last gets the end-of-text token. A template that
    rewrites earlier turns (dropping their thoughts, say) leaves only the last answer to learn.

    Returns:
        None if no token of an answer lies within `max_length`.

    Raises:
        PromptError: if the chat template refuses the messages.
        DataError: if the record is a plain text.
    """
    if record.text is not None:
        raise DataError(f"plain text in the data of domain {record.domain!r}; give messages, or prompt and completion")
    tokens: list[int] = []
    mask: list[bool] = []
    starts = []
    for piece, answer in _pieces(tokenizer, record.messages):
        if answer:
            starts.append(len(tokens))
        tokens += piece
        mask += [answer] * len(piece)
    within = [start for start in starts if start < max_length]
    if not within:
        return None
    return Encoded(
        np.array(tokens[:max_length], np.int32),
        np.array(mask[:max_length], np.bool_),
        within[-1],
        record.instruction,
        record.domain,
        record.key,
    )


def encode_all(
    tokenizer: TokenizerWrapper, records: Iterable[Record], max_length: int, report: Callable[[str], object]
) -> list[Encoded]:
    """`encode` every chat, leaving out those that have no answer within reach or that the chat template refuses.

    Args:
        report: is told, once for each reason, how many were left out.

    Raises:
        DataError: if nothing is left.
    """
    encoded, total, reasons = [], 0, dict[str, int]()
    for record in records:
        total += 1
        try:
            example, reason = encode(tokenizer, record, max_length), f"the answer begins after {max_length} tokens"
        except PromptError as exc:
            example, reason = None, str(exc)
        if example is None:
            reasons[reason] = reasons.get(reason, 0) + 1
        else:
            encoded.append(example)
    told = [f"{count} of {total} chats left out: {reason}" for reason, count in reasons.items()]
    if not encoded:
        raise DataError(f"no chat is left to use ({told[0] if told else 'there were none'}); give others")
    for line in told:
        report(line)
    return encoded


def chunked(tokenizer: TokenizerWrapper, record: Record, size: int, *, context: bool = True) -> list[Encoded]:
    """A plain text as pairs of neighbouring chunks of `size` tokens: the first selects for the second (stage 1).

    The text is encoded as mlx-lm does for training, with the end-of-text token after it. The last chunk may be short.
    A chunk of nothing but space selects nothing, so its pair is left out.

    Args:
        context: keep the first chunk before the second, as a prompt is kept before an answer; else `tokens` are the
            second alone, and its first token is not predicted. The paper does not say which.

    Raises:
        DataError: if the record is a chat.
    """
    if record.text is None:
        raise DataError(f"a chat in the data of domain {record.domain!r}, where plain text is needed; give text")
    tokens = list(tokenizer.encode(record.text))
    if tokenizer.eos_token_id is not None and tokens[-1:] != [tokenizer.eos_token_id]:
        tokens.append(tokenizer.eos_token_id)
    pairs = []
    for index, start in enumerate(range(size, len(tokens), size)):
        first, second = tokens[start - size : start], tokens[start : start + size]
        instruction = str(tokenizer.decode(first, skip_special_tokens=True))
        prompt = first if context else second[:1]
        both = np.array(first + second if context else second, np.int32)
        if len(both) < 2 or not instruction.strip():
            continue
        mask = np.arange(len(both)) >= len(prompt)
        pairs.append(
            Encoded(both, mask, len(prompt) if context else 0, instruction, record.domain, f"{record.key}-{index}")
        )
    return pairs


class Keyed(Protocol):
    """What a mixture holds: records, encoded or not."""

    @property
    def key(self) -> str: ...


Item = TypeVar("Item", bound=Keyed)


class Mixture(Generic[Item]):
    """An endless stream that draws from several sources by weight, without chance: only the order within a source is
    shuffled, anew for each of its epochs.

    The next item comes from the source that is furthest behind its share, so every stretch of the stream holds the
    weights as nearly as whole items can, and how many items each source has given is all there is to its position.

    Args:
        sources: items and weight by name. Names matter to the shuffle; their order does not.

    Raises:
        DataError: if there are no sources, one is empty, or a weight is not above 0.
    """

    def __init__(self, sources: Mapping[str, tuple[Sequence[Item], float]], seed: int) -> None:
        if not sources:
            raise DataError("a mixture needs at least one source of data")
        for name, (items, weight) in sources.items():
            if not items:
                raise DataError(f"source {name!r} holds nothing to learn from; leave it out, or give it data")
            if not (weight > 0 and math.isfinite(weight)):
                raise DataError(f"source {name!r} has the weight {weight:g}; give a number above 0, or leave it out")
        self._items: dict[str, Sequence[Item]] = {name: sources[name][0] for name in sorted(sources)}
        total = sum(sources[name][1] for name in self._items)  # summed in this order, to the last bit
        self._shares = {name: sources[name][1] / total for name in self._items}
        self._seed = seed
        self._taken = dict.fromkeys(self._items, 0)
        self._orders: dict[str, tuple[int, npt.NDArray[np.intp]]] = {}

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        position = self.position + 1
        # `max` takes the first of equals, in the order of names.
        name = max(self._items, key=lambda name: self._shares[name] * position - self._taken[name])
        items = self._items[name]
        epoch, index = divmod(self._taken[name], len(items))
        if self._orders.get(name, (-1,))[0] != epoch:
            self._orders[name] = epoch, shuffled(len(items), f"{self._seed}/{name}/{epoch}")
        self._taken[name] += 1
        return items[int(self._orders[name][1][index])]

    @property
    def position(self) -> int:
        """Items given so far."""
        return sum(self._taken.values())

    @property
    def seed(self) -> int:
        """What the order hangs on, beside the data."""
        return self._seed

    @cached_property
    def fingerprint(self) -> str:
        """Hash of seed, shares and the keys of all items in their order; knows nothing of how they were encoded."""
        digest = hashlib.sha256(json.dumps([self._seed, self._shares]).encode())
        for items in self._items.values():
            digest.update("\n".join(item.key for item in items).encode() + b"\0")
        return digest.hexdigest()[:16]

    def state(self) -> dict[str, Any]:
        """The position, as plain JSON values."""
        return {"taken": dict(self._taken), "fingerprint": self.fingerprint}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            DataError: if it was taken from another mixture: other data, weights or seed.
        """
        if state.get("fingerprint") != self.fingerprint:
            raise DataError("the data, their weights or the seed changed since the run was saved; start a new run")
        self._taken = {name: int(state["taken"][name]) for name in self._items}


@dataclass(frozen=True, eq=False)
class Batch:
    """What one process computes of one step.

    Attributes:
        tokens: int32 `[rows, length]`, padded on the right; `length` is that of the whole step, on every process.
        mask: bool `[rows, length]`, True for the tokens to be predicted.
        examples: the rows before padding.
        targets: number of tokens to be predicted in the whole step, over all processes. A loss that sums over rows and
            divides by this is the one-process loss once summed over processes.
        state: give it to `batches` to go on after this step.
    """

    tokens: mx.array
    mask: mx.array
    examples: tuple[Encoded, ...]
    targets: int
    state: dict[str, Any]


def batches(
    mixture: Mixture[Encoded],
    size: int,
    *,
    rank: int = 0,
    world: int = 1,
    pool: int = 8,
    multiple: int = 32,
    state: Mapping[str, Any] | None = None,
) -> Iterator[Batch]:
    """Endless batches of `size` rows over all processes, of which this one gets every `world`-th row.

    To pad less, `pool` batches are drawn at once, sorted by length, cut, and given in shuffled order; all of it
    follows from the mixture's position. Every process draws the whole batch and keeps its rows, so nothing has to
    be agreed between them.

    Args:
        size: rows of one step, a multiple of `world`.
        pool: 1 keeps the mixture's own order.
        multiple: the padded length is a multiple of this, so that compiled steps see few shapes.
        state: of an earlier batch, made with the same data, `size` and `pool`; the rest may differ.

    Raises:
        DataError: if `size` is not a multiple of `world`, or `state` belongs to other data or other arguments.
    """
    if size < 1 or size % world:
        raise DataError(f"a batch of {size} cannot be shared equally by {world} processes; give a multiple of {world}")
    done = 0
    if state is not None:
        if state.get("shape") != [size, pool]:
            raise DataError("the batch size or pool changed since the run was saved; give those it began with")
        mixture.restore(state["mixture"])
        done = int(state["done"])
    return _batches(mixture, size, rank, world, pool, multiple, done)


def collate(examples: Sequence[Encoded], *, multiple: int = 1, length: int | None = None) -> tuple[mx.array, mx.array]:
    """Pad examples on the right, with token 0, which a causal model's earlier tokens never see.

    Args:
        multiple: round the length up to a multiple of this.
        length: at least this long; None: as long as the longest.

    Returns:
        tokens int32 and mask bool, both `[len(examples), length]`.
    """
    width = max([length or 1, *(len(example.tokens) for example in examples)])
    width += -width % multiple
    tokens = np.zeros((len(examples), width), np.int32)
    mask = np.zeros((len(examples), width), np.bool_)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = example.tokens
        mask[row, : len(example.mask)] = example.mask
    return mx.array(tokens), mx.array(mask)


def shuffled(count: int, seed: str) -> npt.NDArray[np.intp]:
    """A permutation of 0..count-1 that `seed` fixes on every machine.

    From a bit generator's raw output, which NumPy promises not to change (NEP 19), unlike `Generator.permutation`.
    """
    bits = np.random.PCG64(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:16], "big"))
    return np.argsort(bits.random_raw(count), kind="stable")


def _batches(
    mixture: Mixture[Encoded],
    size: int,
    rank: int,
    world: int,
    pool: int,
    multiple: int,
    done: int,
) -> Iterator[Batch]:
    """`batches`, whose arguments are sound; `done` batches of the pool at hand were given before."""
    while True:
        before, position = mixture.state(), mixture.position
        drawn = [next(mixture) for _ in range(size * pool)]
        if pool > 1:
            drawn.sort(key=lambda example: len(example.tokens))
        order = shuffled(pool, f"{mixture.seed}/pool/{position}")
        for index in range(done, pool):
            start = int(order[index]) * size
            rows = drawn[start : start + size]
            mine = rows[rank::world]
            tokens, mask = collate(mine, multiple=multiple, length=max(len(row.tokens) for row in rows))
            last = index + 1 == pool
            after = {
                "mixture": mixture.state() if last else before,
                "done": 0 if last else index + 1,
                "shape": [size, pool],
            }
            yield Batch(tokens, mask, tuple(mine), sum(int(row.mask.sum()) for row in rows), after)
        done = 0


def _pieces(tokenizer: TokenizerWrapper, messages: Sequence[Message]) -> Iterator[tuple[list[int], bool]]:
    """Consecutive token ids of a chat that ends with an answer, each piece with whether it is to be predicted."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    # For every answer the text before it, ready for it, and the text after it.
    texts = [(_render(tokenizer, messages[:i], True), _render(tokenizer, messages[: i + 1], False)) for i in answers]
    flat = [text for pair in texts for text in pair]
    if not all(longer.startswith(shorter) for shorter, longer in pairwise(flat)):
        answers, texts = answers[-1:], texts[-1:]
    yield render_messages(tokenizer, messages[: answers[0]]), False
    ends, done = set(tokenizer.eos_token_ids), texts[0][0]
    for index, (before, after) in zip(answers, texts, strict=True):
        if len(before) > len(done):
            yield _encode(tokenizer, before[len(done) :]), False
        done, last = after, index == answers[-1]
        # No prefix only in the rewriting template's last answer, which it may prepare for with more than it keeps.
        answer = after[len(before) :] if after.startswith(before) else messages[index]["content"]
        if last and not tokenizer.has_chat_template and tokenizer.eos_token_id is not None:
            yield [*_encode(tokenizer, answer.removesuffix("\n")), tokenizer.eos_token_id], True
            return
        tokens = _encode(tokenizer, answer)
        # What the template puts after the end of a turn, a line break as a rule, is no part of the answer.
        end = max((i + 1 for i, token in enumerate(tokens) if token in ends), default=len(tokens))
        yield tokens[:end], True
        if not last:
            yield tokens[end:], False


def _render(tokenizer: TokenizerWrapper, messages: Sequence[Message], ready: bool) -> str:
    """The text of messages, as `prompts.render_messages` encodes it if they are to be answered (`ready`)."""
    if not tokenizer.has_chat_template:
        return "\n".join(message["content"] for message in messages) + "\n"
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ready))
    except Exception as exc:  # jinja and the templates themselves raise what they like
        raise PromptError(f"the chat template refuses these messages ({' '.join(str(exc).split())[:200]})") from None


def _encode(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


class _BadLine(Exception):
    """Why a line cannot be used."""


def _lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 text file. Only line feeds end them: JSON strings may hold Unicode's other line breaks."""
    number = 0
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: is no ordinary file; give a file of JSON lines")
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{path}, line {number}: not UTF-8 text; convert the file, for example with iconv") from None
    except (EOFError, zlib.error) as exc:
        raise DataError(f"{path}: damaged after line {number} ({exc}); copy or download it again") from None
    except OSError as exc:
        raise DataError(f"{path}: cannot be read ({exc.strerror or exc})") from None


def _open(path: Path) -> BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    return bz2.open(path, "rb") if path.suffix == ".bz2" else path.open("rb")


def _record(line: str, domain: str) -> Record:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise _BadLine(f"not a chat or text; expected JSON with {_EXPECTED}") from None
    if not isinstance(value, dict):
        raise _BadLine(f"not a chat or text; expected a JSON object with {_EXPECTED}")
    # The order of precedence is mlx-lm's.
    if "prompt" in value and "completion" in value:
        user, assistant = _text(value["prompt"], "prompt"), _text(value["completion"], "completion")
        return _chat([{"role": "user", "content": user}, {"role": "assistant", "content": assistant}], domain)
    if "messages" in value:
        if value.get("tools"):
            raise _BadLine("a chat with tools, which are not supported")
        return _chat(value["messages"], domain)
    if "text" in value:
        record = Record((), domain, _text(value["text"], "text"))
        if not record.instruction.strip():
            raise _BadLine("text is blank")
        return record
    raise _BadLine(f"not a chat or text; expected {_EXPECTED}")


def _chat(values: Any, domain: str) -> Record:
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise _BadLine("messages are no list of objects with role and content")
    messages = [
        {key: _text(value.get(key), f"the {key} of message {number}") for key in ("role", "content")}
        for number, value in enumerate(values, 1)
    ]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise _BadLine("no answer by the assistant")
    roles = [message["role"] for message in messages]
    if "user" not in roles[: roles.index("assistant")]:
        raise _BadLine("no user message before the first answer")
    record = Record(tuple(messages), domain)
    if not record.instruction.strip():
        raise _BadLine("the first user message is blank")
    if not messages[-1]["content"].strip():
        raise _BadLine("the last answer is blank")
    return record


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise _BadLine(f"{what} is not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _BadLine(f"{what} holds half a surrogate pair, which is no character") from None
    return value
