"""Writes the answers of `ifprune chat`: as Markdown on a terminal, and as they are elsewhere."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from .console import show_answer

if TYPE_CHECKING:
    from ifprune_mlx.thinking import Thinking

    from .chat_markdown import MarkdownStream


class AnswerWriter:
    """Writes one answer to stdout. Thoughts are dim on a terminal; elsewhere their marks tell them apart.

    Args:
        thinking: how the model marks its thoughts; None if it does not think.
    """

    def __init__(self, thinking: Thinking | None) -> None:
        from ifprune_mlx.thinking import ThoughtFinder

        self._draws = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        dims = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self._finder = ThoughtFinder(thinking) if thinking is not None and dims else None
        self._mark = f"{thinking.start}\n" if thinking is not None and thinking.begun and not dims else ""
        self._stream: tuple[bool, MarkdownStream] | None = None

    @staticmethod
    def prepare() -> None:
        """Import what writing takes, which is a moment's work."""
        import_module(".chat_markdown", __package__)

    def write(self, text: str) -> None:
        """Write what is final of one more piece of text."""
        if text and self._mark:  # which stands in the prompt
            text, self._mark = self._mark + text, ""
        for thought, piece in [(False, text)] if self._finder is None else self._finder.feed(text):
            self._piece(piece, thought)

    def finish(self) -> None:
        """Write the rest, after the last text."""
        if self._finder is not None:
            thought, rest = self._finder.finish()
            self._piece(rest, thought)
        if self._stream is not None:
            self._stream[1].finish()

    def _piece(self, text: str, thought: bool) -> None:
        if not self._draws:
            show_answer(text, dim=thought)
            return
        if not text:
            return
        from .chat_markdown import MarkdownStream

        if self._stream is None or self._stream[0] != thought:
            if self._stream is not None:
                self._stream[1].finish()
                show_answer("\n\n")
            self._stream = (thought, MarkdownStream(dim=thought))
        self._stream[1].write(text)
