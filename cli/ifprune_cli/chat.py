"""`ifprune chat`: a conversation on a terminal, or line by line from a pipe.

`Session` does the answering; chat_commands.py has the /commands, chat_input.py reads lines. stdout carries the answers
and nothing else.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from .console import footer, note, one_line, progress, show, show_answer
from .loading import Runtime, open_runtime
from .logs import show_cause
from .options import (
    Budget,
    IgnoreTemplateOption,
    ModelOptions,
    PrefillStepOption,
    Sampling,
    Selecting,
    SelectionOptions,
    SystemPromptOption,
    TemplateVariablesOption,
    check_exclusive,
    selection_option,
)

if TYPE_CHECKING:
    from ifprune_mlx import Session, Stats
    from ifprune_mlx.thinking import Thinking

    from .chat_commands import Commands
    from .chat_input import LineEditor


@dataclass(frozen=True)
class _Sampling(Sampling):
    prefill_step_size: PrefillStepOption = 512  # Ctrl-C and the progress bar wait for a step's end


@dataclass(frozen=True)
class _Conversing:
    """How the conversation goes."""

    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", help="Generate at most this many tokens for each answer.")
    ] = 512
    system_prompt: SystemPromptOption = None
    ignore_chat_template: IgnoreTemplateOption = False
    chat_template_config: TemplateVariablesOption = None
    load: Annotated[Optional[Path], typer.Option("--load", metavar="FILE", help="Go on with a saved chat.")] = None
    policy: Annotated[
        Optional[Literal["first", "turn", "auto", "system"]],
        selection_option(
            "--policy",
            help="Select by the first message, anew at every turn, anew where the topic changes, or by the system"
            " prompt.  [default: first]",
        ),
    ] = None
    on_switch: Annotated[
        Optional[Literal["reprefill", "keep"]],
        selection_option(
            "--on-switch",
            help="After a switch, recompute the history (exact) or keep it (fast).  [default: reprefill]",
        ),
    ] = None


def chat(
    model: ModelOptions,
    choice: SelectionOptions,
    budget: Budget,
    selecting: Selecting,
    conversing: _Conversing,
    sampling: _Sampling,
) -> int:
    """Chat with a model that selects its neurons by what is said. In the chat, /help lists the commands."""
    from ifprune_mlx import ChatFileError, PromptError

    tokens, load = conversing.max_tokens, conversing.load
    if tokens == 0 or tokens < -1:
        raise PromptError(f"max tokens is {tokens}; give a number above 0, or -1 for no limit")
    if load is not None and not load.is_file():
        raise ChatFileError(f"{load}: no such saved chat")
    replace(choice, dense=False).check_exclusive(budget)  # /dense off goes back to the selection
    check_exclusive({"--selection": choice.selection, "--task": choice.task, "--policy": conversing.policy})
    template = {"--ignore-chat-template": conversing.ignore_chat_template}
    check_exclusive({**template, "--chat-template-config": conversing.chat_template_config})
    runtime = open_runtime(
        model,
        choice,
        budget,
        selecting,
        sampling,
        template=not conversing.ignore_chat_template,
        variables=conversing.chat_template_config,
    )
    from .chat_commands import Commands
    from .chat_input import LineEditor, piped

    session = _session(runtime, conversing)
    commands = Commands(session)
    if not sys.stdin.isatty():
        return _Conversation(session, commands, tokens).run(piped(sys.stdin.buffer))
    from ifprune_convert.embedded import cache_folder

    note(f"{runtime.name}\n{commands.describe()}\n/help for commands, Ctrl-D to leave")
    if load is not None:
        commands.show_turns(load)
    editor = LineEditor(commands.names, commands.with_file, cache_folder() / "chat_history")
    _Conversation(session, commands, tokens, editor).run(editor)
    return 0


def _session(runtime: Runtime, conversing: _Conversing) -> Session:
    """A new conversation, or the saved one, changed by the options that are given."""
    from ifprune_mlx import Session

    session = Session(
        runtime.model,
        runtime.tokenizer,
        policy=conversing.policy or "first",
        on_switch=conversing.on_switch or "reprefill",
        system_prompt=conversing.system_prompt,
        **runtime.arguments,
    )
    if conversing.load is None:
        return session
    given = session.selector
    session.load(conversing.load)
    if runtime.selector is not None and session.policy != "task":
        session.selector = given
    session.on_switch = conversing.on_switch or session.on_switch
    if any(value is not None for value in runtime.budget.values()):
        session.set_budget(**runtime.budget)
        session.dense = False
    if runtime.selection is not None:
        session.use(runtime.selection)
        session.policy = "task"
    if conversing.policy is not None and session.policy != "task":
        session.policy = conversing.policy
    session.system_prompt = conversing.system_prompt or session.system_prompt
    session.dense = runtime.dense or session.dense
    return session


class _Conversation:
    """The loop: takes messages, answers them or runs them as commands, and survives what goes wrong with one."""

    def __init__(self, session: Session, commands: Commands, max_tokens: int, editor: LineEditor | None = None) -> None:
        from ifprune_mlx.chat_template import thinking_in_chats

        self._session = session
        self._thinking = thinking_in_chats(session.tokenizer)
        self._commands = commands
        self._max_tokens = max_tokens
        self._editor = editor
        self._answering = False
        self._interrupts = 0

    def run(self, messages: Iterable[str]) -> int:
        """Take messages until they end or one says /quit; the exit code: 1 if anything went wrong on the way."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 still shows the rest of an answer
        from ifprune_mlx import IfpruneError

        failed = False
        before = signal.signal(signal.SIGINT, self._interrupted)
        try:
            for text in messages:
                try:
                    if not self._take(text):
                        break
                except (IfpruneError, RuntimeError, ValueError, MemoryError) as exc:
                    # MLX reports a lack of memory, and options that a cache cannot have, in the last three: the
                    # conversation is worth more than a traceback.
                    failed = True
                    show_cause(exc)
                    note(f"ifprune: error: {one_line(self._explained(exc))}")
        finally:
            signal.signal(signal.SIGINT, before)
        return int(failed)

    def _take(self, text: str) -> bool:
        """Answer one message or carry out one command; False if the chat is to end."""
        text.encode("utf-8")
        if text.startswith("/") and not text.startswith("//"):
            return self._commands.run(text)
        self._answer(text[1:] if text.startswith("/") else text)
        return True

    def _explained(self, exc: Exception) -> str:
        """One line on what went wrong with a message, and what to do."""
        from ifprune_mlx import IfpruneError, PromptError

        if isinstance(exc, UnicodeEncodeError):
            return "the message is not UTF-8 text; check the terminal's encoding"
        line = str(exc) or type(exc).__name__
        if isinstance(exc, PromptError) and self._session.messages:
            return f"{line} (/reset forgets the conversation)"
        return line if isinstance(exc, IfpruneError) else f"no answer ({line})"

    def _answer(self, text: str) -> None:
        """Stream one answer, then its figures."""
        said = False
        stats = None
        shown = _Shown(self._thinking)
        self._interrupts, self._answering = 0, True
        try:
            with progress("prefill", "tokens") as update:
                for response in self._session.stream(text, max_tokens=self._max_tokens, progress=update):
                    said = said or bool(response.text)
                    shown.write(response.text)
                    stats = response.stats
        finally:
            self._answering = False
            shown.finish()
            if said or stats is not None:
                show()
            if self._interrupts and self._editor is not None:
                self._editor.discard()
        if stats is not None:
            if stats.completion_tokens:
                note(f"{footer(stats)}{self._ending(stats)}", dim=True)
            else:
                note("[stopped before the answer began; the message is forgotten]", dim=True)

    def _ending(self, stats: Stats) -> str:
        """Why the answer ends where it does, if not of itself."""
        if stats.finish_reason == "cancelled":
            return " stopped"
        if stats.finish_reason != "length":
            return ""
        full = stats.completion_tokens != self._max_tokens
        return " cut off: the context is full (/reset)" if full else " cut off by --max-tokens"

    def _interrupted(self, signum: int, frame: FrameType | None) -> None:
        """Ctrl-C. It only asks to stop: an exception within a model call would leave the layers' caches out of step."""
        if not self._answering:
            if self._editor is None:
                raise KeyboardInterrupt
            return  # at the prompt the line editor takes it; a command is over in a moment
        self._interrupts += 1
        self._session.cancel()
        if self._interrupts == 2:
            note("\nstopping after the step in work; Ctrl-C again leaves the chat at once")
        if self._interrupts > 2:
            raise KeyboardInterrupt


class _Shown:
    """Writes an answer to stdout. Thoughts are dim on a terminal; elsewhere their marks tell them apart."""

    def __init__(self, thinking: Thinking | None) -> None:
        from ifprune_mlx.thinking import ThoughtFinder

        dims = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self._finder = ThoughtFinder(thinking) if thinking is not None and dims else None
        self._mark = f"{thinking.start}\n" if thinking is not None and thinking.begun and not dims else ""

    def write(self, text: str) -> None:
        """Write what is final of one more piece of text."""
        if text and self._mark:  # which stands in the prompt
            text, self._mark = self._mark + text, ""
        for thought, piece in [(False, text)] if self._finder is None else self._finder.feed(text):
            show_answer(piece, dim=thought)

    def finish(self) -> None:
        """Write the rest, after the last text."""
        if self._finder is not None:
            thought, rest = self._finder.finish()
            show_answer(rest, dim=thought)
