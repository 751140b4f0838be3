"""Reads the messages of `ifprune chat`: from a line editor on a terminal, or line by line from a pipe."""

from __future__ import annotations

import sys
import termios
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory
from prompt_toolkit.input.typeahead import clear_typeahead
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.key_binding.key_processor import KeyPressEvent
from prompt_toolkit.output import create_output
from prompt_toolkit.shortcuts import CompleteStyle

from ifprune_mlx.errors import PromptError

from .console import note, printable

_HISTORY_BYTES = 1_000_000
# What people type at other prompts to leave. In a pipe these are messages like any other.
_LEAVE = ("exit", "quit")


def piped(stream: BinaryIO) -> Iterator[str]:
    """Every line that is not blank, as one message, as soon as it arrives.

    Raises:
        PromptError: at a line that is not UTF-8.
    """
    for number, raw in enumerate(stream, 1):
        try:
            line = raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as exc:
            raise PromptError(
                f"stdin, line {number}, byte {exc.start + 1}: not UTF-8 text; convert it, for example with iconv"
            ) from exc
        if line.strip():
            yield line


@contextmanager
def keys_unseen() -> Iterator[None]:
    """Outside the line editor the terminal shows no keys: no `^C`, and nothing typed ahead, gets into an answer."""
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    quiet = before.copy()
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)


class LineEditor:
    """Iterates over what a person enters, until Ctrl-D, or `exit` or `quit` alone. Enter sends; a pasted text with
    several lines is one message.

    Args:
        commands: completed at the beginning of the line.
        with_file: those of them that take a file name, which is completed too.
        choices: what else may stand after a command.
        history: file of earlier lines; where it cannot be read or written, they are kept in memory.
    """

    def __init__(
        self, commands: Sequence[str], with_file: Sequence[str], choices: Callable[[str], Iterable[str]], history: Path
    ) -> None:
        output = create_output(always_prefer_tty=True)
        self._question: PromptSession[str] = PromptSession(output=output)
        self._prompt: PromptSession[str] = PromptSession(
            [("bold", "> ")],
            multiline=True,
            prompt_continuation=[("", "  ")],
            history=_History(history),
            key_bindings=_keys(),
            completer=_CommandCompleter(commands, with_file, choices),
            complete_while_typing=False,
            # A menu would reserve eight empty lines under the prompt.
            complete_style=CompleteStyle.READLINE_LIKE,
            enable_suspend=True,
            output=output,
        )

    def __iter__(self) -> Iterator[str]:
        while True:
            try:
                text = self._prompt.prompt()
            except KeyboardInterrupt:
                if not self._prompt.default_buffer.text:
                    note("Ctrl-D or /quit leaves the chat")
                continue
            except EOFError:
                return
            if text.strip().lower() in _LEAVE:
                return
            if text.strip():
                yield text.rstrip()

    def confirm(self, question: str) -> bool:
        """Ask something; only a yes is one."""
        try:
            return self._question.prompt(f"{printable(question)} [y/N] ").strip().lower() in ("y", "yes")
        except (KeyboardInterrupt, EOFError):
            return False

    def discard(self) -> None:
        """Forget what was typed during an answer; otherwise each line of it would be answered."""
        clear_typeahead(self._prompt.input)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_char == "" and buffer.document.char_before_cursor == "\\":
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _newline(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


class _CommandCompleter(Completer):
    """Completes /commands, and what may stand after them."""

    def __init__(
        self, commands: Sequence[str], with_file: Sequence[str], choices: Callable[[str], Iterable[str]]
    ) -> None:
        self._commands = commands
        self._with_file = with_file
        self._choices = choices
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        command, space, rest = text.partition(" ")
        if not text.startswith("/"):
            return
        if not space:
            yield from (Completion(f"{name} ", -len(text)) for name in self._commands if name.startswith(text))
            return
        rest = rest.lstrip()
        yield from (Completion(name, -len(rest)) for name in self._choices(command) if name.startswith(rest))
        if command in self._with_file:
            # A quote before a name stays; `_path` takes it away.
            yield from self._paths.get_completions(Document(rest.lstrip("'\"")), complete_event)


class _History(FileHistory):
    """prompt_toolkit's history file: private and of bounded size. Where it cannot be used, the chat goes on without."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            if path.stat().st_size > _HISTORY_BYTES:
                recent = path.read_bytes()[-_HISTORY_BYTES // 2 :]
                # Every entry begins with a comment line; lines of messages begin with a plus.
                path.write_bytes(recent[max(recent.find(b"\n# "), 0) :])

    def load_history_strings(self) -> Iterable[str]:
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        with suppress(OSError, UnicodeEncodeError):
            super().store_string(string)
