"""The messages of a conversation and their answers, which are Markdown.

Whatever an answer holds is inert: HTML stays text, no picture is loaded, no link is followed.
"""

from __future__ import annotations

from PySide6.QtCore import QTimer, QUrl
from PySide6.QtGui import QTextBlockFormat, QTextCharFormat, QTextCursor, QTextDocument, QTextFormat
from PySide6.QtWidgets import QTextEdit

# An answer is drawn anew, as a whole, since what comes next can change the meaning of what was there.
_REDRAW_MS = 80
_MARKDOWN = QTextDocument.MarkdownFeature.MarkdownDialectGitHub | QTextDocument.MarkdownFeature.MarkdownNoHTML


class Transcript(QTextEdit):
    """Shows what was said, and an answer while it comes. A reader who scrolled up stays there."""

    def __init__(self, name: str) -> None:
        super().__init__(readOnly=True)
        self.setAccessibleName(name)
        self.document().setDocumentMargin(12)
        self._answer = ""
        self._begin: int | None = None  # where the answer that is coming begins
        self._follows = True  # the end, until the reader scrolls up
        bar = self.verticalScrollBar()
        bar.valueChanged.connect(lambda place: self._follow(place >= bar.maximum() - 4))
        bar.rangeChanged.connect(lambda _, end: bar.setValue(end) if self._follows else None)
        self._redraw = QTimer(self, singleShot=True, interval=_REDRAW_MS)
        self._redraw.timeout.connect(self._draw)

    def loadResource(self, kind: int, name: QUrl | str) -> None:
        """Nothing: a picture in an answer could name any file or address."""

    def say(self, who: str, text: str) -> None:
        """Add a paragraph of plain text, which ends an answer."""
        self.end_answer()
        cursor = self._end()
        if not self.document().isEmpty():
            cursor.insertBlock()
        spaced = QTextBlockFormat()
        spaced.setTopMargin(10)
        cursor.setBlockFormat(spaced)
        name = QTextCharFormat()
        name.setFontWeight(700)
        cursor.setBlockCharFormat(name)
        cursor.insertText(who, name)
        cursor.insertBlock(QTextBlockFormat(), QTextCharFormat())
        cursor.insertText(text)
        self._follow(True)

    def begin_answer(self) -> None:
        """Add an answer, of which nothing is known yet."""
        self.say("Answer", "")
        self._answer, self._begin = "", self._end().position()

    def add(self, text: str) -> None:
        """More of the answer."""
        self._answer += text
        if not self._redraw.isActive():
            self._redraw.start()

    def end_answer(self, words: str = "") -> None:
        """The answer is complete; `words`, such as `[cut off]`, are added to it as plain text."""
        if self._begin is None:
            return
        self._draw()
        self._begin = None
        if words:
            self._end().insertText(words, QTextCharFormat())

    def _draw(self) -> None:
        self._redraw.stop()
        follows, bar = self._follows, self.verticalScrollBar()
        place = bar.value()
        cursor = self._end()
        cursor.setPosition(self._begin or 0, QTextCursor.MoveMode.KeepAnchor)
        cursor.removeSelectedText()
        cursor.setBlockFormat(QTextBlockFormat())
        cursor.insertMarkdown(_with_breaks(self._answer), _MARKDOWN)
        if self._end().position() == self._begin:  # such as the fence of code that has not come
            cursor.insertText(self._answer)
        self._shrink_headings()
        self._follow(follows)
        if not follows:
            bar.setValue(place)

    def _shrink_headings(self) -> None:
        """A chat is no book: `# Test` may be a comment of code that has no fence."""
        smaller = QTextCharFormat()
        smaller.setProperty(QTextFormat.Property.FontSizeAdjustment, 1)
        block = self.document().findBlock(self._begin or 0)
        while block.isValid():
            if block.blockFormat().headingLevel():
                cursor = QTextCursor(block)
                cursor.select(QTextCursor.SelectionType.BlockUnderCursor)
                cursor.mergeCharFormat(smaller)
            block = block.next()

    def _follow(self, follows: bool) -> None:
        self._follows = follows
        if follows:
            bar = self.verticalScrollBar()
            bar.setValue(bar.maximum())

    def _end(self) -> QTextCursor:
        cursor = QTextCursor(self.document())
        cursor.movePosition(QTextCursor.MoveOperation.End)
        return cursor


def _with_breaks(text: str) -> str:
    """Markdown in which a line that ends outside code ends on the screen, too, as models mean it."""
    lines, fence = [], ""
    for line in text.split("\n"):
        mark = line.lstrip()[:3]
        if not fence and mark in ("```", "~~~"):
            fence = mark
        elif fence and mark == fence:
            fence = ""
        breaks = not fence and mark.strip() not in ("", "```", "~~~")
        lines.append(f"{line}  " if breaks else line)
    return "\n".join(lines)
