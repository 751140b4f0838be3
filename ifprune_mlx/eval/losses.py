"""Measures selectors by the loss of given answers, each beside its controls at the same density.

The loss is the negative log likelihood of the answer's tokens, teacher-forced, in nats per token. A row's selection
runs on the prompt and the answer. Only `activation` keeps its dense prefill.

dense              all neurons
learned            the predictor's selection for the prompt
static             the prior's selection
static-own         as static, by a prior measured on the answers to the domain's *other* prompts, in ten folds
activation         selected by the prompt's activations and the prior; the prompt stays dense, as when generating
activation-sliced  the same selection, which the prompt runs under as well
random             arbitrary neurons
matched            the prompt's own selection, by `learned` or `activation-sliced` unless another selector is given
mismatched         the matched selector's selection for another prompt of the same domain
cross-domain       the matched selector's selection for a prompt of another domain
oracle             selected by the answer's own activations and the prior; a bound that no selector can reach

Beside `dense`, every row has its acceptance (`ifprune_mlx.eval.acceptance`).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ifprune_mlx.data.tokenize import Example
from ifprune_mlx.errors import DataError, IfpruneError
from ifprune_mlx.eval.acceptance import Target, acceptance, target_of
from ifprune_mlx.eval.evaluation import Evaluation, Row
from ifprune_mlx.eval.metrics import POOLED, mean_overlaps
from ifprune_mlx.model import Model, Progress
from ifprune_mlx.prompt_cache import History
from ifprune_mlx.selection.selection import Scores, Selection, top_k
from ifprune_mlx.selection.selectors import Instruction, RandomSelector, Selector, StaticSelector, make_selector
from ifprune_mlx.sparse.importance import ImportanceRecorder, fuse_ranks, recorded

ROWS = (
    "dense",
    "learned",
    "static",
    "static-own",
    "activation",
    "activation-sliced",
    "random",
    "matched",
    "mismatched",
    "cross-domain",
    "oracle",
)
# Row name -> selector that reads the instruction.
_SELECTORS = {"learned": "learned", "activation": "activation", "activation-sliced": "activation"}
_OF_MATCHED = ("matched", "mismatched", "cross-domain")
_CHUNK = 256  # positions whose logits are in memory at once
_FOLDS = 10
_ORACLE_SHARE = 0.5  # as in the activation selector, so that the two differ only in the activations they see
Part = tuple[mx.array, mx.array]  # logits float32 `[m, vocabulary]`, and the tokens that they predict, int32 `[m]`
NOT_FINITE = "the weights are damaged or float16 overflows, try --dtype float32 or bfloat16"


def available_rows(model: Model, domains: int) -> list[str]:
    """Rows that this checkpoint and this number of domains allow, without the alias `matched`."""
    left_out = {"matched"}
    if not model.checkpoint.has_predictor:
        left_out.add("learned")
    if domains < 2:
        left_out.add("cross-domain")
    return [name for name in ROWS if name not in left_out]


def compare(
    model: Model,
    data: Mapping[str, Sequence[Example]],
    names: Sequence[str],
    keep: Sequence[int],
    *,
    matched: Selector | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure rows on every example. The last selection stays active.

    The selections of all prompts stay in memory until the end, 4 bytes per kept neuron; with `dense`, the
    probabilities of one answer as well, 4 bytes per token and word of the vocabulary.

    Args:
        data: examples by domain.
        names: from `ROWS`; with `dense`, all rows have their acceptance.
        keep: *k* per FFN.
        matched: selector of `matched`, `mismatched` and `cross-domain`; None takes the predictor, or `activation` if
            the checkpoint has none.
        progress: called with (tokens read, tokens to read), over all rows.

    Raises:
        DataError: if a domain is empty, repeats a prompt, or has too few prompts for a row.
        IfpruneError: if a name is unknown, or a loss is not a number.
        PredictorError, SelectionError: from the selectors.
    """
    return _Comparison(model, data, list(dict.fromkeys(names)), tuple(keep), matched, seed, progress).run()


