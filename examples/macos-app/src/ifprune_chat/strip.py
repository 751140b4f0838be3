"""The selection as a picture: a row per FFN, neurons from left to right, the darker the more of them are kept, blue or,
where enough of them came in with the last switch, orange. Draws; knows nothing of models.

Blue and orange are told apart with every common colour blindness. They are not mixed: that would make brown.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PySide6.QtCore import QEvent, QRect, QSize, Qt
from PySide6.QtGui import QColor, QFontMetrics, QHelpEvent, QImage, QLinearGradient, QPainter, QPaintEvent, QPalette
from PySide6.QtWidgets import QSizePolicy, QToolTip, QWidget

from ifprune_mlx import Selection

Shares = npt.NDArray[np.float32]
Colours = tuple[QColor, QColor, QColor]
"""None kept, all kept, all kept and enough of them new."""

LIGHT: Colours = (QColor("#e9eff5"), QColor("#0b5394"), QColor("#d55e00"))
DARK: Colours = (QColor("#26303a"), QColor("#8cc8ff"), QColor("#ff9a3c"))
NEW = 0.25  # of a bin's kept neurons: where so many came in, it is orange
_CELL = 4  # pixels of a bin
_HEIGHT = 96  # pixels that the rows share
_GAP = 6


def shares(ids: npt.NDArray[np.int32], width: int, bins: int) -> Shares:
    """Of `width` neurons in `bins` equal stretches, the share that `ids` names: float32 `[bins]`, 0 to 1."""
    mask = np.zeros(width, dtype=np.float32)
    mask[ids] = 1
    starts = np.arange(bins) * width // bins
    return np.asarray(np.add.reduceat(mask, starts) / np.diff(starts, append=width), dtype=np.float32)


def picture(selection: Selection, before: Selection | None, bins: int, colours: Colours) -> QImage:
    """One pixel per FFN and bin; without `before` nothing came in."""
    rows = []
    none, kept, new = (np.array([c.red(), c.green(), c.blue()], dtype=np.float32) for c in colours)
    for layer, (ids, width) in enumerate(zip(selection.ids, selection.widths, strict=True)):
        share = shares(ids, width, bins)[:, None]
        entered = ids[:0] if before is None else np.setdiff1d(ids, before.ids[layer], assume_unique=True)
        changed = (entered.size > 0) & (shares(entered, width, bins)[:, None] >= NEW * np.maximum(share, 1e-6))
        rows.append(none + share * (np.where(changed, new, kept) - none))
    pixels = np.ascontiguousarray(np.rint(np.stack(rows)), dtype=np.uint8)
    height, columns, _ = pixels.shape
    return QImage(pixels.tobytes(), columns, height, 3 * columns, QImage.Format.Format_RGB888).copy()


class Strip(QWidget):
    """Shows the live selection, and says of the bin under the pointer what is kept of it.

    Attributes:
        selection: what is shown; None where all neurons are active, or nothing is known yet.
    """

    def __init__(self) -> None:
        super().__init__()
        self.selection: Selection | None = None
        self._before: Selection | None = None
        self._empty = "The neurons that a message selects are shown here"
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        self.setAccessibleName("Selected neurons")

    def show_selection(self, selection: Selection | None) -> None:
        """Show what is active now; None is the dense model. What came in since the last one is marked."""
        if selection is None:
            self.clear("All neurons are active")
            return
        comparable = self.selection is not None and self.selection.widths == selection.widths
        if self.selection is None or self.selection.hash != selection.hash:
            self._before = self.selection if comparable else None
        self.selection = selection
        self.setAccessibleDescription(f"{selection.density:.0%} of {len(selection.widths)} layers' neurons are active")
        self.updateGeometry()
        self.update()

    def sentence(self) -> str:
        """What one sees, in words."""
        selection, before = self.selection, self._before
        if selection is None:
            return ""
        if before is None:
            layers = len(selection.ids)
            return (
                f"{selection.density:.0%} of the neurons in each of {layers} layers answer: a row is a layer. "
                "The others are not computed."
            )
        pairs = list(zip(selection.ids, before.ids, selection.widths, strict=True))
        stayed = [np.intersect1d(ids, old, assume_unique=True).size for ids, old, _ in pairs]
        if all(count == ids.size == old.size for count, (ids, old, _) in zip(stayed, pairs, strict=True)):
            return "The same neurons as for the message before."
        came, went = 1 - sum(stayed) / sum(selection.keep), 1 - sum(stayed) / sum(before.keep)
        changes = [(ids.size + old.size - 2 * n) / width for n, (ids, old, width) in zip(stayed, pairs, strict=True)]
        most, least = int(np.argmax(changes)), int(np.argmin(changes))
        words = f"New neurons: {came:.0%} of those in use came in, {went:.0%} of those before went out."
        return words if most == least else f"{words} Layer {most} changed most, layer {least} least."

    def clear(self, text: str) -> None:
        """Show a line of text instead."""
        self.selection = self._before = None
        self._empty = text
        self.setAccessibleDescription(text)
        self.update()

    def sizeHint(self) -> QSize:
        return QSize(480, self._rows().bottom() + _GAP + self._legend_height())

    def minimumSizeHint(self) -> QSize:
        return QSize(240, self.sizeHint().height())

    def paintEvent(self, event: QPaintEvent) -> None:
        painter = QPainter(self)
        rows, colours = self._rows(), self._colours()
        if self.selection is None:
            painter.fillRect(rows, colours[0])
            painter.setPen(self.palette().color(QPalette.ColorRole.WindowText))
            painter.drawText(rows, Qt.AlignmentFlag.AlignCenter, self._empty)
        else:
            painter.drawImage(rows, picture(self.selection, self._before, self._bins(), colours))
        self._paint_legend(painter, colours)

    def event(self, event: QEvent) -> bool:
        if event.type() == QEvent.Type.ToolTip and isinstance(event, QHelpEvent):
            text = self.described(event.pos().x(), event.pos().y())
            QToolTip.showText(event.globalPos(), text, self)
            return True
        return super().event(event)

    def described(self, x: int, y: int) -> str:
        """What lies at a point of the widget; empty where nothing does."""
        rows = self._rows()
        if self.selection is None or not rows.contains(x, y):
            return ""
        layer = (y - rows.top()) * len(self.selection.ids) // rows.height()
        ids, width, bins = self.selection.ids[layer], self.selection.widths[layer], self._bins()
        column = (x - rows.left()) * bins // rows.width()
        first, end = column * width // bins, (column + 1) * width // bins
        here = ids[(ids >= first) & (ids < end)]
        text = f"Layer {layer}, neurons {first} to {end - 1}: {len(here)} of {end - first} kept"
        if self._before is None:
            return text
        return f"{text}, {len(np.setdiff1d(here, self._before.ids[layer]))} of them new"

    def _rows(self) -> QRect:
        """Where the rows lie: whole pixels for each, so that none is thicker than another."""
        layers = 1 if self.selection is None else len(self.selection.ids)
        return QRect(0, 0, max(self.width(), 1), layers * max(2, min(24, _HEIGHT // layers)) if layers > 1 else 40)

    def _bins(self) -> int:
        narrowest = 1 if self.selection is None else min(self.selection.widths)
        return max(1, min(narrowest, self.width() // _CELL))

    def _colours(self) -> Colours:
        return DARK if self.palette().color(QPalette.ColorRole.Window).lightness() < 128 else LIGHT

    def _legend_height(self) -> int:
        return QFontMetrics(self.font()).height()

    def _paint_legend(self, painter: QPainter, colours: Colours) -> None:
        none, kept, new = colours
        height = self._legend_height()
        top, box = self._rows().bottom() + _GAP, height - 4
        painter.setPen(self.palette().color(QPalette.ColorRole.PlaceholderText))
        x = 0

        def text(words: str) -> None:
            nonlocal x
            painter.drawText(x, top, 400, height, Qt.AlignmentFlag.AlignVCenter, words)
            x += QFontMetrics(self.font()).horizontalAdvance(words) + _GAP

        text("Neurons kept: none")
        ramp = QLinearGradient(x, 0, x + 60, 0)
        ramp.setColorAt(0, none)
        ramp.setColorAt(1, kept)
        painter.fillRect(x, top + 2, 60, box, ramp)
        x += 60 + _GAP
        text("all")
        x += 2 * _GAP
        painter.fillRect(x, top + 2, box, box, new)
        x += box + _GAP
        text("a quarter of them or more came in with the last switch")
        words = "a row per layer"
        painter.drawText(0, top, self.width(), height, Qt.AlignmentFlag.AlignRight, words)
