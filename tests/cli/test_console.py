"""What reaches the terminal: no control characters from files or models, and no line without an end."""

from __future__ import annotations

import io
import json
import os
import pty
import sys
from pathlib import Path
from unittest.mock import patch
from xml.dom.minidom import parseString

import pytest

from ifprune_cli import console
from ifprune_mlx import Checkpoint, Selection
from ifprune_mlx.checkpoint.format_writer import write_manifest
from ifprune_mlx.errors import DataError
from ifprune_mlx.eval.analysis import Quality
from ifprune_mlx.eval.plots import bar_chart, check_plot, write_figure
from tests.cli.bad_input.table import edit_json
from tests.cli.process import ROOT, run, run_here
from tests.tiny import write_checkpoint

HOSTILE = "a\x1b[31mb\x1b]0;title\x07c\x9b31md\x7fe\rf\u202eg\u2028h\ud800i\0j"
SHOWN = "a\\x1b[31mb\\x1b]0;title\\x07c\\x9b31md\\x7fe\\rf\\u202eg\\u2028h\\ud800i\\x00j"


def controls(text: str) -> list[str]:
    """What of a text a terminal would obey, or no encoding holds."""
    return [char for char in text if char in HOSTILE and not (char.isprintable() or char in "\n\t")]


def test_control_characters_become_escapes() -> None:
    assert console.printable(HOSTILE) == SHOWN
    assert console.printable("plain é 東京 \U0001f600\n\ttext") == "plain é 東京 \U0001f600\n\ttext"


def test_notes_results_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    console.note(HOSTILE)
    console.show(HOSTILE)
    console.result_json({"value": HOSTILE})
    out, err = capsys.readouterr()
    assert err == SHOWN + "\n"
    first, second = out.splitlines()
    assert first == SHOWN
    assert not controls(second)
    assert json.loads(second) == {"value": HOSTILE}


def test_json_for_a_terminal_that_is_not_utf8() -> None:
    written = io.BytesIO()
    with patch("sys.stdout", io.TextIOWrapper(written, encoding="ascii")):
        console.result_json({"value": "é東"})
        sys.stdout.flush()
        assert json.loads(written.getvalue()) == {"value": "é東"}


