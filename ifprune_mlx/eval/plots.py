"""Every chart of the project: lines, bars, bands and heat maps, drawn by matplotlib as PNG or SVG.

No display is needed. The same numbers give the same bytes with the same matplotlib: files hold no dates and no random
ids, and the user's settings are ignored. matplotlib comes with `ifprune-mlx[plots]` and is imported for drawing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ifprune_mlx.checkpoint.atomic_write import check_replaceable, write_atomic
from ifprune_mlx.errors import IfpruneError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ifprune_mlx.eval.metrics import Values

SUFFIXES = (".png", ".svg")

# Okabe and Ito's colours, which the colour-blind tell apart, without the yellow, too pale for a line. When they are
# used up, they repeat with other dashes, markers and hatches.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
_MARKERS = ("o", "s", "^")
_HATCHES = ("", "///", "...")
_LEVEL_DASH = (0, (8, 2, 2, 2))
_COLOUR_MAP = "viridis"  # even in lightness, for the colour-blind too
_WIDTH = 9.0  # inches; as wide as a README's column in an SVG, where an inch is 72 points
_COLUMNS = 2
_DPI = 160
_LOG_RATIO = 3.0  # y is logarithmic from this highest / lowest value on, so that one bad line does not flatten others
_MOST_NUMBERS = 12  # most rows of a matrix that shows its numbers
_NUMBER, _LETTER = 0.42, 0.075  # inches that a number and a letter of a name take
_COLOUR_BAR = 1.3  # inches
_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": "#222222",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "font.size": 10,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text, which can be searched, read out and compared
    "svg.hashsalt": "ifprune",
    "text.color": "#222222",
    "text.parse_math": False,  # a prompt may hold dollar signs
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}


@dataclass(frozen=True)
class Series:
    """One line."""

    name: str
    points: tuple[tuple[float, float], ...]  # (x, y), joined in this order
    level: bool = False  # does not depend on x: its single point is drawn as a line across the panel


@dataclass(frozen=True)
class Panel:
    """One drawing area, with axes of its own. A name has the same colour in all panels."""

    title: str
    series: tuple[Series, ...]


@dataclass(frozen=True)
class Matrix:
    """A square heat map, with one list of items for rows and columns."""

    title: str
    values: Values  # float64 `[n, n]`; NaN is unknown
    groups: tuple[tuple[str, int], ...]  # (name, number of rows) of consecutive rows, n in all


def check_plot(path: Path, option: str) -> None:
    """Raise IfpruneError unless a chart can be written to `path`, the value of `option`. Call it before measuring."""
    _check_suffix(path, f"{option} {path}")
    if not path.parent.is_dir():
        raise IfpruneError(f"{option} {path}: no such folder; make it first")
    check_replaceable(path, f"{option} {path}")
    check_library()


def check_library() -> None:
    """Raise IfpruneError with an install hint unless matplotlib is there."""
    try:
        import matplotlib as _  # noqa: F401
    except ImportError as exc:
        raise IfpruneError("plots need the package matplotlib; pip install 'ifprune-mlx[plots]'") from exc


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure atomically, as PNG or SVG by its suffix.

    Raises:
        IfpruneError: for another suffix, and if it cannot be written.
    """
    _check_suffix(path, str(path))
    # These would differ between days or machines.
    removed = {".svg": {"Date": None, "Creator": None}, ".png": {"Software": None}}[path.suffix]
    with _style(), warnings.catch_warnings():
        # A glyph that no font has becomes a box in a PNG. An SVG uses the reader's own fonts.
        warnings.filterwarnings("ignore", message="Glyph")
        options: dict[str, Any] = {"format": path.suffix[1:], "dpi": _DPI, "metadata": removed}
        write_atomic(path, lambda file: figure.savefig(file, **options), IfpruneError)


def _check_suffix(path: Path, where: str) -> None:
    if path.suffix not in SUFFIXES:
        raise IfpruneError(f"{where}: charts are PNG or SVG; give a name that ends in .png or .svg")


def line_chart(title: str, x_label: str, y_label: str, panels: Sequence[Panel]) -> Figure:
    """Draw panels side by side, with one legend on the right.

    A panel's y axis is logarithmic, and labelled so, if its values are positive and far apart.

    Args:
        panels: at least one, each with at least one series that is no level.
    """
    names = list(dict.fromkeys(series.name for panel in panels for series in panel.series))
    columns = min(len(panels), _COLUMNS)
    rows = math.ceil(len(panels) / columns)
    with _drawing(title, 0.6 + max(rows * 3.1, 0.22 * len(names))) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        handles: dict[str, Any] = {}
        for index, axes in enumerate(grid.flat):
            if index < len(panels):
                handles |= _lines(axes, panels[index], names, x_label, y_label)
            else:
                axes.set_axis_off()
        figure.legend([handles[name] for name in names], names, loc="outside right upper")
    return figure


