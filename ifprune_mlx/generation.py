"""Select, switch, prefill, decode: one answer, with its timings.

Sampling, caches and the decoding loop are mlx-lm's; this module decides which selection computes what, and never
mixes KV entries of two selections unless it is told to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationResponse as LMResponse
from mlx_lm.generate import stream_generate as lm_stream_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .errors import IfpruneError, PromptError
from .history import DENSE, History
from .model import Model, Progress, Switch
from .selection import Selection
from .selectors import FixedSelector, Instruction, Selector, make_selector

Messages = Sequence[dict[str, Any]]
Prompt = str | Sequence[int] | Messages
REPREFILL, KEEP = "reprefill", "keep"


@dataclass(frozen=True)
class Stats:
    """What one answer took. Seconds, bytes, plain numbers.

    Attributes:
        selector: what chose the neurons; `dense` if all were active.
        selection: the selection's hash; None if dense.
        overlap: share of the selection that was active before it; None at the first.
        reused_tokens: prompt tokens whose KV entries were there already.
        select_s: finding the selection (for `activation` this includes a dense prefill of the prompt).
        switch_s: moving neurons.
        prefill_s: reading the rest of the prompt, up to the first token.
        decode_s: the tokens after the first.
    """

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    reused_tokens: int
    selector: str
    selection: str | None
    density: float
    overlap: float | None
    active_parameters: int
    total_parameters: int
    select_s: float
    switch_s: float
    prefill_s: float
    decode_s: float
    tokens_per_s: float
    peak_memory: int


@dataclass
class GenerationResponse(LMResponse):
    """mlx-lm's response; the last one of an answer carries `stats`."""

    stats: Stats | None = None


@dataclass(frozen=True)
class Request:
    """One answer to be computed; what `Session` and `stream_generate` both boil down to.

    Attributes:
        tokens: everything that the model must have read before it answers.
        instruction: what the selector reads.
        selector: chooses the selection; None goes on with `selection`.
        selection: used where there is no selector, None being the dense model; beside a selector, what `switch_below`
            compares with.
        keep: *k* per FFN for the selector.
        on_switch: `reprefill` recomputes history that another selection computed, `keep` goes on from it.
        switch_below: keep `selection` unless the new one overlaps it by less than this; None always switches.
    """

    tokens: list[int]
    instruction: str
    selector: Selector | None
    selection: Selection | None
    keep: tuple[int, ...]
    on_switch: str = REPREFILL
    switch_below: float | None = None


class _Cancelled(Exception):
    """The caller's `cancel` said so; never leaves this module."""


def generate(model: Model, tokenizer: TokenizerWrapper, prompt: Prompt, *, verbose: bool = False, **kwargs: Any) -> str:
    """The whole answer as text, as `mlx_lm.generate` gives it. Takes what `stream_generate` takes."""
    text = ""
    for response in stream_generate(model, tokenizer, prompt, **kwargs):
        if verbose:
            print(response.text, end="", flush=True)
        text += response.text
    if verbose:
        print()
    return text


def stream_generate(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    *,
    max_tokens: int = 256,
    selector: str | Selector | None = None,
    selection: Selection | None = None,
    dense: bool = False,
    density: float | None = None,
    active_parameters: int | None = None,
    memory: int | None = None,
    instruction: str | None = None,
    prompt_cache: History | None = None,
    on_switch: str = REPREFILL,
    seed: int = 0,
    cancel: Callable[[], bool] | None = None,
    progress: Progress | None = None,
    max_kv_size: int | None = None,
    **kwargs: Any,
) -> Iterator[GenerationResponse]:
    """Select neurons for the prompt, switch to them, and stream the answer.

    Args:
        prompt: a string or token ids, taken as they are (as in mlx-lm), or chat messages, put into the chat template.
        max_tokens: the most tokens to generate; -1 for no limit.
        selector: a name or an object; None takes the checkpoint's default.
        selection: use this selection, no selector.
        dense: use all neurons, no selector.
        density, active_parameters, memory: the budget; see `ifprune_mlx.budget.resolve_keep`.
        instruction: what the selector reads; by default the first user message, or the prompt.
        prompt_cache: goes on after what this history holds (and updates it); `prompt` is then only what is new.
        on_switch: what to do with history that another selection computed: `reprefill` it, or `keep` it.
        seed: for the random selector.
        cancel: asked between tokens and prefill chunks; True ends the answer with what is there.
        progress: called with (prompt tokens read, prompt tokens).
        max_kv_size: as in mlx-lm, for models without caches of their own.
        kwargs: `sampler`, `logits_processors`, `kv_bits`, `kv_group_size`, `quantized_kv_start`, `prefill_step_size`, ...,
            as in `mlx_lm.stream_generate`.

    Yields:
        mlx-lm's responses; the last one has `finish_reason` and `stats`.

    Raises:
        PromptError: if the prompt is empty or longer than the context.
        BudgetError, SelectionError, PredictorError: as the parts raise them.
    """
    tokens = encode_prompt(tokenizer, prompt)
    history = prompt_cache if prompt_cache is not None else History.empty(model, max_kv_size)
    chosen: Selector | None
    if dense:
        chosen, selection = None, None
    elif selection is not None:
        chosen = FixedSelector(model, selection)
    else:
        chosen = (
            make_selector(model, selector, seed=seed) if selector is None or isinstance(selector, str) else selector
        )
    request = Request(
        tokens=history.tokens + tokens,
        instruction=instruction if instruction is not None else _instruction(tokenizer, prompt),
        selector=chosen,
        selection=selection,
        keep=model.keep(density, active_parameters, memory),
        on_switch=on_switch,
    )
    yield from answer(model, tokenizer, history, request, max_tokens, cancel=cancel, progress=progress, **kwargs)


