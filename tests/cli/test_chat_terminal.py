"""`ifprune chat` as a person sees it, on a pseudo-terminal: waiting, wrapping, stopping, loops, topics, commands."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from wcwidth import wcswidth

from ifprune_cli.chat_topics import change
from ifprune_cli.repetition import LoopFinder, below_own_density, penalizing
from ifprune_mlx import Model, Session, TaskStore
from tests.cli.process import run_here
from tests.cli.terminal import ANSWER, PROMPT, PROMPT_LEFT, Terminal
from tests.ifprune_mlx.generating import A, B
from tests.ifprune_mlx.reference import random_selection
from tests.tiny import write_checkpoint

# In the chat's process, a logits processor makes the model say what a file holds.
SCRIPTED = (
    "import os, pathlib; from mlx_lm import sample_utils as s; "
    "from tests.ifprune_mlx.serving.http.script_tokens import _Script; made = s.make_logits_processors; "
    "s.make_logits_processors = lambda **given: [*made(**given), _Script(pathlib.Path(os.environ['SCRIPT']))]"
)
WORDS = "Words wrap at word borders, also internationalization, 中文字符, 日本語 and 👍 emoji 🎉 between them."


class Scripted(Terminal):
    """A chat with a model that says what it is told to."""

    def __init__(self, checkpoint: Path, folder: Path, text: str, *options: str, columns: int = 80) -> None:
        script = folder / "script.json"
        # Every byte is a token.
        tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())["model"]["vocab"]
        script.write_text(json.dumps([tokenizer[char] for char in _letters(text)] + [tokenizer["<|im_end|>"]]))
        environment = {"SCRIPT": str(script)}
        super().__init__(checkpoint, folder / "cache", *options, columns=columns, prelude=SCRIPTED, env=environment)


def _letters(text: str) -> str:
    """A text's bytes as GPT-2's byte-level tokenizers write them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return "".join(chr(byte) if byte in plain else chr(256 + others.index(byte)) for byte in text.encode())


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_answers_wrap_between_words(tiny_checkpoint: Path, tmp_path: Path, columns: int) -> None:
    text = f"{WORDS} " * 3 + "\n\n**Bold** and `code`."
    with Scripted(tiny_checkpoint, tmp_path, text, "-m", "-1", "--dense", columns=columns) as terminal:
        terminal.expect(PROMPT)
        terminal.send("hello\r")
        terminal.expect(rb"tokens at")
        assert terminal.leave() == 0
        begin = terminal.lines.index("> hello") + 1
        end = next(n for n, line in enumerate(terminal.lines) if line.startswith("[dense"))
        answer = terminal.lines[begin:end]
    assert " ".join(answer).split() == [*WORDS.split() * 3, "Bold", "and", "code."]
    assert all(wcswidth(line) < columns for line in answer)
    assert "loading" not in "\n".join(terminal.lines)
    assert "reading" not in "\n".join(terminal.lines)


