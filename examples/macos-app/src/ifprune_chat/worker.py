"""The model and its conversation in a thread of their own. Everything of ifprune_mlx happens here; nothing of widgets.

The window asks by signals, which wait in this thread's queue: a density that is changed during an answer is set after
it. Only `stop` acts at once.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper
from PySide6.QtCore import QObject, Signal, SignalInstance, Slot

from ifprune_cli.repetition import PENALTY, LoopFinder, below_own_density, penalizing
from ifprune_convert.embedded import ensure_embedded
from ifprune_convert.model_cache import cached_models, ensure_converted, names_dense_model
from ifprune_mlx import IfpruneError, Model, PromptError, Session, Stats, TaskStore, load
from ifprune_mlx.selection.presets import data_folder

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
        chats: the folder of its saved conversations, which may be missing.
    """

    name: str
    tasks: tuple[str, ...]
    chats: Path


@dataclass(frozen=True)
class Budget:
    """What the next selection will keep: the share of all neurons, and parameters that take part in a token."""

    density: float
    active: int
    total: int


def models() -> list[tuple[str, str]]:
    """What lies ready in the cache: names to show, and what `Worker.load` takes."""
    usable = [model for model in cached_models() if model.usable and model.kind != "download"]
    return [(model.name, model.name if model.kind == "converted" else str(model.folder)) for model in usable]


