"""The window: conversation, selection, density, what selects, figures. Never waits for the model."""

from __future__ import annotations

from PySide6.QtCore import QEvent, QObject, Qt, QThread, QTimer, Signal
from PySide6.QtGui import (
    QAction,
    QCloseEvent,
    QFontDatabase,
    QKeyEvent,
    QKeySequence,
    QTextBlockFormat,
    QTextCharFormat,
    QTextCursor,
)
from PySide6.QtWidgets import (
    QApplication,
    QComboBox,
    QFileDialog,
    QHBoxLayout,
    QLabel,
    QMainWindow,
    QPlainTextEdit,
    QProgressBar,
    QPushButton,
    QSlider,
    QTextEdit,
    QVBoxLayout,
    QWidget,
)

from ifprune_mlx import Stats

from .strip import Strip
from .worker import DENSE, EACH, FIRST, Budget, Loaded, Worker

_CHOICES = ((EACH, "Each message"), (FIRST, "The first message"), (DENSE, "Nothing: all neurons"))
# A slider that is dragged says where it is all the time; the model is told once it rests.
_REST_MS = 150


class Window(QMainWindow):
    """One conversation with one model.

    Attributes:
        conversation, message, send_button, stop_button, strip, density, choice, figures, progress: its widgets.
        ready: whether a message can be sent now.
    """

    _load = Signal(object)
    _answer = Signal(str)
    _set_density = Signal(float)
    _choose = Signal(str)
    _reset = Signal()
    _end = Signal()

    def __init__(self) -> None:
        super().__init__()
        self.ready = False
        self._answering = False
        self._thread = QThread()
        self._worker = Worker()
        self._worker.moveToThread(self._thread)
        self._build()
        self._connect()
        self._thread.start()

    def open_model(self, path: str | None) -> None:
        """Load a folder or hub id, or the embedded default (None); the window stays usable meanwhile."""
        self._worker.stop.clear()
        self._set_ready(False)
        self.conversation.clear()
        self.strip.clear("The neurons that a message selects are shown here")
        self.figures.setText("")
        self._load.emit(path)

    def closeEvent(self, event: QCloseEvent) -> None:
        """Hide at once; the app ends when the step in work does."""
        if self._thread.isFinished():
            event.accept()
            return
        event.ignore()
        self.hide()
        self._worker.stop.set()
        self._end.emit()

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:
        """In the input, Return sends, Shift-Return begins a line, and Escape stops."""
        if watched is self.message and isinstance(event, QKeyEvent) and event.type() == QEvent.Type.KeyPress:
            shift = event.modifiers() & Qt.KeyboardModifier.ShiftModifier
            if event.key() in (Qt.Key.Key_Return, Qt.Key.Key_Enter) and not shift:
                self.send()
                return True
            if event.key() == Qt.Key.Key_Escape:
                self.stop()
                return True
        return super().eventFilter(watched, event)

    def send(self) -> None:
        """Ask what is written in the input."""
        text = self.message.toPlainText().strip()
        if not self.ready or not text:
            return
        self._worker.stop.clear()
        self.message.clear()
        self._paragraph("You", text)
        self._paragraph("Answer", "")
        self._set_ready(False, answering=True)
        self._answer.emit(text)

    def stop(self) -> None:
        """End the answer under way after the token in work; what was said stays."""
        if self._answering:
            self._worker.stop.set()

    def _build(self) -> None:
        self.setWindowTitle("IFPrune Chat")
        self.resize(900, 760)
        self.strip = Strip()
        self.conversation = QTextEdit(readOnly=True)
        self.conversation.setAccessibleName("Conversation")
        self.conversation.document().setDocumentMargin(12)
        self.message = QPlainTextEdit(placeholderText="Write a message. Return sends it.", tabChangesFocus=True)
        self.message.setAccessibleName("Message")
        self.message.setFixedHeight(3 * self.message.fontMetrics().lineSpacing() + 20)
        self.message.installEventFilter(self)
        self.send_button = QPushButton("Send")
        self.stop_button = QPushButton("Stop")
        self.density = QSlider(Qt.Orientation.Horizontal)
        self.density.setRange(10, 100)
        self.density.setAccessibleName("Density in percent")
        self.density.setFixedWidth(180)
        self._density_text = QLabel()
        self._density_text.setMinimumWidth(self.fontMetrics().horizontalAdvance("0.00, 000M of 000M parameters"))
        self.choice = QComboBox()
        self.choice.setAccessibleName("Selected by")
        self.choice.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToContents)
        self.figures = QLabel(textInteractionFlags=Qt.TextInteractionFlag.TextSelectableByMouse)
        self.figures.setFont(QFontDatabase.systemFont(QFontDatabase.SystemFont.SmallestReadableFont))
        self.figures.setWordWrap(True)
        self.progress = QProgressBar(maximum=0)
        self.progress.setFixedWidth(240)
        self._lay_out()
        self._build_menu()

    def _lay_out(self) -> None:
        settings = QHBoxLayout()
        for label, widget in (("Selected by", self.choice), ("Density", self.density)):
            name = QLabel(label)
            name.setBuddy(widget)
            settings.addWidget(name)
            settings.addWidget(widget)
            settings.addSpacing(8)
        settings.insertStretch(3)
        settings.addWidget(self._density_text)
        buttons = QVBoxLayout()
        buttons.addWidget(self.send_button)
        buttons.addWidget(self.stop_button)
        entry = QHBoxLayout()
        entry.addWidget(self.message)
        entry.addLayout(buttons)
        body = QVBoxLayout()
        body.setContentsMargins(16, 12, 16, 12)
        body.setSpacing(10)
        state = QHBoxLayout()
        state.addWidget(self.figures, 1)
        state.addWidget(self.progress)
        for part in (settings, self.strip, self.conversation, entry, state):
            body.addLayout(part) if isinstance(part, QHBoxLayout) else body.addWidget(part)
        body.setStretchFactor(self.conversation, 1)
        centre = QWidget()
        centre.setLayout(body)
        self.setCentralWidget(centre)

    def _build_menu(self) -> None:
        menu = self.menuBar().addMenu("File")
        for text, key, act in (
            ("New Chat", QKeySequence.StandardKey.New, self._new_chat),
            ("Open Model...", QKeySequence.StandardKey.Open, self._pick_model),
            ("Quit", QKeySequence.StandardKey.Quit, self.close),
        ):
            action = QAction(text, self, shortcut=QKeySequence(key))
            action.triggered.connect(act)
            menu.addAction(action)

    def _connect(self) -> None:
        worker = self._worker
        for ask, slot in (
            (self._load, worker.load),
            (self._answer, worker.answer),
            (self._set_density, worker.set_density),
            (self._choose, worker.choose),
            (self._reset, worker.reset),
            (self._end, worker.end),
        ):
            ask.connect(slot, Qt.ConnectionType.QueuedConnection)
        worker.noted.connect(self.figures.setText)
        worker.advanced.connect(self._advanced)
        worker.loaded.connect(self._loaded)
        worker.budgeted.connect(self._budgeted)
        worker.switched.connect(self.strip.show_selection)
        worker.said.connect(self._append)
        worker.answered.connect(self._answered)
        worker.failed.connect(self.fail)
        self._thread.finished.connect(self._gone)
        self._rest = QTimer(self, singleShot=True, interval=_REST_MS)
        self._rest.timeout.connect(lambda: self._set_density.emit(self.density.value() / 100))
        self.density.valueChanged.connect(self._dragged)
        self.choice.activated.connect(self._chosen)
        self.send_button.clicked.connect(self.send)
        self.stop_button.clicked.connect(self.stop)

    def _gone(self) -> None:
        QApplication.quit()

    def _new_chat(self) -> None:
        if self.ready:
            self.conversation.clear()
            self.figures.setText("")
            self._reset.emit()

    def _pick_model(self) -> None:
        if self._answering:
            return
        folder = QFileDialog.getExistingDirectory(self, "A folder that `ifprune convert` made")
        if folder:
            self.open_model(folder)

    def _dragged(self, percent: int) -> None:
        self._density_text.setText(f"{percent / 100:.2f}")
        self._rest.start()

    def _chosen(self) -> None:
        self._choose.emit(self.choice.currentData())

    def _advanced(self, what: str, done: int, total: int) -> None:
        self.progress.setVisible(True)
        self.progress.setFormat(f"{what} %p %")
        self.progress.setMaximum(total)
        self.progress.setValue(done)
        if what == "Reading" and done >= total:
            self.progress.setVisible(False)

    def _loaded(self, model: Loaded) -> None:
        self.setWindowTitle(f"{model.name} - IFPrune Chat")
        self.choice.clear()
        for data, text in (*_CHOICES, *((task, f"Task {task}") for task in model.tasks)):
            self.choice.addItem(text, data)
        self.figures.setText("")
        self._set_ready(True)

    def _budgeted(self, budget: Budget) -> None:
        if self._rest.isActive():  # the slider has moved on; the answer to that comes
            return
        self.density.blockSignals(True)
        self.density.setValue(round(100 * budget.density))
        self.density.blockSignals(False)
        self.density.setEnabled(self.choice.currentData() in (EACH, FIRST))
        self._density_text.setText(
            f"{budget.density:.2f}, {_count(budget.active)} of {_count(budget.total)} parameters"
        )

    def _answered(self, stats: Stats | None) -> None:
        self._set_ready(True)
        if stats is None:
            return
        if stats.finish_reason == "cancelled":
            self._append(" [stopped]" if stats.completion_tokens else "[stopped before it began; nothing is kept]")
        elif stats.finish_reason == "length":
            self._append(" [cut off]")
        self.figures.setText(_figures(stats))

    def fail(self, line: str) -> None:
        """Say in the conversation what went wrong."""
        self.progress.setVisible(False)
        self._paragraph("Error", line)

    def _set_ready(self, ready: bool, *, answering: bool = False) -> None:
        self.ready, self._answering = ready, answering
        self.send_button.setEnabled(ready)
        self.stop_button.setEnabled(answering)
        self.choice.setEnabled(ready)
        self.density.setEnabled(ready and self.choice.currentData() in (EACH, FIRST))
        self.progress.setVisible(not ready)
        if ready:
            self.message.setFocus()

    def _paragraph(self, who: str, text: str) -> None:
        cursor = self._end_of_text()
        if not self.conversation.document().isEmpty():
            cursor.insertBlock()
        spaced = QTextBlockFormat()
        spaced.setTopMargin(10)
        cursor.setBlockFormat(spaced)
        name = QTextCharFormat()
        name.setFontWeight(700)
        cursor.insertText(who, name)
        cursor.insertBlock(QTextBlockFormat(), QTextCharFormat())
        cursor.insertText(text)
        self._scroll_to_end()

    def _append(self, text: str) -> None:
        """Add to the last paragraph, as text whatever it holds; a reader who scrolled up stays there."""
        bar = self.conversation.verticalScrollBar()
        at_end = bar.value() >= bar.maximum() - 4
        self._end_of_text().insertText(text)
        if at_end:
            self._scroll_to_end()

    def _end_of_text(self) -> QTextCursor:
        cursor = QTextCursor(self.conversation.document())
        cursor.movePosition(QTextCursor.MoveOperation.End)
        return cursor

    def _scroll_to_end(self) -> None:
        bar = self.conversation.verticalScrollBar()
        bar.setValue(bar.maximum())


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"


def _figures(stats: Stats) -> str:
    """Where the time went, and what was active."""
    what = "all neurons" if stats.selection is None else f"{stats.selector} {stats.selection[:6]}"
    if stats.overlap is not None:
        what += f", {stats.overlap:.0%} of it active before"
    times = "   ".join(
        f"{name} {seconds:.2f} s"
        for name, seconds in (
            ("select", stats.select_s),
            ("switch", stats.switch_s),
            ("prefill", stats.prefill_s),
            ("decode", stats.decode_s),
        )
    )
    active = f"{_count(stats.active_parameters)} of {_count(stats.total_parameters)} active"
    return f"{stats.tokens_per_s:.1f} tokens/s   {active}   {times}   {what}"
