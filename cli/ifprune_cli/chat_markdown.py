"""Shows Markdown on a terminal while it is being written.

Rich renders it. Only the last block of an unfinished text can still change, so only that is rendered again, and of its
lines only those that differ are drawn again: nothing flickers, and no answer is ever reprinted.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Sequence

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from rich.cells import cell_len
from rich.color import ColorSystem
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown
from rich.segment import Segment
from rich.style import Style
from rich.syntax import Syntax
from rich.text import Text
from rich.theme import Theme

from .console import draw, without_controls

# Characters of one block after which it is cut, and the share of the time that drawing may take.
_LONGEST_BLOCK, _SHARE = 32_000, 0.1


def _line_end(state: StateInline, silent: bool) -> bool:
    """A line's end within a paragraph, and the spaces after it: poems need them, and so does code without fences."""
    if state.src[state.pos] != "\n":
        return False
    if not silent:
        state.pending = state.pending.rstrip(" ")
        state.push("hardbreak", "br", 0)
    state.pos += 1
    return True


# HTML is shown as it is written, and so is where a link leads that stands elsewhere.
_PARSER = (
    MarkdownIt("commonmark", {"html": False, "maxNesting": 100}).enable(["strikethrough", "table"]).disable("reference")
)
_PARSER.inline.ruler.at("newline", _line_end)
# Colours of the terminal's own palette, which can be read on its background, whatever that is.
_THEME = Theme({"markdown.code": "cyan", "markdown.h1": "bold underline", "markdown.h2": "bold"})


class _Heading(Heading):
    """On the left, as all text."""

    LEVEL_ALIGN = {}  # noqa: RUF012


class _Code(CodeBlock):
    """Code between its fences, without a frame, so that it can be copied."""

    fence = ""

    @classmethod
    def create(cls, markdown: Markdown, token: Token) -> _Code:
        code = cls(token.info.split()[0] if token.info.split() else "text", "ansi_dark")
        code.fence = f"{token.markup}{token.info}"
        return code

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.fence:
            yield Text(self.fence, "dim")
        code = str(self.text).rstrip()
        yield Syntax(code, self.lexer_name, theme=self.theme, word_wrap=True, background_color="default")
        if self.fence:
            yield Text(self.fence[: len(self.fence) - len(self.fence.lstrip("`~"))], "dim")


class _Markdown(Markdown):
    elements = Markdown.elements | {"heading_open": _Heading, "fence": _Code, "code_block": _Code}

    def __init__(self, tokens: list[Token], style: str) -> None:
        super().__init__("", style=style, hyperlinks=False)  # so that an address is always seen
        self.parsed = _with_empty_items(tokens)


