"""Charts show their numbers where they should be, in files that are the same every time."""

from __future__ import annotations

import sys
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from ifprune_mlx.errors import IfpruneError
from ifprune_mlx.eval.plots import (
    Matrix,
    Panel,
    Series,
    band_chart,
    bar_chart,
    check_plot,
    line_chart,
    matrix_chart,
    write_figure,
)

NAMES = [f"selector {i}" for i in range(13)]


def lines(*panels: Panel) -> Figure:
    return line_chart("A <title> & more", "active", "nats", panels)


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def every_chart() -> dict[str, Figure]:
    """One of each kind, with names that markup or mathematics could be made of."""
    square = np.array([[1.0, 0.6], [0.4, np.nan]])
    return {
        "lines": lines(Panel("costs $5 or $6", (Series("a<b", ((1.0, 2.0), (2.0, 8.0))),))),
        "bars": bar_chart("Speed & more", "tokens/s", {"dense": {"x": 1.0}, "$liced$": {"x": 2.0, "y": 3.0}}),
        "bands": band_chart("Whose", "layer", "%", {"all": [60.0, 40.0], "some": [40.0, 60.0]}),
        "matrix": matrix_chart(
            "Shared", "by", "share", [Matrix("日本 \u2713", square, (("a", 1), ("b", 1)))], 0.5, 0.9
        ),
    }


def test_lines_go_through_their_points_and_a_level_goes_across() -> None:
    points = ((60e6, 4.0), (80e6, 3.0), (100e6, 2.5))
    (axes,) = lines(Panel("code", (Series("dense", ((135e6, 2.0),), True), Series("static", points)))).axes
    level, line = axes.lines
    assert [tuple(map(float, point)) for point in line.get_xydata()] == list(points)
    assert (list(level.get_xdata()), list(level.get_ydata())) == ([0, 1], [2.0, 2.0])  # of the panel's width
    # The dense model's own size does not stretch the axis.
    assert axes.get_xlim()[1] < 110e6
    assert axes.get_yscale() == "linear"
    assert [axes.get_title("left"), axes.get_xlabel(), axes.get_ylabel()] == ["code", "active", "nats"]
    assert axes.xaxis.get_major_formatter()(80e6) == "80M"
    assert line.get_color() != level.get_color()


def test_a_line_far_above_the_others_makes_the_axis_logarithmic(tmp_path: Path) -> None:
    near, far = ((1.0, 2.0), (2.0, 2.0)), ((1.0, 8.0), (2.0, 4.0))
    figure = lines(Panel("x", (Series("static", near), Series("random", far))))
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert axes.get_ylabel() == "nats, log scale"
    write_figure(figure, tmp_path / "x.svg")
    assert {"2", "3", "5", "7"} <= set(texts(tmp_path / "x.svg"))


def test_a_name_looks_the_same_in_all_panels_and_no_two_alike(tmp_path: Path) -> None:
    series = tuple(Series(name, ((1e9, 9.0 + i), (2e9, 8.0 + i))) for i, name in enumerate(NAMES))
    figure = lines(*(Panel(title, series) for title in ("mean", "code", "maths & more")))
    looks = [
        [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.lines] for axes in figure.axes
    ]
    assert looks[0] == looks[1] == looks[2]
    assert len(set(looks[0])) == 13
    assert legend(figure) == NAMES
    write_figure(figure, tmp_path / "x.svg")
    found = texts(tmp_path / "x.svg")
    assert {"A <title> & more", "mean", "code", "maths & more", "1.2B", *NAMES} <= set(found)
    assert [found.count(word) for word in ("active", "nats")] == [3, 3]


def test_a_single_point_is_drawn() -> None:
    (axes,) = lines(Panel("x", (Series("static", ((0.0, 0.0),)),))).axes
    assert axes.lines[0].get_marker() == "o"


