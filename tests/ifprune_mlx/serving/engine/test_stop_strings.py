"""Stop strings, fed in every way that a text can be cut."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest

from ifprune_mlx.serving.engine.output_processor import StopStrings


def fed(stops: tuple[str, ...], outputs: list[str]) -> tuple[str, str | None]:
    text = StopStrings(stops)
    said = "".join(text.feed(output) for output in outputs)
    assert text.matched is None or (text.feed("more"), text.flush()) == ("", "")
    return said + text.flush(), text.matched


@pytest.mark.parametrize(
    ("stops", "text", "expected", "matched"),
    [
        ((), "abc", "abc", None),
        (("b",), "abc", "a", "b"),
        (("bc",), "abbcd", "ab", "bc"),
        (("aab",), "aaab", "a", "aab"),
        (("abcd", "bc"), "abcd", "a", "bc"),  # complete first
        (("c", "abc"), "abc", "", "abc"),  # complete together: the longer one
        (("xyz",), "abxy", "abxy", None),
        (("\n\n",), "one\ntwo\n\nthree", "one\ntwo", "\n\n"),
        (("ä€",), "1ä€2", "1", "ä€"),
    ],
)
def test_every_way_to_cut_a_text(stops: tuple[str, ...], text: str, expected: str, matched: str | None) -> None:
    for count in range(min(len(text), 5)):
        for cuts in combinations(range(1, len(text)), count):
            edges = [0, *cuts, len(text)]
            outputs = [text[start:end] for start, end in pairwise(edges)]
            assert fed(stops, outputs) == (expected, matched)


def test_text_comes_as_soon_as_it_can() -> None:
    text = StopStrings(("STOP", "END."))
    assert [text.feed(output) for output in ("a", "S", "T", "x", "E", "ND", "S", "TOP")] == [
        "a", "", "", "STx", "", "", "END", "",
    ]  # fmt: skip
    assert text.matched == "STOP"
