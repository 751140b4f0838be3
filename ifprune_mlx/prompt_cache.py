"""What a model has read: tokens, their KV cache, and which selection computed each stretch.

A KV cache belongs to the selection that computed it: going on from it under another one is a choice, never an accident.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.models.cache import (
    ArraysCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    can_trim_prompt_cache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

from ifprune_mlx.checkpoint.atomic_write import write_atomic
from ifprune_mlx.checkpoint.safetensors_io import read_safetensors_header
from ifprune_mlx.errors import ChatFileError, IfpruneError, ModelClosedError, reason_of

if TYPE_CHECKING:
    from ifprune_mlx.model import Model

DENSE = "dense"
_STEP = 512
_FIRST_STEP, _LEAST_STEP = 32, 8
_KEPT = 4  # of a bounded cache's first tokens, as in mlx-lm


def make_cache(model: Model, max_kv_size: int | None = None) -> list[Any]:
    """Empty KV caches of the family's kinds, in the order of its layers.

    Args:
        max_kv_size: how many tokens each may hold: the first few and the latest. None for no bound of ours.

    Raises:
        IfpruneError: if the family has a kind of cache that cannot be bounded.
    """
    caches: list[Any] = make_prompt_cache(model.module)
    return caches if max_kv_size is None else [_bounded(cache, max_kv_size) for cache in caches]


def _bounded(cache: Any, size: int) -> Any:
    # mlx-lm bounds only the caches of families that do not make their own.
    if size < 1:
        raise IfpruneError(f"max_kv_size is {size}; give a number of tokens above 0")
    if type(cache) is KVCache:
        return RotatingKVCache(size, keep=min(_KEPT, size - 1))
    if type(cache) is RotatingKVCache:
        return RotatingKVCache(min(cache.max_size, size), keep=min(cache.keep, size - 1))
    if type(cache) is ArraysCache:  # a state whose size does not grow
        return cache
    raise IfpruneError(
        f"max_kv_size {size}: this model's caches ({type(cache).__name__}) cannot be bounded; leave it out"
    )


def quantize(kv: list[Any], bits: int, group_size: int, start: int = 0) -> bool:
    """Quantize, in place, the caches that have read `start` tokens; those that rotate stay, mlx-lm cannot pack them.

    Returns:
        Whether any is quantized now.
    """
    for index, cache in enumerate(kv):
        if type(cache) is KVCache and cache.offset >= start:
            kv[index] = cache.to_quantized(group_size=group_size, bits=bits)
    return any(type(cache) is QuantizedKVCache for cache in kv)


def check_quantizable(model: Model, kv: Sequence[Any], bits: int, group_size: int) -> None:
    """Raise IfpruneError unless caches of these kinds can be quantized. Computes two tokens as the model is now."""
    if any(type(cache) is QuantizedKVCache for cache in kv):
        return
    cannot = f"kv_bits {bits}: the KV cache of this model cannot be quantized"
    if not any(type(cache) is KVCache for cache in kv):
        kinds = ", ".join(sorted({type(cache).__name__ for cache in kv}))
        raise IfpruneError(f"{cannot}, every layer has a {kinds}; leave it out, or max_kv_size if that is given")
    probe = make_cache(model)
    try:
        for _ in range(2):
            model(mx.array([[0]]), cache=probe)
            quantize(probe, bits, group_size)
            mx.eval([cache.state for cache in probe])
    except (ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as exc:
        raise IfpruneError(
            f"{cannot} in groups of {group_size} ({reason_of(exc)}); choose another size, or leave it out"
        ) from exc


class Pace:
    """How many prompt tokens are read at a time: what takes about so long, so that who cancels need not wait longer.

    Attributes:
        seconds: of a step; None reads as much at a time as may be.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = seconds
        self._size = _FIRST_STEP

    def steps(self, tokens: Sequence[int], most: int) -> Iterator[list[int]]:
        """The tokens in pieces of at most so many, each as long as the time that the one before took allows."""
        start = 0
        while start < len(tokens):
            size = most if self.seconds is None else min(self._size, most)
            begun = time.perf_counter()
            yield list(tokens[start : start + size])
            start += size
            if self.seconds is None:
                continue
            taken = time.perf_counter() - begun
            if taken > self.seconds:
                self._size = max(size // 2, _LEAST_STEP)
            elif taken < self.seconds / 2:
                self._size = size * 2


@dataclass(frozen=True)
class Span:
    """A stretch of tokens, and where their KV entries come from.

    Attributes:
        tokens: how many.
        computed_by: a selection's hash, or `dense`.
        read_for: hash of the selection that the activation selector read them for; that one may go on from them.
    """

    tokens: int
    computed_by: str
    read_for: str | None = field(default=None, compare=False)


@dataclass
class History:
    """Tokens read so far, with their KV cache and its provenance.

    Attributes:
        kv: mlx-lm caches, one per layer.
        tokens: the tokens whose entries `kv` holds.
        spans: who computed them, in order; their lengths sum to `len(tokens)`.
        max_kv_size: the bound that `kv` was made with; see `make_cache`.
    """

    kv: list[Any]
    tokens: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    max_kv_size: int | None = None

    @classmethod
    def empty(cls, model: Model, max_kv_size: int | None = None) -> History:
        """A history that has read nothing; arguments and errors are those of `make_cache`."""
        return cls(make_cache(model, max_kv_size), max_kv_size=max_kv_size)

    def clear(self, model: Model) -> None:
        """Forget everything, also what `kv` may hold beyond `tokens` after a failed call."""
        self.kv, self.tokens, self.spans = make_cache(model, self.max_kv_size), [], []

    def read(self, model: Model, tokens: Sequence[int]) -> History:
        """Read tokens under the model's active selection; itself, for chaining."""
        for start in range(0, len(tokens), _STEP):
            chunk = list(tokens[start : start + _STEP])
            model(mx.array([chunk]), cache=self.kv)
            mx.eval([cache.state for cache in self.kv])
            self.append(chunk, DENSE if model.selection is None else model.selection.hash)
        return self

    def settle(self, model: Model, thread: int) -> None:
        """Compute what the cache still has to, so that the next answer may come from any thread.

        Args:
            thread: the one that read; in another, which cannot compute it, everything is forgotten.
        """
        if threading.get_ident() == thread:
            # In mlx-lm 0.31, on Python 3.10, a layer that has read nothing has no state.
            mx.eval([cache.state for cache in self.kv if not cache.empty()])
        else:
            self.clear(model)

    def append(self, tokens: list[int], computed_by: str) -> None:
        """Note that `kv` now also holds `tokens`, and what computed them: a selection's hash, or `dense`."""
        if not tokens:
            return
        self.tokens.extend(tokens)
        last = self.spans[-1] if self.spans else None
        if last is not None and (last.computed_by, last.read_for) == (computed_by, None):
            self.spans[-1] = Span(last.tokens + len(tokens), computed_by)
        else:
            self.spans.append(Span(len(tokens), computed_by))

    def note_reader(self, start: int, selection: str) -> None:
        """Note that all tokens from the `start`-th on were read densely to find the selection of this hash."""
        self.spans = self._first_spans(start)
        if count := len(self.tokens) - start:
            self.spans.append(Span(count, DENSE, selection))

    def common_prefix(self, tokens: list[int]) -> int:
        """How many leading tokens of `tokens` have been read already."""
        count = 0
        for ours, theirs in zip(self.tokens, tokens, strict=False):
            if ours != theirs:
                break
            count += 1
        return count

    def prefix_computed_by(self, names: set[str]) -> int:
        """How many leading tokens were computed by one of `names`, or read to find it."""
        count = 0
        for span in self.spans:
            if span.computed_by not in names and span.read_for not in names:
                break
            count += span.tokens
        return count

    def trim_to(self, count: int) -> bool:
        """Forget all but the first `count` tokens.

        Returns:
            False if this kind of cache cannot be trimmed; nothing is changed then.
        """
        surplus = len(self.tokens) - count
        if surplus <= 0:
            return True
        if not can_trim_prompt_cache(self.kv) or trim_prompt_cache(self.kv, surplus) != surplus:
            return False
        del self.tokens[count:]
        self.spans = self._first_spans(count)
        return True

    def _first_spans(self, count: int) -> list[Span]:
        spans, left = [], count
        for span in self.spans:
            if left > 0:
                spans.append(replace(span, tokens=min(span.tokens, left)))
            left -= span.tokens
        return spans

    def save(self, path: str | Path, model: Model) -> None:
        """Write cache, tokens and provenance to a safetensors file (mlx-lm's prompt cache format, plus metadata)."""
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ChatFileError(f"{path}: a prompt cache file ends in .safetensors")
        if not self.tokens:
            raise ChatFileError(f"{path}: nothing has been read yet; there is nothing to save")
        metadata = {
            "ifprune_checkpoint": model.checkpoint.id,
            "ifprune_tokens": json.dumps(self.tokens),
            "ifprune_spans": json.dumps([[span.tokens, span.computed_by, span.read_for] for span in self.spans]),
            "ifprune_max_kv_size": json.dumps(self.max_kv_size),
        }
        write_atomic(path, lambda file: save_prompt_cache(str(file), self.kv, metadata), ChatFileError)

    @classmethod
    def load(cls, path: str | Path, model: Model) -> History:
        """Read what `save` wrote.

        Raises:
            ChatFileError: if the file is damaged, or was written by another checkpoint.
        """
        path = Path(path)
        # What the file says of itself is compared with the model before its arrays are read.
        said = read_safetensors_header(path, ChatFileError).metadata.get("0.ifprune_checkpoint")
        if said not in (None, model.checkpoint.id):
            raise ChatFileError(f"{path}: was computed by another checkpoint; make it again with this one")
        try:
            kv, metadata = load_prompt_cache(str(path), return_metadata=True)
            mx.eval([cache.state for cache in kv])
            tokens = [int(token) for token in json.loads(metadata["ifprune_tokens"])]
            spans = [_span(*values) for values in json.loads(metadata["ifprune_spans"])]
            fresh = make_cache(model)
            bounds = [cache.max_size for cache, own in zip(kv, fresh, strict=True) if _is_bound(cache, own)]
            max_kv_size = json.loads(metadata["ifprune_max_kv_size"]) if "ifprune_max_kv_size" in metadata else None
            if max_kv_size is None and bounds:  # saved before it was kept
                max_kv_size = max(bounds)
            fits = [_fits(*pair, len(tokens)) for pair in zip(kv, make_cache(model, max_kv_size), strict=True)]
            fits += [said is not None, sum(span.tokens for span in spans) == len(tokens)]
        except ModelClosedError:
            raise
        except Exception as exc:  # mlx-lm's reader raises whatever its parsing meets
            raise ChatFileError(f"{path}: not a prompt cache of ifprune ({reason_of(exc)}); make it again") from exc
        if not all(fits):
            raise ChatFileError(f"{path}: its tokens and its cache do not match; make it again")
        return cls(kv, tokens, spans, max_kv_size)


def _span(tokens: Any, computed_by: Any, read_for: Any = None) -> Span:
    """A span of a file; those of before had no `read_for`."""
    if not (
        isinstance(tokens, int) and tokens > 0 and isinstance(computed_by, str) and isinstance(read_for, str | None)
    ):
        raise ValueError("a span of another form")
    return Span(tokens, computed_by, read_for)


def _is_bound(cache: Any, own: Any) -> bool:
    """Whether a cache is one that `make_cache` bounded."""
    return type(cache) is RotatingKVCache and type(own) is KVCache


def _fits(cache: Any, own: Any, count: int) -> bool:
    """Whether a cache that was read from a file is of this model's kind `own`, and holds `count` tokens."""
    packed = type(cache) is QuantizedKVCache and type(own) is KVCache
    if type(cache) is not type(own) and not packed:
        return False
    if type(cache) is RotatingKVCache and not (cache.max_size == own.max_size and 0 <= cache.keep < cache.max_size):
        return False
    if getattr(cache, "offset", count) != count:  # some kinds do not say how much they have read
        return False
    if type(cache) not in (KVCache, QuantizedKVCache, RotatingKVCache):
        return True
    least = min(count, getattr(cache, "max_size", count))
    arrays = [*cache.keys, *cache.values] if packed else [cache.keys, cache.values]
    return all(array.ndim == 4 and array.shape[0] == 1 and array.shape[2] >= least for array in arrays)
