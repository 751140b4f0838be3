"""Requests of the serving engine: their parameters, outputs and state."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from ifprune_mlx.constraint import Constraint, Grammar
from ifprune_mlx.errors import IfpruneError
from ifprune_mlx.prompt_cache import DENSE
from ifprune_mlx.selection.selection import Selection
from ifprune_mlx.thinking import Thinking

if TYPE_CHECKING:
    from ifprune_mlx.serving.engine.output_processor import OutputProcessor

POLICIES = ("first", "turn", "auto", "system")


class EngineFullError(IfpruneError):
    """The queue is full (HTTP: 429)."""


class EngineClosedError(IfpruneError):
    """The engine is closed or closing (HTTP: 503)."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down; ask again when it is back")


class GenerationFailedError(RuntimeError):
    """The model failed while it computed a batch; the request is not at fault (HTTP: 500)."""


@dataclass(frozen=True)
class SelectionParams:
    """How a request's neurons are selected.

    All policies select by `Request.instruction`: the first user message for `first`, the last one for `turn` and
    `auto`, the system prompt and the tools' names for `system`. `auto` goes through the conversation's user messages:
    from one to the next the selection stays if their agreement is `ifprune_mlx.session.SWITCH_BELOW` or more. So it is
    the same whoever else asks. The selector `activation` reads the whole prompt and always selects, but for `system` it
    reads `Request.instruction` alone.
    """

    selector: str | None = None  # `learned`, `activation`, `static` or `random`; None takes the checkpoint's default
    selection: Selection | None = None  # a fixed selection, such as a task's; no selector runs
    dense: bool = False  # all neurons; no selector runs
    density: float | None = None  # this or the next is the budget; None takes the checkpoint's
    active_parameters: int | None = None
    policy: str = "first"


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled, in mlx-lm's terms. The penalties count the last tokens of prompt and answer."""

    temperature: float = 0.0  # 0 takes the most likely token, after penalties and bias
    top_p: float = 1.0  # above 0, at most 1; 1 is off
    top_k: int = 0  # 0 is off
    min_p: float = 0.0  # from 0 to 1; 0 is off
    repetition_penalty: float = 1.0  # from 0.01 to 100; 1 is off
    presence_penalty: float = 0.0  # from -2 to 2; 0 is off
    frequency_penalty: float = 0.0  # from -2 to 2; 0 is off
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> number added to its logit
    seed: int | None = None  # equal seeds, prompts and selections give equal tokens; None draws a random seed


@dataclass(frozen=True)
class ThinkingBudget:
    """A bound on a model's thoughts, which are then closed. All tuples hold token ids."""

    tokens: int  # the most tokens of thoughts, above 0
    start: tuple[int, ...]  # the mark of thoughts; empty if the answer begins with thoughts
    end: tuple[int, ...]  # the mark of their end
    closing: tuple[int, ...]  # what closes them


@dataclass(frozen=True)
class Request:
    """One answer to compute."""

    tokens: tuple[int, ...]  # the rendered prompt, at least one token
    instruction: str  # the selector reads it, see `SelectionParams`
    selection_params: SelectionParams
    sampling: SamplingParams
    max_tokens: int  # above 0; the answer is shorter if the context ends first
    stop: tuple[str, ...] = ()  # strings that end the answer; its text ends before them, whatever tokens they span
    logprobs: int | None = None  # top alternatives per token, 0 to 20; None gives no log-probabilities
    continues: bool = False  # the answer continues the prompt's text, and is no message of its own
    grammar: Grammar | None = None  # the answer must satisfy it
    earlier: tuple[str, ...] = ()  # the user messages before the instruction, oldest first, for policy `auto`
    # The instruction's tokens where policy `system` selects by it alone; the selector `activation` reads them.
    instruction_tokens: tuple[int, ...] = ()
    thinking: Thinking | None = None  # stop strings do not count within thoughts
    thinking_budget: ThinkingBudget | None = None


def to_rank(request: Request) -> dict[str, Any]:
    """What a rank that does not lead needs of a request, as JSON: nothing of its sampling, as it gets the tokens."""
    params = request.selection_params
    fixed = params.selection
    return {
        "tokens": request.tokens,
        "instruction": request.instruction,
        "earlier": request.earlier,
        "instruction_tokens": request.instruction_tokens,
        "max_tokens": request.max_tokens,
        "params": {field.name: getattr(params, field.name) for field in fields(params) if field.name != "selection"},
        "selection": fixed and [[ids.tolist() for ids in fixed.ids], fixed.widths, fixed.selector],
    }


def from_rank(told: dict[str, Any]) -> Request:
    """The request that `to_rank` told of."""
    fixed = told["selection"]
    if fixed is not None:
        ids, widths, selector = fixed
        fixed = Selection(tuple(np.array(one, np.int32) for one in ids), tuple(widths), selector)
    return Request(
        tuple(told["tokens"]),
        told["instruction"],
        SelectionParams(**told["params"], selection=fixed),
        SamplingParams(),
        told["max_tokens"],
        earlier=tuple(told["earlier"]),
        instruction_tokens=tuple(told["instruction_tokens"]),
    )