def answer_logits(
    model: Model,
    tokens: npt.NDArray[np.int32],
    mask: npt.NDArray[np.bool_],
    *,
    history: History | None = None,
    recorder: ImportanceRecorder | None = None,
) -> Iterator[Part]:
    """Logits that predict answer tokens, under the model's active selection, in chunks.

    Args:
        tokens: int32 `[n]`.
        mask: bool `[n]`, True for answer tokens; False for the first token.
        history: has read a part of the tokens before the first prediction; it is consumed.
        recorder: records only the positions that predict an answer token.

    Yields:
        Logits float32 `[m, vocabulary]`, and the tokens that they predict, int32 `[m]`.
    """
    history = history or History.empty(model)
    start, wanted = len(history.tokens), np.append(mask[1:], False)
    first = int(np.flatnonzero(wanted)[0])
    assert start <= first
    # A chunk ends where the answer begins. MLX is lazy, so no logits are computed before it.
    borders = [*range(start, first, _CHUNK), *range(first, len(tokens) - 1, _CHUNK), len(tokens) - 1]
    for begin, end in pairwise(borders):
        if recorder is not None:
            recorder.token_weights = mx.array(wanted[begin:end].astype(np.float32))
        logits = model(mx.array(tokens[None, begin:end]), cache=history.kv)
        states = [[cache.state for cache in history.kv], recorder.state() if recorder is not None else []]
        places = np.flatnonzero(wanted[begin:end])
        if len(places):
            rows = logits[0, mx.array(places)].astype(mx.float32)
            mx.eval(rows, states)
            yield rows, mx.array(tokens[begin + 1 + places])
        else:
            mx.eval(states)


def token_nll(logits: mx.array, tokens: mx.array) -> mx.array:
    """Negative log likelihood of each token, nats, float32 `[m]`, from logits `[m, vocabulary]`."""
    return mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]


def answer_nll(
    model: Model, tokens: npt.NDArray[np.int32], mask: npt.NDArray[np.bool_], **options: Any
) -> npt.NDArray[np.float32]:
    """Loss of answer tokens in nats, float32 `[mask.sum()]`; arguments as for `answer_logits`."""
    return np.concatenate([np.array(token_nll(*part)) for part in answer_logits(model, tokens, mask, **options)])


def density_of(model: Model, keep: Sequence[int]) -> float:
    """Kept neurons / all neurons, with *k* per FFN."""
    return sum(keep) / sum(spec.d_ffn for spec in model.checkpoint.layout.ffns)


def prompt_tokens(example: Example) -> tuple[int, ...]:
    """The tokens before the first answer."""
    return tuple(example.tokens[: int(np.argmax(example.mask))].tolist())


