"""`ifprune chat` on lines of a pipe; as a real process for signals, and on a pseudo-terminal for the line editor."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ifprune_cli.chat_input import _History
from ifprune_mlx import Model, Selection, Session
from tests.cli.process import run, run_here, start
from tests.cli.terminal import PROMPT, Terminal
from tests.tiny import write_checkpoint

# The random models repeat themselves.
LONG = ["-m", "100000", "--repetition-penalty", "1"]


class Piped:
    """Runs chats on lines of a pipe, with files in one folder."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self.checkpoint = checkpoint
        self.folder = folder

    def __call__(self, *lines: str | bytes, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """Send lines, without a newline after the last, and wait for the end."""
        return run_here("chat", *self.arguments, *options, stdin=self.joined(lines))

    @property
    def arguments(self) -> tuple[str | Path, ...]:
        return ("--model", self.checkpoint, "-m", "6")

    @staticmethod
    def joined(lines: Sequence[str | bytes]) -> bytes:
        return b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)

    def select(self, prompt: str, *options: str | Path) -> str:
        """Select for a prompt, save as the options say; the selection's hash."""
        made = run_here("select", "--prompt", prompt, "--model", self.checkpoint, *options, "--json")
        assert made.returncode == 0, made.stderr
        return str(json.loads(made.stdout)["selection"])

    def saved(self, name: str) -> dict[str, Any]:
        """A chat that was saved in the folder."""
        state = json.loads((self.folder / name).read_text(encoding="utf-8"))
        assert isinstance(state, dict)
        return state


@pytest.fixture
def piped(tiny_checkpoint: Path, tmp_path: Path) -> Piped:
    return Piped(tiny_checkpoint, tmp_path)