@dataclass(frozen=True)
class PromptProgress:
    """How far a request is before its first token."""

    read: int | None  # prompt tokens that need not be read any more; None while the request waits
    total: int  # tokens of the prompt
    selection: Selection | None = None  # of the answer, told once, before its prompt is read; None if dense


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token with its natural-log probability, after penalties and bias, before temperature."""

    id: int
    text: str  # see `ifprune_mlx.detokenizer.TokenTexts`
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()  # the most likely tokens as (id, text, logprob), the likeliest first
    offset: int = 0  # characters of the answer before it


@dataclass(frozen=True)
class RequestStats:
    """The figures of one answered request; times in seconds."""

    finish_reason: str  # `stop` (end of text or a stop string) or `length`
    matched_stop: str | None  # the stop string that ended the answer
    prompt_tokens: int
    completion_tokens: int  # an end-of-text token included
    cached_tokens: int  # prompt tokens whose KV entries came from the prefix cache
    selection: str | None  # hash of the selection that computed the answer; None if dense
    selector: str  # `dense` if all neurons were active
    density: float
    overlap: float | None  # share of the selection that was live before the switch; None without a switch
    queue_s: float  # from the call to the start of prefill, without `select_s` and `switch_s`
    select_s: float  # finding the selection
    switch_s: float  # moving neurons; 0 for requests that joined a batch
    prefill_s: float  # from the start of prefill to the first token
    decode_s: float  # from the first token to the last
    tokens_per_s: float  # without the first token; 0 if there is no other
    batch: int  # the most requests that were decoded together, this one included


@dataclass(frozen=True)
class RequestOutput:
    """A part of an answer."""

    text: str  # new final text; empty while a stop string or a UTF-8 sequence is incomplete
    tokens: tuple[TokenLogprob, ...] = ()  # the tokens of that text, if the request has `logprobs`
    stats: RequestStats | None = None  # in the last output only
    selection: Selection | None = None  # of the answer, in the last output only; None if dense


@dataclass(frozen=True)
class EngineStats:
    """An engine's counters. Tokens and seconds are sums over the `RequestStats` of answered requests."""

    requests: int  # ended: answered, failed or cancelled
    failed: int  # ended with an error, also at `Engine.close`
    cancelled: int
    prefix_hits: int  # answered, with KV entries from the prefix cache
    running: int  # prefilled or decoded now
    waiting: int  # in the queue now
    switches: int  # how often another selection (or dense) was made active
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    selection: str | None  # hash of the live selection; None if dense
    select_s: float
    switch_s: float
    prefill_s: float
    decode_s: float
    prompt_cache_bytes: int  # size of the prefix cache
    active_bytes: int  # memory of MLX's arrays in this process, the model's included
    spare_bytes: int  # freed memory that MLX keeps for its next arrays


@dataclass(eq=False)
class RequestState:
    """A request in the engine. The worker thread uses it; any thread may `put`, and set `cancelled` and `stopped`.

    Fields without a comment are those of `RequestStats`. Points in time are those of `time.monotonic`.
    """

    request: Request
    loop: asyncio.AbstractEventLoop | None  # reads `outputs`; None on a rank that does not lead
    progress: Callable[[PromptProgress], None] | None = None  # is called in that loop
    outputs: asyncio.Queue[RequestOutput | Exception] = field(default_factory=asyncio.Queue)  # an error is the last one
    cancelled: bool = False  # nobody reads `outputs` any more
    stopped: bool = False  # it must end soon: it is cancelled, or the engine is closed
    selection: Selection | None = None  # None if dense, or not known yet
    # Requests of one key share KV caches and batches: the selection's hash, `dense`, or `scheduler.EXCLUSIVE` for a
    # request that runs alone. Empty until the request has selected.
    selection_key: str = ""
    followed: int = 0  # messages that policy `auto` has gone through; `selection` is the one after these
    serial: int = -1  # names it to other ranks
    uid: int = -1  # of its sequence in the decoder, once it runs
    constraint: Constraint | None = None  # of its answer, once it runs
    output_processor: OutputProcessor = field(init=False)  # once it runs
    arrived: float = field(default_factory=time.monotonic)
    started: float = 0.0  # when prefill began
    first_token: float = 0.0  # when the first token came
    overlap: float | None = None
    cached_tokens: int = 0
    select_s: float = 0.0
    switch_s: float = 0.0
    batch: int = 0

    def put(self, output: RequestOutput | Exception) -> None:
        """Send a part of the answer to the event loop that reads it; may be called in any thread."""
        self._in_loop(self.outputs.put_nowait, output)

    def has_read(self, tokens: int, selection: Selection | None = None) -> None:
        """Tell how many tokens of the prompt need not be read any more; may be called in any thread."""
        if self.progress is not None:
            self._in_loop(self.progress, PromptProgress(tokens, len(self.request.tokens), selection))

    def _in_loop(self, call: Callable[..., None], given: object) -> None:
        if self.loop is None:
            return
        try:
            self.loop.call_soon_threadsafe(call, given)
        except RuntimeError:  # the event loop is closed
            self.cancelled = self.stopped = True

    def stats(self, now: float) -> RequestStats:
        """The request's figures, after its last token."""
        output, selection = self.output_processor, self.selection
        assert output.finish_reason is not None
        tokens, decode_s = output.completion_tokens, now - self.first_token
        return RequestStats(
            finish_reason=output.finish_reason,
            matched_stop=output.matched_stop,
            prompt_tokens=len(self.request.tokens),
            completion_tokens=tokens,
            cached_tokens=self.cached_tokens,
            selection=None if selection is None else selection.hash,
            selector=DENSE if selection is None else selection.selector,
            density=1.0 if selection is None else selection.density,
            overlap=self.overlap,
            queue_s=max(self.started - self.arrived - self.select_s - self.switch_s, 0.0),
            select_s=self.select_s,
            switch_s=self.switch_s,
            prefill_s=self.first_token - self.started,
            decode_s=decode_s,
            tokens_per_s=(tokens - 1) / decode_s if tokens > 1 and decode_s > 0 else 0.0,
            batch=self.batch,
        )