def test_something_moves_from_the_first_moment(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with Terminal(tiny_checkpoint, tmp_path / "cache", "-m", "4") as terminal:
        terminal.expect("⠙ loading".encode())
        terminal.expect("⠹ loading".encode())
        terminal.expect(PROMPT)
        assert terminal.lines[0].startswith("checkpoint")
        terminal.send("hello\r")
        terminal.expect(PROMPT_LEFT + rb".*?reading\x1b\[K" + ANSWER)
        assert terminal.leave() == 0


@pytest.fixture(scope="module")
def slow_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes seconds to read 512 tokens, wherever it runs: in bfloat16, which has no fast BLAS."""
    changes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "max_position_embeddings": 65536}
    return write_checkpoint(tmp_path_factory.mktemp("slow") / "checkpoint", **changes)


@pytest.mark.parametrize("selector", ["static", "activation"])
def test_ctrl_c_stops_reading_within_a_second(slow_checkpoint: Path, tmp_path: Path, selector: str) -> None:
    options = ("--selector", selector, "--dtype", "bfloat16")
    with Terminal(slow_checkpoint, tmp_path / "cache", *options) as terminal:
        terminal.expect(PROMPT)
        terminal.send(f"\x1b[200~{'many words ' * 1500}\x1b[201~\r")
        terminal.expect(PROMPT_LEFT + rb".*?reading \[")  # it knows already how fast it reads
        begun = time.monotonic()
        terminal.send("\x03")
        terminal.expect(b"stopped before the answer began")
        terminal.expect(PROMPT)
        assert time.monotonic() - begun < 1
        assert not any("^C" in line for line in terminal.lines)
        terminal.send("\r")
        assert terminal.leave() == 0


def test_keys_typed_during_an_answer_do_not_get_into_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = "an answer " + " ".join(f"of {number} words" for number in range(16))
    with Scripted(tiny_checkpoint, tmp_path, text, "-m", "-1", "--dense") as terminal:
        terminal.expect(PROMPT)
        terminal.send("hello\r")
        terminal.expect(rb"an ans")
        terminal.send("typed ahead")
        terminal.expect(rb"tokens at")
        terminal.expect(PROMPT + b".*typed ahead")
        assert " ".join(terminal.lines).count("typed ahead") == 1
        terminal.send("\x03")
        terminal.expect(PROMPT)
        terminal.send("hello\r")
        terminal.expect(PROMPT_LEFT + ANSWER + rb"an ans")
        terminal.send("\x03")
        terminal.expect(rb"\] stopped")
        assert "^C" not in "\n".join(terminal.lines)
        assert terminal.leave() == 0


def test_a_loop_is_ended_with_a_line(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = "It says this once. " + "And this again and again. " * 15
    with Scripted(tiny_checkpoint, tmp_path, text, "-m", "-1", "--dense") as terminal:
        terminal.expect(PROMPT)
        terminal.send("hello\r")
        terminal.expect(rb"ended: the answer was repeating itself")
        assert "stopped" not in "\n".join(terminal.lines)
        assert 4 <= "\n".join(terminal.lines).count("And this") <= 6
        assert terminal.leave() == 0
    with Scripted(tiny_checkpoint, tmp_path, text, "-m", "-1", "--dense", "--repetition-penalty", "1") as terminal:
        terminal.expect(PROMPT)
        terminal.send("hello\r")
        terminal.expect(rb"tokens at")
        assert " ".join(terminal.lines).count("And this") == 15
        assert terminal.leave() == 0


def test_what_is_a_loop() -> None:
    def looped(tokens: list[int]) -> int | None:
        finder = LoopFinder()
        return next((at for at, token in enumerate(tokens) if finder.feed(token)), None)

    assert looped(list(range(1000))) is None
    assert looped([*range(50), *[7] * 200]) == 50 + 95
    assert looped([*range(50), *list(range(100, 130)) * 10]) == 50 + 4 * 30 - 1
    assert looped([*range(50), *list(range(100, 228)) * 4]) == 50 + 4 * 128 - 1
    assert looped([*range(50), *list(range(100, 229)) * 9]) is None  # too long a run
    # A table's rule; a table of alike rows; a list whose items begin alike.
    assert looped([5] * 80) is None
    assert looped([token for row in range(40) for token in (1, row + 10, 1, row + 10, 2)]) is None
    assert looped([token for row in range(90) for token in (1, 2, 3, row + 10, 4)]) is None


def test_a_change_of_topic_is_told(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for name, prompt in (("code", "write code"), ("recipe", "bake a cake")):
        options = ("--selector", "random", "--density", "0.5", "--prompt", prompt, "--save", name)
        data = {"IFPRUNE_DATA": str(tmp_path / "cache" / "data")}
        assert run_here("select", "--model", tiny_checkpoint, *options, env=data).returncode == 0
    options = ("-m", "4", "--selector", "random", "--density", "0.5", "--repetition-penalty", "1")
    with Terminal(tiny_checkpoint, tmp_path / "cache", *options) as terminal:
        terminal.expect(PROMPT)
        terminal.send("write code\r")
        terminal.expect(rb"tokens at")
        terminal.expect(PROMPT)
        assert "switched" not in "\n".join(terminal.lines)
        terminal.send("bake a cake\r")
        terminal.expect(rb"another topic: its own selection would be \d+ % new \(code -> recipe\); /policy auto")
        terminal.expect(PROMPT)
        terminal.send("bake a cake\r")  # told once
        terminal.expect(rb"tokens at")
        terminal.expect(PROMPT)
        assert "\n".join(terminal.lines).count("another topic") == 1
        terminal.send("/policy auto\r")
        terminal.expect(b"policy auto: a message selects anew where the topic changes")
        terminal.expect(PROMPT)
        terminal.send("bake a cake\r")
        terminal.expect(rb"switched: \d+ % new \(code -> recipe\)\]")
        terminal.expect(PROMPT)
        terminal.send("a third one\r")
        terminal.expect(rb"switched: \d+ % new \(recipe -> other\)\]")
        assert terminal.leave() == 0


def test_two_selections_in_words(tiny: tuple[Model, Any]) -> None:
    store, other = TaskStore(tiny[0].checkpoint), random_selection(A.widths, A.keep, seed=5)
    assert change(store, A, other) == f"{100 * (1 - other.overlap(A)):.0f} % new"
    store.save("a", A)
    assert change(store, A, other).endswith(" % new (a -> other)")
    assert change(store, A, A) == "0 % new"
    store.save("b", other).write_bytes(b"damaged")
    assert change(store, other, A).endswith(" % new (other -> a)")
    assert change(store, A, B).endswith(f" % new, density {A.density:.2f} -> {B.density:.2f}")


def test_commands_for_files_policies_and_models(tiny_checkpoint: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", "qwen2")
    file = tmp_path / "a chat.json"
    with Terminal(tiny_checkpoint, tmp_path / "cache", "-m", "4") as terminal:
        terminal.expect(PROMPT)
        terminal.send("hello\r")
        terminal.expect(rb"tokens at")
        for keys, answer in (
            (f"/save {file}\r", b"saved 1 turn"),
            ("/reset\r", b"forgot"),
            (f"/save {file}\rn\r", rb"exists; overwrite it\? \[y/N\] .*not saved"),
            (f"/save {file}\r\x03", rb"exists; overwrite it.*not saved"),
            (f"/load {tmp_path}/a\t\r", b"loaded 1 turn"),
            (f"/load '{tmp_path}/a\t\r", b"loaded 1 turn"),
            (f"/save {file}\ry\r", rb"exists; overwrite it.*saved 1 turn"),
            ("/policy\r", b"policy first: the first message selects"),
            ("/policy tu\t\r", b"policy turn: every message selects"),
            ("/policy never\r", b"unknown policy never; choose first, turn"),
            ("/model\r", b"checkpoint, 0.1M parameters.*at hand: SmolLM2-135M-Instruct"),
            (f"/model {tmp_path}/nowhere\r", b"no such folder"),
            (f"/model {tmp_path}/oth\t\r", b"other\r\n.*selector, density.*it reads the conversation so far .1 turn."),
            ("go on\r", rb"tokens at"),
            (f"/save {tmp_path}/b.json\r", b"saved 2 turns"),
            (f"/model {tmp_path}/other/predictor\r", b"ifprune: error"),
        ):
            terminal.expect(PROMPT)
            terminal.send(keys)
            terminal.expect(answer)
        assert terminal.leave() == 0
    saved = json.loads((tmp_path / "b.json").read_text())
    assert saved["checkpoint"] != json.loads(file.read_text())["checkpoint"]
    assert [message["content"] for message in saved["messages"][::2]] == ["hello", "go on"]
    assert other.is_dir()


def test_a_model_that_cannot_be_loaded_leaves_the_one_in_use(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """What only loading finds out, when the model in use has made room already."""
    broken = write_checkpoint(tmp_path / "broken")
    tokenizer = broken / "tokenizer.json"
    tokenizer.write_text("{" + " " * (tokenizer.stat().st_size - 2) + "}")
    given = f"one\n/model {broken}\ntwo\n/save {tmp_path / 'a.json'}\n".encode()
    done = run_here("chat", "--model", tiny_checkpoint, "-m", "4", stdin=given)
    assert done.returncode == 1
    assert done.stderr.count("ifprune: error: ") == 1
    assert len(json.loads((tmp_path / "a.json").read_text())["messages"]) == 4


def test_the_penalty_is_mlx_lms(tiny: tuple[Model, Any]) -> None:
    from mlx_lm.sample_utils import make_logits_processors

    plain, ours = Session(*tiny), Session(*tiny)
    once = plain.ask("hello", max_tokens=40)
    ours.options["logits_processors"] = penalizing(1.0)
    assert ours.ask("hello", max_tokens=40) == once
    ours.reset()
    ours.options["logits_processors"] = penalizing(1.5)
    processors = make_logits_processors(repetition_penalty=1.5, repetition_context_size=64)
    wanted = Session(*tiny, logits_processors=processors).ask("hello", max_tokens=40)
    assert ours.ask("hello", max_tokens=40) == wanted != once


def test_where_the_penalty_is_on_by_itself(tiny: tuple[Model, Any]) -> None:
    assert not below_own_density(Session(*tiny))
    assert not below_own_density(Session(*tiny, dense=True, density=0.25))
    thin = Session(*tiny, density=0.25)
    assert below_own_density(thin)
    thin.use(Session(*tiny).selection or A)
    assert below_own_density(thin)
    thin.policy = "auto"
    thin.set_budget(density=1.0)
    assert not below_own_density(thin)


def test_the_penalty_is_said_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    said = (
        "below the model's own density, 0.90: repetition penalty 1.1; --repetition-penalty 1 at the start turns it off"
    )
    with Terminal(tiny_checkpoint, tmp_path / "cache", "-m", "4") as terminal:
        for keys in ("hello\r", "/density 0.25\r", "hello\r", "hello\r"):
            terminal.expect(PROMPT)
            terminal.send(keys)
        assert terminal.leave() == 0
        assert "\n".join(terminal.lines).count(said) == 1


def test_a_pipe_gets_what_the_model_says(tiny_checkpoint: Path, tiny: tuple[Model, Any]) -> None:
    """No penalty that was not asked for, no end of loops, no Markdown."""
    done = run_here("chat", "--model", tiny_checkpoint, "-m", "300", "--density", "0.25", stdin=b"hello")
    assert done.stdout == Session(*tiny, density=0.25).ask("hello", max_tokens=300) + "\n"
    assert "penalty" not in done.stderr
    done = run_here("chat", "--model", tiny_checkpoint, "-m", "40", "--repetition-penalty", "1.5", stdin=b"hello")
    asked = Session(*tiny, logits_processors=penalizing(1.5))
    assert done.stdout == asked.ask("hello", max_tokens=40) + "\n"


@pytest.mark.parametrize("given", ["0", "-1", "1e-300", "101", "nan", "inf"])
def test_penalties_that_are_none(tiny_checkpoint: Path, given: str) -> None:
    done = run_here("chat", "--model", tiny_checkpoint, "--repetition-penalty", given, stdin=b"hello")
    assert (done.returncode, done.stdout) == (1, "")
    assert "give a number from 0.01 to 100" in done.stderr