def derangement(count: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """The successors `[count]` in a random cyclic order; with two or more, none is its own."""
    order = generator.permutation(count)
    partner = np.empty(count, np.int64)
    partner[order] = np.roll(order, -1)
    return partner


class _Comparison:
    """Two passes over the data: the first selects for all prompts, the second measures the rows that need that."""

    def __init__(
        self,
        model: Model,
        data: Mapping[str, Sequence[Example]],
        names: list[str],
        keep: tuple[int, ...],
        matched: Selector | None,
        seed: int,
        progress: Progress | None,
    ) -> None:
        _check(data, names)
        self._model, self._data, self._names, self._keep, self._seed = model, data, names, keep, seed
        self._progress = progress or (lambda done, total: None)
        self._selectors: dict[str, Selector] = {}
        self._matched: str | None = None
        if set(names) & set(_OF_MATCHED):
            default = "learned" if model.checkpoint.has_predictor else "activation"
            matched = matched or make_selector(model, default, seed=seed)
            self._matched = matched.name
            self._selectors[matched.name] = matched
        for name in [_SELECTORS[row] for row in names if row in _SELECTORS]:
            if name not in self._selectors:
                self._selectors[name] = make_selector(model, name, seed=seed)
        self._fixed: dict[str, Selector] = {"static": StaticSelector(model), "random": RandomSelector(model, seed)}
        self._chosen: dict[str, dict[str, list[Selection]]] = {
            name: {domain: [] for domain in data} for name in self._selectors
        }
        self._losses: dict[tuple[str, str], list[float]] = defaultdict(list)
        self._accepted: dict[tuple[str, str], list[float]] = defaultdict(list)
        # For `static-own`, by domain: squared importance summed over answer tokens, per FFN and fold; token counts.
        widths = [spec.d_ffn for spec in model.checkpoint.layout.ffns]
        self._sums = {domain: [np.zeros((_FOLDS, width)) for width in widths] for domain in data}
        self._weights = {domain: np.zeros(_FOLDS) for domain in data}
        self._own: dict[tuple[str, int], Selection] = {}
        self._same = {domain: derangement(len(data[domain]), _generator(seed, domain)) for domain in data}
        self._other = _partners_elsewhere(data, seed) if "cross-domain" in names else {}
        tokens = sum(len(example.tokens) for examples in data.values() for example in examples)
        dense_passes = bool({"dense", "oracle"} & set(names)) + ("static-own" in names)
        self._done, self._total = 0, tokens * (len(set(names) - {"dense"}) + dense_passes)

    def run(self) -> Evaluation:
        """Measure everything."""
        data = self._data
        places = [(domain, i, example) for domain, examples in data.items() for i, example in enumerate(examples)]
        for domain, index, example in places:
            self._prepare(domain, index, example)
            mx.clear_cache()
        for domain, index, example in places:
            self._measure_rows(domain, index, example)
            mx.clear_cache()
        tokens = {domain: tuple(int(e.mask.sum()) for e in examples) for domain, examples in data.items()}
        pairs = [(name, domain) for name in self._names for domain in data]
        accepted = {pair: tuple(self._accepted[pair]) if "dense" in self._names else None for pair in pairs}
        rows = tuple(Row(*pair, tuple(self._losses[pair]), tokens[pair[1]], accepted[pair]) for pair in pairs)
        overlap = {name: mean_overlaps(chosen) for name, chosen in self._chosen.items()}
        keys = {domain: tuple(example.key for example in examples) for domain, examples in data.items()}
        return Evaluation(density_of(self._model, self._keep), self._matched, rows, overlap, keys, self._seed)

    def _prepare(self, domain: str, index: int, example: Example) -> None:
        """Run every selector on the prompt; for `static-own`, measure the answer's importance."""
        instruction = Instruction(example.instruction, prompt_tokens(example))
        for name, selector in self._selectors.items():
            self._chosen[name][domain].append(selector.select(instruction, self._keep).selection)
        if "static-own" in self._names:
            _, importance = self._read_dense(example, importance=True)
            weight, fold = float(example.mask.sum()), index % _FOLDS
            self._weights[domain][fold] += weight
            for sums, values in zip(self._sums[domain], importance, strict=True):
                sums[fold] += values.astype(np.float64) ** 2 * weight

    def _measure_rows(self, domain: str, index: int, example: Example) -> None:
        """Measure all rows on one answer."""
        names, target = self._names, None
        if {"dense", "oracle"} & set(names):
            logits, importance = self._read_dense(example, importance="oracle" in names)
            if "dense" in names:
                target = target_of(rows for rows, _ in logits)
                self._add("dense", domain, index, logits, target)
            if "oracle" in names:
                self._model.switch(
                    top_k(fuse_ranks(importance, self._model.prior, _ORACLE_SHARE), self._keep, "oracle")
                )
                self._measure("oracle", domain, index, target)
        for name in names:
            if name == "activation":
                instruction = Instruction(example.instruction, prompt_tokens(example))
                selected = self._selectors[name].select(instruction, self._keep)
                self._model.switch(selected.selection)
                self._measure(name, domain, index, target, selected.history)
            elif name not in ("dense", "oracle"):
                self._model.switch(self._selection(name, domain, index, example))
                self._measure(name, domain, index, target)

    def _read_dense(self, example: Example, *, importance: bool) -> tuple[list[Part], list[Scores]]:
        """The answer's logits with all neurons, and on request the importance of every neuron to it."""
        model = self._model
        model.switch(None)
        with recorded(model.down_leaves) if importance else nullcontext() as recorder:
            logits = list(answer_logits(model, example.tokens, example.mask, recorder=recorder))
        self._advance(example)
        return logits, [] if recorder is None else recorder.importance(model.down_norms)

    def _selection(self, name: str, domain: str, index: int, example: Example) -> Selection:
        """The selection of a row in the second pass."""
        if name in self._fixed:
            return self._fixed[name].select(Instruction(example.instruction, ()), self._keep).selection
        if name == "static-own":
            return self._own_prior(domain, index % _FOLDS)
        if name in _SELECTORS:
            return self._chosen[_SELECTORS[name]][domain][index]
        assert self._matched is not None
        if name == "mismatched":
            index = int(self._same[domain][index])
        elif name == "cross-domain":
            domain, index = self._other[domain][index]
        return self._chosen[self._matched][domain][index]

    def _own_prior(self, domain: str, fold: int) -> Selection:
        """The most important neurons for the domain's answers outside one fold."""
        if (domain, fold) not in self._own:
            weight = np.delete(self._weights[domain], fold).sum()
            scores = [np.sqrt(np.delete(sums, fold, axis=0).sum(axis=0) / weight) for sums in self._sums[domain]]
            self._own[domain, fold] = top_k([layer.astype(np.float32) for layer in scores], self._keep, "static-own")
        return self._own[domain, fold]

    def _measure(self, name: str, domain: str, index: int, target: Target, history: History | None = None) -> None:
        """Add an answer under the active selection to a row."""
        example = self._data[domain][index]
        self._add(
            name, domain, index, answer_logits(self._model, example.tokens, example.mask, history=history), target
        )
        self._advance(example)

    def _add(self, name: str, domain: str, index: int, logits: Iterable[Part], target: Target) -> None:
        """Add the mean loss of an answer, and its acceptance by the probabilities `target`, to a row."""
        losses, shares = [], []
        for number, (rows, tokens) in enumerate(logits):
            losses.append(np.array(token_nll(rows, tokens)))
            if target is not None:
                shares.append(np.array(acceptance(rows, target[number])))
        loss = float(np.concatenate(losses).mean(dtype=np.float64))
        if not np.isfinite(loss):
            raise IfpruneError(
                f"{name}, domain {domain!r}, prompt {index + 1}: the loss is not a finite number; {NOT_FINITE}"
            )
        self._losses[name, domain].append(loss)
        if target is not None:
            self._accepted[name, domain].append(float(np.concatenate(shares).mean(dtype=np.float64)))

    def _advance(self, example: Example) -> None:
        self._done += len(example.tokens)
        self._progress(self._done, self._total)


def _check(data: Mapping[str, Sequence[Example]], names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in ROWS]
    if unknown or not names:
        what = f"unknown selector {unknown[0]!r}" if unknown else "no selectors to compare"
        raise IfpruneError(f"{what}; choose from {', '.join(name for name in ROWS if name != 'matched')}")
    if not data:
        raise DataError("no data to evaluate on; give at least one domain")
    if POOLED in data:
        raise DataError(f"a domain cannot be called {POOLED!r}, which means all of them; give it another name")
    for domain, examples in data.items():
        if not examples:
            raise DataError(f"domain {domain!r} has no prompts; give it data, or leave it out")
        if len(examples) < 2 and {"mismatched", "static-own"} & set(names):
            raise DataError(
                f"domain {domain!r} has 1 usable prompt, mismatched and static-own need another one beside each; "
                "give more, or leave those two out"
            )
        if len({example.key for example in examples}) < len(examples):
            raise DataError(f"domain {domain!r} repeats a prompt; give each prompt once")
    if "cross-domain" in names and len(data) < 2:
        raise DataError("cross-domain needs two domains; give another --data, or leave it out of --selectors")


def _generator(seed: int, *words: str) -> np.random.Generator:
    digest = hashlib.sha256(":".join([str(seed), *words]).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def _partners_elsewhere(data: Mapping[str, Sequence[Example]], seed: int) -> dict[str, list[tuple[str, int]]]:
    """A (domain, index) of another domain for every example: the other domains in turn, their prompts shuffled."""
    partners: dict[str, list[tuple[str, int]]] = {}
    for domain, examples in data.items():
        others = [name for name in data if name != domain]
        orders = {name: _generator(seed, domain, name).permutation(len(data[name])) for name in others}
        partners[domain] = []
        for index, example in enumerate(examples):
            name = others[index % len(others)]
            turn = np.roll(orders[name], -(index // len(others)))
            # The same prompt may be in two domains.
            different = (place for place in turn if data[name][place].key != example.key)
            partners[domain].append((name, int(next(different, turn[0]))))
    return partners
