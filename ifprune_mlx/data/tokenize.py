"""Chats and texts as token ids, with the tokens to be predicted and the instruction that selects."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.chat_template import plain_text, render_messages
from ifprune_mlx.data.dataset import Message, Record
from ifprune_mlx.errors import DataError, PromptError
from ifprune_mlx.tokenizer import encode_text, render_chat


@dataclass(frozen=True, eq=False)
class Example:
    """Token ids to learn from.

    Attributes:
        tokens: int32 `[n]`.
        mask: bool `[n]`, True for the tokens that are to be predicted (token i from those before it); never the first.
        prompt_length: index of the first token of the last answer.
        instruction: the text that selects.
        domain: the record's.
        key: the record's; that of a chunk has the chunk's number behind it.
    """

    tokens: npt.NDArray[np.int32]
    mask: npt.NDArray[np.bool_]
    prompt_length: int
    instruction: str
    domain: str
    key: str


def encode(tokenizer: TokenizerWrapper, record: Record, max_length: int) -> Example | None:
    """Token ids of a chat, with every answer to be predicted, cut off after `max_length`.

    The prompt of the first answer is encoded exactly as at inference (`chat_template.render_messages`). No token spans
    the border of a prompt and an answer, since what the chat template adds stays with the text that it adds it to.
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
    return Example(
        np.array(tokens[:max_length], np.int32),
        np.array(mask[:max_length], np.bool_),
        within[-1],
        record.instruction,
        record.domain,
        record.key,
    )


def encode_all(
    tokenizer: TokenizerWrapper,
    records: Iterable[Record],
    max_length: int,
    report: Callable[[str], object],
    *,
    limit: int | None = None,
) -> list[Example]:
    """`encode` every chat but those whose answer begins after `max_length` and those that the chat template refuses.

    Args:
        report: receives one line for each reason, with the number of chats left out.
        limit: stop after so many.

    Raises:
        DataError: if nothing is left.
    """
    encoded: list[Example] = []
    total, reasons, domains = 0, dict[str, int](), set[str]()
    for record in records:
        if len(encoded) == limit:
            break
        total += 1
        domains.add(record.domain)
        try:
            example, reason = encode(tokenizer, record, max_length), f"the answer begins after {max_length} tokens"
        except PromptError as exc:
            example, reason = None, str(exc)
        if example is None:
            reasons[reason] = reasons.get(reason, 0) + 1
        else:
            encoded.append(example)
    where = f"domain {domains.pop()!r}: " if len(domains) == 1 else ""
    lines = [f"{where}{count} of {total} chats left out: {reason}" for reason, count in reasons.items()]
    if not encoded:
        raise DataError(f"{lines[0] if lines else 'there are no chats'}; none is left, give other chats")
    for line in lines:
        report(line)
    return encoded


def chunked(tokenizer: TokenizerWrapper, record: Record, size: int) -> list[Example]:
    """A plain text as pairs of neighbouring chunks of `size` tokens: the first selects for the second (stage 1).

    The text is encoded as mlx-lm does for training, with the end-of-text token after it. The last chunk may be short.
    The first chunk stays before the second, as a prompt stays before an answer. A chunk of nothing but space selects
    nothing, so its pair is left out.

    Raises:
        DataError: if the record is a chat.
    """
    if record.text is None:
        raise DataError(f"a chat in the data of domain {record.domain!r}, where plain text is needed; give text")
    tokens = encode_text(tokenizer, record.text)
    if tokenizer.eos_token_id is not None and tokens[-1:] != [tokenizer.eos_token_id]:
        tokens.append(tokenizer.eos_token_id)
    pairs = []
    for index, start in enumerate(range(size, len(tokens), size)):
        instruction = str(tokenizer.decode(tokens[start - size : start], skip_special_tokens=True))
        if instruction.strip():
            both = np.array(tokens[start - size : start + size], np.int32)
            mask = np.arange(len(both)) >= size
            pairs.append(Example(both, mask, size, instruction, record.domain, f"{record.key}-{index}"))
    return pairs


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
            yield [*_encode(tokenizer, answer), tokenizer.eos_token_id], True
            return
        tokens = _encode(tokenizer, answer)
        # What the template puts after the end of a turn, a line break as a rule, is no part of the answer.
        end = max((i + 1 for i, token in enumerate(tokens) if token in ends), default=len(tokens))
        yield tokens[:end], True
        if not last:
            yield tokens[end:], False


def _render(tokenizer: TokenizerWrapper, messages: Sequence[Message], ready: bool) -> str:
    """The text of messages, as `chat_template.render_messages` encodes it if they are to be answered (`ready`)."""
    if not tokenizer.has_chat_template:
        return plain_text(tokenizer, messages)
    return render_chat(tokenizer, messages, add_generation_prompt=ready)


def _encode(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    return encode_text(tokenizer, text, add_special_tokens=False)
