"""Line charts as SVG, by hand: a figure or two for a README need no plotting library. Knows numbers and names only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Okabe and Ito's colours, which the colour-blind tell apart; their yellow is too pale for a line. The dashes change
# with every round of them.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
_DASHES = ("", "6 3", "2 3")
_LEVEL_DASH = "10 3 2 3"
# Pixels: a panel's drawing area, and what is around it.
_WIDTH, _HEIGHT = 340, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 20, 34, 48
_TITLE, _LEGEND = 44, 168
_LEGEND_LINE = 20
_COLUMNS = 2
_TICKS = 5
# From this ratio of the highest to the lowest value on, y is logarithmic: one bad line must not press all others flat.
_LOG_RATIO = 3.0


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        points: (x, y), in the order in which they are joined.
        level: a value that does not depend on x; its one point is drawn as a line across the panel.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    level: bool = False


@dataclass(frozen=True)
class Panel:
    """One drawing area, with axes of its own. A name has the same colour in all panels."""

    title: str
    series: tuple[Series, ...]


def line_chart(title: str, x_label: str, y_label: str, panels: Sequence[Panel]) -> str:
    """A chart of one or more panels side by side, with one legend on the right.

    The y axis of a panel is logarithmic, and says so, if its values are above 0 and far apart.

    Args:
        panels: at least one; each has at least one series that is no level.

    Returns:
        The text of an SVG file.
    """
    names = list(dict.fromkeys(series.name for panel in panels for series in panel.series))
    levels = {series.name for panel in panels for series in panel.series if series.level}
    columns = min(len(panels), _COLUMNS)
    cell_width, cell_height = _LEFT + _WIDTH + _RIGHT, _TOP + _HEIGHT + _BOTTOM
    width = columns * cell_width + _LEGEND
    height = _TITLE + max(math.ceil(len(panels) / columns) * cell_height, _TOP + len(names) * _LEGEND_LINE)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#222222">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(_LEFT, 28, title, "start", size=14, bold=True),
    ]
    for index, panel in enumerate(panels):
        left = index % columns * cell_width + _LEFT
        top = _TITLE + index // columns * cell_height + _TOP
        parts += _panel(panel, names, left, top, x_label, y_label)
    for index, name in enumerate(names):
        y = _TITLE + _TOP + 6 + index * _LEGEND_LINE
        x = columns * cell_width + 8
        parts.append(_line(x, y, x + 28, y, _stroke(names, name, name in levels)))
        if name not in levels:
            parts.append(_dot(x + 14, y, names, name))
        parts.append(_text(x + 36, y + 4, name, "start"))
    return "\n".join([*parts, "</svg>", ""])


def ticks(low: float, high: float, count: int = _TICKS) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them, steps of 1, 2 or 5 times a power of ten.

    Args:
        high: above `low`.
    """
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high` for a logarithmic axis, a handful per power of ten.

    Args:
        low: above 0; `high` is at least three times as much.
    """
    marks = (1, 2, 3, 5, 7) if high / low <= 30 else (1, 3)
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    return [mark * 10.0**power for power in powers for mark in marks if low <= mark * 10.0**power <= high]


def _panel(panel: Panel, names: Sequence[str], left: float, top: float, x_label: str, y_label: str) -> list[str]:
    x_low, x_high = _range([x for series in panel.series if not series.level for x, _ in series.points])
    heights = [y for series in panel.series for _, y in series.points]
    logarithmic = min(heights) > 0 and max(heights) / min(heights) >= _LOG_RATIO
    scale = math.log if logarithmic else float
    y_low, y_high = _range([scale(y) for y in heights])
    y_ticks = log_ticks(math.exp(y_low), math.exp(y_high)) if logarithmic else ticks(y_low, y_high)
    if logarithmic:
        y_label = f"{y_label}, log scale"

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x_low) / (x_high - x_low) * _WIDTH,
            top + _HEIGHT - (scale(y) - y_low) / (y_high - y_low) * _HEIGHT,
        )

    parts = [_text(left, top - 10, panel.title, "start", bold=True)]
    for value in y_ticks:
        _, y = place(x_low, value)
        parts += [_line(left, y, left + _WIDTH, y, 'stroke="#e4e4e4"'), _text(left - 8, y + 4, _number(value), "end")]
    for value in ticks(x_low, x_high):
        x, _ = place(value, heights[0])
        parts.append(_line(x, top + _HEIGHT, x, top + _HEIGHT + 5, 'stroke="#666666"'))
        parts.append(_text(x, top + _HEIGHT + 18, _number(value), "middle"))
    parts.append(f'<path d="M{left} {top}V{top + _HEIGHT}H{left + _WIDTH}" fill="none" stroke="#666666"/>')
    parts.append(_text(left + _WIDTH / 2, top + _HEIGHT + 36, x_label, "middle"))
    middle = top + _HEIGHT / 2
    turned = f'transform="rotate(-90 {left - 44} {middle})"'
    parts.append(f'<text x="{left - 44}" y="{middle}" text-anchor="middle" {turned}>{escape(y_label)}</text>')
    for series in panel.series:
        if series.level:
            _, y = place(x_low, series.points[0][1])
            parts.append(_line(left, y, left + _WIDTH, y, _stroke(names, series.name, True)))
            continue
        places = [place(*point) for point in series.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" {_stroke(names, series.name)}/>')
        parts += [_dot(x, y, names, series.name) for x, y in places]
    return parts


def _range(values: Sequence[float]) -> tuple[float, float]:
    """From below the lowest to above the highest: a twentieth of what is between them, so that no dot is cut."""
    low, high = min(values), max(values)
    margin = (high - low) / 20 or abs(high) / 20 or 1.0
    return low - margin, high + margin


def _number(value: float) -> str:
    for factor, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= factor:
            return f"{value / factor:.6g}{suffix}"
    return f"{value:.6g}"


def _stroke(names: Sequence[str], name: str, level: bool = False) -> str:
    turn, place = divmod(names.index(name), len(_COLOURS))
    dash = _LEVEL_DASH if level else _DASHES[turn % len(_DASHES)]
    return f'stroke="{_COLOURS[place]}" stroke-width="1.8"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _dot(x: float, y: float, names: Sequence[str], name: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{_COLOURS[names.index(name) % len(_COLOURS)]}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def _text(x: float, y: float, text: str, anchor: str, *, size: int = 12, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{weight}>{escape(text)}</text>'
