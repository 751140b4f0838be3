"""The window: conversation, selection, density, what selects, figures. Never waits for the model."""

from __future__ import annotations

from pathlib import Path

from PySide6.QtCore import QEvent, QObject, Qt, QThread, QTimer, Signal
from PySide6.QtGui import (
    QAction,
    QCloseEvent,
    QFontDatabase,
    QKeyEvent,
    QKeySequence,
)
from PySide6.QtWidgets import (
    QApplication,
    QCheckBox,
    QComboBox,
    QFileDialog,
    QHBoxLayout,
    QLabel,
    QMainWindow,
    QPlainTextEdit,
    QProgressBar,
    QPushButton,
    QSlider,
    QSplitter,
    QVBoxLayout,
    QWidget,
)

from ifprune_mlx import Selection, Stats

from .strip import Strip
from .transcript import Transcript
from .worker import DENSE, EACH, FIRST, Budget, Loaded, Worker, models

_CHOICES = ((EACH, "Each message"), (FIRST, "The first message"), (DENSE, "Nothing: all neurons"))
# A slider that is dragged says where it is all the time; the model is told once it rests.
_REST_MS = 150
_MOST_CHATS = 20


class Window(QMainWindow):
    """One conversation with one model.

    Attributes:
        conversation, dense_conversation, message, send_button, stop_button, strip, sentence, density, choice, beside,
            figures, progress: its widgets.
        ready: whether a message can be sent now.
    """

    _load = Signal(object)
    _answer = Signal(str, bool)
    _open_chat = Signal(object)
    _delete_chat = Signal()
    _set_density = Signal(float)
    _choose = Signal(str)
    _reset = Signal()
    _end = Signal()

    def __init__(self) -> None:
        super().__init__()
        self.ready = False
        self._answering = False
        self._chats: Path | None = None
        self._thread = QThread()
        self._worker = Worker()
        self._worker.moveToThread(self._thread)
        self._build()
        self._connect()
        self._thread.start()

    def open_model(self, path: str | None) -> None:
        """Load a folder, file or hub id, or the embedded default (None); the window stays usable meanwhile."""
        self._worker.stop.clear()
        self._set_ready(False)
        self._clear()
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
        beside = self.beside.isChecked() and self.beside.isEnabled()
        for shown in (self.conversation, self.dense_conversation)[: 1 + beside]:
            shown.say("You", text)
            shown.begin_answer()
        self._set_ready(False, answering=True)
        self._answer.emit(text, beside)

    def stop(self) -> None:
        """End the answer under way after the token in work; what was said stays."""
        if self._answering:
            self._worker.stop.set()

    def _build(self) -> None:
        self.setWindowTitle("IFPrune Chat")
        self.resize(900, 760)
        self.strip = Strip()
        self.sentence = QLabel()
        self.sentence.setWordWrap(True)
        self.conversation = Transcript("Conversation")
        self.dense_conversation = Transcript("The same with all neurons")
        self.dense_conversation.setPlaceholderText("All neurons answer the next message here, after the selected ones.")
        self.dense_conversation.hide()
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
        self.beside = QCheckBox("Dense beside")
        self.beside.setToolTip("Answers once more with all neurons, beside the first answer")
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
        settings.addWidget(self.beside)
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
        both = QSplitter(Qt.Orientation.Horizontal)
        both.addWidget(self.conversation)
        both.addWidget(self.dense_conversation)
        for part in (settings, self.strip, self.sentence, both, entry, state):
            body.addLayout(part) if isinstance(part, QHBoxLayout) else body.addWidget(part)
        body.setStretchFactor(both, 1)
        centre = QWidget()
        centre.setLayout(body)
        self.setCentralWidget(centre)

    def _build_menu(self) -> None:
        menu = self.menuBar().addMenu("File")
        for text, key, act in (
            ("New Chat", QKeySequence.StandardKey.New, self._new_chat),
            ("Delete This Chat", None, self._forget_chat),
            ("Open Folder...", QKeySequence.StandardKey.Open, self._pick_folder),
            ("Open GGUF File...", None, self._pick_file),
            ("Quit", QKeySequence.StandardKey.Quit, self.close),
        ):
            action = QAction(text, self)
            if key is not None:
                action.setShortcut(QKeySequence(key))
            action.triggered.connect(act)
            menu.addAction(action)
        self.models = self.menuBar().addMenu("Models")
        self.models.aboutToShow.connect(self._list_models)
        self.chats = self.menuBar().addMenu("Chats")
        self.chats.aboutToShow.connect(self._list_chats)

    def _connect(self) -> None:
        worker = self._worker
        for ask, slot in (
            (self._load, worker.load),
            (self._answer, worker.answer),
            (self._set_density, worker.set_density),
            (self._choose, worker.choose),
            (self._reset, worker.reset),
            (self._open_chat, worker.open_chat),
            (self._delete_chat, worker.delete_chat),
            (self._end, worker.end),
        ):
            ask.connect(slot, Qt.ConnectionType.QueuedConnection)
        worker.noted.connect(self.figures.setText)
        worker.advanced.connect(self._advanced)
        worker.loaded.connect(self._loaded)
        worker.budgeted.connect(self._budgeted)
        worker.switched.connect(self._switched)
        worker.said.connect(self._append)
        worker.said_dense.connect(self.dense_conversation.add)
        worker.opened.connect(self._opened)
        worker.answered.connect(self._answered)
        worker.failed.connect(self.fail)
        self._thread.finished.connect(self._gone)
        self._rest = QTimer(self, singleShot=True, interval=_REST_MS)
        self._rest.timeout.connect(lambda: self._set_density.emit(self.density.value() / 100))
        self.density.valueChanged.connect(self._dragged)
        self.choice.activated.connect(self._chosen)
        self.beside.toggled.connect(self.dense_conversation.setVisible)
        self.send_button.clicked.connect(self.send)
        self.stop_button.clicked.connect(self.stop)

    def _gone(self) -> None:
        QApplication.quit()

    def _clear(self) -> None:
        for shown in (self.conversation, self.dense_conversation):
            shown.clear()
        self.strip.clear("The neurons that a message selects are shown here")
        self.sentence.setText("")
        self.figures.setText("")

    def _new_chat(self) -> None:
        if self.ready:
            self._clear()
            self._reset.emit()

    def _forget_chat(self) -> None:
        if self.ready:
            self._clear()
            self._delete_chat.emit()

    def _list_chats(self) -> None:
        """The newest chats with this model."""
        self.chats.clear()
        files = [] if self._chats is None else sorted(self._chats.glob("[!.]*.json"), reverse=True)
        for file in files[:_MOST_CHATS]:
            self.chats.addAction(file.stem, lambda file=file: self._pick_chat(file))
        if not files:
            self.chats.addAction("None yet").setEnabled(False)

    def _pick_chat(self, file: Path) -> None:
        if self.ready:
            self._open_chat.emit(file)

    def _opened(self, messages: list[dict[str, str]], choice: str) -> None:
        """Show a saved chat."""
        self._clear()
        for message in messages:
            if message["role"] == "user":
                self.conversation.say("You", message["content"])
            else:
                self.conversation.begin_answer()
                self.conversation.add(message["content"])
                self.conversation.end_answer()
        self.choice.setCurrentIndex(self.choice.findData(choice))
        self._set_ready(True)

    def _pick_folder(self) -> None:
        if not self._answering:
            self._pick_model(QFileDialog.getExistingDirectory(self, "A model: an IFP checkpoint, or safetensors"))

    def _pick_file(self) -> None:
        if not self._answering:
            self._pick_model(QFileDialog.getOpenFileName(self, "A model", filter="GGUF (*.gguf)")[0])

    def _list_models(self) -> None:
        """The models in the cache; others come into it when they are opened."""
        self.models.clear()
        for name, path in models():
            self.models.addAction(name.replace("&", "&&"), lambda path=path: self._pick_model(path))
        if self.models.isEmpty():
            self.models.addAction("None yet").setEnabled(False)

    def _pick_model(self, path: str) -> None:
        if path and not self._answering:
            self.open_model(path)

    def _dragged(self, percent: int) -> None:
        self._density_text.setText(f"{percent / 100:.2f}")
        self._rest.start()

    def _chosen(self) -> None:
        self.beside.setEnabled(self.choice.currentData() != DENSE)
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
        self._chats = model.chats
        self._set_ready(True)

    def _switched(self, selection: Selection | None) -> None:
        self.strip.show_selection(selection)
        self.sentence.setText(self.strip.sentence())

    def _append(self, text: str) -> None:
        self.conversation.add(text)

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

    def _answered(self, stats: Stats | None, end: str, dense: bool, last: bool) -> None:
        (self.dense_conversation if dense else self.conversation).end_answer(end)
        if stats is not None:
            before = f"{self.figures.text()}\n" if dense else ""
            self.figures.setText(before + _figures(stats))
        if last:
            self._set_ready(True)

    def fail(self, line: str) -> None:
        """Say in the conversation what went wrong."""
        self.progress.setVisible(False)
        self.conversation.say("Error", line)

    def _set_ready(self, ready: bool, *, answering: bool = False) -> None:
        self.ready, self._answering = ready, answering
        self.send_button.setEnabled(ready)
        self.stop_button.setEnabled(answering)
        self.choice.setEnabled(ready)
        self.beside.setEnabled(ready and self.choice.currentData() != DENSE)
        self.density.setEnabled(ready and self.choice.currentData() in (EACH, FIRST))
        self.progress.setVisible(not ready)
        if ready:
            self.message.setFocus()


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
