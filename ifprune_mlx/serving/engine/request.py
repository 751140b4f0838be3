"""What goes into the serving engine and what comes out of it. Plain data; knows no model and no HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ifprune_mlx.errors import IfpruneError
from ifprune_mlx.selection.selection import Selection

POLICIES = ("first", "turn", "auto")
STOP, LENGTH = "stop", "length"


class EngineFullError(IfpruneError):
    """As many jobs wait as the queue holds; try again later (HTTP: 429)."""


class EngineClosedError(IfpruneError):
    """The engine is being shut down and answers nothing any more (HTTP: 503)."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down; ask again when it is back")


class GenerationFailedError(RuntimeError):
    """The model itself failed while it computed a batch, through no fault of the job (HTTP: 500)."""


@dataclass(frozen=True)
class SelectionParams:
    """What chooses the neurons of a job.

    Attributes:
        selector: `learned`, `activation`, `static` or `random`; None takes the checkpoint's default.
        selection: a fixed one (a task that was looked up); no selector runs.
        dense: all neurons; no selector runs.
        density, active_parameters: the budget; None takes the checkpoint's. A fixed selection has its own.
        policy: `first` and `turn` select by `Request.instruction` and differ only in what that is (first or last
            user message). `auto` does too, but keeps the live selection where the new one agrees with it by
            `ifprune_mlx.session.SWITCH_BELOW` or more and both keep the same number of neurons; `activation` always
            selects.
    """

    selector: str | None = None
    selection: Selection | None = None
    dense: bool = False
    density: float | None = None
    active_parameters: int | None = None
    policy: str = "first"


@dataclass(frozen=True)
class SamplingParams:
    """How a token is drawn from the model's distribution. The names and meanings are mlx-lm's.

    Attributes:
        temperature: 0 takes the most likely token, and nothing below but penalties and bias matters then.
        top_p: above 0, at most 1; 1 is off.
        top_k: 0 is off.
        min_p: from 0 to 1; 0 is off.
        repetition_penalty: above 0; 1 is off. Counts the last tokens of prompt and answer, as in mlx-lm.
        presence_penalty, frequency_penalty: from -2 to 2; 0 is off. They count the last tokens of prompt and answer.
        logit_bias: token id -> what is added to its logit.
        seed: the same seed, prompt and selection draw the same tokens; None draws anew each time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True)
class Request:
    """One answer to be computed.

    Attributes:
        tokens: the rendered prompt, at least one token.
        instruction: what the selector reads.
        max_tokens: above 0; fewer come where the context ends before.
        stop: strings that end the answer; neither they nor what follows is part of the text, whatever tokens they span.
        logprobs: None for none, else how many top alternatives each token comes with, 0 to 20.
    """

    tokens: tuple[int, ...]
    instruction: str
    choice: SelectionParams
    sampling: SamplingParams
    max_tokens: int
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token with its natural-log probability, after penalties and bias, before temperature.

    Attributes:
        top: the most likely tokens as (id, text, logprob), the likeliest first.
    """

    id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True)
class RequestStats:
    """What one job took. Seconds, plain numbers.

    Attributes:
        finish_reason: `stop` (end of text or a stop string) or `length`. A job that is cancelled has no stats: nobody
            waits for them.
        matched_stop: the stop string that ended it; None otherwise.
        completion_tokens: generated, with an end-of-text token.
        cached_tokens: prompt tokens whose KV entries were there already.
        selection: hash of the selection that computed it; None if dense.
        selector: what chose it; `dense` if all neurons were active.
        overlap: share of the selection that was live before the switch it caused; None if it caused none.
        queue_s: from the call to the start of selecting or prefilling, without `select_s`.
        select_s: finding the selection.
        switch_s: moving neurons, for the job that caused the switch; 0 for those that joined.
        prefill_s: reading the prompt, up to the first token.
        decode_s: the tokens after the first.
        tokens_per_s: of the tokens after the first; 0 if there are none.
        batch: the most jobs that were decoded together with it, itself included.
    """

    finish_reason: str
    matched_stop: str | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    selection: str | None
    selector: str
    density: float
    overlap: float | None
    queue_s: float
    select_s: float
    switch_s: float
    prefill_s: float
    decode_s: float
    tokens_per_s: float
    batch: int


@dataclass(frozen=True)
class RequestOutput:
    """A stretch of an answer.

    Attributes:
        text: what is now final; empty while a stop string or a UTF-8 sequence is undecided.
        tokens: those generated since the last piece, if the job asks for `logprobs`; else none. Of an answer that a
            stop string ends, only the tokens that gave its text.
        stats: in the last piece only.
        selection: what computed the answer, beside `stats`; None if dense.
    """

    text: str
    tokens: tuple[TokenLogprob, ...] = ()
    stats: RequestStats | None = None
    selection: Selection | None = None


@dataclass(frozen=True)
class EngineStats:
    """What an engine has done since it began. Tokens and seconds are sums over the `RequestStats` of answered jobs.

    Attributes:
        requests: jobs that ended: answered, failed or cancelled.
        failed: ended with an error, also at `Engine.close`.
        running: jobs being prefilled or decoded now.
        waiting: jobs in the queue now.
        switches: how often another selection (or dense) was made active.
        selection: hash of the live selection; None if dense.
        prompt_cache_bytes: of the KV caches of finished jobs.
        active_bytes: what MLX's arrays take in this process, the model's included.
        spare_bytes: what MLX keeps of arrays that are no more, for the next ones.
    """

    requests: int
    failed: int
    cancelled: int
    running: int
    waiting: int
    switches: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    selection: str | None
    select_s: float
    switch_s: float
    prefill_s: float
    decode_s: float
    prompt_cache_bytes: int
    active_bytes: int
    spare_bytes: int