def answer(
    model: Model,
    tokenizer: TokenizerWrapper,
    history: History,
    request: Request,
    max_tokens: int,
    *,
    cancel: Callable[[], bool] | None = None,
    progress: Progress | None = None,
    **kwargs: Any,
) -> Iterator[GenerationResponse]:
    """Compute one request and bring `history` up to date with it. See `stream_generate` for arguments and errors."""
    _check(model, request, max_tokens)

    def checked(done: int, total: int) -> None:
        if progress is not None:
            progress(done, total)
        if cancel is not None and cancel():
            raise _Cancelled

    start = time.perf_counter()
    live = model.selection
    try:
        selection = _select(model, history, request, checked)
    except _Cancelled:
        model.switch(live)
        yield _cancelled(model, request, time.perf_counter() - start)
        return
    except IfpruneError:
        raise
    except BaseException:
        history.clear(model)  # a selector's own prefill may have died between two layers
        raise
    selected = time.perf_counter()
    switch = model.switch(selection)
    overlap = selection.overlap(live) if selection is not None and live is not None else None
    reused = _rewind(model, history, request.tokens, _owners(selection), request.on_switch)
    unread = request.tokens[reused:]
    owner = selection.hash if selection is not None else DENSE
    read = len(history.tokens)
    timing = _Timing(selected - start, switch)

    def on_prefill(done: int, total: int) -> None:
        # Entries for `done` tokens are complete in every layer when mlx-lm calls this.
        history.append(request.tokens[len(history.tokens) : read + done], owner)
        if done < total:
            checked(done, total)
        elif progress is not None:
            # mlx-lm has read the first answer token too by now; cancelling waits until that one is in `history`.
            progress(done, total)

    decode_start = prefill_start = time.perf_counter()
    count = 0
    stream = lm_stream_generate(
        model.module,
        tokenizer,
        mx.array(unread),
        max_tokens,
        prompt_cache=history.kv,
        prompt_progress_callback=on_prefill,
        **kwargs,
    )
    try:
        for response in stream:
            if response.generation_tokens > count:
                count = response.generation_tokens
                if count == 1:
                    decode_start = time.perf_counter()
                    timing.prefill_s = decode_start - prefill_start
                history.append([response.token], owner)
            timing.decode_s = time.perf_counter() - decode_start
            stop = response.finish_reason
            if stop is None and cancel is not None and cancel():
                stop = "cancelled"
            fields = dict(vars(response), finish_reason=stop, prompt_tokens=len(request.tokens))
            if stop is None:
                yield GenerationResponse(**fields)
                continue
            stats = _stats(model, request, timing, stop, count, reused, overlap)
            yield GenerationResponse(**fields, stats=stats)
            break
    except _Cancelled:
        stats = _stats(model, request, timing, "cancelled", count, reused, overlap)
        yield _empty_response(stats)
    except GeneratorExit:
        raise
    except BaseException:
        history.clear(model)  # the model call may have died between two layers, whose caches are then out of step
        raise
    finally:
        stream.close()


@dataclass
class _Timing:
    select_s: float
    switch: Switch
    prefill_s: float = 0.0
    decode_s: float = 0.0


def _check(model: Model, request: Request, max_tokens: int) -> None:
    check_prompt(model, request.tokens)
    if max_tokens == 0 or max_tokens < -1:
        raise PromptError(f"max tokens is {max_tokens}; give a number above 0, or -1 for no limit")
    if request.on_switch not in (REPREFILL, KEEP):
        raise IfpruneError(f"on_switch {request.on_switch!r} is unknown; choose {REPREFILL} or {KEEP}")


def check_prompt(model: Model, tokens: Sequence[int]) -> None:
    """Raise PromptError if there is nothing to read, or more than the model's context holds."""
    if not tokens:
        raise PromptError("the prompt is empty; write something to answer")
    limit = model.context_length
    if limit is not None and len(tokens) >= limit:
        raise PromptError(
            f"the prompt has {len(tokens)} tokens, the model's context holds {limit}; shorten it or start anew"
        )


