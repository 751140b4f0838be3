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

import numpy as np
import pytest

from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx import Instruction, Selection, TaskStore, load, make_selector
from tests.cli.process import environment
from tests.ifprune_mlx.reference import random_selection
from tests.tiny import write_checkpoint
from tests.tiny_predictor import write_predictor

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


@pytest.fixture(scope="module")
def predicting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a predictor, which selects before the prompt is read."""
    folder = tmp_path_factory.mktemp("predicting")
    write_checkpoint(folder / "plain")
    options = Options(predictor=write_predictor(folder / "head"))
    convert(open_source(folder / "source-of-plain"), folder / "checkpoint", options)
    return folder / "checkpoint"


@pytest.fixture
def window(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The app's window, without a model. It is closed at the end, and must end its thread then."""
    monkeypatch.syspath_prepend(str(SOURCES))
    # Tiny models say the same token for ever; who tests that an answer is stopped needs a long one.
    monkeypatch.setattr("ifprune_cli.repetition.LoopFinder.feed", lambda self, token: False)
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
    for _ in range(3):  # more than the context holds, whatever is answered
        say(window, "Hello there" * 20)
    assert said(window).endswith("(File, New Chat begins another one)")
    window._new_chat()
    say(window, "Hello there")
    assert said(window).startswith("You\nHello there\nAnswer\n")


def test_an_answer_with_html_is_shown_as_text(chat: Any) -> None:
    say(chat, "<b>Hello</b> <img src=x>")
    assert said(chat).startswith("You\n<b>Hello</b> <img src=x>\n")


MARKDOWN = """# Title

Some **bold**, <b>raw</b> <script>alert(1)</script> and ![pixel](file:///etc/hostname) ![far](http://a.example/x.png).
[A link](javascript:alert)

```python
def f(x):
    return x
```

| a | b |
|---|---|
| 1 | 2 |
"""


