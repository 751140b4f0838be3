"""Select, switch, prefill, decode: one answer, with its timings.

Sampling, caches and the decoding loop are mlx-lm's. This module decides which selection computes what. It mixes KV
entries of two selections only on request.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationResponse as LMResponse
from mlx_lm.generate import stream_generate as lm_stream_generate
from mlx_lm.sample_utils import make_sampler as lm_make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.chat_template import Prompt, check_ids, check_prompt, encode_prompt, instruction_of, is_chat
from ifprune_mlx.constraint import Grammars, json_rule
from ifprune_mlx.detokenizer import continuing
from ifprune_mlx.errors import IfpruneError, PromptError
from ifprune_mlx.model import Model, Progress
from ifprune_mlx.prompt_cache import DENSE, History, Pace, check_quantizable, quantize
from ifprune_mlx.selection.selection import Selection
from ifprune_mlx.selection.selectors import Instruction, Selector, make_selector

REPREFILL, KEEP = "reprefill", "keep"
Sampler = Callable[[mx.array], mx.array]
"""Log-probabilities `[B, vocabulary]` -> the tokens drawn `[B]`."""
# Below, float16 overflows or the filter keeps nothing, and tokens would be noise; above, all are about equally likely.
_LEAST_TEMPERATURE, _LEAST_TOP_P, _MOST_TEMPERATURE = 1e-4, 1e-4, 1e4
_QUANTIZED_START = 5000  # mlx-lm's default


@dataclass(frozen=True)
class Stats:
    """The cost of one answer. Times are in seconds, memory is in bytes.

    Attributes:
        selector: the selector's name; `dense` if all neurons were active.
        selection: the selection's hash; None if dense.
        overlap: share of the selection that was active before; None for the first selection.
        reused_tokens: prompt tokens whose KV entries existed already.
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
class GenerationRequest:
    """One answer to compute, for `Session` and `stream_generate`.

    Attributes:
        tokens: all tokens that the model reads before it answers.
        instruction: the text for the selector.
        selector: chooses the selection; None uses `selection`.
        selection: without a selector, the one to use (None: dense); with one, the live one, for `switch_below`.
        keep: *k* per FFN for the selector.
        on_switch: `reprefill` recomputes history that another selection computed, `keep` continues from it.
        switch_below: keep `selection` unless the new one's agreement with it (`Selection.agreement`) is below this;
            None always switches.
        continues: the answer continues the text of `tokens`, and is no message of its own.
        switched: called with the selection once it is active, before the prompt is read; not if dense.
    """

    tokens: list[int]
    instruction: str
    selector: Selector | None
    selection: Selection | None
    keep: tuple[int, ...]
    on_switch: str = REPREFILL
    switch_below: float | None = None
    continues: bool = False
    switched: Callable[[Selection], object] | None = None


def usable_temperature(temperature: float, top_p: float = 1.0) -> float:
    """The temperature to sample at: 0, the likeliest token, if either is too small to compute with; at most 10,000."""
    if temperature < _LEAST_TEMPERATURE or top_p < _LEAST_TOP_P:
        return 0.0
    return min(temperature, _MOST_TEMPERATURE)


def make_sampler(temperature: float = 0.0, *, top_p: float = 1.0, min_p: float = 0.0, top_k: int = 0) -> Sampler:
    """mlx-lm's sampler, for `stream_generate` and `Session`: any values in range give tokens that the model means.

    Args:
        temperature: 0 takes the likeliest token.
        top_p: sample among the likeliest tokens that have this probability together, above 0; 1 is off.
        min_p: drop tokens less likely than this share of the likeliest one; 0 is off.
        top_k: sample among this many tokens; 0 is off.

    Raises:
        IfpruneError: if a value is out of its range.
    """
    if not (0 <= temperature < math.inf and 0 < top_p <= 1 and 0 <= min_p <= 1 and top_k >= 0):
        raise IfpruneError(
            "sampling options out of range: --temp >= 0, 0 < --top-p <= 1, 0 <= --min-p <= 1, --top-k >= 0"
        )
    sampler: Sampler = lm_make_sampler(usable_temperature(temperature, top_p), top_p=top_p, min_p=min_p, top_k=top_k)
    return sampler


