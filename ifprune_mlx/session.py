"""A conversation: its messages, its selection, and its history.

Policies: `first` (the paper: the first human message selects, and the selection stays), `turn` (every message selects),
`auto` (every message selects, but the model switches only if the two selections agree too little), `task` (fixed),
`system` (the system prompt selects, alike in every conversation that has it; without one it is as `first`).
"""

from __future__ import annotations

import base64
import json
import math
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.chat_template import check_prompt, render_messages
from ifprune_mlx.checkpoint.atomic_write import write_atomic
from ifprune_mlx.checkpoint.regular_file import read_json_object
from ifprune_mlx.errors import ChatFileError, IfpruneError, PromptError, SelectionError, reason_of
from ifprune_mlx.generation import KEEP, REPREFILL, GenerationRequest, GenerationResponse, Stats, answer, check_options
from ifprune_mlx.model import Model, Progress
from ifprune_mlx.model_lock import ModelBusyError, Operation
from ifprune_mlx.prompt_cache import History
from ifprune_mlx.selection.presets import NamedSelection
from ifprune_mlx.selection.selection import Selection
from ifprune_mlx.selection.selectors import SELECTORS, Instruction, Selector, make_selector

POLICIES = ("first", "turn", "auto", "task", "system")
OnSwitch = Callable[[Selection | None, Selection], object]
"""Called with the selection before, None at first, and the new one."""
_FILE_FORMAT = 1
# From this agreement on a follow-up loses nothing; other topics lie below it (docs/performance.md).
SWITCH_BELOW = 0.55


