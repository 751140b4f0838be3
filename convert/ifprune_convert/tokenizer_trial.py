"""Tries a stranger's tokenizer.json in a process of its own, which may hang, crash or run out of memory.

A tokenizer holds regular expressions and replacements, and a few characters of them can take for ever or fill the
memory. The child is this file, run as a script: it imports `tokenizers` alone, which takes a tenth of a second.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

_SECONDS = 10
_MEMORY = 3 << 30  # far above a tokenizer of 260,000 tokens, which takes 0.3 GB
_FULL, _FAILED = 41, 42
_RUN = 512


def try_tokenizer(folder: Path) -> str | None:
    """Load the tokenizer.json of a folder and let it read and write texts of many kinds.

    Returns:
        What is wrong with it; None if nothing is, or there is no such file.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    command = [sys.executable, "-I", __file__, str(file)]
    try:
        done = subprocess.run(command, check=False, capture_output=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f"it takes more than {_SECONDS} s for a short text"
    if done.returncode == _FULL:
        return f"it takes more than {_MEMORY >> 30} GB of memory for a short text"
    if done.returncode == _FAILED:
        return done.stdout.decode(errors="replace") or "it fails"
    return None if done.returncode == 0 else "it crashes"


def _texts(settings: Any) -> Iterator[str]:
    """Texts that make a tokenizer's rules work: runs of every kind of character, and what its rules look for."""
    yield "Hello, world! It's 12,345.67 \u00e9t\u00e9 \u6771\u4eac \U0001f680\n\n\tdef f(x):\n        return x\n"
    for number in (*range(9, 14), *range(32, 127), 0, 0xA0, 0xE9, 0x301, 0x200D, 0x2581, 0x4E00, 0xFDFA, 0x1F600):
        yield chr(number) * _RUN + "!\u00e9"
    for pattern in _patterns(settings):
        yield pattern * 8
        yield "".join(letter * 64 for letter in dict.fromkeys(pattern[:64])) + "\0"


def _patterns(value: Any) -> Iterator[str]:
    """The texts and regular expressions that a tokenizer's normalizer and the like look for."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            left += [part for name, part in one.items() if name not in ("model", "added_tokens")]
            pattern = one.get("pattern")
            yield from (
                (text for text in (pattern or {}).values() if isinstance(text, str))
                if isinstance(pattern, dict)
                else ()
            )
        elif isinstance(one, list):
            left += one


def _watch() -> None:
    """End the process when it takes too much memory: macOS's kernel would not, whatever the limit."""
    while True:
        if _memory() > _MEMORY:
            os._exit(_FULL)
        time.sleep(0.02)


def _memory() -> int:
    """Bytes of memory of this process, now or at most so far."""
    try:
        # Linux hands the most that the parent had down to `ru_maxrss`.
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _main(file: Path) -> int:
    with suppress(AttributeError, ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY + (1 << 30),) * 2)
    threading.Thread(target=_watch, daemon=True).start()
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
        for text in _texts(json.loads(file.read_bytes())):
            # Of a batch of one: only batches let the thread run that watches.
            (encoding,) = tokenizer.encode_batch([text])
            tokenizer.decode_batch([encoding.ids], skip_special_tokens=False)
    except BaseException as exc:  # Rust's panics are no Exceptions
        print(" ".join(str(exc).split())[:200], end="", flush=True)
        return _FAILED
    return 0


if __name__ == "__main__":
    os._exit(_main(Path(sys.argv[1])))