def check_options(options: dict[str, Any]) -> None:
    """Raise IfpruneError for an option of mlx-lm's generation that cannot be had here."""
    for name in ("draft_model", "num_draft_tokens"):
        if options.get(name) is not None:
            raise IfpruneError(f"{name}: a second model that drafts tokens is not supported; leave it out")
    step = options.get("prefill_step_size", 1)
    if type(step) is not int or step < 1:  # mlx-lm would read steps of no tokens for ever
        raise IfpruneError(f"prefill_step_size is {step!r}; give a whole number above 0")


def _likeliest(logprobs: mx.array) -> mx.array:
    return mx.argmax(logprobs, axis=-1)


class _Cancelled(Exception):
    """The caller's `cancel` returned True; never leaves this module."""


def generate(model: Model, tokenizer: TokenizerWrapper, prompt: Prompt, *, verbose: bool = False, **kwargs: Any) -> str:
    """The whole answer as text. Takes the arguments of `stream_generate`; `verbose` prints the text as it comes."""
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
    json_schema: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Iterator[GenerationResponse]:
    """Select neurons for the prompt, switch to them, and stream the answer.

    Args:
        prompt: a string or token ids, used unchanged (as in mlx-lm), or chat messages for the chat template.
        max_tokens: the most tokens to generate; -1 for no limit.
        selector: a name or an object; None takes the checkpoint's default.
        selection: use this selection, no selector.
        dense: use all neurons, no selector.
        density, active_parameters, memory: the budget; see `ifprune_mlx.checkpoint.budget.resolve_keep`.
        instruction: the text for the selector; by default the first user message, or the prompt.
        prompt_cache: continue after this history, and update it; `prompt` is then only the new part.
        on_switch: `reprefill` or `keep` the history that another selection computed.
        seed: for the random selector.
        cancel: called between tokens and prefill chunks; True ends the answer early.
        progress: called with (prompt tokens read, prompt tokens).
        max_kv_size: how many tokens a layer's KV cache may hold; see `ifprune_mlx.prompt_cache.make_cache`.
        json_schema: the answer is JSON that this allows, after the thoughts of a model that thinks.
        kwargs: `sampler`, `logits_processors`, `kv_bits`, `kv_group_size`, `quantized_kv_start`,
            `prefill_step_size`, ..., as in `mlx_lm.stream_generate`, but no `draft_model`. `make_sampler` here makes
            samplers. With `prefill_seconds`, the prompt is read in steps that take about so long, or
            `prefill_step_size` tokens if these take less: `cancel` is heard after each.

    Yields:
        mlx-lm's responses; the last one has `finish_reason` and `stats`.

    Raises:
        PromptError: if the prompt is empty or longer than the context.
        BudgetError: if the budget cannot be met.
        GrammarError: if the JSON schema cannot be used.
        SelectionError, PredictorError: if no selection can be made, or it does not fit the model.
        ModelBusyError: while another answer of the model is under way.
    """
    tokens = encode_prompt(tokenizer, prompt)
    check_ids(model, tokens)
    history = prompt_cache if prompt_cache is not None else History.empty(model, max_kv_size)
    if max_kv_size not in (None, history.max_kv_size):
        raise IfpruneError(
            f"max_kv_size {max_kv_size}: the given prompt_cache has its own bound, {history.max_kv_size}; leave it "
            "out, or make the cache with History.empty(model, max_kv_size)"
        )
    if dense:
        selection = None
    chosen = None if dense or selection is not None else make_selector(model, selector, seed=seed)
    request = GenerationRequest(
        tokens=history.tokens + tokens,
        instruction=instruction if instruction is not None else instruction_of(tokenizer, prompt),
        selector=chosen,
        selection=selection,
        keep=model.keep(density, active_parameters, memory),
        on_switch=on_switch,
        continues=not is_chat(tokenizer, prompt),
    )
    if json_schema is not None:
        rule, continues = f"answer: {json_rule(json_schema)}", request.continues
        grammar = Grammars(tokenizer).compile(rule, request.tokens, continues=continues)
        kwargs["logits_processors"] = [*(kwargs.get("logits_processors") or ()), grammar.constraint()]
    steps = answer(model, tokenizer, history, request, max_tokens, cancel=cancel, progress=progress, **kwargs)
    thread = threading.get_ident()
    try:
        yield from model.lock.during(steps)
    finally:
        history.settle(model, thread)


