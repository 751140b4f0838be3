"""The model and its conversation in a thread of their own. Everything of ifprune_mlx happens here; nothing of widgets.

The window asks by signals, which wait in this thread's queue: a density that is changed during an answer is set after
it. Only `stop` acts at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from PySide6.QtCore import QObject, Signal, Slot

from ifprune_convert.embedded import ensure_embedded
from ifprune_mlx import IfpruneError, Model, PromptError, Session, TaskStore, load

EACH, FIRST, DENSE = "turn", "first", "dense"
"""What chooses the neurons, beside the name of a task: each message, the first one, or nothing (all neurons)."""

MAX_TOKENS = 512
# MLX reports a lack of memory, and what it cannot compute, in the last three.
_FAILURES = (IfpruneError, OSError, RuntimeError, ValueError, MemoryError)


class _Stopped(Exception):
    """`stop` was set while a model was converted or loaded."""


@dataclass(frozen=True)
class Loaded:
    """A model that is ready.

    Attributes:
        name: to show.
        tasks: names of its saved selections.
    """

    name: str
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Budget:
    """What the next selection will keep: the share of all neurons, and parameters that take part in a token."""

    density: float
    active: int
    total: int


class Worker(QObject):
    """Lives in a QThread that it quits at its end.

    Attributes:
        stop: set by any thread, ends what is under way after the step in work. Whoever asks for an answer clears it.
    """

    noted = Signal(str)  # a line for the user
    advanced = Signal(str, int, int)  # what, done, total
    loaded = Signal(Loaded)
    budgeted = Signal(Budget)
    switched = Signal(object)  # the live Selection, or None for all neurons; before the first token of an answer
    said = Signal(str)  # the next piece of the answer
    answered = Signal(object)  # its Stats; None if there is no answer, `failed` has then said why
    failed = Signal(str)  # one line
    ended = Signal()

    def __init__(self) -> None:
        super().__init__()
        self.stop = threading.Event()
        self._model: Model | None = None
        self._session: Session | None = None

    @Slot(object)
    def load(self, path: str | None) -> None:
        """Load a folder or hub id, or the embedded default (None), in the place of the present model."""
        try:
            self._close()
            self.advanced.emit("Loading", 0, 0)
            folder = ensure_embedded(self.noted.emit, self._converting) if path is None else path
            self._model, tokenizer = load(folder, progress=self._progress("Loading"))
            # Stopping waits for a step of the prefill: half a thousand tokens are soon read.
            self._session = Session(self._model, tokenizer, policy=EACH, prefill_step_size=512)
            tasks = tuple(task.name for task in TaskStore(self._model.checkpoint).tasks())
        except _Stopped:
            return
        except _FAILURES as exc:
            self._close()
            self.failed.emit(_line(exc))
            return
        self._report_budget()
        self.loaded.emit(Loaded("SmolLM2-135M-Instruct" if path is None else Path(path).name, tasks))

    @Slot(str)
    def answer(self, text: str) -> None:
        """Answer one message, piece by piece."""
        session, stats = self._session, None
        try:
            if session is None or self.stop.is_set():
                return
            for number, response in enumerate(session.stream(text, max_tokens=MAX_TOKENS, progress=self._reading)):
                if number == 0:
                    self.switched.emit(session.model.selection)
                if response.text:
                    self.said.emit(response.text)
                if self.stop.is_set():
                    session.cancel()
                stats = response.stats
        except _FAILURES as exc:
            full = isinstance(exc, PromptError) and session is not None and session.messages
            self.failed.emit(f"{_line(exc)} (File, New Chat forgets this one)" if full else _line(exc))
        finally:
            self.answered.emit(stats)

    @Slot(str)
    def choose(self, choice: str) -> None:
        """What selects from the next message on: EACH, FIRST, DENSE or a task's name."""
        session = self._session
        if session is None:
            return
        try:
            if choice in (EACH, FIRST, DENSE):
                session.policy = FIRST if choice == DENSE else choice
                session.reselect()
                session.dense = choice == DENSE
            else:
                session.use(TaskStore(session.model.checkpoint).load(choice))
                session.policy = "task"
        except IfpruneError as exc:
            self.failed.emit(_line(exc))
        self._report_budget()

    @Slot(float)
    def set_density(self, density: float) -> None:
        """The share of neurons that the next message selects."""
        if self._session is None:
            return
        try:
            self._session.set_budget(density=density)
        except IfpruneError as exc:
            self.failed.emit(_line(exc))
        self._report_budget()

    @Slot()
    def reset(self) -> None:
        """Forget the conversation."""
        if self._session is not None:
            self._session.reset()

    @Slot()
    def end(self) -> None:
        """Give everything back and end the thread."""
        self._close()
        mx.clear_streams()  # as MLX asks of each thread that used it
        self.ended.emit()
        self.thread().quit()

    def _close(self) -> None:
        self._session = None
        if self._model is not None:
            self._model.close()
            self._model = None

    def _report_budget(self) -> None:
        session = self._session
        if session is None:
            return
        checkpoint = session.model.checkpoint
        keep = None if session.dense else session.keep
        if session.policy == "task" and session.selection is not None:
            keep = session.selection.keep
        widths = [spec.d_ffn for spec in checkpoint.layout.ffns]
        density = 1.0 if keep is None else sum(keep) / sum(widths)
        self.budgeted.emit(Budget(density, checkpoint.active_parameters(keep), checkpoint.parameters))

    def _converting(self, stage: str, done: int, total: int) -> None:
        self._progress("Converting")(done, total)

    def _progress(self, what: str) -> Callable[[int, int], None]:
        def advance(done: int, total: int) -> None:
            if self.stop.is_set():
                raise _Stopped
            self.advanced.emit(what, done, total)

        return advance

    def _reading(self, done: int, total: int) -> None:
        """Of the prompt. An answer is cancelled, not broken off, so that the conversation stays whole."""
        if self.stop.is_set() and self._session is not None:
            self._session.cancel()
        self.advanced.emit("Reading", done, total)


def _line(exc: Exception) -> str:
    return " ".join(str(exc).split()) or type(exc).__name__