def bar_chart(
    title: str, value_label: str, bars: Mapping[str, Mapping[str, float]], *, stacked: bool = False
) -> Figure:
    """Draw groups of horizontal bars with their numbers, and a legend if there are several names.

    Args:
        value_label: the quantity and its unit.
        bars: numbers of at least 0, by group and name; a group may lack a name.
        stacked: draw a group's numbers as parts of one bar, with their sum at its end.
    """
    names = list(dict.fromkeys(name for group in bars.values() for name in group))
    thickness = 0.8 if stacked else 0.8 / len(names)
    with _drawing(title, 1.2 + len(bars) * max(0.3, 0.0 if stacked else 0.24 * len(names))) as figure:
        axes = figure.subplots()
        drawn: dict[str, Any] = {}
        for row, group in enumerate(bars.values()):
            begin = 0.0
            for place, name in enumerate(names):
                if name not in group:
                    continue
                y = row if stacked else row - 0.4 + (place + 0.5) * thickness
                (drawn[name],) = axes.barh(y, group[name], thickness, begin, **_filled(names, name))
                begin += group[name] if stacked else 0.0
                if not stacked:
                    _beside(axes, group[name], y)
            if stacked:
                _beside(axes, begin, row)
        axes.set_yticks(range(len(bars)), list(bars))
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.grid(axis="x")
        axes.margins(x=0.12, y=0.02)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(lambda value, _: _number(value))
        axes.set_xlabel(value_label)
        if len(names) > 1:
            figure.legend([drawn[name] for name in names], names, loc="outside right upper")
    return figure


def band_chart(title: str, x_label: str, y_label: str, bands: Mapping[str, Sequence[float]]) -> Figure:
    """Draw bands of percentages stacked over x = 0, 1, 2, ..., the first at the bottom.

    Args:
        bands: by name, a number for each x, together at most 100; all of one length.
    """
    names = list(bands)
    with _drawing(title, 3.9) as figure:
        from matplotlib.ticker import MaxNLocator

        axes = figure.subplots()
        base = np.zeros(len(next(iter(bands.values()))))
        handles = []
        for name in names:
            values = np.asarray(bands[name], np.float64)
            (handle, *_) = axes.bar(np.arange(len(values)), values, 1.0, base, **_filled(names, name))
            handles.append(handle)
            base += values
        axes.set_xlim(-0.5, len(base) - 0.5)
        axes.set_ylim(0, 100)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        figure.legend(handles[::-1], names[::-1], loc="outside right upper")
    return figure


def matrix_chart(
    title: str, label: str, value_label: str, matrices: Sequence[Matrix], low: float, high: float
) -> Figure:
    """Draw square heat maps with one colour scale, side by side if they fit; small ones show their numbers.

    Args:
        label: of rows and columns.
        matrices: at least one.
        low, high: ends of the scale; values beyond them get the end's colour.
    """
    margin = _LETTER * max(len(name) for matrix in matrices for name, _ in matrix.groups) + 0.4
    side = max(map(_legible, matrices))
    columns = len(matrices) if len(matrices) * (side + margin) + _COLOUR_BAR <= _WIDTH else 1
    rows = len(matrices) // columns
    side = min(side, (_WIDTH - _COLOUR_BAR) / columns - margin)
    with _drawing(title, 0.5 + rows * (side + margin + 0.3)) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, matrix in zip(grid.flat, matrices, strict=True):
            image = _heat(axes, matrix.values, low, high)
            axes.set_title(matrix.title)
            axes.set_xlabel(label)
            axes.set_ylabel(label)
            _name_groups(axes, matrix.groups, side)
            if len(matrix.values) <= _MOST_NUMBERS:
                _write_numbers(axes, matrix.values, low, high)
        values = np.concatenate([matrix.values.ravel() for matrix in matrices])  # NaN is beyond neither end
        ends = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
        beyond = ends[bool((values < low).any()), bool((values > high).any())]
        bar = figure.colorbar(image, ax=list(grid.flat), extend=beyond, shrink=0.75, aspect=30)
        bar.set_label(value_label, fontsize=9)
    return figure


@contextmanager
def _style() -> Iterator[None]:
    """The project's style in place of the user's matplotlibrc. Axes read it when made, text and SVG when written."""
    check_library()
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


