"""Charts are well-formed SVG in which everything lies where its figures say."""

from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree

import pytest

from ifprune_mlx.plots import Panel, Series, line_chart, log_ticks, ticks

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (2.13, 2.57, [2.2, 2.3, 2.4, 2.5]),
        (61e6, 104e6, [70e6, 80e6, 90e6, 100e6]),
        (-1.5, 1.5, [-1, 0, 1]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("scale", [1e-9, 0.3, 1, 7e9])
def test_there_are_a_few_ticks_within_the_range(scale: float) -> None:
    for start in (0.0, 1.7, -4.2):
        low, high = start * scale, (start + 1.3) * scale
        found = ticks(low, high)
        assert 2 <= len(found) <= 7
        steps = [b - a for a, b in pairwise(found)]
        assert steps == pytest.approx([steps[0]] * len(steps))
        assert min(found) >= low - 1e-6 * scale
        assert max(found) <= high + 1e-6 * scale


def draw(*panels: Panel) -> ElementTree.Element:
    return ElementTree.fromstring(line_chart("A <title> & more", "active", "nats", panels))


def numbers(text: str) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for pair in text.split()]  # type: ignore[misc]


def test_lines_go_through_their_points_and_a_level_goes_across() -> None:
    points = ((60e6, 4.0), (80e6, 3.0), (100e6, 2.5))
    chart = draw(Panel("code", (Series("dense", ((135e6, 2.0),), True), Series("static", points))))
    (line,) = chart.iter(f"{SVG}polyline")
    places = numbers(line.attrib["points"])
    # To the right with x, up with less y, in proportion.
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 - y0 == pytest.approx(2 * (y2 - y1), abs=0.2)
    assert y0 < y1 < y2
    dots = [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in chart.iter(f"{SVG}circle")]
    assert [dot for dot in dots if dot in places] == places
    level = next(item for item in chart.iter(f"{SVG}line") if "stroke-dasharray" in item.attrib)
    assert float(level.attrib["y1"]) == float(level.attrib["y2"]) > y2
    assert float(level.attrib["x1"]) < x0
    assert float(level.attrib["x2"]) > x2
    # The dense model's own size does not stretch the axis.
    assert x2 - x0 > 0.8 * (float(level.attrib["x2"]) - float(level.attrib["x1"]))


def test_a_line_far_above_the_others_makes_the_axis_logarithmic() -> None:
    near, far = ((1.0, 2.0), (2.0, 2.0)), ((1.0, 8.0), (2.0, 4.0))
    chart = draw(Panel("x", (Series("static", near), Series("random", far))))
    low, high = (numbers(line.attrib["points"]) for line in chart.iter(f"{SVG}polyline"))
    # Each doubling is as high as the other.
    assert low[0][1] - high[1][1] == pytest.approx(high[1][1] - high[0][1], abs=0.2)
    texts = [item.text for item in chart.iter(f"{SVG}text")]
    assert "nats, log scale" in texts
    assert {"2", "3", "5", "7"} <= set(texts)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(1.2, 14.0, [2, 3, 5, 7, 10]), (0.02, 3.5, [0.03, 0.1, 0.3, 1, 3]), (4, 12, [5, 7, 10])],
)
def test_log_ticks(low: float, high: float, expected: list[float]) -> None:
    assert log_ticks(low, high) == pytest.approx(expected)


def test_everything_is_within_the_picture_and_named() -> None:
    names = [f"selector {i}" for i in range(13)]
    series = tuple(Series(name, ((1e9, 9.0 + i), (2e9, 8.0 + i))) for i, name in enumerate(names))
    chart = draw(*(Panel(title, series) for title in ("mean", "code", "maths & more")))
    width, height = float(chart.attrib["width"]), float(chart.attrib["height"])
    texts = [item.text for item in chart.iter(f"{SVG}text")]
    assert {"A <title> & more", "mean", "code", "maths & more", "1.5B", *names} <= set(texts)
    assert [texts.count(word) for word in ("active", "nats")] == [3, 3]
    for item in chart.iter():
        for key, value in item.attrib.items():
            if key in ("x", "x1", "x2", "cx"):
                assert 0 <= float(value) <= width
            if key in ("y", "y1", "y2", "cy"):
                assert 0 <= float(value) <= height
    # A name looks the same in all panels, and no two alike.
    styles = [(line.attrib["stroke"], line.attrib.get("stroke-dasharray")) for line in chart.iter(f"{SVG}polyline")]
    assert styles == styles[:13] * 3
    assert len(set(styles)) == 13


def test_a_single_point_is_drawn() -> None:
    chart = draw(Panel("x", (Series("static", ((0.0, 0.0),)),)))
    assert len(list(chart.iter(f"{SVG}circle"))) == 2