def _select(model: Model, history: History, request: Request, progress: Progress) -> Selection | None:
    """The selection to compute the answer with; a selector's own dense prefill goes into `history`."""
    if request.selector is None:
        return request.selection
    base = History.empty(model, history.max_kv_size)
    if request.on_switch == KEEP:
        _rewind(model, history, request.tokens, set(), KEEP)
        base = history
    instruction = Instruction(request.instruction, tuple(request.tokens), base, progress)
    selected = request.selector.select(instruction, request.keep)
    if selected.history is not None:
        history.kv, history.tokens, history.spans = selected.history.kv, selected.history.tokens, selected.history.spans
    live, threshold = request.selection, request.switch_below
    if live is not None and threshold is not None and selected.selection.overlap(live) >= threshold:
        return live
    return selected.selection


def _owners(selection: Selection | None) -> set[str]:
    """Whose KV entries a selection may go on from: its own, and for `activation` the dense prefill that found it."""
    if selection is None:
        return {DENSE}
    return {selection.hash, DENSE} if selection.selector == "activation" else {selection.hash}


def _rewind(model: Model, history: History, tokens: list[int], owners: set[str], on_switch: str) -> int:
    """Cut `history` back to what of `tokens` may be gone on from; at least one token is left to read.

    Returns:
        Tokens that need not be read again.
    """
    usable = min(history.common_prefix(tokens), len(tokens) - 1)
    if on_switch == REPREFILL:
        usable = min(usable, history.owned_prefix(owners))
    if not history.trim_to(usable):
        history.clear(model)
    return len(history.tokens)


def _stats(
    model: Model, request: Request, timing: _Timing, stop: str, count: int, reused: int, overlap: float | None
) -> Stats:
    selection = model.selection
    return Stats(
        finish_reason=stop,
        prompt_tokens=len(request.tokens),
        completion_tokens=count,
        reused_tokens=reused,
        selector=selection.selector if selection is not None else DENSE,
        selection=selection.hash if selection is not None else None,
        density=selection.density if selection is not None else 1.0,
        overlap=overlap,
        active_parameters=model.active_parameters,
        total_parameters=model.total_parameters,
        select_s=timing.select_s,
        switch_s=timing.switch.seconds,
        prefill_s=timing.prefill_s,
        decode_s=timing.decode_s,
        tokens_per_s=(count - 1) / timing.decode_s if count > 1 and timing.decode_s > 0 else 0.0,
        peak_memory=mx.get_peak_memory(),
    )


def _cancelled(model: Model, request: Request, select_s: float) -> GenerationResponse:
    timing = _Timing(select_s, Switch(0.0, 0, 0, None))
    return _empty_response(_stats(model, request, timing, "cancelled", 0, 0, None))


def _empty_response(stats: Stats) -> GenerationResponse:
    return GenerationResponse(
        text="",
        token=-1,
        logprobs=mx.array([]),
        from_draft=False,
        prompt_tokens=stats.prompt_tokens,
        prompt_tps=0.0,
        generation_tokens=stats.completion_tokens,
        generation_tps=stats.tokens_per_s,
        peak_memory=stats.peak_memory / 1e9,
        finish_reason=stats.finish_reason,
        stats=stats,
    )


def _is_messages(prompt: Prompt) -> bool:
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], dict)


def encode_prompt(tokenizer: TokenizerWrapper, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: chat messages through the template, text as mlx-lm encodes it, ids as they are."""
    if isinstance(prompt, str):
        if not prompt.strip():
            return []
        special = tokenizer.bos_token is None or not prompt.startswith(tokenizer.bos_token)
        return list(tokenizer.encode(prompt, add_special_tokens=special))
    if _is_messages(prompt):
        return render_messages(tokenizer, prompt)  # type: ignore[arg-type]
    return [int(token) for token in prompt]  # type: ignore[call-overload]


def render_messages(tokenizer: TokenizerWrapper, messages: Messages) -> list[int]:
    """Token ids of chat messages, ready for an answer; plain lines where the tokenizer has no chat template.

    Raises:
        PromptError: if the template refuses the messages.
    """
    if not tokenizer.has_chat_template:
        return list(tokenizer.encode("\n".join(str(message["content"]) for message in messages) + "\n"))
    try:
        return list(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True))
    except Exception as exc:  # jinja and the templates themselves raise what they like
        raise PromptError(f"the chat template refuses these messages ({' '.join(str(exc).split())[:200]})") from None


def _instruction(tokenizer: TokenizerWrapper, prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    if _is_messages(prompt):
        users = [m for m in prompt if m["role"] == "user"]  # type: ignore[index]
        return str((users or list(prompt))[0]["content"])  # type: ignore[index]
    return str(tokenizer.decode([int(token) for token in prompt]))  # type: ignore[call-overload]