class Session:
    """One chat with one model.

    Several sessions may share a model, and any thread may use them, one answer at a time: see `Model`. During an answer
    of this session only `cancel`, `save`, and reading its attributes are allowed; methods that would change it raise
    ModelBusyError.

    Args:
        model, tokenizer: from `ifprune_mlx.load`.
        policy: `first`, `turn`, `auto`, `task` or `system`.
        selector: a name or an object; None takes the checkpoint's default.
        selection: a fixed selection; required for policy `task`, and implies it.
        dense: begin with all neurons active.
        density, active_parameters, memory: the budget; see `ifprune_mlx.checkpoint.budget.resolve_keep`.
        on_switch: after a switch, `reprefill` recomputes the history (exact), `keep` continues from it (fast). Or a
            function that is told whenever the conversation gets another selection, before the first token and in the
            thread that computes; the history is then recomputed.
        switch_below: policy `auto` switches if the agreement (`Selection.agreement`) is below this.
        system_prompt: comes before the first message.
        max_kv_size: how many tokens a layer's KV cache may hold; see `ifprune_mlx.prompt_cache.make_cache`.
        options: passed to mlx-lm's generation: `sampler`, `logits_processors`, `kv_bits`, `prefill_step_size`, ...;
            also `prefill_seconds`, see `stream_generate`.

    Attributes:
        messages: the conversation so far, without the system prompt.
        selection: the current or fixed selection; None before the first answer.
        selector: chooses the next selection; None where one is fixed.
        switched: the function given as `on_switch`; None for none.
        keep: *k* per FFN of the next selection.
        history: the tokens read, with their KV cache and its provenance.
        stats: the last answer's.

    Raises:
        IfpruneError: on an unknown policy or selector, or a budget that cannot be met.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: TokenizerWrapper,
        *,
        policy: str = "first",
        selector: str | Selector | None = None,
        selection: Selection | None = None,
        dense: bool = False,
        density: float | None = None,
        active_parameters: int | None = None,
        memory: int | None = None,
        on_switch: str | OnSwitch = REPREFILL,
        switch_below: float = SWITCH_BELOW,
        system_prompt: str | None = None,
        max_kv_size: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if policy not in POLICIES:
            raise IfpruneError(f"unknown policy {policy!r}; choose one of {', '.join(POLICIES)}")
        if policy == "task" and selection is None:
            raise IfpruneError("policy 'task' needs a fixed selection; give one, or choose another policy")
        check_options(options)
        self.model = model
        self.tokenizer = tokenizer
        self.policy = "task" if selection is not None else policy
        self.switched = None if isinstance(on_switch, str) else on_switch
        self.on_switch = on_switch if isinstance(on_switch, str) else REPREFILL
        self.switch_below = switch_below
        self.system_prompt = system_prompt
        self.dense = dense
        self.messages: list[dict[str, str]] = []
        self.stats: Stats | None = None
        self.options = options
        self.selection = selection
        self.history = History.empty(model, max_kv_size)
        self.keep = model.keep(density, active_parameters, memory)
        self.selector = make_selector(model, selector, seed=seed) if selection is None else None
        if selection is not None:
            model.check(selection)
            self.keep = selection.keep
        self._max_kv_size = max_kv_size
        self._seed = seed
        self._instruction: str | None = None
        self._stop: threading.Event | None = None  # of the answer under way
        self._told: Selection | None = None  # what `switched` was last told

    def stream(
        self, text: str, *, max_tokens: int = 256, progress: Progress | None = None
    ) -> Operation[GenerationResponse]:
        """Answer one user message, token by token, in the thread that reads it; `close` ends the answer early.

        The message and the answer join `messages` when the answer ends, is cancelled, or its reader stops. If it is
        cancelled before the first token, or an error is raised, the conversation stays as it was.

        Raises:
            PromptError: if the message is empty or the conversation no longer fits the context.
            ModelBusyError: if another answer of this model is under way, or another thread reads or closes this one.
        """
        return self.model.lock.during(self._answer(text, max_tokens, progress, threading.Event()))

    def astream(
        self, text: str, *, max_tokens: int = 256, progress: Progress | None = None
    ) -> AsyncGenerator[GenerationResponse, None]:
        """Like `stream`, for asyncio: the model's worker thread computes the answer, and the event loop stays free.

        Each token is computed when the reader awaits it; MLX works at most one token ahead. Answers of one model wait
        for each other in order, across sessions and event loops, but not for a `stream`. Cancelling the task, or
        `aclose`, ends the answer after the current token and frees the model. If you leave the loop early, call
        `aclose` (or use `contextlib.aclosing`), or the model stays busy until the event loop closes the generator.

        Args:
            progress: called in the worker thread, like the session's sampler and logits processors. MLX seeds random
                numbers per thread.

        Raises:
            PromptError: see `stream`.
        """
        stop = threading.Event()
        return self.model.lock.in_worker(self._answer(text, max_tokens, progress, stop), stop.set)

    def ask(self, text: str, **kwargs: Any) -> str:
        """The whole answer to one message; takes the arguments of `stream`."""
        return "".join(response.text for response in self.stream(text, **kwargs))

    def cancel(self) -> None:
        """End the current answer after the current token; its text so far stays in the conversation.

        May be called from any thread. To end an `astream` that still waits for the model, cancel its task.
        """
        if (stop := self._stop) is not None:
            stop.set()

    def reset(self) -> None:
        """Forget the conversation; the next message selects again."""
        self._check_idle()
        self.messages = []
        self.history = History.empty(self.model, self._max_kv_size)
        self._instruction = self._told = None
        self.stats = None
        if self.policy != "task":
            self.selection = None

    def reselect(self, instruction: str | None = None) -> None:
        """Select again at the next message, by that message or by the given instruction."""
        self._check_idle()
        if self.policy == "task":
            raise IfpruneError(
                "the selection is fixed in this conversation; give another policy to select (in a chat: /policy auto)"
            )
        self.selection = None
        self._instruction = instruction

    def use(self, selection: Selection) -> None:
        """Use this selection: with policy `first` for good, otherwise until the next message selects."""
        self._check_idle()
        self.model.check(selection)
        self.selection = selection
        self.dense = False

    def set_policy(self, policy: str) -> None:
        """Select by another policy from the next message on. `task` keeps the selection in use, for every message;
        any other gives up a selection that was fixed.

        Raises:
            IfpruneError: for an unknown policy, or for `task` where there is no selection.
        """
        self._check_idle()
        if policy not in POLICIES:
            raise IfpruneError(f"unknown policy {policy!r}; choose one of {', '.join(POLICIES)}")
        if policy == "task" and self.selection is None:
            raise IfpruneError("policy 'task' needs a fixed selection; use one first, or choose another policy")
        if self.policy == "task" and policy != "task":
            self.selection, self._instruction = None, None
            self.selector = self.selector or make_selector(self.model, None, seed=self._seed)
        self.policy = policy

    def move_to(
        self,
        model: Model,
        tokenizer: TokenizerWrapper,
        *,
        selector: str | Selector | None = None,
        density: float | None = None,
        active_parameters: int | None = None,
        memory: int | None = None,
    ) -> None:
        """Go on with another model, which reads the conversation anew and selects anew; with `first`, by its beginning.

        The model that was in use may be closed already. A fixed selection stays with that: policy `task` becomes
        `first`.
        """
        if self._stop is not None:
            self._check_idle()
        keep, chosen = model.keep(density, active_parameters, memory), make_selector(model, selector, seed=self._seed)
        history = History.empty(model, self._max_kv_size)
        self.model, self.tokenizer, self.keep, self.selector, self.history = model, tokenizer, keep, chosen, history
        self.selection, self.stats, self._told = None, None, None
        self.policy = "first" if self.policy == "task" else self.policy

    def select(self, text: str) -> NamedSelection:
        """What this message selects if it begins a conversation; neither the model nor this conversation changes.

        Returns:
            The selection: `use` takes it, `save("name")` on it keeps it as a task, which `TaskStore` finds again.

        Raises:
            PromptError: if the message is empty, or longer than the context.
            ModelBusyError: if an answer is under way.
        """
        self._check_idle()
        if not text.strip():
            raise PromptError("the message is empty; write something that selects")
        tokens = render_messages(self.tokenizer, [*self._system, {"role": "user", "content": text}])
        check_prompt(self.model, tokens)
        selector = self.selector or make_selector(self.model, None, seed=self._seed)
        found = self._selected(selector, Instruction(text, tuple(tokens)))
        return NamedSelection(found.ids, found.widths, found.selector, self.model.checkpoint)

    def would_select(self, text: str) -> Selection | None:
        """What this message would select now under policy `auto`; neither the model nor the conversation changes.

        Returns:
            None if nothing selects, or only reading the conversation could tell (selector `activation`).
        """
        self._check_idle()
        if self.dense or self.selector is None or self.selector.name == "activation":
            return None
        return self._selected(self.selector, Instruction(text, ()))

    def _selected(self, selector: Selector, instruction: Instruction) -> Selection:
        """What a selector chooses; the model is afterwards as it was."""
        with self.model.lock.held():
            live = self.model.selection
            try:
                return selector.select(instruction, self.keep).selection
            finally:
                self.model.switch(live)

    def set_budget(
        self, density: float | None = None, active_parameters: int | None = None, memory: int | None = None
    ) -> None:
        """Change the budget. The next message selects again; with `first` and `system`, by the same instruction."""
        self._check_idle()
        if self.policy == "task":
            raise IfpruneError(
                "the selection is fixed in this conversation, and its density with it; give another policy to select "
                "(in a chat: /policy auto)"
            )
        self.keep = self.model.keep(density, active_parameters, memory)
        self.selection = None
        if self.policy not in ("first", "system"):
            self._instruction = None

    def save(self, path: str | Path) -> None:
        """Write messages, settings and the selection as JSON. After `load` the KV cache is computed again.

        The settings are the system prompt, the policy, the selector (by its name) with its seed, the budget, and what
        happens on a switch. `max_kv_size` and `options` are not kept: they belong to a machine, or cannot be written.

        Raises:
            ChatFileError: if the file cannot be written.
        """
        selection = self.selection
        state = {
            "format": _FILE_FORMAT,
            "checkpoint": self.model.checkpoint.id,
            "system_prompt": self.system_prompt,
            "policy": self.policy,
            "selector": None if self.selector is None else self.selector.name,
            "seed": self._seed,
            "on_switch": self.on_switch,
            "switch_below": self.switch_below,
            "dense": self.dense,
            "keep": list(self.keep),
            "instruction": self._instruction,
            "selection": None if selection is None else _pack(selection),
            "messages": self.messages,
        }
        text = json.dumps(state, ensure_ascii=False, indent=1) + "\n"
        write_atomic(Path(path), lambda file: file.write_text(text, encoding="utf-8"), ChatFileError)

    def load(self, path: str | Path) -> None:
        """Replace this conversation by a saved one. If the file cannot be read, nothing changes.

        Raises:
            ChatFileError: if the file is missing, damaged, or belongs to another checkpoint.
        """
        self._check_idle()
        path = Path(path)
        if not path.is_file():
            raise ChatFileError(f"{path}: no such saved chat")
        try:
            state = read_json_object(path, ChatFileError)
        except ChatFileError as exc:
            raise ChatFileError(f"{path}: not a saved chat, or damaged; give a file that /save wrote") from exc
        if state.get("format") != _FILE_FORMAT:
            raise ChatFileError(f"{path}: not a saved chat of format {_FILE_FORMAT}; give a file that /save wrote")
        if state.get("checkpoint") != self.model.checkpoint.id:
            raise ChatFileError(f"{path}: was saved with another model; load that one to go on")
        try:
            messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in state["messages"]]
            if any(m["role"] not in ("user", "assistant") for m in messages):
                raise ValueError("unknown role")
            policy, dense, system = state["policy"], bool(state["dense"]), state["system_prompt"]
            if policy not in POLICIES or not isinstance(system, str | None):
                raise ValueError("unknown policy or system prompt")
            widths = tuple(spec.d_ffn for spec in self.model.checkpoint.layout.ffns)
            selection = None if state["selection"] is None else _unpack(state["selection"], widths)
            if policy == "task" and selection is None:
                raise ValueError("a task without its selection")
            # Chats that were saved before these were kept leave this conversation's.
            seed, on_switch = int(state.get("seed", self._seed)), state.get("on_switch", self.on_switch)
            switch_below = float(state.get("switch_below", self.switch_below))
            if on_switch not in (REPREFILL, KEEP) or not math.isfinite(switch_below):
                raise ValueError("an unknown way to switch")
            selector = None if policy == "task" else self._selector_named(path, state.get("selector"), seed)
            keep = tuple(int(k) for k in state["keep"])
            if len(keep) != len(widths) or not all(0 < k <= width for k, width in zip(keep, widths, strict=True)):
                raise ValueError("neurons to keep that the model does not have")
            instruction = None if state["instruction"] is None else str(state["instruction"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, MemoryError, SelectionError) as exc:
            raise ChatFileError(f"{path}: the saved chat is damaged ({reason_of(exc)}); nothing was loaded") from exc
        self.reset()
        self.messages, self.system_prompt, self.dense = messages, system, dense
        self.selection, self._instruction, self.keep = selection, instruction, keep
        self.selector, self._seed = selector, seed
        self.policy, self.on_switch, self.switch_below = policy, on_switch, switch_below

    def _selector_named(self, path: Path, name: Any, seed: int) -> Selector:
        """The selector of a saved chat; this conversation's own if the chat names none, or it is the same."""
        own = self.selector
        if own is not None and (name is None or (own.name == name and seed == self._seed)):
            return own
        if name is not None and name not in SELECTORS:
            raise ChatFileError(
                f"{path}: was saved with the selector {str(name)[:40]!r}, which is not one of ifprune's; make the "
                "Session with that selector"
            )
        return make_selector(self.model, name, seed=seed)

    def _answer(
        self, text: str, max_tokens: int, progress: Progress | None, stop: threading.Event
    ) -> Generator[GenerationResponse, None, None]:
        """The steps of `stream`, for one operation of `ModelLock`; `stop` ends them early."""
        if not text.strip():
            raise PromptError("the message is empty; write something to answer")
        user = {"role": "user", "content": text}
        request = replace(self._request(text, [*self._system, *self.messages, user]), switched=self._tell)
        said, answered = "", False
        self._stop, thread = stop, threading.get_ident()
        try:
            responses = answer(
                self.model,
                self.tokenizer,
                self.history,
                request,
                max_tokens,
                cancel=stop.is_set,
                progress=progress,
                **self.options,
            )
            for response in responses:
                said += response.text
                # If it is cancelled before the first token, the model may still have another session's selection.
                answered = response.generation_tokens > 0
                if response.stats is not None:
                    self.stats = response.stats
                yield response
        except BaseException as exc:
            answered = answered and isinstance(exc, GeneratorExit)
            raise
        finally:
            self._stop = None
            self.history.settle(self.model, thread)
            if answered:
                self.messages += [user, {"role": "assistant", "content": said}]
                if not self.dense:
                    self.selection = self.model.selection
                    self._instruction = request.instruction

    @property
    def _system(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []

    def _tell(self, selection: Selection) -> None:
        before = self._told
        if self.switched is not None and (before is None or before.hash != selection.hash):
            self._told = selection
            self.switched(before, selection)

    def _check_idle(self) -> None:
        self.model.lock.check_open()
        if self._stop is not None:
            raise ModelBusyError("an answer of this conversation is under way; cancel it or wait for its end first")

    def _request(self, text: str, messages: list[dict[str, str]]) -> GenerationRequest:
        tokens = render_messages(self.tokenizer, messages)
        continues = not self.tokenizer.has_chat_template
        selecting = not self.dense and (self.selection is None or self.policy in ("turn", "auto"))
        if self.policy == "system" and self.system_prompt:
            text = self.system_prompt
        kept = text if self._instruction is None else self._instruction
        if not selecting:
            selection = None if self.dense else self.selection
            return GenerationRequest(tokens, kept, None, selection, self.keep, self.on_switch, None, continues)
        # There is an instruction but no selection after `reselect` and after a budget change.
        instruction = kept if self.selection is None else text
        threshold = self.switch_below if self.policy == "auto" else None
        return GenerationRequest(
            tokens, instruction, self.selector, self.selection, self.keep, self.on_switch, threshold, continues
        )


def _pack(selection: Selection) -> dict[str, Any]:
    """A selection for JSON: per FFN a bit mask in base64."""
    masks = []
    for ids, width in zip(selection.ids, selection.widths, strict=True):
        mask = np.zeros(width, dtype=bool)
        mask[ids] = True
        masks.append(base64.b64encode(np.packbits(mask).tobytes()).decode())
    return {"selector": selection.selector, "widths": list(selection.widths), "hash": selection.hash, "masks": masks}


def _unpack(packed: dict[str, Any], widths: tuple[int, ...]) -> Selection:
    """What `_pack` gave, for a model of these widths, which are compared before anything is made of the file's."""
    if packed["widths"] != list(widths):
        raise ValueError("a selection for a model of another shape")
    ids = []
    for text, width in zip(packed["masks"], widths, strict=True):
        bits = np.unpackbits(np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8), count=width)
        ids.append(np.flatnonzero(bits).astype(np.int32))
    selection = Selection(tuple(ids), widths, str(packed["selector"]))
    if selection.hash != packed["hash"]:
        raise ValueError("the selection does not match its hash")
    return selection
