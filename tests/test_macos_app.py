"""The desktop app of examples/macos-app, driven offscreen as a person does: keys, clicks, the slider, closing.

Skips where PySide6 or the system libraries that it needs are missing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ifprune_mlx import Instruction, Selection, TaskStore, load, make_selector
from tests.cli.process import environment
from tests.tiny import write_checkpoint

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
QtWidgets = pytest.importorskip("PySide6.QtWidgets", exc_type=ImportError)
QtTest = pytest.importorskip("PySide6.QtTest", exc_type=ImportError)
QtCore = pytest.importorskip("PySide6.QtCore", exc_type=ImportError)

SOURCES = Path(__file__).parent.parent / "examples" / "macos-app" / "src"
PICTURE = os.environ.get("IFPRUNE_APP_PICTURE")  # where to put a screenshot of the app with the real model


def wait(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Let the app run until `condition` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the app did not get there in time"
        loop = QtCore.QEventLoop()  # QTest.qWait would hold Python's lock, and with it the model's thread
        QtCore.QTimer.singleShot(10, loop.quit)
        loop.exec()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose context holds some answers of full length."""
    return write_checkpoint(tmp_path_factory.mktemp("app") / "checkpoint", max_position_embeddings=4096)


@pytest.fixture
def window(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The app's window, without a model. It is closed at the end, and must end its thread then."""
    monkeypatch.syspath_prepend(str(SOURCES))
    application = QtWidgets.QApplication.instance() or QtWidgets.QApplication([])
    from ifprune_chat.window import Window

    shown = Window()
    shown.show()
    yield shown
    shown.close()
    wait(shown._thread.isFinished)
    application.processEvents()


@pytest.fixture
def chat(window: Any, checkpoint: Path) -> Any:
    """The window with the tiny model loaded."""
    window.open_model(str(checkpoint))
    assert not window.ready
    wait(lambda: window.ready)
    return window


def say(window: Any, text: str, *, end: bool = True) -> None:
    """Type a message and send it with Return; by default wait for the answer's end."""
    QtTest.QTest.keyClicks(window.message, text)
    QtTest.QTest.keyClick(window.message, QtCore.Qt.Key.Key_Return)
    assert not window.ready
    if end:
        wait(lambda: window.ready)


def set_density(window: Any, percent: int) -> None:
    """Move the slider, and wait until the model has been told."""
    window.density.setValue(percent)
    wait(lambda: " of " in window._density_text.text())


def said(window: Any) -> str:
    return str(window.conversation.toPlainText())


def test_a_message_is_answered_and_its_neurons_are_shown(chat: Any) -> None:
    assert chat.strip.selection is None
    set_density(chat, 25)
    say(chat, "Hello there")
    _, _, answer = said(chat).partition("Answer\n")
    assert said(chat).startswith("You\nHello there\n")
    assert answer
    assert chat.message.toPlainText() == ""
    first = chat.strip.selection
    assert isinstance(first, Selection)
    assert first.hash[:6] in chat.figures.text()
    assert all(word in chat.figures.text() for word in ("tokens/s", "active", "select", "switch", "prefill", "decode"))
    say(chat, "Something else: 1 + 1 = 2, 2 + 2 = 4.")
    assert chat.strip.selection.hash != first.hash
    assert said(chat).count("You\n") == said(chat).count("Answer\n") == 2


def test_the_strip_draws_shares_and_marks_what_came_in(chat: Any) -> None:
    set_density(chat, 25)
    say(chat, "Hello there")
    before = chat.strip.selection
    say(chat, "Something else: 1 + 1 = 2, 2 + 2 = 4.")
    after = chat.strip.selection
    from ifprune_chat.strip import LIGHT, picture, shares

    assert shares(after.ids[0], 128, 128).sum() == len(after.ids[0])
    assert shares(after.ids[0], 128, 1) == pytest.approx([after.density])
    none, kept, new = (colour.name() for colour in LIGHT)
    image = picture(after, before, 128, LIGHT)
    for layer in range(2):
        mine, old = set(after.ids[layer].tolist()), set(before.ids[layer].tolist())
        wanted = [new if n in mine - old else kept if n in mine else none for n in range(128)]
        assert [image.pixelColor(n, layer).name() for n in range(128)] == wanted
    left, bottom = chat.strip.described(0, 0), chat.strip.described(0, chat.strip._rows().bottom())
    assert left.startswith("Layer 0, neurons 0 to ")
    assert left.endswith(" new")
    assert bottom.startswith("Layer 1, ")


def test_the_slider_sets_the_density_of_the_next_message(chat: Any) -> None:
    say(chat, "Hello there")
    wide = chat.strip.selection.density
    set_density(chat, 25)
    say(chat, "And now?")
    assert chat.strip.selection.density == 0.25
    assert wide > 0.25


def test_dense_and_back(chat: Any) -> None:
    chat.choice.setCurrentIndex(chat.choice.findData("dense"))
    chat.choice.activated.emit(chat.choice.currentIndex())
    say(chat, "Hello there")
    assert chat.strip.selection is None
    assert "all neurons" in chat.figures.text()
    assert not chat.density.isEnabled()
    chat.choice.setCurrentIndex(chat.choice.findData("first"))
    chat.choice.activated.emit(chat.choice.currentIndex())
    say(chat, "Hello there")
    first = chat.strip.selection
    say(chat, "Something else: 1 + 1 = 2")
    assert chat.strip.selection.hash == first.hash
    assert chat.density.isEnabled()


def test_a_task(window: Any, checkpoint: Path) -> None:
    model, _ = load(checkpoint)
    chosen = make_selector(model, "static").select(Instruction("", (1,)), model.keep(0.5)).selection
    TaskStore(model.checkpoint).save("letters", chosen)
    model.close()
    window.open_model(str(checkpoint))
    wait(lambda: window.ready)
    window.choice.setCurrentText("Task letters")
    window.choice.activated.emit(window.choice.currentIndex())
    say(window, "Hello there")
    assert window.strip.selection.hash == chosen.hash
    assert not window.density.isEnabled()


def test_stop_keeps_what_was_said(chat: Any) -> None:
    say(chat, "Tell me a long story", end=False)
    wait(lambda: said(chat).partition("Answer\n")[2])
    QtTest.QTest.mouseClick(chat.stop_button, QtCore.Qt.MouseButton.LeftButton)
    wait(lambda: chat.ready, 10)
    assert said(chat).endswith(" [stopped]")
    say(chat, "And then?", end=False)
    wait(lambda: said(chat).count("Answer\n") == 2 and not said(chat).endswith("Answer\n"))
    QtTest.QTest.keyClick(chat.message, QtCore.Qt.Key.Key_Escape)
    wait(lambda: chat.ready, 10)
    assert said(chat).count("[stopped]") == 2


def test_the_event_loop_stays_free_during_an_answer(chat: Any) -> None:
    beats: list[float] = []
    timer = QtCore.QTimer(interval=10)
    timer.timeout.connect(lambda: beats.append(time.monotonic()))
    say(chat, "Tell me a long story", end=False)
    timer.start()
    wait(lambda: chat.ready)
    timer.stop()
    assert len(beats) > 5
    # A busy machine may hold the process up, but an answer of 512 tokens in one piece would show.
    assert max(late - early for early, late in pairwise(beats)) < 1.0


def test_a_full_context_says_what_to_do(window: Any, tiny_checkpoint: Path) -> None:
    window.open_model(str(tiny_checkpoint))
    wait(lambda: window.ready)
    say(window, "Hello there" * 20)
    say(window, "Hello there" * 20)
    assert said(window).endswith("(File, New Chat forgets this one)")
    window._new_chat()
    say(window, "Hello there")
    assert said(window).startswith("You\nHello there\nAnswer\n")


def test_an_answer_with_html_is_shown_as_text(chat: Any) -> None:
    say(chat, "<b>Hello</b> <img src=x>")
    assert said(chat).startswith("You\n<b>Hello</b> <img src=x>\n")


def test_closing_during_an_answer_ends_it(chat: Any) -> None:
    say(chat, "Tell me a long story", end=False)
    wait(lambda: said(chat).partition("Answer\n")[2])
    chat.close()
    assert not chat.isVisible()
    wait(chat._thread.isFinished, 10)


def test_a_model_that_cannot_be_loaded_is_said_in_a_line(window: Any, tmp_path: Path) -> None:
    window.open_model(str(tmp_path))
    wait(lambda: "Error\n" in said(window))
    assert str(tmp_path) in said(window)
    assert not window.ready
    assert not window.progress.isVisible()


def test_the_program_starts_answers_and_ends_while_answering(checkpoint: Path, tmp_path: Path) -> None:
    # The program itself; only its window is told what to do, and what it printed.
    code = f"""
import sys
from PySide6.QtCore import QTimer
from ifprune_chat import app
class Told(app.Window):
    def _loaded(self, model):
        super()._loaded(model)
        self.message.setPlainText("Tell me a long story")
        self.send()
    def _append(self, text):
        super()._append(text)
        print("said", flush=True)
        QTimer.singleShot(0, self.close)
app.Window = Told
sys.exit(app.main([{str(checkpoint)!r}]))
"""
    env = environment(tmp_path)
    env["PYTHONPATH"] += os.pathsep + str(SOURCES)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=False, timeout=120)
    complaints = set(done.stderr.decode().splitlines()) - {"This plugin does not support propagateSizeHints()"}
    assert (done.returncode, complaints) == (0, set())
    assert done.stdout.decode().startswith("said\n")
    assert done.stdout.decode().count("said\n") < 100


@pytest.mark.real
@pytest.mark.skipif(PICTURE is None, reason="IFPRUNE_APP_PICTURE names no file for a screenshot of the real model")
def test_screenshot(window: Any, smollm2: Path) -> None:
    window.open_model(str(smollm2))
    wait(lambda: window.ready)
    for text in ("Write a Python function that reverses a string.", "How do I take care of a houseplant?"):
        say(window, text, end=False)
        wait(lambda: window.ready, 300)
    assert window.grab().save(str(PICTURE))
