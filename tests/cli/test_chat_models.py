"""`/model` in a chat: what goes wrong with another model leaves the one in use, and all that was chosen on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ifprune_convert.pipeline import Options
from tests.cli.process import run_here
from tests.cli.terminal import PROMPT, Terminal
from tests.tiny import write_checkpoint
from tests.tiny_predictor import write_predictor

# A checkpoint stays at reading its neurons as long as it has a file of this name; it says so with another.
HOLD, HELD = "hold", "held"
_HOLDING = (
    "import pathlib, time; from ifprune_mlx import model as m; read = m.read_rows; "
    f"held = lambda folder: (folder / '{HOLD}').exists() and ((folder / '{HELD}').touch(), time.sleep(0.01)); "
    "m.read_rows = lambda checkpoint, *given: "
    "(all(iter(lambda: held(checkpoint.path), False)), read(checkpoint, *given))[1]"
)


class Models:
    """Checkpoints of a chat's models, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.first = write_checkpoint(folder / "first")
        self.other = write_checkpoint(folder / "other", "qwen2", num_hidden_layers=3)

    def chat(self, *lines: str, options: tuple[str, ...] = (), model: Path | None = None) -> Any:
        """A chat on lines of a pipe."""
        given = "\n".join([*lines, f"/save {self.folder / 'saved.json'}"]).encode()
        return run_here("chat", "--model", model or self.first, "-m", "4", *options, stdin=given)

    @property
    def saved(self) -> dict[str, Any]:
        """The chat at its end."""
        state = json.loads((self.folder / "saved.json").read_text())
        assert isinstance(state, dict)
        return state

    def break_other(self) -> None:
        """Damage it so that only loading finds out, when the model in use has made room."""
        tokenizer = self.other / "tokenizer.json"
        tokenizer.write_text("{" + " " * (tokenizer.stat().st_size - 2) + "}")


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)


@pytest.mark.parametrize("chosen", ["/density 0.25", "/select {file}", "/policy turn", "/dense on"])
def test_what_was_chosen_stays_if_another_model_cannot_be_loaded(models: Models, chosen: str) -> None:
    file = models.folder / "selection.safetensors"
    made = run_here("select", "--prompt", "x", "--selector", "random", "--model", models.first, "--save-to", file)
    assert made.returncode == 0, made.stderr
    line = chosen.format(file=file)
    assert models.chat("one", line, "two").returncode == 0
    wanted = models.saved
    models.break_other()
    done = models.chat("one", line, f"/model {models.other}", "two")
    assert done.stderr.count("ifprune: error: ") == 1
    assert models.saved == wanted


def test_a_fixed_selection_stays_if_another_model_cannot_be_loaded(models: Models) -> None:
    file = str(models.folder / "selection.safetensors")
    assert run_here("select", "--prompt", "x", "--model", models.first, "--save-to", file).returncode == 0
    assert models.chat("one", "two", options=("--selection", file)).returncode == 0
    wanted = models.saved
    models.break_other()
    models.chat("one", f"/model {models.other}", "two", options=("--selection", file))
    assert models.saved == wanted
    assert wanted["policy"] == "task"


def test_a_model_that_the_selector_cannot_use_leaves_the_one_in_use(models: Models) -> None:
    options = Options(predictor=write_predictor(models.folder / "predictor"))
    first = write_checkpoint(models.folder / "predicted", options=options)
    done = models.chat("one", f"/model {models.other}", "two", options=("--selector", "learned"), model=first)
    assert done.stderr.count("ifprune: error: ") == 1
    assert "has no trained predictor" in done.stderr
    assert [message["content"] for message in models.saved["messages"][::2]] == ["one", "two"]


def test_ctrl_c_while_another_model_is_loaded(models: Models) -> None:
    """The first one leaves the model in use, the second the chat: there is no model then."""
    with Terminal(models.first, models.folder / "cache", "-m", "4", prelude=_HOLDING) as terminal:
        for keys, answer in (("hello\r", rb"tokens at"), ("/density 0.25\r", rb"density 0\.25")):
            terminal.expect(PROMPT)
            terminal.send(keys)
            terminal.expect(answer)
        terminal.expect(PROMPT)
        (models.other / HOLD).touch()
        terminal.send(f"/model {models.other}\r")
        _wait_for(models.other / HELD)
        terminal.send("\x03")
        terminal.expect(b"stopped; the model stays")
        for keys, answer in (("/model\r", rb"first, "), ("/density\r", rb"density 0\.25"), ("go on\r", rb"tokens at")):
            terminal.expect(PROMPT)
            terminal.send(keys)
            terminal.expect(answer)
        (models.other / HELD).unlink()
        (models.first / HOLD).touch()
        terminal.expect(PROMPT)
        terminal.send(f"/model {models.other}\r")
        _wait_for(models.other / HELD)
        terminal.send("\x03")
        _wait_for(models.first / HELD)
        terminal.send("\x03")
        assert terminal.wait() == 130


def _wait_for(file: Path) -> None:
    from tests.ifprune_mlx.serving.http.serving import eventually

    eventually(file.exists)


def test_topics_of_another_model_are_not_compared(models: Models) -> None:
    options = ("-m", "4", "--selector", "random", "--density", "0.5", "--repetition-penalty", "1")
    with Terminal(models.first, models.folder / "cache", *options) as terminal:
        for keys, answer in (
            ("write code\r", rb"tokens at"),
            ("bake a cake\r", rb"another topic"),
            (f"/model {models.other}\r", rb"it reads the conversation so far"),
            ("sing a song\r", rb"another topic"),
        ):
            terminal.expect(PROMPT)
            terminal.send(keys)
            terminal.expect(answer)
        assert terminal.leave() == 0
        assert "error" not in "\n".join(terminal.lines)