def test_long_lines_lose_their_middle() -> None:
    line = console.one_line("begin " + "x" * 10_000 + "\n end")
    assert len(line) <= 650
    assert line.startswith("begin xxx")
    assert line.endswith("xxx end")
    assert " ... " in line


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A checkpoint whose files hold control characters wherever people are shown what they hold."""
    folder = write_checkpoint(tmp_path / "checkpoint")
    edit_json(folder / "config.json", lambda config: config.update(comment=HOSTILE))
    write_manifest(folder, source=HOSTILE, licence=HOSTILE + "\nverified    yes")
    return folder


def test_info_of_a_hostile_checkpoint(hostile: Path) -> None:
    for options in ((), ("--json",), ("--verify",)):
        done = run_here("info", "--model", hostile, *options)
        assert done.returncode == 0, done.stderr
        assert not controls(done.stdout + done.stderr)
    lines = run_here("info", "--model", hostile).stdout.splitlines()
    assert not any(line.startswith("verified") for line in lines)  # a value has one line
    assert any("made from" in line and "a\\x1b[31mb" in line for line in lines)


def test_what_a_selection_file_says_of_itself(hostile: Path, tmp_path: Path) -> None:
    import numpy as np

    file = tmp_path / "s.safetensors"
    ids = tuple(np.arange(64, dtype=np.int32) for _ in range(2))
    Selection(ids, Checkpoint.open(hostile).widths, "\x1b[31m\x9b5m").save(file)
    given = ("generate", "--model", hostile, "--prompt", "hi", "--selection", file)
    done = run_here(*given, "--max-tokens", "2")
    assert done.returncode == 0, done.stderr
    assert "[\\x1b[31m\\x9b5m " in done.stderr
    assert not controls(done.stderr)
    done = run_here("chat", "--model", hostile, "--selection", file, "-m", "2", stdin=b"hi\n/stats\n")
    assert "\\x1b[31m" in done.stderr
    assert not controls(done.stderr)


@pytest.mark.parametrize(
    "arguments",
    [
        ("info", "--model", HOSTILE.replace("\0", "")),
        ("generate", "--model", "x", "--prompt", "hi", "--selection", "s\x1b[2J.safetensors"),
        ("generate", "--prompt", "hi", "--task", "a\x1b[31m"),
        ("info", "--\x1b[31m"),
        ("\x9b31m",),
        ("evaluate", "--data", "a=\x1b[31m"),
        ("train", "--config", "\x1b[31m.yaml"),
        ("info", "--model", "x" * 9000),
        ("info", "--model", "x/" * 3000),
        ("generate", "--prompt", "hi", "--task", "a/" * 5000),
        ("x" * 9000,),
        ("evaluate", "--data", "x" * 9000),
        ("train", "--output", "o", "--data", "a=b", "--densities", "9," * 5000),
    ],
)
def test_error_lines_are_printable_and_bounded(arguments: tuple[str, ...]) -> None:
    done = run_here(*arguments)
    assert done.returncode in (1, 2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("ifprune: ")
    assert len(line) < 700
    assert not controls(line)


@pytest.mark.parametrize(
    "arguments",
    [
        [b"info", b"--model", b"caf\xe9"],
        [b"convert", b"--model", b"caf\xe9.gguf"],
        [b"caf\xe9"],
        [b"train", b"--config", b"caf\xe9.yaml"],
        [b"generate", b"--prompt", b"hi", b"--selection", b"caf\xe9"],
    ],
)
def test_names_that_are_not_utf8(arguments: list[bytes], tmp_path: Path) -> None:
    done = run(*arguments, cache=tmp_path)
    assert done.returncode in (1, 2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("ifprune: ")
    assert "caf\\udce9" in line


def test_an_answer_on_a_terminal_holds_no_controls() -> None:
    master, slave = pty.openpty()
    with os.fdopen(slave, "w", encoding="utf-8") as terminal, patch("sys.stdout", terminal):
        console.show_answer("a\x1b[31mb\x9b5mc\r\x07\n")
    read = os.read(master, 1000)
    os.close(master)
    assert read == b"a[31mb5mc\r\n"  # the terminal itself adds the return


def test_an_answer_in_a_pipe_is_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_answer("a\x1b[31m")
    assert capsys.readouterr().out == "a\x1b[31m"


def test_nothing_else_in_the_command_line_prints() -> None:
    for file in sorted((ROOT / "cli").rglob("*.py")):
        if file.name not in ("console.py", "main.py"):
            text = file.read_text()
            assert " print(" not in text, file
            assert "stdout.write" not in text, file


@pytest.mark.parametrize("kind", ["fifo", "folder", "/dev/null"])
def test_nothing_is_written_over_what_is_no_file(tmp_path: Path, kind: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    made = {}
    for name in ("a.png", "a.safetensors", "a.json"):
        file = tmp_path / name
        if kind == "fifo":
            os.mkfifo(file)
        elif kind == "folder":
            file.mkdir()
        else:
            file.symlink_to(kind)
        made[name] = file
    for options in (("--plot", made["a.png"]), ("--save-to", made["a.safetensors"])):
        done = run_here("select", "--model", checkpoint, "--prompt", "hi", *options)
        assert done.returncode == 1
        assert str(options[1]) in done.stderr
    done = run_here("evaluate", "--model", checkpoint, "--data", "a=b", "--json", made["a.json"])
    assert done.returncode == 1
    assert f"--json {made['a.json']}: cannot be written" in done.stderr
    with pytest.raises(Exception, match="cannot be written"):
        check_plot(made["a.png"], "--plot")


@pytest.mark.parametrize(
    ("module", "raised"),
    [
        ("typer", "KeyboardInterrupt"),
        ("ifprune_cli.chat", "ImportError('stopped')"),
        ("numpy", "ImportError('numpy.core.multiarray failed to import')"),
        ("mlx_lm", "KeyboardInterrupt"),
    ],
)
def test_ctrl_c_while_modules_load(tmp_path: Path, module: str, raised: str) -> None:
    """One line, 130 and no traceback, whichever module is loading, and however it takes the interruption."""
    prelude = (
        "import os, sys; exec('''\nclass Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        "            sys.meta_path.remove(self)\n"
        "            try:\n"
        "                os.kill(os.getpid(), signal.SIGINT)\n"
        "                import time; time.sleep(5)\n"
        "            except KeyboardInterrupt:\n"
        f"                raise {raised}\n"
        "sys.meta_path.insert(0, Finder())\n''')"
    )
    done = run("generate", "--model", "none", "--prompt", "hi", cache=tmp_path, prelude=prelude)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_charts_hold_no_control_characters(tmp_path: Path) -> None:
    """Names come from options, from a file of an evaluation, and from the model's folder."""
    for name in ("\x1b[31m", "a\x9bb", "a\udcffb"):
        done = run_here("atlas", "--data", f"{name}=x.jsonl", "--out", tmp_path / "out")
        assert done.returncode == 1
        assert "expected NAME=FILE" in done.stderr
        assert not controls(done.stderr)
        rows = [{"selector": each, "domain": name, "nll": 1.0} for each in ("dense", "static")]
        with pytest.raises(DataError, match="not what `ifprune evaluate"):
            Quality.of({"total_parameters": 9, "curve": [{"active_parameters": 5, "rows": rows}]}, "file")
        figure = bar_chart(f"model {name}", "x", {"a": {"b": 1.0}})
        for suffix in (".svg", ".png"):
            write_figure(figure, tmp_path / f"chart{suffix}")
        parseString((tmp_path / "chart.svg").read_bytes())


@pytest.mark.parametrize(
    "arguments",
    [
        [b"select", b"--prompt", b"hi", b"--save-to", b"caf\xe9.safetensors"],
        [b"select", b"--prompt", b"hi", b"--system-prompt", b"caf\xe9"],
        [b"export", b"--selector", b"static", b"--prompt", b"hi", b"--mlx-path", b"caf\xe9"],
        [b"generate", b"--prompt", b"hi", b"--system-prompt", b"caf\xe9"],
        [b"chat", b"--system-prompt", b"caf\xe9"],
        [b"evaluate", b"--data", b"a=x", b"--json", b"caf\xe9.json"],
    ],
)
def test_names_and_texts_that_are_not_utf8_where_they_are_used(tiny_checkpoint: Path, arguments: list[bytes]) -> None:
    texts = [os.fsdecode(part) for part in arguments]
    done = run_here(*texts, "--model", tiny_checkpoint)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "not UTF-8 text" in line
