"""Models that think before they answer: how they mark their thoughts, and where these end in a text that streams."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mlx_lm.tokenizer_utils import TokenizerWrapper

# Marks of families that mlx-lm does not know, or whose marks are no tokens of their own.
_MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<thought>", "</thought>"),
)


@dataclass(frozen=True)
class Thinking:
    """How a model marks its thoughts."""

    start: str
    end: str
    begun: bool = False  # the prompt holds the start mark, so the answer begins with thoughts


@dataclass(frozen=True)
class Reasoning:
    """A part of a model's thoughts."""

    text: str


def template_text(tokenizer: TokenizerWrapper) -> str:
    """The source of the chat template, or of all that have names; empty if there is none."""
    template = tokenizer.chat_template if tokenizer.has_chat_template else None
    return "\n".join(map(str, template.values())) if isinstance(template, dict) else str(template or "")


def thinking_of(tokenizer: TokenizerWrapper) -> Thinking | None:
    """The marks of the model's thoughts; None if it does not think."""
    if tokenizer.has_thinking:
        return Thinking(tokenizer.think_start, tokenizer.think_end)
    template = template_text(tokenizer)
    return next((Thinking(start, end) for start, end in _MARKS if start in template and end in template), None)


def overhang(text: str, mark: str) -> int:
    """How many characters at the end of a text may begin the mark."""
    lengths = range(min(len(mark) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(mark[:length])), 0)


class ThoughtFinder:
    """Finds the thoughts in a text that streams. Thoughts stand before the answer: marks within it are text."""

    def __init__(self, thinking: Thinking) -> None:
        self._start, self._end = thinking.start, thinking.end
        self._inside = thinking.begun
        self._may_begin = True
        self._pending = ""

    def feed(self, text: str) -> Iterator[tuple[bool, str]]:
        """Add text. Yields all of it in pieces, with whether each is thought; a mark is never cut, and is thought."""
        self._pending += text
        while self._pending:
            if self._may_begin:
                found = self._pending.lstrip()
                if self._start.startswith(found) and found != self._start:
                    return
                self._may_begin = False
                if found.startswith(self._start):
                    yield True, self._take(len(self._pending) - len(found) + len(self._start))
                    self._inside = True
            elif not self._inside:
                yield False, self._take(len(self._pending))
            elif (at := self._pending.find(self._end)) >= 0:
                yield True, self._take(at + len(self._end))
                self._inside, self._may_begin = False, True
            elif final := len(self._pending) - overhang(self._pending, self._end):
                yield True, self._take(final)
            else:
                return

    def finish(self) -> tuple[bool, str]:
        """The rest, after the last text, and whether it is thought."""
        return self._inside, self._take(len(self._pending))

    def _take(self, length: int) -> str:
        taken, self._pending = self._pending[:length], self._pending[length:]
        return taken


class ThinkingSplitter:
    """Splits the text of an answer into thoughts and the rest, without the marks and the space around them."""

    def __init__(self, thinking: Thinking) -> None:
        self._thinking = thinking
        self._finder = ThoughtFinder(thinking)
        self._space: str | None = None  # at the end of the thoughts so far; None before their first word
        self._after_thoughts = False

    def feed(self, text: str) -> Iterator[str | Reasoning]:
        """Add text; yields the parts that are final now, none of them empty."""
        for thought, piece in self._finder.feed(text):
            yield from self._split(thought, piece)

    def finish(self) -> Iterator[str | Reasoning]:
        """The rest, after the last text."""
        yield from self._split(*self._finder.finish())

    def _split(self, thought: bool, piece: str) -> Iterator[str | Reasoning]:
        if not thought:
            text = piece.lstrip() if self._after_thoughts else piece
            if text:
                self._after_thoughts = False
                yield text
            return
        self._after_thoughts = True
        if piece.lstrip() == self._thinking.start:
            return
        ended = piece.endswith(self._thinking.end)
        words = piece.removesuffix(self._thinking.end)
        whole = words.lstrip() if self._space is None else self._space + words
        text = whole.rstrip()
        if text:
            yield Reasoning(text)
        self._space = None if ended or (self._space is None and not whole) else whole[len(text) :]
