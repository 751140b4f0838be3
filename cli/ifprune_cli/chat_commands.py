"""The /commands of `ifprune chat`: each reads one argument, acts on the session, and says what it did on stderr."""

from __future__ import annotations

import difflib
import shutil
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ifprune_mlx import ChatFileError, IfpruneError, Selection, Session, TaskStore
from ifprune_mlx.checkpoint.hub import cached_checkpoints
from ifprune_mlx.checkpoint.regular_file import read_json_object

from .chat_topics import saved_as
from .console import note, parameters, report, shortened
from .loading import EMBEDDED
from .ranks import once

_TURNS_SHOWN = 8
_POLICIES = {
    "first": "the first message selects, for the whole conversation",
    "turn": "every message selects",
    "auto": "a message selects anew where the topic changes",
    "system": "the system prompt selects",
}


@dataclass(frozen=True)
class _Command:
    run: Callable[[str], None]
    arguments: str
    help: str


class Commands:
    """The commands of one chat.

    Args:
        name: of its model.
        change_model: takes it over to another model, the embedded one for None; returns that model's name.

    Attributes:
        session: the conversation.
        names: every command, as it is typed.
        with_file: those that take a file name.
        confirm: asks the person yes or no; None where nobody is there to ask.
    """

    with_file = ("/select", "/save", "/load", "/model")

    def __init__(self, session: Session, name: str, change_model: Callable[[Session, str | None], str]) -> None:
        self.session = session
        self.confirm: Callable[[str], bool] | None = None
        self._name = name
        self._change_model = change_model
        self._table = {
            "/help": _Command(self._help, "", "show this list; also /?"),
            "/reset": _Command(self._reset, "", "forget the conversation; the next message selects anew"),
            "/model": _Command(self._model, "[NAME]", "go on with another model; alone: list those at hand"),
            "/policy": _Command(self._policy, "[NAME]", f"what selects: {', '.join(_POLICIES)}; alone: show it"),
            "/select": _Command(
                self._select, "[TEXT|FILE]", "select anew: by the next message, by TEXT, or use a saved .safetensors"
            ),
            "/task": _Command(self._task, "[NAME]", "use a saved task's selection; alone: list the tasks"),
            "/density": _Command(self._density, "[X]", "keep this share of each FFN's neurons; alone: show it"),
            "/dense": _Command(self._dense, "[on|off]", "use all neurons, or those selected; alone: the other one"),
            "/stats": _Command(self._stats, "", "show the last answer's figures, the selection and the context"),
            "/system": _Command(self._system, "[TEXT|none]", "set or remove the system prompt; alone: show it"),
            "/save": _Command(self._save, "FILE", "save the conversation and its selection"),
            "/load": _Command(self._load, "FILE", "go on with a saved conversation"),
            "/quit": _Command(self._help, "", "leave; also /exit, Ctrl-D, or exit or quit typed alone"),
        }
        self.names = (*self._table, "/exit")

    def run(self, line: str) -> bool:
        """Run one line that begins with a slash.

        Returns:
            False if the chat is to end.

        Raises:
            IfpruneError: if the command is unknown or cannot be carried out; the session is then as it was.
        """
        name, _, argument = line.strip().partition(" ")
        name, argument = name.lower(), argument.strip()
        name = "/help" if name == "/?" else name
        if name in ("/quit", "/exit"):
            return False
        if name not in self._table:
            close = difflib.get_close_matches(name, self.names, 1)
            meant = f"; did you mean {close[0]}?" if close else ""
            raise IfpruneError(f"unknown command {shortened(name, 40)}{meant} (/help lists them; // sends a slash)")
        command = self._table[name]
        if argument and not command.arguments:
            raise IfpruneError(f"{name} takes no argument")
        if not argument and command.arguments and not command.arguments.startswith("["):
            raise IfpruneError(f"{name} needs an argument: {name} {command.arguments}")
        try:
            command.run(argument)
        except OSError as exc:  # a file name that the system refuses even to look up
            raise ChatFileError(f"{shortened(argument, 40)}: {exc.strerror or exc}") from exc
        return True

    def choices(self, name: str) -> list[str]:
        """What may stand after a command, for completion."""
        if name == "/model":
            return _models()
        if name == "/policy":
            return list(_POLICIES)
        if name == "/task":
            return [task.name for task in TaskStore(self.session.model.checkpoint).tasks()]
        return []

    def describe(self) -> str:
        """What selects, how much it keeps, and the policy unless it is `first` without a predictor."""
        session, model = self.session, self.session.model
        if session.dense:
            return f"dense, all {parameters(model.total_parameters)} parameters"
        if session.selection is not None:
            keep, who = session.selection.keep, session.selection.selector
        else:
            assert session.selector is not None  # without a selection one chooses it
            keep, who = session.keep, session.selector.name
        plain = session.policy == "first" and who != "learned"  # with a predictor another policy is the default
        policy = "" if plain else f"\npolicy {session.policy}"
        return f"{who} selector, {self._share(keep)}{policy}"

    def _help(self, argument: str) -> None:
        for name, command in self._table.items():
            note(f"  {f'{name} {command.arguments}':<20} {command.help}")
        note(f"  {'//text':<20} send /text")
        note("Ctrl-C stops an answer. Esc Enter, or a \\ at the end of the line, begins a new line.")

    def _reset(self, argument: str) -> None:
        self.session.reset()
        note("forgot the conversation")

    def _model(self, argument: str) -> None:
        if not argument:
            note(f"{self._name}, {parameters(self.session.model.total_parameters)} parameters")
            note(f"at hand: {', '.join(_models())}; or give a folder, or a name on the hub")
            return
        embedded = argument.lower() == EMBEDDED.lower()
        self._name = self._change_model(self.session, None if embedded else argument)
        note(f"{self._name}\n{self.describe()}")
        if self.session.messages:
            note(f"it reads the conversation so far ({_turns(len(self.session.messages) // 2)}) with the next message")

    def _policy(self, argument: str) -> None:
        session = self.session
        if not argument:
            fixed = f"a fixed selection, for all messages: {self._selection_line()}"
            note(f"policy {session.policy}: {_POLICIES.get(session.policy, fixed)}")
            return
        if argument not in _POLICIES:
            raise IfpruneError(f"unknown policy {shortened(argument, 20)}; choose {', '.join(_POLICIES)}")
        session.set_policy(argument)
        session.dense = False
        stays = argument in ("first", "system") and session.selection is not None
        note(f"policy {argument}: {'the selection in use stays, until /reset' if stays else _POLICIES[argument]}")

    def _select(self, argument: str) -> None:
        session = self.session
        if not argument.endswith(".safetensors"):
            if "/" in argument and " " not in argument:
                raise IfpruneError(
                    f"{shortened(argument, 60)}: a selection file ends in .safetensors; to select by a text, write more"
                )
            session.reselect(argument or None)
            session.dense = False
            note(f"selects anew at the next message, by {'this text' if argument else 'it'}")
            return
        self._use(Selection.load(_path(argument)), "")

    def _task(self, argument: str) -> None:
        store = TaskStore(self.session.model.checkpoint)
        if not argument:
            names = ", ".join(task.name for task in store.tasks())
            note(f"tasks: {names}" if names else "no tasks yet; `ifprune select --prompt TEXT --save NAME` saves one")
            return
        self._use(store.load(argument), f"task {argument}: ")

    def _use(self, selection: Selection, what: str) -> None:
        """Answer with this selection until another policy is asked for."""
        session, before = self.session, self.session.policy
        session.use(selection)
        session.set_policy("task")
        back = "" if before == "task" else f"; /policy {before} lets messages select again"
        note(f"uses {what}{_words(selection)}{back}")

    def _density(self, argument: str) -> None:
        session = self.session
        if not argument:
            live = session.selection
            note(self._share(session.keep) + (", once /dense off" if session.dense else ""))
            if live is not None and live.keep != session.keep:
                note(f"the selection in use: {self._share(live.keep)}")
            return
        try:
            density = float(argument)
        except ValueError as exc:
            raise IfpruneError(f"density {shortened(argument, 20)!r} is not a number; write it like 0.5") from exc
        session.set_budget(density=density)
        session.dense = False
        note(f"{self._share(session.keep)}, from the next message on")

    def _dense(self, argument: str) -> None:
        if argument not in ("", "on", "off"):
            raise IfpruneError("/dense takes on, off, or nothing to change over")
        session = self.session
        session.dense = argument == "on" or (not argument and not session.dense)
        note(self.describe())

    def _stats(self, argument: str) -> None:
        session = self.session
        stats, history, limit = session.stats, session.history, session.model.context_length
        if stats is None:
            note("no answer yet")
        else:
            note(textwrap.indent(report(stats), "  "))
            note(f"  prompt      {stats.prompt_tokens - stats.reused_tokens} of {stats.prompt_tokens} tokens read anew")
        note(f"  selection   {self._selection_line()}")
        note(f"  policy      {session.policy}, {session.on_switch} on a switch")
        unread = " are read at the next message" if session.messages and not history.tokens else ""
        read = f"{_turns(len(session.messages) // 2)}{unread}" if unread else f"{len(history.tokens)} tokens"
        note(f"  context     {read}" + (f" of {limit}" if limit and not unread else ""))
        spans = ", ".join(f"{span.tokens} tokens {span.computed_by[:8]}" for span in history.spans)
        note(f"  KV cache    {spans or 'empty'}")

    def _selection_line(self) -> str:
        session = self.session
        selection = session.selection
        if session.dense:
            return "none: dense"
        if selection is None:
            return "at the next message"
        name = saved_as(TaskStore(session.model.checkpoint), selection)
        return f"{f'task {name}: ' if name else ''}{_words(selection)}"

    def _system(self, argument: str) -> None:
        session = self.session
        if argument:
            session.system_prompt = None if argument == "none" else argument
        note(f"system prompt: {session.system_prompt}" if session.system_prompt else "no system prompt")

    def _save(self, argument: str) -> None:
        once(lambda: self._write(_path(argument)))

    def _write(self, path: Path) -> None:
        if path.exists() and not _is_saved_chat(path):
            raise ChatFileError(f"{path}: exists and is not a saved chat; choose another name")
        if path.exists() and self.confirm is not None and not self.confirm(f"{path} exists; overwrite it?"):
            note("not saved")
            return
        self.session.save(path)
        note(f"saved {_turns(len(self.session.messages) // 2)} to {path}")

    def _load(self, argument: str) -> None:
        path = _path(argument)
        self.session.load(path)
        self.show_turns(path)

    def show_turns(self, path: Path) -> None:
        """The turns that were loaded from `path`, a line each."""
        messages = self.session.messages
        count, shown = len(messages) // 2, messages[-2 * _TURNS_SHOWN :]
        width = shutil.get_terminal_size().columns
        note(f"loaded {_turns(count)} from {path}; {self.describe()}")
        if len(shown) < len(messages):
            note(f"  ... {_turns((len(messages) - len(shown)) // 2)} earlier")
        for message in shown:
            note(shortened(f"{'> ' if message['role'] == 'user' else '  '}{message['content']}", width - 1))

    def _share(self, keep: tuple[int, ...]) -> str:
        """A *k* per FFN as density and parameters."""
        checkpoint = self.session.model.checkpoint
        density = sum(keep) / sum(spec.d_ffn for spec in checkpoint.layout.ffns)
        active = parameters(checkpoint.active_parameters(keep))
        return f"density {density:.2f}, {active} of {parameters(checkpoint.parameters)} parameters active"


def _words(selection: Selection) -> str:
    return f"{selection.hash}, {selection.selector}, density {selection.density:.2f}"


def _path(argument: str) -> Path:
    """A file name as a person types it: with ~, perhaps in quotes, of which completion leaves out the second."""
    if len(argument) >= 2 and argument[0] in "'\"":
        argument = argument[1:].removesuffix(argument[0])
    try:
        return Path(argument).expanduser()
    except RuntimeError as exc:
        raise ChatFileError(f"{shortened(argument, 40)}: no such user's home folder") from exc


def _is_saved_chat(path: Path) -> bool:
    try:
        return path.is_file() and "messages" in read_json_object(path, ChatFileError)
    except ChatFileError:
        return False


def _models() -> list[str]:
    """What `/model` takes without a download or a conversion."""
    from ifprune_convert.model_cache import cached_models

    converted = [model.name for model in cached_models() if model.kind == "converted" and model.usable]
    return [EMBEDDED, *converted, *cached_checkpoints()]


def _turns(count: int) -> str:
    return f"{count} turn{'' if count == 1 else 's'}"
