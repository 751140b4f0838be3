"""Markdown on a terminal while it is written: what a person sees in the end, and what was written to get there."""

from __future__ import annotations

import io
import random
import time
from unittest.mock import patch

import pyte
import pytest
from wcwidth import wcswidth

from ifprune_cli.chat_markdown import MarkdownStream

ANSWER = """\
# A title

Some **bold** words, some `code`, and a line that is longer than forty columns are.
A second line 👍🎉 with emoji, and 中文字符没有空格所以可以在任何地方换行这一行很长很长 in between.

- one
- two, which goes on for a while, so that it takes more than a line
  ```sh
  ls -l
  ```

1. first

2. second

```python
def f(x: int) -> str:
    return f"{x}"
```

| name | value |
|------|------:|
| a    |     1 |

> quoted

Roses are red,
  violets are blue. [here](https://example.com/a)
"""


class Terminal(io.StringIO):
    """A terminal of a given size, and everything that was written to it."""

    def __init__(self, columns: int, lines: int) -> None:
        super().__init__()
        self._screen = pyte.HistoryScreen(columns, lines, history=10_000, ratio=1e-9)

    def isatty(self) -> bool:
        return True

    @property
    def seen(self) -> list[str]:
        """All lines, also those that have left the screen."""
        pyte.Stream(self._screen).feed(self.getvalue())
        columns = self._screen.columns
        above = ["".join(row[at].data for at in range(columns)).rstrip() for row in self._screen.history.top]
        return "\n".join([*above, *(line.rstrip() for line in self._screen.display)]).rstrip().split("\n")


def shown(
    text: str, monkeypatch: pytest.MonkeyPatch, columns: int = 80, lines: int = 60, seed: int | None = None
) -> Terminal:
    """Write a text in pieces, in one if there is no seed; every piece is drawn."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", str(lines))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal, generator = Terminal(columns, lines), random.Random(seed)
    with patch("sys.stdout", terminal):
        stream, start = MarkdownStream(), 0
        while start < len(text):
            size = len(text) if seed is None else generator.randint(1, 9)
            stream._next = 0
            stream.write(text[start : start + size])
            start += size
        stream.finish()
    return terminal


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_in_the_end_it_does_not_matter_in_which_pieces_it_came(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    wanted = shown(ANSWER, monkeypatch, columns).seen
    for seed in range(3):
        assert shown(ANSWER, monkeypatch, columns, seed=seed).seen == wanted
    assert "A title" in wanted
    assert '    return f"{x}"' in wanted
    assert "  violets are blue. here (https://example.com/a)" in "\n".join(wanted) or columns == 40
    assert all(wcswidth(line) <= columns for line in wanted)


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_lines_end_between_words(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    words = [
        "internationalization",
        "of",
        "words",
        "and",
        "表意文字也可以",
        "with",
        "👍",
        "emoji",
        "🎉",
        "and",
        "plain-ascii",
        "text",
    ] * 12
    lines = shown(" ".join(words), monkeypatch, columns, seed=1).seen
    assert " ".join(lines).split() == words
    assert all(columns // 2 < wcswidth(line) < columns for line in lines[:-1])
    ideographs = "没有空格的文字可以在任何地方换行" * 20
    lines = shown(ideographs, monkeypatch, columns, seed=1).seen
    assert "".join(lines) == ideographs
    assert all(columns - 3 < wcswidth(line) < columns for line in lines[:-1])


def test_colours_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    written = shown("Some **bold**.\n\n```python\nreturn 1\n```\n", monkeypatch).getvalue()
    assert "\x1b[1mbold\x1b[0m" in written
    assert "\x1b[94;49mreturn\x1b[0m" in written
    monkeypatch.setenv("NO_COLOR", "1")
    with patch("sys.stdout", Terminal(80, 60)) as terminal:
        stream = MarkdownStream()
        stream.write("Some **bold**.\n\n```python\nreturn 1\n```\n")
        stream.finish()
    assert "\x1b[1mbold\x1b[0m" in terminal.getvalue()
    assert "\x1b[94" not in terminal.getvalue()


def test_a_long_answer_is_not_reprinted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is written, most is the text itself, and nothing that has left a small screen is written again."""
    text = "".join(f"Paragraph {n} says a few words, and **some** more.\n\n" for n in range(150))
    terminal = shown(text, monkeypatch, lines=10, seed=2)
    assert len(terminal.getvalue()) < 6 * len(text)
    lines = [line for line in terminal.seen if line]
    assert lines == [f"Paragraph {n} says a few words, and some more." for n in range(150)]
    code = "```python\n" + "".join(f"x{n} = {n}\n" for n in range(60)) + "```\n"
    terminal = shown(code, monkeypatch, lines=10, seed=2)
    assert terminal.seen == ["```python", *(f"x{n} = {n}" for n in range(60)), "```"]


def test_a_block_without_an_end_stays_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setenv("TERM", "xterm-256color")
    with patch("sys.stdout", Terminal(80, 24)) as terminal:
        stream = MarkdownStream()
        longest = 0
        for number in range(1500):
            stream._next = 0 if number % 50 == 0 else stream._next
            stream.write("all the words of one paragraph that does not end ")
            longest = max(longest, len(stream._text))
        stream.finish()
    assert longest < 40_000
    assert terminal.getvalue().count("\x1b[J") < 1500


@pytest.mark.parametrize(
    "text",
    [
        "a\x1b[31mb\x9b5mc\x07 &#27;[31m &#155;5m &#8238;x &#x202e;",
        "```\x1b]0;title\x07\n\x1b[2J\n```",
        "[a\x1b[1mb](http://x.y/&#27;%1b[2J) ![p](http://x.y/\x9b2J)",
        "<script>alert(1)</script> <b>bold</b>\n\n<div>\nkept\n</div>\n",
    ],
)
def test_hostile_text(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    terminal = shown(text, monkeypatch)
    written = terminal.getvalue()
    for code in ("\x1b[31m", "\x9b", "\x07", "\u202e", "\x1b]", "\x1b[2J", "\x1b[5m"):
        assert code not in written
    if "script" in text:
        assert [line for line in terminal.seen if line] == [line for line in text.split("\n") if line]


def test_anything_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text made of what Markdown gives a meaning to, on a screen that holds little of it."""
    signs = "`~[]()!<>|#-+1. \n\n*_&;:\\a:-|\t日👍\u0301"
    for seed in range(25):
        generator = random.Random(seed)
        text = "".join(generator.choice(signs) for _ in range(120))
        shown(text, monkeypatch, columns=20, lines=4, seed=seed)


def test_what_waits_is_drawn_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setenv("TERM", "xterm-256color")
    with patch("sys.stdout", Terminal(80, 24)) as terminal:
        stream = MarkdownStream()
        stream._next = time.monotonic() + 1000
        stream.write("some words")
        assert terminal.getvalue() == ""
        stream.finish()
    assert terminal.seen == ["some words"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("4.", "4"),
        ("The answer is:\n\n42.", "42"),
        ("7)", "7"),
        ("1. a\n2.\n3. c", "2"),
        ("- \n- b", "•"),
        ("[1]: https://example.com/a", "https://example.com/a"),
        ("1. 1. 2. 3. 4. 5. 6. 7. 8. 9. 10. 11. 12. 13. 14. 15. 16. 17. 18. 19. 20. 21. end", "end"),
        ("> ", ">"),
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [None, 1])
def test_nothing_of_an_answer_vanishes(
    monkeypatch: pytest.MonkeyPatch, text: str, words: str, seed: int | None
) -> None:
    seen = shown(text, monkeypatch, seed=seed).seen
    assert any(words in line for line in seen), seen
