"""`ifprune chat`: a conversation on a terminal, or line by line from a pipe.

`Session` does the answering; chat_commands.py has the /commands, chat_input.py reads lines. stdout carries the answers
and nothing else.
"""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from .console import footer, note, one_line, progress, show
from .loading import Runtime, model_path, open_runtime
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
    repetition_penalty_option,
    selection_option,
)
from .ranks import join, leads, leave

if TYPE_CHECKING:
    from ifprune_mlx import Selection, Session, Stats
    from ifprune_mlx.parallel.ranks import Ranks

    from .chat_commands import Commands
    from .chat_input import LineEditor


_STEP_SECONDS = 0.3  # while a prompt is read, Ctrl-C waits for a step's end; the first may take longer than this


@dataclass(frozen=True)
class _Sampling(Sampling):
    prefill_step_size: PrefillStepOption = 512
    repetition_penalty: Annotated[
        Optional[float],
        repetition_penalty_option("1; on a terminal 1.1, where the density is below the checkpoint's own"),
    ] = None


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
            " prompt.  [default: auto with a predictor, else first]",
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
    joined = join()
    typed = sys.stdin.isatty() and leads()
    with ExitStack() as stack:
        waiting = stack.enter_context(ExitStack())
        waiting.enter_context(progress("loading", ""))
        from .chat_input import LineEditor, keys_unseen, piped

        if typed:
            stack.enter_context(keys_unseen())
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

        def opened(name: str | None, choice: SelectionOptions) -> Runtime:
            return open_runtime(
                replace(model, model=name),
                choice,
                budget,
                selecting,
                sampling,
                template=not conversing.ignore_chat_template,
                variables=conversing.chat_template_config,
            )

        from .chat_commands import Commands

        runtime = opened(model.model, choice)
        models = _Models(model, replace(choice, selection=None, task=None), opened)
        commands = Commands(_session(runtime, conversing), runtime.name, models.change)
        penalty = sampling.repetition_penalty
        if not typed:
            waiting.close()
            return _Conversation(commands, tokens, penalty).run(_heard(joined, piped(sys.stdin.buffer)))
        from ifprune_convert.embedded import cache_folder

        from .chat_answer import AnswerWriter

        AnswerWriter.prepare()
        waiting.close()
        note(f"{runtime.name}\n{commands.describe()}\n/help for commands, Ctrl-D to leave")
        if load is not None:
            commands.show_turns(load)
        editor = LineEditor(commands.names, commands.with_file, commands.choices, cache_folder() / "chat_history")
        commands.confirm = None if joined is not None else editor.confirm  # no other rank could ask
        _Conversation(commands, tokens, penalty, editor).run(_heard(joined, editor))
    return 0


def _heard(joined: Ranks | None, messages: Iterable[str]) -> Iterator[str]:
    """The messages of rank 0, on every rank."""
    if joined is None:
        yield from messages
        return
    given = iter(messages) if joined.leads else None
    while (text := joined.share(None if given is None else next(given, None))) is not None:
        yield text


class _Models:
    """Takes a conversation from one model to another.

    Args:
        model: the options of the first one.
        choice: what selects, on every model.
        opened: loads a model by its name, None for the embedded one.
    """

    def __init__(
        self, model: ModelOptions, choice: SelectionOptions, opened: Callable[[str | None, SelectionOptions], Runtime]
    ) -> None:
        self._model = model
        self._choice = choice
        self._opened = opened

    def change(self, session: Session, name: str | None) -> str:
        """Go on with the model of this name; returns what people call it.

        Raises:
            IfpruneError: if it cannot be used. The conversation then stays on its model.
        """
        from ifprune_mlx import Checkpoint

        with progress("loading", ""):
            Checkpoint.open(model_path(replace(self._model, model=name), None))
            with ExitStack() as undoing:
                undoing.callback(self._go_back, session, session.keep, session.selection, session.policy)
                session.model.close()  # the two may not fit into memory together
                runtime = self._opened(name, self._choice)
                undoing.callback(runtime.model.close)
                session.move_to(runtime.model, runtime.tokenizer, selector=runtime.selector, **runtime.budget)
                undoing.pop_all()
            self._model = replace(self._model, model=name)
        return runtime.name

    def _go_back(self, session: Session, keep: tuple[int, ...], selection: Selection | None, policy: str) -> None:
        """Load the model in use again; what was chosen on it stays."""
        selector, runtime = session.selector, self._opened(self._model.model, self._choice)
        session.move_to(runtime.model, runtime.tokenizer, selector=None if selector is None else selector.name)
        session.keep, session.selection, session.policy = keep, selection, policy
        if selector is None:  # with a fixed selection
            session.selector = None


