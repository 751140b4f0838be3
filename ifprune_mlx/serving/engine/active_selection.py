"""Finds the selections of requests, and makes one the live selection. Only the worker thread uses it."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from ifprune_mlx.checkpoint.budget import SSD
from ifprune_mlx.errors import BudgetError, CheckpointError, reason_of
from ifprune_mlx.model import Model
from ifprune_mlx.prompt_cache import DENSE
from ifprune_mlx.selection.selection import Selection
from ifprune_mlx.selection.selectors import (
    ActivationSelector,
    CachedSelector,
    Instruction,
    Selected,
    Selector,
    SharedSelector,
    make_selector,
)
from ifprune_mlx.serving.engine.request import (
    EngineClosedError,
    GenerationFailedError,
    RequestState,
    SelectionParams,
)
from ifprune_mlx.serving.engine.scheduler import EXCLUSIVE
from ifprune_mlx.serving.engine.topics import Topics

_ACTIVATION = "activation"


class ActiveSelection:
    """The live selection of one model.

    Attributes:
        selection: computes the running requests, or computed the last ones; None is dense.
        key: the selection key of those requests.
        since: when `key` became live, by `time.monotonic`.
        switches: how often another selection was made active.
        trusted: False once a switch or the model has failed. The active neurons are then unknown, and the next
            `activate` or `restore` switches in any case.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.selection: Selection | None = None
        self.key, self.since = DENSE, 0.0
        self.switches = 0
        self.trusted = False
        self._topics = Topics(model.checkpoint.widths)

    def resume(self) -> None:
        """Start from the model's active selection, as others may have used the model."""
        active = self._model.selection
        if _key_of(active) != _key_of(self.selection):
            self.selection, self.key, self.trusted = active, _key_of(active), False

    def select(self, state: RequestState) -> None:
        """Set a request's selection key, and its selection unless `prefill_dense` will find it.

        It runs one selector at most. Policy `auto` may need several calls, and sets the key in the last one. A selector
        may leave the model dense; `activate` and `restore` undo that.

        The parameters have passed `check_selecting`.
        """
        model, params = self._model, state.request.selection_params
        if params.selection is not None:
            state.selection, state.selection_key = params.selection, params.selection.hash
            return
        name, repeats = params.selector or model.checkpoint.default_selector, bool(state.request.instruction_tokens)
        if params.dense or (name == _ACTIVATION and not repeats):
            # `activation` reads the prompt to select, and decoding continues from its KV cache.
            state.selection_key = DENSE if params.dense else EXCLUSIVE
            return
        keep = model.keep(params.density, params.active_parameters)
        if params.policy == "auto":
            self._follow(state, name, keep)
            return
        selection = self._run_selector(state, name, keep, state.request.instruction).selection
        state.selection, state.selection_key = selection, selection.hash

    def _follow(self, state: RequestState, name: str, keep: tuple[int, ...]) -> None:
        """Go on by one message of the conversation; after the last one the request has selected."""
        texts = (*state.request.earlier, state.request.instruction)
        if not state.followed:
            state.followed, state.selection = self._topics.come_to(name, keep, texts)
        if state.followed < len(texts):
            state.followed += 1
            own = self._run_selector(state, name, keep, texts[state.followed - 1]).selection
            state.selection = self._topics.follow(name, keep, texts[: state.followed], state.selection, own)
        if state.followed == len(texts):
            assert state.selection is not None
            state.selection_key = state.selection.hash

    def prefill_dense(self, state: RequestState) -> tuple[list[Any], int]:
        """Find a request's selection with the activation selector, which reads the prompt densely.

        Returns:
            The KV cache, for decoding to continue from, and how many prompt tokens it holds.

        Raises:
            EngineClosedError: if the request is stopped.
        """
        params = state.request.selection_params
        keep = self._model.keep(params.density, params.active_parameters)
        selected = self._run_selector(state, _ACTIVATION, keep, state.request.instruction)
        state.selection = selected.selection
        assert selected.history is not None
        return selected.history.kv, len(selected.history.tokens)

    def activate(self, state: RequestState) -> None:
        """Make a request's selection the live one. No requests of another selection may be running.

        Raises:
            GenerationFailedError: if the switch fails.
        """
        if state.selection_key == self.key != EXCLUSIVE:
            state.switch_s = self.restore()
            return
        before = self.selection
        state.switch_s = self._switch(state.selection)
        self.selection, self.key, self.since = state.selection, state.selection_key, time.monotonic()
        if _key_of(before) != _key_of(state.selection):
            self.switches += 1
            if before is not None and state.selection is not None:
                state.overlap = state.selection.overlap(before)

    def restore(self) -> float:
        """Switch back to the live selection if a selector has left the model dense; returns the seconds."""
        if self.trusted and _key_of(self._model.selection) == _key_of(self.selection):
            return 0.0
        return self._switch(self.selection)

    def _switch(self, selection: Selection | None) -> float:
        self.trusted = False
        try:
            seconds = self._model.switch(selection).seconds
        except CheckpointError as exc:  # an earlier switch was interrupted; no request is at fault
            raise GenerationFailedError(f"the model failed ({reason_of(exc)})") from exc
        self.trusted = True
        return seconds

    def _run_selector(self, state: RequestState, name: str, keep: tuple[int, ...], text: str) -> Selected:
        def check(done: int, total: int) -> None:
            if self._model.agreed(state.stopped):
                raise EngineClosedError
            state.has_read(done)

        start, request = time.monotonic(), state.request
        selector: Selector = make_selector(self._model, name)
        if name == _ACTIVATION and request.instruction_tokens:
            reader = _InstructionReader(self._model)
            ranks = self._model.ranks
            if ranks is None:
                selector = CachedSelector(self._model, reader, self._model.selection_cache)
            else:
                selector = SharedSelector(name, ranks, reader, everywhere=True)
        try:
            tokens = request.instruction_tokens or request.tokens
            return selector.select(Instruction(text, tokens, progress=check), keep)
        finally:
            state.select_s += time.monotonic() - start


class _InstructionReader(ActivationSelector):
    """Reads instructions alone, without the rest of their prompts, so that what it selects can be kept."""

    def reads(self, instruction: Instruction) -> bytes:
        """The tokens, and the float type that computes them."""
        return f"{self._model.dtype}:".encode() + np.array(instruction.tokens, dtype="<i4").tobytes()


def check_selecting(model: Model, params: SelectionParams) -> None:
    """Raise IfpruneError if a request's selection parameters cannot be used."""
    if params.selection is not None:
        model.check(params.selection)
        return
    name = params.selector or model.checkpoint.default_selector
    model.keep(params.density, params.active_parameters)
    if (params.dense or name == _ACTIVATION) and model.residency == SSD:
        raise BudgetError("not all neurons are in memory; load the model with residency ram to use it dense")
    if name != "learned" or not model.checkpoint.has_predictor:  # a predictor is loaded in the worker thread
        make_selector(model, name)


def _key_of(selection: Selection | None) -> str:
    return DENSE if selection is None else selection.hash