class MarkdownStream:
    """Writes one text to the terminal on stdout, as it comes.

    Args:
        dim: all of it is dim.
    """

    def __init__(self, *, dim: bool = False) -> None:
        self._console = Console(force_terminal=True, highlight=False, theme=_THEME)
        self._style = "dim" if dim else "none"
        self._text = ""  # of the blocks that may still change
        self._drawn: list[str] = []  # their lines on the screen; the cursor stands after the last
        self._next = 0.0

    def write(self, text: str) -> None:
        """Add text, and draw it unless something was drawn a moment ago."""
        self._text += without_controls(text)
        begun = time.monotonic()
        if text and begun >= self._next:
            self._update()
            ended = time.monotonic()
            self._next = ended + (ended - begun) / _SHARE

    def finish(self) -> None:
        """Draw what is left, after the last text."""
        self._update()
        self._text, self._drawn = "", []

    def _update(self) -> None:
        """Draw the text, and forget what of it is final."""
        blocks = _blocks(_PARSER.parse(self._text))
        if not blocks:
            return
        source = self._text.splitlines(keepends=True)
        rendered = [self._render(block) or self._as_written(block, source) for block in blocks]
        shown = [each for each in rendered if each]
        lines = [line for number, each in enumerate(shown) for line in ([""] if number else []) + each]
        if lines or self._drawn:
            self._draw(lines or [""])
        begin = (blocks[-1][0].map or [0])[0]
        # Its first line tells whether it is a block of its own: a "1" may become the next item of a list.
        if len(blocks) > 1 and source[begin].endswith("\n"):
            self._text = "".join(source[begin:])
            self._drawn = rendered[-1]
        elif len(self._text) > _LONGEST_BLOCK:
            opening = f"{blocks[-1][0].markup}{blocks[-1][0].info}\n" if blocks[-1][0].type == "fence" else ""
            draw("\r\n")
            self._text, self._drawn = opening, []

    @property
    def _width(self) -> int:
        """A column stays free for characters that the terminal draws wider than Rich believes."""
        return max(self._console.width - 1, 1)

    def _render(self, block: list[Token]) -> list[str]:
        """A block's lines, without empty ones around it; none if the terminal is too narrow for it."""
        if 2 * max(token.level for token in block) > self._width // 2:  # lists in lists, each with an indent
            return []
        options = self._console.options.update(width=self._width, height=None)
        rendered = self._console.render_lines(_Markdown(block, self._style), options, pad=False)
        lines = [self._line(line) for line in rendered]
        while lines and not lines[0]:
            del lines[0]
        while lines and not lines[-1]:
            del lines[-1]
        return lines

    def _as_written(self, block: list[Token], source: Sequence[str]) -> list[str]:
        """The lines of a block that Rich shows nothing of, or not all."""
        if block[0].type == "heading_open":  # a "#" is a title without words
            return []
        first, end = block[0].map or [0, 0]
        text = Text("".join(source[first:end]).rstrip(), "" if self._style == "none" else self._style)
        options = self._console.options.update(width=self._width)
        return [self._line(line) for line in self._console.render_lines(text, options, pad=False)]

    def _line(self, line: Iterable[Segment]) -> str:
        """One line with the terminal's codes for its styles, and no spaces at its end."""
        # Entities such as &#155; have become characters only now.
        pieces = [(without_controls(piece.text), piece.style or Style.null()) for piece in line if not piece.control]
        while pieces and not pieces[-1][0].strip():
            pieces.pop()
        if pieces:
            pieces[-1] = (pieces[-1][0].rstrip(), pieces[-1][1])
        colours = None if self._console.color_system is None else ColorSystem.STANDARD
        plain = self._console.no_color
        return "".join(
            (style.without_color if plain else style).render(text, color_system=colours) for text, style in pieces
        )

    def _draw(self, lines: Sequence[str]) -> None:
        """Make the screen show these lines in the place of those that were drawn."""
        old, size = self._drawn, shutil.get_terminal_size()
        same = next((n for n, pair in enumerate(zip(old, lines, strict=False)) if pair[0] != pair[1]), len(old))
        same = min(same, len(lines) - 1)
        # A terminal that became narrower has broken lines that were drawn for a wider one.
        heights = [max(-(-cell_len(Text.from_ansi(line).plain) // size.columns), 1) for line in old]
        while same < len(lines) - 1 and sum(heights[same:]) > size.lines:
            same += 1  # what has left the screen stays as it is
        self._drawn = list(lines)
        if same < len(old) - 1 or (old and same < len(old) and not lines[same].startswith(old[same])):
            up = min(sum(heights[same:]), size.lines) - 1
            draw((f"\x1b[{up}A" if up else "") + "\r\x1b[J" + "\r\n".join(lines[same:]))
        elif same < len(old):  # the last line has become longer
            draw("\r\n".join([lines[same][len(old[same]) :], *lines[same + 1 :]]))
        else:
            draw(("\r\n" if old else "") + "\r\n".join(lines[same:]))


def _with_empty_items(tokens: Sequence[Token]) -> list[Token]:
    """With a space in each item of a list that has nothing else: Rich leaves these out, and an answer may be "42."."""
    found: list[Token] = []
    for token in tokens:
        if token.type == "list_item_close" and found[-1].type == "list_item_open":
            space = Token("text", "", 0, content="\u00a0")
            found += [
                Token("paragraph_open", "p", 1),
                Token("inline", "", 0, content=space.content, children=[space]),
                Token("paragraph_close", "p", -1),
            ]
        found.append(token)
    return found


def _blocks(tokens: Iterable[Token]) -> list[list[Token]]:
    """The tokens of every block of the text."""
    blocks: list[list[Token]] = []
    for token in tokens:
        if token.level == 0 and token.nesting >= 0:
            blocks.append([])
        blocks[-1].append(token)
    return blocks