def _session(runtime: Runtime, conversing: _Conversing) -> Session:
    """A new conversation, or the saved one, changed by the options that are given."""
    from ifprune_mlx import Session

    session = Session(
        runtime.model,
        runtime.tokenizer,
        policy=conversing.policy or "first",
        on_switch=conversing.on_switch or "reprefill",
        system_prompt=conversing.system_prompt,
        prefill_seconds=_STEP_SECONDS if sys.stdin.isatty() else None,
        **runtime.arguments,
    )
    if conversing.policy is None and session.selector is not None and session.selector.name == "learned":
        session.policy = "auto"  # it costs follow-ups nothing, and another topic much less (docs/performance.md)
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
    """The loop: takes messages, answers them or runs them as commands, and survives what goes wrong with one.

    Args:
        penalty: for repetitions; None for one where the density asks for it, if there is an editor.
        editor: where a person types; None for messages of a pipe, which get what the model says as it is.
    """

    def __init__(
        self, commands: Commands, max_tokens: int, penalty: float | None, editor: LineEditor | None = None
    ) -> None:
        self._commands = commands
        self._session = commands.session
        self._max_tokens = max_tokens
        self._penalty = penalty
        self._editor = editor
        self._answering = self._loading = self._said = self._told_penalty = False
        self._interrupts = 0
        self._told: Selection | None = None  # of the last message of another topic that was told of

    def run(self, messages: Iterable[str]) -> int:
        """Take messages until they end or one says /quit; the exit code: 1 if anything went wrong on the way."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 still shows the rest of an answer
        from ifprune_mlx import IfpruneError

        failed = False
        before = signal.getsignal(signal.SIGINT)
        if leads():
            signal.signal(signal.SIGINT, self._interrupted)
        try:
            for text in messages:
                try:
                    if not self._take(text):
                        break
                except (IfpruneError, RuntimeError, ValueError, MemoryError) as exc:
                    # MLX reports a lack of memory, and options that a cache cannot have, in the last three: the
                    # conversation is worth more than a traceback.
                    failed = True
                    leave(exc)
                    show_cause(exc)
                    note(f"ifprune: error: {one_line(self._explained(exc))}")
        finally:
            signal.signal(signal.SIGINT, before)
        return int(failed)

    def _take(self, text: str) -> bool:
        """Answer one message or carry out one command; False if the chat is to end."""
        text.encode("utf-8")
        if not text.startswith("/") or text.startswith("//"):
            self._answer(text[1:] if text.startswith("/") else text)
            return True
        if text.startswith("/model"):
            self._loading = self._editor is not None
            self._told = None  # another model's selections are not to be compared with it
        try:
            return self._commands.run(text)
        except KeyboardInterrupt:
            if not self._loading or self._session.model.lock.closed:  # nothing is left to talk to
                raise
            note("stopped; the model stays")
            return True
        finally:
            self._loading = False

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
        from ifprune_mlx.chat_template import thinking_in_chats

        from .chat_answer import AnswerWriter
        from .repetition import LoopFinder

        session, stats, looped = self._session, None, False
        live = session.model.selection
        self._set_penalty()
        shown = AnswerWriter(thinking_in_chats(session.tokenizer))
        loops = LoopFinder() if self._editor is not None and self._penalty != 1 else None
        self._interrupts, self._answering, self._said = 0, True, False
        try:
            with progress("reading", "tokens") as update:
                for response in session.stream(text, max_tokens=self._max_tokens, progress=update):
                    self._said = self._said or bool(response.text)
                    shown.write(response.text)
                    stats = response.stats
                    if loops is not None and not looped and loops.feed(response.token):
                        looped = True
                        session.cancel()
        finally:
            self._answering = False
            shown.finish()
            if self._said or stats is not None:
                show()
            if self._interrupts and self._editor is not None:
                self._editor.discard()
        if stats is None:
            return
        if not stats.completion_tokens:
            note("[stopped before the answer began; the message is forgotten]", dim=True)
            return
        note(f"{footer(stats, self._switched(live, stats))}{self._ending(stats, looped)}", dim=True)
        self._tell_topic(text)

    def _set_penalty(self) -> None:
        """Use the repetition penalty for the next answer; say so where nobody asked for it."""
        from .repetition import PENALTY, below_own_density, penalizing

        penalty = 1.0 if self._penalty is None else self._penalty
        if self._penalty is None and self._editor is not None and below_own_density(self._session):
            penalty = PENALTY
            if not self._told_penalty:
                own = self._session.model.checkpoint.layout.density
                note(
                    f"[below the model's own density, {own:.2f}: repetition penalty {penalty}; "
                    "--repetition-penalty 1 at the start turns it off]",
                    dim=True,
                )
                self._told_penalty = True
        self._session.options["logits_processors"] = penalizing(penalty)

    def _switched(self, live: Selection | None, stats: Stats) -> str:
        """What the answer changed of the selection that was live before; empty if nothing."""
        from ifprune_mlx import TaskStore

        from .chat_topics import change

        now = self._session.model.selection
        if live is None or now is None or live.hash == now.hash:
            return ""
        return f"switched: {change(TaskStore(self._session.model.checkpoint), live, now)}"

    def _tell_topic(self, text: str) -> None:
        """Say that policy `auto` would have switched at this message, once for each other topic."""
        from ifprune_mlx import TaskStore

        from .chat_topics import change

        session, live = self._session, self._session.selection
        alone = session.model.ranks is None  # else the others would have to select with this rank
        if self._editor is None or not alone or session.policy != "first" or live is None or len(session.messages) <= 2:
            return
        if session.selector is None or session.selector.name != live.selector:
            return  # a task, or a file
        other = session.would_select(text)
        if other is None or other.agreement(live) >= session.switch_below:
            self._told = None
        elif self._told is None or other.agreement(self._told) < session.switch_below:
            self._told = other
            what = change(TaskStore(session.model.checkpoint), live, other)
            note(f"[another topic: its own selection would be {what}; /policy auto follows topics]", dim=True)

    def _ending(self, stats: Stats, looped: bool) -> str:
        """Why the answer ends where it does, if not of itself."""
        if looped and self._session.dense:
            return "\n[ended: the answer was repeating itself]"
        if looped:
            # A selection made for another topic is the likelier reason.
            help_ = "/policy auto, which selects for each topic," if self._told else "a higher /density"
            return f"\n[ended: the answer was repeating itself; {help_} may help]"
        if stats.finish_reason == "cancelled":
            return " stopped"
        if stats.finish_reason != "length":
            return ""
        full = stats.completion_tokens != self._max_tokens
        return " cut off: the context is full (/reset)" if full else " cut off by --max-tokens"

    def _interrupted(self, signum: int, frame: FrameType | None) -> None:
        """Ctrl-C. It only asks to stop: an exception within a model call would leave the layers' caches out of step."""
        if not self._answering:
            if self._editor is None or self._loading:
                raise KeyboardInterrupt
            return  # at the prompt the line editor takes it; a command is over in a moment
        self._interrupts += 1
        self._session.cancel()
        if self._interrupts == 2 and not self._said:
            note("stopping after the step in work; Ctrl-C again leaves the chat at once")
        if self._interrupts > 2:
            raise KeyboardInterrupt