def answer(
    model: Model,
    tokenizer: TokenizerWrapper,
    history: History,
    request: GenerationRequest,
    max_tokens: int,
    *,
    cancel: Callable[[], bool] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Generator[GenerationResponse, None, None]:
    """Compute one request and update `history`. See `stream_generate` for arguments and errors."""
    check_prompt(model, request.tokens)
    if max_tokens == 0 or max_tokens < -1:
        raise PromptError(f"max tokens is {max_tokens}; give a number above 0, or -1 for no limit")
    if request.on_switch not in (REPREFILL, KEEP):
        raise IfpruneError(f"on_switch {request.on_switch!r} is unknown; choose {REPREFILL} or {KEEP}")
    check_options(options)
    seconds = options.pop("prefill_seconds", None)
    # Ranks read in the same steps, whatever time these take on each.
    run = _Run(model, history, request, cancel, progress, Pace(seconds if model.ranks is None else None))
    try:
        run.select_and_switch()
        yield from run.decode(tokenizer, max_tokens, options)
    except _Cancelled:
        yield run.cancelled()
    except (IfpruneError, GeneratorExit):
        raise
    except BaseException:
        history.clear(model)  # the model may have stopped between two layers, so their caches may not match
        raise


class _Run:
    """One answer under way, with its counts and times."""

    def __init__(
        self,
        model: Model,
        history: History,
        request: GenerationRequest,
        cancel: Callable[[], bool] | None,
        progress: Progress | None,
        pace: Pace,
    ) -> None:
        self.model, self.history, self.request, self.pace = model, history, request, pace
        self._cancel = None if cancel is None else lambda: model.agreed(cancel())
        self._progress = progress
        self.overlap: float | None = None
        self.reused = self.count = 0
        self.select_s = self.switch_s = self.prefill_s = self.decode_s = 0.0

    def select_and_switch(self) -> None:
        """Find the selection, make it active, and cut the history back to the part that may be reused."""
        live, start = self.model.selection, time.perf_counter()
        try:
            selection = self._select()
        except _Cancelled:
            self.model.switch(live)  # a selector may have left the model dense
            raise
        finally:
            self.select_s = time.perf_counter() - start
        self.switch_s = self.model.switch(selection).seconds
        if selection is not None and live is not None:
            self.overlap = selection.overlap(live)
        name = DENSE if selection is None else selection.hash
        self._rewind({name} if self.request.on_switch == REPREFILL else None)
        self.reused = len(self.history.tokens)
        if selection is not None and self.request.switched is not None:
            self.request.switched(selection)

    def _select(self) -> Selection | None:
        """The selection for the answer. A selector's own dense prefill becomes the history."""
        request, history = self.request, self.history
        if request.selector is None:
            return request.selection
        if request.on_switch == KEEP:
            self._rewind(None)
            base = history
        else:
            base = History.empty(self.model, history.max_kv_size)
        start = len(base.tokens)
        instruction = Instruction(request.instruction, tuple(request.tokens), base, self._report, self.pace)
        selected = request.selector.select(instruction, request.keep)
        selection, live, threshold = selected.selection, request.selection, request.switch_below
        if live is not None and threshold is not None and selection.agreement(live) >= threshold:
            selection = live
        if selected.history is not None:
            read = selected.history
            read.note_reader(start, selection.hash)
            history.kv, history.tokens, history.spans = read.kv, read.tokens, read.spans
        return selection

    def _rewind(self, usable: set[str] | None) -> None:
        """Cut the history back to the part of the prompt that may be reused; at least one token is left to read.

        Args:
            usable: keep only what these computed (selections' hashes or `dense`), or what was read to find them; None
                keeps everything.
        """
        tokens = self.request.tokens
        count = min(self.history.common_prefix(tokens), len(tokens) - 1)
        if usable is not None:
            count = min(count, self.history.prefix_computed_by(usable))
        if not self.history.trim_to(count):
            self.history.clear(self.model)

    def decode(
        self, tokenizer: TokenizerWrapper, max_tokens: int, options: dict[str, Any]
    ) -> Iterator[GenerationResponse]:
        """Read the rest of the prompt and stream the answer with mlx-lm."""
        computed_by = self.model.selection.hash if self.model.selection is not None else DENSE
        tokens = self.request.tokens
        if self.model.context_length is not None:
            left = self.model.context_length - len(tokens)
            max_tokens = left if max_tokens == -1 else min(max_tokens, left)

        sampler = options.pop("sampler", None) or _likeliest
        if self.model.ranks is not None:
            sampler = self.model.ranks.same_tokens(sampler)
        bits, group = options.pop("kv_bits", None), options.pop("kv_group_size", 64)
        begin = options.pop("quantized_kv_start", _QUANTIZED_START)
        if bits is not None:
            check_quantizable(self.model, self.history.kv, bits, group)

        def pack() -> None:
            # Where mlx-lm does it, which also tries the caches that rotate, and fails.
            if bits is not None:
                quantize(self.history.kv, bits, group, begin)

        def sample(logprobs: mx.array) -> mx.array:
            pack()
            return sampler(logprobs)

        def on_read(count: int) -> None:
            if count > self.reused:
                pack()
            # Entries for so many tokens are complete in every layer when this is called.
            self.history.append(tokens[len(self.history.tokens) : count], computed_by)
            # At the end mlx-lm has already read the first answer token: do not cancel before `history` holds it.
            self._report(count - self.reused, len(tokens) - self.reused, may_cancel=count < len(tokens))

        start = first = time.perf_counter()
        read = self._read_ahead(options.get("prefill_step_size", 2048), on_read)
        stream = lm_stream_generate(
            self.model.module,
            continuing(tokenizer, tokens if self.request.continues else ()),
            mx.array(tokens[read:]),
            max_tokens,
            prompt_cache=self.history.kv,
            prompt_progress_callback=lambda done, _: on_read(read + done),
            sampler=sample,
            **options,
        )
        try:
            for response in stream:
                if response.generation_tokens > self.count:  # the last response may repeat the last token
                    self.count = response.generation_tokens
                    self.history.append([response.token], computed_by)
                    if self.count == 1:
                        first = time.perf_counter()
                        self.prefill_s = first - start
                self.decode_s = time.perf_counter() - first
                cancelled = self._cancel is not None and self._cancel()
                stop = response.finish_reason or ("cancelled" if cancelled else None)
                fields = dict(vars(response), finish_reason=stop, prompt_tokens=len(tokens))
                yield GenerationResponse(**fields, stats=None if stop is None else self._stats(stop))
                if stop is not None:
                    return
        except IfpruneError:
            self.history.clear(self.model)  # neurons could not be read: the layers' caches do not match
            raise
        finally:
            stream.close()

    def _read_ahead(self, most: int, on_read: Callable[[int], None]) -> int:
        """If steps are to take a given time, read all but the prompt's last token; how many tokens have been read."""
        read = self.reused
        if self.pace.seconds is None:
            return read  # mlx-lm reads, in steps of one size
        try:
            for chunk in self.pace.steps(self.request.tokens[read:-1], most):
                on_read(read)
                self.model(mx.array([chunk]), cache=self.history.kv)
                mx.eval([cache.state for cache in self.history.kv])
                mx.clear_cache()
                read += len(chunk)
        except IfpruneError:
            self.history.clear(self.model)
            raise
        return read

    def cancelled(self) -> GenerationResponse:
        """The last response of an answer that was cancelled before its first token."""
        stats = self._stats("cancelled")
        return GenerationResponse(
            text="",
            token=-1,
            logprobs=mx.array([]),
            from_draft=False,
            prompt_tokens=stats.prompt_tokens,
            prompt_tps=0.0,
            generation_tokens=0,
            generation_tps=0.0,
            peak_memory=stats.peak_memory / 1e9,
            finish_reason=stats.finish_reason,
            stats=stats,
        )

    def _report(self, done: int, total: int, may_cancel: bool = True) -> None:
        if self._progress is not None:
            self._progress(done, total)
        if may_cancel and self._cancel is not None and self._cancel():
            raise _Cancelled

    def _stats(self, finish_reason: str) -> Stats:
        selection = self.model.selection
        return Stats(
            finish_reason=finish_reason,
            prompt_tokens=len(self.request.tokens),
            completion_tokens=self.count,
            reused_tokens=self.reused,
            selector=selection.selector if selection is not None else DENSE,
            selection=selection.hash if selection is not None else None,
            density=selection.density if selection is not None else 1.0,
            overlap=self.overlap,
            active_parameters=self.model.active_parameters,
            total_parameters=self.model.total_parameters,
            select_s=self.select_s,
            switch_s=self.switch_s,
            prefill_s=self.prefill_s,
            decode_s=self.decode_s,
            tokens_per_s=(self.count - 1) / self.decode_s if self.count > 1 and self.decode_s > 0 else 0.0,
            peak_memory=mx.get_peak_memory(),
        )