def notes(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Lines of stderr but the speed figures."""
    assert "Traceback" not in done.stderr
    return [line for line in done.stderr.splitlines() if not line.startswith("[")]


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in notes(done) if line.startswith("ifprune: error: ")]


def test_stdout_carries_the_answers_and_nothing_else(piped: Piped, tiny: tuple[Model, Any]) -> None:
    done = piped("hello", "", "  ", "/stats", "/help", "go on\r")
    session = Session(*tiny)
    answers = [session.ask(text, max_tokens=6) for text in ("hello", "go on")]
    assert done.stdout == "".join(f"{answer}\n" for answer in answers)
    assert done.returncode == 0
    figures = [line for line in done.stderr.splitlines() if line.startswith("[")]
    assert len(figures) == 2
    assert all("6 tokens" in line and line.endswith("] cut off by --max-tokens") for line in figures)


def test_a_process_says_the_same(piped: Piped) -> None:
    lines = ("hello", "/density 2", "naïve 東京")
    here = piped(*lines)
    there = run("chat", *piped.arguments, cache=piped.folder / "cache", stdin=piped.joined(lines))
    assert (there.returncode, there.stdout, notes(there)) == (here.returncode, here.stdout, notes(here))


def test_end_of_input_and_quit_end_the_chat(piped: Piped) -> None:
    assert piped("").returncode == 0
    done = piped("/quit", "never")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = piped("quit", "/?")  # in a pipe it is a message
    assert done.stdout
    assert "leave; also /exit, Ctrl-D, or exit or quit typed alone" in done.stderr


def test_commands_say_what_they_did(piped: Piped) -> None:
    done = piped(
        "hello", "/density", "/density 0.25", "again", "/dense", "dense now", "/DENSE off", "/system be brief",
        "/system", "/system none", "/select another topic", "go", f"/save {piped.folder / 'a.json'}", "/stats",
        "/reset", "/stats",
    )  # fmt: skip
    assert done.returncode == 0
    said = "\n".join(notes(done))
    for words in (
        "density 0.88, 0.1M of 0.1M parameters active",
        "density 0.25, 0.1M of 0.1M parameters active, from the next message on",
        "dense, all 0.1M parameters",
        "activation selector, density 0.25",
        "system prompt: be brief",
        "no system prompt",
        "selects anew at the next message, by this text",
        "saved 4 turns",
        "forgot the conversation",
        "no answer yet",
    ):
        assert words in said
    hash_ = piped.saved("a.json")["selection"]["hash"]
    assert f"selection   {hash_}, activation, density 0.25" in said
    assert re.search(rf"KV cache    \d+ tokens dense, \d+ tokens {hash_[:8]}", said)
    assert re.search(r"context     \d+ tokens of 512", said)
    assert "KV cache    empty" in said
    assert piped.saved("a.json")["instruction"] == "another topic"


def test_bad_input_is_one_line_and_the_chat_goes_on(piped: Piped) -> None:
    (piped.folder / "notes.txt").write_text("mine")
    cases = {
        "/lod x": "unknown command /lod; did you mean /load? (/help",
        "/usr/bin/env?": "// sends a slash",
        "/": "unknown command /",
        "/help me": "/help takes no argument",
        "/save": "/save needs an argument: /save FILE",
        "/density half": "'half' is not a number",
        "/density 2": "density 2 is not usable",
        "/density nan": "density nan is not usable",
        "/dense maybe": "/dense takes on, off",
        "/select /nowhere.safetensors": "/nowhere.safetensors: no such selection file",
        "/load /nowhere": "/nowhere: no such saved chat",
        "/load ~nobody-of-this-name/x": "no such user's home folder",
        f"/load {'x' * 300}": "File name too long",
        f"/save {piped.folder / 'notes.txt'}": "exists and is not a saved chat",
        f"/save {piped.folder}": "exists and is not a saved chat",
        f"/save {piped.folder / 'no' / 'folder'}": "cannot be written",
        "x" * 600: "the model's context holds 512",
    }
    done = piped(*cases, "still there?")
    assert done.returncode == 1
    assert len(errors(done)) == len(cases) == len(notes(done))
    for line, words in zip(errors(done), cases.values(), strict=True):
        assert words in line
    assert done.stdout
    assert (piped.folder / "notes.txt").read_text() == "mine"


def test_a_full_context_hints_at_reset(piped: Piped) -> None:
    done = piped("hello", "x" * 600, "/reset", "hello")
    assert done.returncode == 1
    assert errors(done)[0].endswith("(/reset forgets the conversation)")
    assert " cut off: the context is full (/reset)" in piped("x" * 490, options=("-m", "-1")).stderr
    first, second = done.stdout[: len(done.stdout) // 2], done.stdout[len(done.stdout) // 2 :]
    assert first == second


def test_two_slashes_send_one(piped: Piped) -> None:
    done = piped("//quit is a word", f"/save {piped.folder / 'a.json'}")
    assert done.returncode == 0
    assert piped.saved("a.json")["messages"][0] == {"role": "user", "content": "/quit is a word"}


@pytest.mark.parametrize("bad", [b"caf\xe9", b"\xff\xfe"])
def test_stdin_that_is_not_utf8_ends_the_chat(piped: Piped, bad: bytes) -> None:
    done = piped("hello", bad, "never")
    assert done.returncode == 1
    assert len(notes(done)) == 1
    assert errors(done)[0].startswith("ifprune: error: stdin, line 2, byte ")
    assert "not UTF-8" in errors(done)[0]
    assert done.stdout


def test_a_saved_chat_goes_on(piped: Piped) -> None:
    a, b, c = (piped.folder / f"{name}.json" for name in "abc")
    unbroken = piped("one", "two", f"/save {a}", f'/save "{b}"', "three", f"/save {c}")
    assert unbroken.returncode == 0
    assert a.read_bytes() == b.read_bytes()
    done = piped(f"/load {a}", f"/save {b}", "three", f"/save {c}.again")
    assert done.returncode == 0
    assert a.read_bytes() == b.read_bytes()
    assert "loaded 2 turns" in done.stderr
    assert "> one" in notes(done)
    # The KV cache is computed anew, by the same selection, and says the same.
    assert piped.saved("c.json.again")["selection"]["hash"] == piped.saved("a.json")["selection"]["hash"]
    assert len(piped.saved("c.json.again")["messages"]) == 6


def test_load_option_and_what_goes_before_it(piped: Piped) -> None:
    a, b = piped.folder / "a.json", piped.folder / "b.json"
    piped("/system be brief", "one", f"/save {a}")
    done = piped(f"/save {b}", options=("--load", str(a)))
    assert (done.returncode, a.read_bytes()) == (0, b.read_bytes())
    changed = ("--load", str(a), "--policy", "turn", "--density", "0.5", "--system-prompt", "be long")
    done = piped("two", f"/save {b}", options=changed)
    assert done.returncode == 0
    state = piped.saved("b.json")
    assert (state["policy"], state["system_prompt"], len(state["messages"])) == ("turn", "be long", 4)
    assert "[activation 0.50 " in done.stderr
    done = piped("two", options=("--load", str(piped.folder / "nowhere.json")))
    assert (done.returncode, len(errors(done)), done.stdout) == (1, 1, "")


def test_what_stays_is_said(piped: Piped) -> None:
    """The selection under a policy that selects once, and the turns of a chat that was loaded."""
    a = piped.folder / "a.json"
    done = piped("/policy first", "one", "/policy turn", "/policy system", "/reset", "/policy first")
    said = [line for line in notes(done) if line.startswith("policy ")]
    first, system = "the first message selects, for the whole conversation", "the selection in use stays, until /reset"
    turn = "policy turn: every message selects"
    assert said == [f"policy first: {first}", turn, f"policy system: {system}", f"policy first: {first}"]
    piped("one", "two", f"/save {a}")
    told = [line.strip() for line in notes(piped(f"/load {a}", "/stats"))]
    assert "context     2 turns are read at the next message" in told


def test_a_damaged_saved_chat_changes_nothing(piped: Piped) -> None:
    a, b, damaged = (piped.folder / name for name in ("a.json", "b.json", "damaged.json"))
    piped("one", f"/save {a}")
    state = piped.saved("a.json")
    lines = []
    for number, change in enumerate(
        (
            {"format": 9},
            {"messages": 5},
            {"policy": "task", "selection": None},
            {"checkpoint": "other"},
            {"selection": {}},
        )
    ):
        file = piped.folder / f"damaged{number}.json"
        file.write_text(json.dumps(state | change))
        lines.append(f"/load {file}")
    damaged.write_bytes(a.read_bytes()[:-40])
    done = piped(f"/load {a}", *lines, f"/load {damaged}", f"/save {b}")
    assert done.returncode == 1
    assert len(errors(done)) == 6
    assert a.read_bytes() == b.read_bytes()


def test_saved_selections(piped: Piped) -> None:
    file, a = piped.folder / "fixed.safetensors", piped.folder / "a.json"
    wanted = piped.select("maths", "--save-to", file)
    assert wanted == Selection.load(file).hash
    done = piped("one", f"/select {file}", "two", f"/save {a}")
    assert done.returncode == 0
    assert piped.saved("a.json")["selection"]["hash"] == wanted
    done = piped("one", "/reset", "two", "/select", "/density 0.5", f"/save {a}", options=("--selection", str(file)))
    assert len(errors(done)) == 2
    assert (piped.saved("a.json")["policy"], piped.saved("a.json")["selection"]["hash"]) == ("task", wanted)
    done = piped("one", f"/select {file}", "two", f"/save {a}", options=("--policy", "turn"))
    assert any("/policy turn lets messages select again" in line for line in notes(done))
    assert (piped.saved("a.json")["policy"], piped.saved("a.json")["selection"]["hash"]) == ("task", wanted)


def test_named_tasks(piped: Piped) -> None:
    a = piped.folder / "a.json"
    assert notes(piped("/task")) == ["no tasks yet; `ifprune select --prompt TEXT --save NAME` saves one"]
    wanted = {
        name: piped.select(name, "--density", density, "--save", name)
        for name, density in (("maths", "0.5"), ("poetry", "0.25"))
    }
    done = piped("one", "/task", "/task maths", "two", f"/save {a}", "/task ../maths", "/task nope")
    assert "tasks: maths, poetry" in notes(done)
    said = f"uses task maths: {wanted['maths']}, activation, density 0.50; /policy first lets messages select again"
    assert said in notes(done)
    assert piped.saved("a.json")["selection"]["hash"] == wanted["maths"]
    bad, unknown = errors(done)
    assert "'../maths' cannot name a task" in bad
    assert "no task nope" in unknown
    assert "it has maths, poetry" in unknown
    # Who asks is told which it is.
    done = piped("/task maths", "/policy", "/stats", "/dense on", "/density")
    live = f"task maths: {wanted['maths']}, activation, density 0.50"
    assert f"policy task: a fixed selection, for all messages: {live}" in notes(done)
    assert f"selection   {live}" in [line.strip() for line in notes(done)]
    assert notes(done)[-2].endswith("parameters active, once /dense off")
    # From the beginning, and it stays, until another is asked for.
    done = piped("/density", "one", "/reset", "/density 0.9", "two", f"/save {a}", options=("--task", "poetry"))
    assert notes(done)[0].startswith("density 0.25, ")
    assert "the selection is fixed" in errors(done)[0]
    assert (piped.saved("a.json")["policy"], piped.saved("a.json")["selection"]["hash"]) == ("task", wanted["poetry"])
    piped("/task maths", "two", "three", f"/save {a}", options=("--task", "poetry"))
    assert (piped.saved("a.json")["policy"], piped.saved("a.json")["selection"]["hash"]) == ("task", wanted["maths"])
    for policy in ("turn", "auto"):
        done = piped("one", "/task maths", "two", f"/save {a}", options=("--policy", policy))
        assert any(f"/policy {policy} lets messages select again" in line for line in notes(done))
        state = piped.saved("a.json")
        assert (state["policy"], state["selection"]["hash"]) == ("task", wanted["maths"])
    # Also after `/reset`, until another policy is asked for, whether it was given at the start or in the chat.
    for given in ((), ("--task", "maths")):
        lines = ("/task maths", "one", "/reset", "two", f"/save {a}", "/policy turn", "three", "/reset", "four")
        done = piped(*lines, options=given)
        state = piped.saved("a.json")
        assert (state["policy"], state["selection"]["hash"]) == ("task", wanted["maths"])
        assert not errors(done)


def test_a_given_task_goes_before_what_was_saved(piped: Piped) -> None:
    a = piped.folder / "a.json"
    wanted = piped.select("maths", "--save", "maths")
    piped("one", f"/save {a}", options=("--policy", "turn"))
    done = piped("two", "three", f"/save {a}", options=("--load", str(a), "--task", "maths"))
    assert done.returncode == 0
    state = piped.saved("a.json")
    assert (state["policy"], state["selection"]["hash"]) == ("task", wanted)


@pytest.mark.parametrize("selector", ["static", "activation"])
@pytest.mark.parametrize("at_end", [False, True])
def test_stopping_while_the_prompt_is_read(tiny: tuple[Model, Any], selector: str, at_end: bool) -> None:
    session, other = (Session(*tiny, selector=selector, prefill_step_size=8) for _ in range(2))
    other.ask("a conversation before this one", max_tokens=4)

    def stop(done: int, total: int) -> None:
        if (done == total) == at_end:
            session.cancel()

    stopped = list(session.stream("hello", max_tokens=20, progress=stop))
    assert [response.finish_reason for response in stopped] == ["cancelled"]
    history = session.history
    assert history.kv[0].offset == len(history.tokens) == sum(span.tokens for span in history.spans)
    if not at_end:
        assert (session.messages, session.selection) == ([], None)
        assert session.ask("hello", max_tokens=8) == Session(*tiny, selector=selector).ask("hello", max_tokens=8)


@pytest.mark.parametrize(
    ("options", "code"),
    [(("-m", "0"), 1), (("--density", "0"), 1), (("--policy", "never"), 2), (("--selector", "learned"), 1)],
)
def test_bad_options(piped: Piped, options: tuple[str, ...], code: int) -> None:
    done = piped("hello", options=options)
    assert (done.returncode, done.stdout, len(notes(done))) == (code, "", 1)


def test_an_impossible_cache_is_one_line(piped: Piped) -> None:
    done = piped("hello", options=("--kv-bits", "4"))  # heads of 16 do not divide into groups of 64
    assert (done.returncode, done.stdout, len(errors(done))) == (1, "", 1)


@pytest.fixture(scope="module")
def roomy_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose context outlasts an answer that is stopped late."""
    return write_checkpoint(tmp_path_factory.mktemp("roomy") / "checkpoint", max_position_embeddings=1_000_000)


def test_signals_through_pipes(roomy_checkpoint: Path, tmp_path: Path) -> None:
    saved = tmp_path / "a.json"
    with start(["chat", "--model", roomy_checkpoint, *LONG], tmp_path) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        first = os.read(process.stdout.fileno(), 1)  # not through the buffer, which `communicate` passes by
        process.send_signal(signal.SIGINT)
        process.stdin.write(f"/save {saved}\n".encode())
        process.stdin.flush()
        wait_for(saved.exists)
        process.send_signal(signal.SIGINT)  # nothing is being answered now
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().endswith("interrupted\n")
    assert "] stopped\n" in err.decode()
    messages = json.loads(saved.read_text())["messages"]
    assert f"{messages[1]['content']}\n" == (first + out).decode()


def wait_for(happened: Any) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("word", ["exit", "Quit "])
def test_a_word_typed_alone_leaves_as_at_other_prompts(tiny_checkpoint: Path, tmp_path: Path, word: str) -> None:
    with Terminal(tiny_checkpoint, tmp_path / "cache", "-m", "4") as terminal:
        assert terminal.leave(f"{word}\r") == 0


def test_ctrl_c_stops_the_answer_and_not_the_chat(roomy_checkpoint: Path, tmp_path: Path) -> None:
    with Terminal(roomy_checkpoint, tmp_path / "cache", *LONG) as terminal:
        terminal.expect(b"/help for commands")
        terminal.stop_an_answer("hello")
        # The random model may say nothing that can be seen after an answer as long as a busy machine lets it become.
        terminal.expect(PROMPT)
        terminal.send("/reset\r")
        terminal.stop_an_answer("hello")
        terminal.expect(PROMPT)
        terminal.send("\x03")
        terminal.expect(b"Ctrl-D or /quit leaves the chat")
        terminal.expect(PROMPT)
        terminal.send("unwanted\x03")
        terminal.expect(PROMPT)
        terminal.send(f"/save {tmp_path / 'a.json'}\r")
        terminal.expect(b"saved 1 turn")
        assert terminal.leave() == 0
    messages = json.loads((tmp_path / "a.json").read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[0]["content"] == "hello"
    assert all(message["content"] for message in messages)


def test_line_editor(roomy_checkpoint: Path, tmp_path: Path) -> None:
    with Terminal(roomy_checkpoint, tmp_path / "cache", *LONG) as terminal:
        terminal.stop_an_answer("\x1b[200~first line\nsecond line\x1b[201~")
        terminal.stop_an_answer("a \\\rb\x1b\rc")
        terminal.stop_an_answer("\x1b[A" * 4)  # up the three lines of the message before, to the one before it
        terminal.expect(PROMPT)
        terminal.send(f"/sa\t{tmp_path / 'a.json'}\r")
        terminal.expect(b"saved 3 turns")
        assert terminal.leave() == 0
    users = [m["content"] for m in json.loads((tmp_path / "a.json").read_text())["messages"] if m["role"] == "user"]
    assert users == ["first line\nsecond line", "a \nb\nc", "first line\nsecond line"]
    assert "+second line" in (tmp_path / "cache" / "chat_history").read_text()


def test_a_broken_history_file_stops_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "chat_history").mkdir()
    with Terminal(tiny_checkpoint, tmp_path, "-m", "4") as terminal:
        terminal.expect(PROMPT)
        terminal.send("hello\r")
        terminal.expect(b"4 tokens")
        assert terminal.leave("/exit\r") == 0


def test_history_is_bounded_and_private(tmp_path: Path) -> None:
    file = tmp_path / "new" / "chat_history"
    history = _History(file)
    history.store_string("one\ntwo")
    assert file.stat().st_mode & 0o077 == 0
    assert list(_History(file).load_history_strings()) == ["one\ntwo"]
    with file.open("a") as out:
        out.writelines(f"\n# then\n+{'x' * 1000} {number}\n" for number in range(1000))
    shorter = list(_History(file).load_history_strings())
    assert file.stat().st_size < 1_000_000
    assert 300 < len(shorter) < 600
    assert shorter[0].endswith(" 999")
    assert all(line.startswith("xxx") for line in shorter)