class Worker(QObject):
    """Lives in a QThread that it quits at its end.

    Attributes:
        stop: set by any thread, ends what is under way after the step in work. Whoever asks for an answer clears it.
    """

    noted = Signal(str)  # a line for the user
    advanced = Signal(str, int, int)  # what, done, total
    loaded = Signal(Loaded)
    budgeted = Signal(Budget)
    switched = Signal(object)  # the live Selection, or None for all neurons; before the prompt is read
    said = Signal(str)  # the next piece of the answer
    said_dense = Signal(str)  # the next piece of the dense answer beside it
    # An answer's Stats, None if there is none: `failed` has then said why; how it ended, if not by itself; is it the
    # dense one beside, and the last?
    answered = Signal(object, str, bool, bool)
    opened = Signal(object, str)  # a saved chat: its messages, and what selects
    failed = Signal(str)  # one line
    ended = Signal()

    def __init__(self) -> None:
        super().__init__()
        self.stop = threading.Event()
        self._model: Model | None = None
        self._tokenizer: TokenizerWrapper | None = None
        self._session: Session | None = None
        self._chats = Path()
        self._file: Path | None = None  # of the conversation, once it has an answer

    @Slot(object)
    def load(self, path: str | None) -> None:
        """Load a model in the place of the present one: a checkpoint, a GGUF file, a folder or hub id of a dense model,
        which is converted at first use, or the embedded default (None).
        """
        try:
            self._close()
            self.advanced.emit("Loading", 0, 0)
            folder: str | Path | None = path
            if path is None:
                folder = ensure_embedded(self.noted.emit, self._converting)
            elif names_dense_model(path):
                folder = ensure_converted(path, note=self.noted.emit, report=self._converting)
            self._model, self._tokenizer = load(folder, progress=self._progress("Loading"))
            self._session = self._new_session(policy=EACH)
            tasks = tuple(task.name for task in TaskStore(self._model.checkpoint).tasks())
            self._chats, self._file = data_folder() / "chats" / self._model.checkpoint.id[:16], None
        except _Stopped:
            return
        except _FAILURES as exc:
            self._close()
            self.failed.emit(_line(exc))
            return
        self._report_budget()
        self.loaded.emit(Loaded("SmolLM2-135M-Instruct" if path is None else Path(path).name, tasks, self._chats))

    @Slot(str, bool)
    def answer(self, text: str, beside: bool) -> None:
        """Answer one message, piece by piece; `beside`: once more with all neurons."""
        session = self._session
        before = [] if session is None else list(session.messages)
        stats, end = self._stream(session, text, self.said)
        beside = beside and stats is not None and not self.stop.is_set()
        self.answered.emit(stats, end, False, not beside)
        if stats is not None:
            self._keep(text)
        if beside:
            dense = self._new_session(dense=True)
            dense.messages = before  # reads the same conversation
            self.answered.emit(*self._stream(dense, text, self.said_dense), True, True)

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
        """Begin another conversation; the present one stays among the saved ones."""
        self._file = None
        if self._session is not None:
            self._session.reset()

    @Slot(object)
    def open_chat(self, file: Path) -> None:
        """Go on with a saved conversation."""
        session = self._session
        if session is None:
            return
        try:
            session.load(file)
        except IfpruneError as exc:
            self.failed.emit(_line(exc))
            return
        self._file = file
        self.opened.emit(session.messages, DENSE if session.dense else session.policy)
        self._report_budget()

    @Slot()
    def delete_chat(self) -> None:
        """Forget the present conversation, here and on the disk."""
        try:
            if self._file is not None:
                self._file.unlink(missing_ok=True)
        except OSError as exc:
            self.failed.emit(_line(exc))
        self.reset()

    @Slot()
    def end(self) -> None:
        """Give everything back and end the thread."""
        self._close()
        mx.clear_streams()  # as MLX asks of each thread that used it
        self.ended.emit()
        self.thread().quit()

    def _new_session(self, **options: Any) -> Session:
        assert self._model is not None
        assert self._tokenizer is not None
        # Stopping waits for a step of the prefill: half a thousand tokens are soon read.
        return Session(self._model, self._tokenizer, prefill_step_size=512, **options)

    def _stream(self, session: Session | None, text: str, said: SignalInstance) -> tuple[Stats | None, str]:
        """Answer a message in a conversation; its Stats, None if that failed, and how it ended."""
        if session is None or self.stop.is_set():
            return None, ""
        stats, loops, loop = None, LoopFinder(), False
        session.options["logits_processors"] = penalizing(PENALTY if below_own_density(session) else 1)

        def show_selection() -> None:
            if session is self._session:
                self.switched.emit(session.model.selection)

        def reading(done: int, total: int) -> None:
            # Of the prompt. An answer is cancelled, not broken off, so that the conversation stays whole.
            if self.stop.is_set():
                session.cancel()
            # The prompt is read on the new selection, unless it is what selects.
            if session.selector is None or session.selector.name != "activation":
                show_selection()
            self.advanced.emit("Reading", done, total)

        try:
            for number, response in enumerate(session.stream(text, max_tokens=MAX_TOKENS, progress=reading)):
                if number == 0:
                    show_selection()
                if response.text:
                    said.emit(response.text)
                loop = loop or loops.feed(response.token)
                if loop or self.stop.is_set():
                    session.cancel()
                stats = response.stats
        except _FAILURES as exc:
            full = isinstance(exc, PromptError) and session.messages
            self.failed.emit(f"{_line(exc)} (File, New Chat begins another one)" if full else _line(exc))
            return None, ""
        return stats, "" if stats is None else _end(stats, loop)

    def _keep(self, text: str) -> None:
        """Save the conversation, under the time and the words that it began with."""
        if self._session is None or not self._session.messages:
            return
        if self._file is None:
            words = " ".join(re.sub(r"[^\w ]", " ", text).split())[:40].strip()
            self._file = self._chats / f"{datetime.now():%Y-%m-%d %H.%M.%S} {words}.json"
        try:
            self._chats.mkdir(parents=True, exist_ok=True)
            self._session.save(self._file)
        except (IfpruneError, OSError) as exc:
            self.failed.emit(f"this chat is not saved: {_line(exc)}")

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


def _end(stats: Stats, loop: bool) -> str:
    """How an answer ended, in words, if not by itself."""
    if loop:
        return " [ended: it was repeating itself; a higher density may help]"
    if stats.finish_reason == "cancelled":
        return " [stopped]" if stats.completion_tokens else "[stopped before it began; nothing is kept]"
    return " [cut off]" if stats.finish_reason == "length" else ""


def _line(exc: Exception) -> str:
    return " ".join(str(exc).split()) or type(exc).__name__