def test_bars_have_their_lengths_numbers_and_colours() -> None:
    bars = {"dense": {"prefill": 30.0, "decode": 12.0}, "sliced": {"prefill": 60.4}}
    figure = bar_chart("Speed", "tokens/s", bars)
    (axes,) = figure.axes
    assert [patch.get_width() for patch in axes.patches] == [30, 12, 60.4]
    first, second, third = (to_hex(patch.get_facecolor()) for patch in axes.patches)
    assert first == third != second
    assert [text.get_text() for text in axes.texts] == ["30", "12", "60.4"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["dense", "sliced"]
    assert axes.get_xlim()[0] == 0  # lengths are to be compared
    assert axes.yaxis.get_inverted()  # the first group is on top
    assert legend(figure) == ["prefill", "decode"]
    # One name needs no legend.
    assert bar_chart("x", "s", {"a": {"": 1.0}}).legends == []


def test_stacked_bars_follow_each_other_and_end_with_their_sum() -> None:
    (axes,) = bar_chart("Time", "s", {"a": {"select": 1.0, "decode": 3.0}}, stacked=True).axes
    assert [(patch.get_x(), patch.get_width()) for patch in axes.patches] == [(0, 1), (1, 3)]
    assert [text.get_text() for text in axes.texts] == ["4"]


def test_bands_lie_upon_each_other() -> None:
    figure = band_chart("Whose", "layer", "%", {"all": [60.0, 40.0], "some": [40.0, 60.0]})
    (axes,) = figure.axes
    assert [(bar.get_y(), bar.get_height()) for bar in axes.patches] == [(0, 60), (0, 40), (60, 40), (40, 60)]
    assert axes.get_ylim() == (0, 100)
    assert legend(figure) == ["some", "all"]  # as they lie


def test_a_matrix_shows_its_numbers_and_its_groups() -> None:
    values = np.array([[1.0, 0.6], [0.4, np.nan]])
    large = Matrix("prompts", np.full((30, 30), 0.7), (("code", 10), ("maths", 20)))
    figure = matrix_chart("Shared", "by", "share", [Matrix("means", values, (("a", 1), ("b", 1))), large], 0.5, 0.9)
    small, big, bar = figure.axes
    assert [text.get_text() for text in small.texts] == ["1.00", "0.60", "0.40"]
    image = small.images[0]
    assert np.array_equal(image.get_array().filled(np.nan), values, equal_nan=True)
    assert image.get_clim() == (0.5, 0.9)
    assert len(big.texts) == 0
    # A name stands at the middle of its group, and a line between the two.
    assert list(big.get_xticks()) == [4.5, 19.5]
    assert [label.get_text() for label in big.get_xticklabels()] == ["code", "maths"]
    across, down = big.lines
    assert (across.get_ydata()[0], down.get_xdata()[0]) == (9.5, 9.5)
    assert bar.get_ylabel() == "share"
    assert big.images[0].colorbar.extend == "both"  # there is less than 0.5 and more than 0.9


@pytest.mark.parametrize("domains", [2, 3, 12, 24, 45])
def test_names_and_numbers_of_a_matrix_do_not_overlap_at_any_size(domains: int) -> None:
    names = [f"code-source{index}" for index in range(domains)]
    square = np.full((domains, domains), 0.7)
    means = Matrix("means", square, tuple((name, 1) for name in names))
    prompts = Matrix("prompts", np.full((4 * domains, 4 * domains), 0.7), tuple((name, 4) for name in names))
    figure = matrix_chart("Shared", "by", "share", [prompts, means], 0.5, 0.9)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    shown = {text.get_text() for axes in figure.axes[:2] for text in axes.get_yticklabels()}
    assert shown == set(names) if domains <= 24 else shown < set(names)
    for axes in figure.axes[:2]:
        boxes = [[text.get_window_extent() for text in texts] for texts in (axes.get_yticklabels(), axes.texts)]
        assert not any(Bbox.intersection(one, other) for texts in boxes for one, other in combinations(texts, 2))
        # Names below are turned: their baselines keep a line's height apart.
        labels = axes.get_xticklabels()
        places = [label.get_window_extent().x1 for label in labels]
        turn = np.sin(np.radians(labels[0].get_rotation())) or 1.0
        apart = min(turn * (right - left) for left, right in pairwise(places))
        assert apart >= labels[0].get_fontsize() * figure.dpi / 72 * 0.9


@pytest.mark.parametrize("suffix", [".png", ".svg"])
@pytest.mark.parametrize("name", every_chart())
def test_files_are_the_same_every_time_and_hold_no_date(name: str, suffix: str, tmp_path: Path) -> None:
    files = [tmp_path / f"{which}{suffix}" for which in ("one", "other")]
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):  # a user's own settings
        write_figure(every_chart()[name], files[0])
    write_figure(every_chart()[name], files[1])
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == files
    if suffix == ".svg":
        assert "dc:date" not in files[0].read_text(encoding="utf-8")
    else:
        assert files[0].read_bytes().startswith(b"\x89PNG")
        assert b"Software" not in files[0].read_bytes()


def test_text_stays_text(tmp_path: Path) -> None:
    for name, figure in every_chart().items():
        write_figure(figure, tmp_path / f"{name}.svg")
    found = {name: texts(tmp_path / f"{name}.svg") for name in every_chart()}
    assert {"costs $5 or $6", "a<b"} <= set(found["lines"])
    assert {"Speed & more", "$liced$"} <= set(found["bars"])
    assert "日本 \u2713" in found["matrix"]


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    figure = every_chart()["bars"]
    for name in ("x.pdf", "x", "x.PNG.bak"):
        with pytest.raises(IfpruneError, match="PNG or SVG"):
            write_figure(figure, tmp_path / name)
        with pytest.raises(IfpruneError, match=r"--plot .*\.png or \.svg"):
            check_plot(tmp_path / name, "--plot")
    with pytest.raises(IfpruneError, match="cannot be written"):
        write_figure(figure, tmp_path / "none" / "x.png")
    with pytest.raises(IfpruneError, match="no such folder"):
        check_plot(tmp_path / "none" / "x.png", "--plot")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for call in (lambda: check_plot(tmp_path / "x.png", "--plot"), lambda: band_chart("", "", "", {"a": [1.0]})):
        with pytest.raises(IfpruneError, match=r"pip install 'ifprune-mlx\[plots\]'"):
            call()


def texts(file: Path) -> list[str]:
    """Every text of an SVG file."""
    root: Any = ElementTree.parse(file).getroot()
    return [item.text or "" for item in root.iter("{http://www.w3.org/2000/svg}text")]
