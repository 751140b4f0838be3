"""Selectors map an instruction to a selection, behind one protocol.

learned      the paper's sparsity predictor; one pass of a small LM
activation   no training: a dense prefill shows which neurons the prompt uses; fused with the prior (GRIFFIN, GLASS)
static       the prior alone; the same for every instruction
random       a control: arbitrary neurons, the same ones for the same instruction and seed

All but `activation` depend on the instruction's words alone, so their selections are cached: see `CachedSelector`.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx
import numpy as np

from ifprune_mlx.errors import CheckpointError, IfpruneError
from ifprune_mlx.prompt_cache import DENSE, History, Pace
from ifprune_mlx.selection.cache import SelectionCache
from ifprune_mlx.selection.predictor import SparsityPredictor
from ifprune_mlx.selection.selection import Selection, top_k
from ifprune_mlx.sparse.importance import fuse_ranks, recorded

if TYPE_CHECKING:
    from ifprune_mlx.model import Model
    from ifprune_mlx.parallel.ranks import Ranks

SELECTORS = ("learned", "activation", "static", "random")
_PREFILL_STEP = 512
# Of the shares from 0.25 to 0.75 this one had the lowest NLL on SmolLM2 (docs/log.md).
_PROMPT_SHARE = 0.5


@dataclass(frozen=True)
class Instruction:
    """The input of a selector.

    Attributes:
        text: the user's message.
        tokens: all token ids that the model reads before it answers.
        history: a prefix of `tokens` that the model has read already; None for none.
        progress: called with (tokens read, tokens) between chunks; may raise to stop.
        pace: how much of the prompt is read at a time.
    """

    text: str
    tokens: tuple[int, ...]
    history: History | None = None
    progress: Callable[[int, int], None] | None = None
    pace: Pace = field(default_factory=Pace, compare=False)


@dataclass(frozen=True)
class Selected:
    """The output of a selector.

    Attributes:
        selection: the kept neurons.
        history: the selector's own dense prefill, from which decoding may continue; None if there was none.
    """

    selection: Selection
    history: History | None = None


class Selector(Protocol):
    """Maps an instruction to a selection."""

    name: str

    def select(self, instruction: Instruction, keep: Sequence[int]) -> Selected:
        """Choose `keep[l]` neurons of every FFN."""
        ...


class RepeatableSelector(Selector, Protocol):
    """A selector whose choice depends only on the checkpoint, *k* and `reads`."""

    def reads(self, instruction: Instruction) -> bytes:
        """Everything in the instruction that the choice depends on."""
        ...


class LearnedSelector:
    """The trained sparsity predictor (paper, section 3)."""

    name = "learned"

    def __init__(self, model: Model, predictor: SparsityPredictor) -> None:
        self._model = model
        self._predictor = predictor

    def select(self, instruction: Instruction, keep: Sequence[int]) -> Selected:
        """Keep the neurons that the predictor scores highest. A predictor on the model's own layers leaves it dense."""
        if self._predictor.head.layers is not None:
            self._model.first_layers_in_order(self._predictor.head.layers)
        return Selected(top_k(self._predictor.scores(instruction.text), keep, self.name))

    def reads(self, instruction: Instruction) -> bytes:
        """The tokens; also the model's float type, if its own layers read them."""
        tokens = np.array(self._predictor.tokens(instruction.text), dtype="<i4").tobytes()
        own = self._predictor.head.layers is not None
        return (f"{self._model.dtype}:" if own else ":").encode() + tokens


class StaticSelector:
    """The prior alone: the baseline, and the fallback."""

    name = "static"

    def __init__(self, model: Model) -> None:
        self._model = model

    def select(self, instruction: Instruction, keep: Sequence[int]) -> Selected:
        """The neurons of the highest prior, for every instruction."""
        return Selected(top_k(self._model.prior, keep, self.name))

    def reads(self, instruction: Instruction) -> bytes:
        """Nothing."""
        return b""


class ActivationSelector:
    """Training-free: the neurons that the prompt uses in a dense prefill, fused by rank with the prior.

    It keeps the prefill's KV cache, like GRIFFIN (arXiv 2404.01365). So it saves decoding time, but no prefill time.
    """

    name = "activation"

    def __init__(self, model: Model, prompt_share: float = _PROMPT_SHARE) -> None:
        self._model = model
        self._prompt_share = prompt_share

    def select(self, instruction: Instruction, keep: Sequence[int]) -> Selected:
        """Prefill all but the last token densely, and rank the neurons by their activations. Leaves the model dense."""
        model = self._model
        model.switch(None)
        history = instruction.history or History.empty(model)
        unread = list(instruction.tokens[len(history.tokens) :])
        total = len(unread)
        with recorded(model.down_leaves) as recorder:
            # A single token is read for its activations only, without the cache.
            ahead = unread[:-1]
            if not ahead:
                model(mx.array([unread]))
                mx.eval(recorder.state())
            before = len(history.tokens)
            for chunk in instruction.pace.steps(ahead, _PREFILL_STEP):
                if instruction.progress is not None:
                    instruction.progress(len(history.tokens) - before, total)
                model(mx.array([chunk]), cache=history.kv)
                mx.eval([cache.state for cache in history.kv], recorder.state())
                history.append(chunk, DENSE)
            seen = recorder.importance(model.down_norms)
        scores = fuse_ranks(seen, model.prior, self._prompt_share)
        return Selected(top_k(scores, keep, self.name), history)


