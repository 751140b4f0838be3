"""Runs the code blocks of one page, in order, in one process: commands and Python share its folder, Python its names.

Started by tests/test_code_blocks.py with the blocks as JSON; a line of JSON comes back for each that was run, the last
being the one that failed, if one did. A server that a page starts runs beside the blocks that follow, on a free port.
"""

from __future__ import annotations

import io
import json
import shlex
import sys
import traceback
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

from tests.cli.process import run_here, start

# Put after a command's own options, of which the last counts: enough to keep tiny models and short files quick.
QUICK = {
    "train": [
        *("--iters", "2", "--batch-size", "2", "--layers", "1", "--rank", "32", "--chats", "8", "--held-out", "0.4"),
        *("--eval-prompts", "0", "--max-seq-length", "64"),
    ],
    "adapt": ["--stages", "convert"],
    "evaluate": ["--limit", "3", "--max-length", "96", "--max-tokens", "8"],
    "doctor": ["--limit", "6"],
    "generate": ["--max-tokens", "8"],
    "chat": ["--max-tokens", "8"],
}
SHORT_CALIBRATION = ["--calibrate", "code.jsonl"]  # the shipped chats would take most of a minute
PRINTED_URL = "http://127.0.0.1:8080"
SAID = "Write a haiku.\nWrite SQL queries.\n/quit\n"


def commands(block: str) -> list[list[str]]:
    """The command lines of a shell block, without comments."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def serve(words: list[str], stack: ExitStack) -> str:
    """Start a server that ends with the page; what it prints when it listens."""
    server = stack.enter_context(start([*words, "--port", "0", "--json"], Path.cwd()))
    stack.callback(server.terminate)  # called before the process is waited for
    assert server.stdout is not None
    assert server.stderr is not None
    if line := server.stdout.readline().decode():
        return line
    raise AssertionError(server.stderr.read().decode())


def run_shell(block: str, stack: ExitStack) -> str:
    """What the commands of a block print, all of which are `ifprune`'s."""
    said = ""
    for program, *words in commands(block):
        assert program.rsplit("/", 1)[-1] == "ifprune", f"{program}: runs nowhere but on a reader's machine; say why"
        if words[0] == "serve":
            said += serve(words, stack)
            continue
        quick = SHORT_CALIBRATION if "--calibrate" in words else QUICK.get(words[0], [])
        done = run_here(*words, *quick, stdin=SAID.encode())
        said += done.stdout
        assert done.returncode == 0, f"ifprune {shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return said


def run_python(block: str, names: dict[str, Any]) -> str:
    """What a block prints."""
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile(block, "code block", "exec"), names)
    return out.getvalue()


def main() -> None:
    """Run what the first argument holds: [[language, text, line], ...]."""
    names: dict[str, Any] = {"__name__": "__main__"}
    url = PRINTED_URL
    with ExitStack() as stack:
        for language, text, line in json.loads(sys.argv[1]):
            said = wrong = ""
            try:
                if language == "python":
                    said = run_python(text.replace(PRINTED_URL, url), names)
                else:
                    said = run_shell(text, stack)
                    url = json.loads(said)["url"] if said.startswith('{"url"') else url
            except BaseException:  # reported to the test, whatever it is
                wrong = traceback.format_exc()
            print(json.dumps({"line": line, "said": said, "wrong": wrong}), flush=True)
            if wrong:
                return


if __name__ == "__main__":
    main()