def test_answers_are_markdown_and_nothing_in_them_is_loaded(window: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = window.conversation
    asked: list[str] = []
    loading = type(shown).loadResource

    def watched(self: Any, kind: int, name: Any) -> Any:
        asked.append(name.toString())
        return loading(self, kind, name)

    monkeypatch.setattr(type(shown), "loadResource", watched)
    shown.say("You", "**not** bold")
    shown.begin_answer()
    for piece in (MARKDOWN[start : start + 7] for start in range(0, len(MARKDOWN), 7)):
        shown.add(piece)
        shown._draw()  # as often as it can be
    shown.end_answer(" [cut off]")
    window.grab()
    text = said(window)
    assert text.startswith("You\n**not** bold\nAnswer\nTitle\nSome bold, <b>raw</b> <script>alert(1)</script> and ")
    assert "```" not in text
    assert "def f(x):\n    return x\n" in text
    assert text.endswith(" [cut off]")
    assert text.count("Title") == 1
    assert set(asked) <= {"file:///etc/hostname", "http://a.example/x.png"}
    assert all(loading(shown, 2, QtCore.QUrl(name)) is None for name in asked)
    html = shown.toHtml()
    assert "font-weight:700" in html.partition("bold")[0].rpartition("<span")[2]
    assert "<table" in html
    # The next message begins below it, in its own style.
    shown.say("You", "and **now**?")
    assert said(window).endswith(" [cut off]\nYou\nand **now**?")


def test_an_error_during_an_answer_stays(window: Any) -> None:
    window.conversation.say("You", "Hello")
    window.conversation.begin_answer()
    window.conversation.add("It *began*")
    window.fail("the disk is full")
    window._answered(None, "", False, True)
    assert said(window) == "You\nHello\nAnswer\nIt began\nError\nthe disk is full"


def test_the_strip_changes_before_the_prompt_is_read_and_says_what_one_sees(predicting: Path, window: Any) -> None:
    window.open_model(str(predicting))
    wait(lambda: window.ready)
    events: list[str] = []
    window._worker.switched.connect(lambda selection: events.append("switched"))
    window._worker.advanced.connect(lambda what, done, total: events.append(f"{what} {done}"))
    window._worker.said.connect(lambda text: events.append("said"))
    set_density(window, 25)
    say(window, "Hello there")
    assert events[:2] == ["switched", "Reading 0"]
    assert "said" in events
    assert window.sentence.text() == window.strip.sentence()
    assert window.sentence.text().startswith("25% of the neurons in each of 2 layers answer")


def test_the_sentence_counts_what_came_in_and_went_out(window: Any) -> None:
    one, other = random_selection((128, 128), (32, 32), 0), random_selection((128, 128), (64, 32), 1)
    window._switched(one)
    window._switched(other)
    stayed = [np.isin(new, old).sum() for new, old in zip(other.ids, one.ids, strict=True)]
    came, went = 1 - sum(stayed) / 96, 1 - sum(stayed) / 64
    wanted = f"New neurons: {came:.0%} of those in use came in, {went:.0%} of those before went out. "
    assert window.sentence.text() == f"{wanted}Layer 0 changed most, layer 1 least."
    window._switched(other)  # the first token of the same answer
    assert window.sentence.text().startswith(wanted)
    window._switched(None)
    assert window.sentence.text() == ""


def test_dense_beside_answers_the_same_conversation_with_all_neurons(chat: Any) -> None:
    assert not chat.dense_conversation.isVisible()
    set_density(chat, 25)
    say(chat, "Hello there")
    chat.beside.setChecked(True)
    assert chat.dense_conversation.isVisible()
    say(chat, "Something else")
    sliced, dense = said(chat), str(chat.dense_conversation.toPlainText())
    assert sliced.count("Answer\n") == 2
    assert dense.startswith("You\nSomething else\nAnswer\n")
    assert dense.partition("Answer\n")[2] not in ("", sliced.rpartition("Answer\n")[2])
    assert "all neurons" in chat.figures.text().splitlines()[1]
    assert chat.strip.selection is not None  # of the sliced answer
    # What was said beside it is no part of the conversation.
    assert [message["content"] for message in chat._worker._session.messages[::2]] == ["Hello there", "Something else"]
    say(chat, "And now?")
    assert chat.strip.selection.density == 0.25
    # It read the conversation, not only the message: a new one answers otherwise.
    chat.choice.setCurrentIndex(chat.choice.findData("dense"))
    chat.choice.activated.emit(chat.choice.currentIndex())
    assert not chat.beside.isEnabled()


def test_stop_ends_the_answer_beside_too(chat: Any) -> None:
    chat.beside.setChecked(True)
    say(chat, "Tell me a long story", end=False)
    wait(lambda: str(chat.dense_conversation.toPlainText()).partition("Answer\n")[2])
    QtTest.QTest.keyClick(chat.message, QtCore.Qt.Key.Key_Escape)
    wait(lambda: chat.ready, 10)
    assert str(chat.dense_conversation.toPlainText()).endswith(" [stopped]")
    assert not said(chat).endswith(" [stopped]")


def chats(window: Any) -> list[Any]:
    """What the menu lists."""
    window.chats.aboutToShow.emit()
    return [action for action in window.chats.actions() if action.isEnabled()]


def test_chats_are_saved_listed_opened_and_deleted(
    chat: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IFPRUNE_DATA", str(tmp_path))
    chat.open_model(str(checkpoint))
    wait(lambda: chat.ready)
    assert chats(chat) == []
    say(chat, "Hello / there & everybody?")
    say(chat, "And then?")
    wait(lambda: chats(chat))
    first, seen = chat.strip.selection, said(chat)
    chat._new_chat()
    assert said(chat) == ""
    say(chat, "Another chat")
    wait(lambda: len(chats(chat)) == 2)
    names = [action.text() for action in chats(chat)]
    (old,) = [action for action in chats(chat) if action.text().endswith(" Hello there everybody")]
    old.trigger()
    wait(lambda: said(chat).startswith("You\nHello / there"))
    assert said(chat).replace(" [cut off]", "") == seen.replace(" [cut off]", "")
    say(chat, "Go on")
    assert said(chat).count("You\n") == 3
    assert chat._worker._session.messages[0]["content"] == "Hello / there & everybody?"
    assert [action.text() for action in chats(chat)] == names  # it went into its own file
    assert first.hash != chat.strip.selection.hash
    chat._forget_chat()
    wait(lambda: len(chats(chat)) == 1)
    assert chats(chat)[0].text().endswith(" Another chat")


def test_a_damaged_chat_is_said_in_a_line(chat: Any, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text("{")
    chat._pick_chat(file)
    wait(lambda: "Error\n" in said(chat))
    assert "not a saved chat" in said(chat)
    assert chat.ready


def test_a_loop_is_ended_with_a_line(chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ifprune_cli.repetition.LoopFinder.feed", lambda self, token: True)
    say(chat, "Hello there")
    assert said(chat).endswith(" [ended: it was repeating itself; a higher density may help]")
    assert "tokens/s" in chat.figures.text()


def test_a_line_of_an_answer_ends_on_the_screen_and_code_stays_as_it_is(window: Any) -> None:
    window.conversation.begin_answer()
    window.conversation.add("one\ntwo\n\n~~~\nx = 1\n```\n~~~\nthree\nfour")
    window.conversation.end_answer()
    lines = said(window).replace("\u2028", "\n").split("\n")
    assert [line for line in lines if line] == ["Answer", "one", "two", "x = 1", "```", "three", "four"]


def test_the_end_is_followed_until_the_reader_scrolls_up(window: Any) -> None:
    shown, bar = window.conversation, window.conversation.verticalScrollBar()
    shown.begin_answer()
    for number in range(200):
        shown.add(f"line {number}\n\n")
    shown.end_answer()
    window.beside.setChecked(True)  # makes the lines shorter, and the text longer
    shown.say("You", "And now?")
    shown.begin_answer()
    wait(lambda: 0 < bar.maximum() == bar.value())
    bar.setValue(bar.maximum() // 2)
    place = bar.value()
    shown.add("more\n\n" * 50)
    shown._draw()
    QtWidgets.QApplication.processEvents()
    assert bar.value() == place
    bar.setValue(bar.maximum())
    shown.add("more\n\n" * 50)
    shown._draw()
    wait(lambda: bar.value() == bar.maximum())


def test_a_dense_model_is_converted_once_and_listed(
    window: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IFPRUNE_CACHE", str(tmp_path))

    def listed() -> list[Any]:
        window.models.aboutToShow.emit()
        return [action for action in window.models.actions() if action.isEnabled()]

    assert listed() == []
    source = checkpoint.parent / "source-of-checkpoint"
    window._pick_model(str(source))
    wait(lambda: window.ready)
    say(window, "Hello there")
    (action,) = listed()
    assert action.text().endswith(source.name)
    converted = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    assert converted
    action.trigger()
    assert not window.ready
    wait(lambda: window.ready)
    say(window, "Hello there")
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")} == converted


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
    for text in ("What is the capital of France?", "Write a Python function that reverses a string."):
        window.beside.setChecked("Python" in text)
        say(window, text, end=False)
        wait(lambda: window.ready, 500)
    assert window.grab().save(str(PICTURE))