class RandomSelector:
    """Arbitrary neurons: the floor that every other selector must beat."""

    name = "random"

    def __init__(self, model: Model, seed: int = 0) -> None:
        self._widths = [spec.d_ffn for spec in model.checkpoint.layout.ffns]
        self._seed = seed

    def select(self, instruction: Instruction, keep: Sequence[int]) -> Selected:
        """Draw without replacement, from a generator seeded by the seed and the instruction."""
        digest = hashlib.sha256(self.reads(instruction)).digest()
        generator = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        ids = [
            np.sort(generator.choice(width, size=k, replace=False)).astype(np.int32)
            for width, k in zip(self._widths, keep, strict=True)
        ]
        return Selected(Selection(tuple(ids), tuple(self._widths), self.name))

    def reads(self, instruction: Instruction) -> bytes:
        """The seed and the words."""
        return f"{self._seed}:{instruction.text}".encode()


class CachedSelector:
    """Returns a cached selection, or calls another selector and caches its choice. A hit leaves the model as it is.

    Args:
        selector: may depend on nothing but the checkpoint, *k* and its `reads`, since the key holds only these.
        cache: may be shared with other selectors and other models.
    """

    def __init__(self, model: Model, selector: RepeatableSelector, cache: SelectionCache) -> None:
        self.name = selector.name
        self.cache = cache
        self._model = model
        self._selector = selector

    def select(self, instruction: Instruction, keep: Sequence[int]) -> Selected:
        """The same neurons that the selector would choose."""
        checkpoint = self._model.checkpoint
        # The checkpoint's id covers its predictor and its prior.
        digest = hashlib.sha256(f"ifprune-selecting-1:{checkpoint.id}:{self.name}:".encode())
        digest.update(np.array([len(keep), *keep], dtype="<i8").tobytes())
        digest.update(self._selector.reads(instruction))
        key = digest.hexdigest()
        selection = self.cache.get(key, tuple(spec.d_ffn for spec in checkpoint.layout.ffns), tuple(keep))
        if selection is None:
            selection = self._selector.select(instruction, keep).selection
            self.cache.put(key, selection)
        return Selected(selection)


class SharedSelector:
    """The leader's choice, on every rank of a model that several share.

    Args:
        selector: chooses; where it does not run, it is not used.
        everywhere: it computes with the model, so that all ranks run it; else the leader alone does.
    """

    def __init__(self, name: str, ranks: Ranks, selector: Selector | None, everywhere: bool) -> None:
        self.name = name
        self._ranks, self._selector, self._everywhere = ranks, selector, everywhere

    def select(self, instruction: Instruction, keep: Sequence[int]) -> Selected:
        """The same neurons on every rank; the history is a rank's own part."""
        selected: Selected | None = None

        def run() -> Selected:
            assert self._selector is not None
            return self._selector.select(instruction, keep)

        if self._everywhere:
            with self._ranks.together():
                selected = run()
        selection = share_selection(self._ranks, lambda: (selected or run()).selection)
        return Selected(selection, None if selected is None else selected.history)


def share_selection(ranks: Ranks, choose: Callable[[], Selection]) -> Selection:
    """What `choose` gives on the leader, on every rank."""

    def packed() -> tuple[list[str], list[int], str]:
        selection = choose()
        ids = [base64.b64encode(ids.astype("<i4").tobytes()).decode() for ids in selection.ids]
        return ids, list(selection.widths), selection.selector

    ids, widths, selector = ranks.once(packed)
    return Selection(tuple(np.frombuffer(base64.b64decode(one), "<i4") for one in ids), tuple(widths), selector)


def make_selector(model: Model, name: str | Selector | None = None, *, seed: int = 0) -> Selector:
    """A selector by name; None takes the checkpoint's default, a selector is returned as it is.

    All but `activation` use `model.selection_cache`.

    Raises:
        IfpruneError: if the name is unknown.
        CheckpointError: for `learned` without a predictor in the checkpoint.
    """
    if name is None:
        name = model.checkpoint.default_selector
    elif not isinstance(name, str):
        return name
    if (ranks := model.ranks) is not None:
        own_layers = name == "learned" and model.checkpoint.predictor_layers > 0
        everywhere = name == "activation" or own_layers
        runs = everywhere or ranks.leads
        return SharedSelector(name, ranks, _selector(model, name, seed) if runs else None, everywhere)
    return _selector(model, name, seed)


def _selector(model: Model, name: str, seed: int) -> Selector:
    selector: RepeatableSelector
    if name == "activation":
        return ActivationSelector(model)
    if name == "learned":
        if model.predictor is None:
            raise CheckpointError(
                f"{model.checkpoint.path}: has no trained predictor; use --selector activation, "
                "or convert with --predictor DIR"
            )
        selector = LearnedSelector(model, model.predictor)
    elif name == "static":
        selector = StaticSelector(model)
    elif name == "random":
        selector = RandomSelector(model, seed)
    else:
        raise IfpruneError(f"unknown selector {name!r}; choose learned, activation, static or random")
    if model.ranks is not None and model.checkpoint.predictor_layers and name == "learned":
        return selector  # what one rank finds in its cache, another may not
    return CachedSelector(model, selector, model.selection_cache)