@contextmanager
def _drawing(title: str, height: float) -> Iterator[Figure]:
    """A figure of this height, in inches, to draw on in the project's style."""
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        title = "".join(char if char.isprintable() else "?" for char in title)  # an SVG holds no control characters
        figure.suptitle(title, x=0.01, ha="left")
        yield figure


def _lines(axes: Axes, panel: Panel, names: Sequence[str], x_label: str, y_label: str) -> dict[str, Any]:
    """Draw a panel; return its lines by name."""
    handles: dict[str, Any] = {}
    for series in panel.series:
        look: dict[str, Any] = {"color": _colour(names, series.name), "linewidth": 1.8}
        if series.level:
            handles[series.name] = axes.axhline(series.points[0][1], linestyle=_LEVEL_DASH, **look)
            continue
        turn = names.index(series.name) // len(_COLOURS)
        x, y = zip(*series.points, strict=True)
        dash, marker = _DASHES[turn % len(_DASHES)], _MARKERS[turn % len(_MARKERS)]
        (handles[series.name],) = axes.plot(x, y, linestyle=dash, marker=marker, markersize=5, **look)
    heights = [y for series in panel.series for _, y in series.points]
    if min(heights) > 0 and max(heights) / min(heights) >= _LOG_RATIO:
        from matplotlib.ticker import LogLocator, NullFormatter

        axes.set_yscale("log")
        marks = (1, 2, 3, 5, 7) if max(heights) / min(heights) <= 30 else (1, 3)
        axes.yaxis.set_major_locator(LogLocator(subs=marks))
        axes.yaxis.set_minor_formatter(NullFormatter())
        y_label = f"{y_label}, log scale"
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: _number(value))
    axes.grid(axis="y")
    axes.set_title(panel.title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return handles


def _heat(axes: Axes, values: Values, low: float, high: float) -> Any:
    import matplotlib as mpl

    colours = mpl.colormaps[_COLOUR_MAP].with_extremes(bad="#dddddd")
    axes.spines[:].set_visible(False)
    return axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="equal", interpolation="nearest")


def _legible(matrix: Matrix) -> float:
    """Inches that a matrix's side takes so that its names, and its numbers if it shows them, do not overlap."""
    rows, names = len(matrix.values), len(matrix.groups)
    return max(2.8, names * _pitch(names), rows * _NUMBER if rows <= _MOST_NUMBERS else 0.0)


def _pitch(names: int) -> float:
    """Inches from one name to the next: many are written smaller."""
    return 0.26 if names <= _MOST_NUMBERS else 0.2


def _name_groups(axes: Axes, groups: Sequence[tuple[str, int]], side: float) -> None:
    """Write each group's name at its middle on both axes, `side` inches long, and draw lines between groups."""
    ends = np.cumsum([count for _, count in groups])
    middles = [end - (count + 1) / 2 for end, (_, count) in zip(ends, groups, strict=True)]
    names = [name for name, _ in groups]
    pitch = _pitch(len(names))
    every = max(1, math.ceil(round(len(names) * pitch / side, 3)))  # more names would overlap
    long = max(map(len, names)) * _LETTER > side / len(names)
    turned: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if long else {}
    axes.set_xticks(middles[::every], names[::every], **turned)
    axes.set_yticks(middles[::every], names[::every])
    axes.tick_params(length=0, labelsize=pitch * 40)
    if any(count > 1 for _, count in groups):
        for end in ends[:-1]:
            axes.axhline(end - 0.5, color="white", linewidth=1.5)
            axes.axvline(end - 0.5, color="white", linewidth=1.5)


def _write_numbers(axes: Axes, values: Values, low: float, high: float) -> None:
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = value > low + 0.6 * (high - low)  # the map's upper end is yellow
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="#222222" if dark else "white")


def _beside(axes: Axes, value: float, y: float) -> None:
    axes.annotate(f"{value:.3g}", (value, y), (4, 0), textcoords="offset points", va="center", fontsize=9)


def _colour(names: Sequence[str], name: str) -> str:
    return _COLOURS[names.index(name) % len(_COLOURS)]


def _filled(names: Sequence[str], name: str) -> dict[str, Any]:
    """Keyword arguments for an area."""
    hatch = _HATCHES[names.index(name) // len(_COLOURS) % len(_HATCHES)]
    return {"color": _colour(names, name), "hatch": hatch, "edgecolor": "white", "linewidth": 0.5}


def _number(value: float) -> str:
    for factor, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= factor:
            return f"{value / factor:.6g}{suffix}"
    return f"{value:.6g}"
