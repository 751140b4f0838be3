"""What a model has read: tokens, their KV cache, and which selection computed each stretch.

A KV cache belongs to the selection that computed it: going on from it under another one is a choice, never an accident.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.models.cache import (
    can_trim_prompt_cache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

from ifprune_mlx.checkpoint.atomic_write import write_atomic
from ifprune_mlx.checkpoint.safetensors_io import read_safetensors_header
from ifprune_mlx.errors import ChatFileError, reason_of

if TYPE_CHECKING:
    from ifprune_mlx.model import Model

DENSE = "dense"
_STEP = 512


@dataclass(frozen=True)
class Span:
    """A stretch of tokens and what computed their KV entries: a selection's hash, or `dense`."""

    tokens: int
    computed_by: str


@dataclass
class History:
    """Tokens read so far, with their KV cache and its provenance.

    Attributes:
        kv: mlx-lm caches, one per layer.
        tokens: the tokens whose entries `kv` holds.
        spans: who computed them, in order; their lengths sum to `len(tokens)`.
        max_kv_size: the bound that `kv` was made with, as in mlx-lm.
    """

    kv: list[Any]
    tokens: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    max_kv_size: int | None = None

    @classmethod
    def empty(cls, model: Model, max_kv_size: int | None = None) -> History:
        """A history that has read nothing."""
        return cls(make_prompt_cache(model.module, max_kv_size), max_kv_size=max_kv_size)

    def clear(self, model: Model) -> None:
        """Forget everything, also what `kv` may hold beyond `tokens` after a failed call."""
        self.kv, self.tokens, self.spans = make_prompt_cache(model.module, self.max_kv_size), [], []

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
        if self.spans and self.spans[-1].computed_by == computed_by:
            self.spans[-1] = Span(self.spans[-1].tokens + len(tokens), computed_by)
        else:
            self.spans.append(Span(len(tokens), computed_by))

    def common_prefix(self, tokens: list[int]) -> int:
        """How many leading tokens of `tokens` have been read already."""
        count = 0
        for ours, theirs in zip(self.tokens, tokens, strict=False):
            if ours != theirs:
                break
            count += 1
        return count

    def prefix_computed_by(self, names: set[str]) -> int:
        """How many leading tokens were computed by one of `names`."""
        count = 0
        for span in self.spans:
            if span.computed_by not in names:
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
        spans, left = [], count
        for span in self.spans:
            if left > 0:
                spans.append(Span(min(span.tokens, left), span.computed_by))
            left -= span.tokens
        self.spans = spans
        return True

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
            "ifprune_spans": json.dumps([[span.tokens, span.computed_by] for span in self.spans]),
        }
        write_atomic(path, lambda file: save_prompt_cache(str(file), self.kv, metadata), ChatFileError)

    @classmethod
    def load(cls, path: str | Path, model: Model) -> History:
        """Read what `save` wrote.

        Raises:
            ChatFileError: if the file is damaged, or was written by another checkpoint.
        """
        path = Path(path)
        read_safetensors_header(path, ChatFileError)
        try:
            kv, metadata = load_prompt_cache(str(path), return_metadata=True)
            mx.eval([cache.state for cache in kv])
            checkpoint = metadata["ifprune_checkpoint"]
            tokens = [int(token) for token in json.loads(metadata["ifprune_tokens"])]
            spans = [Span(int(count), str(name)) for count, name in json.loads(metadata["ifprune_spans"])]
        except Exception as exc:  # mlx-lm's reader raises whatever its parsing meets
            raise ChatFileError(f"{path}: not a prompt cache of ifprune ({reason_of(exc)}); make it again") from None
        if checkpoint != model.checkpoint.id:
            raise ChatFileError(f"{path}: was computed by another checkpoint; make it again with this one")
        # Some kinds of caches do not say how much they have read.
        counts = {getattr(cache, "offset", len(tokens)) for cache in kv} | {sum(span.tokens for span in spans)}
        if counts != {len(tokens)} or len(kv) != len(model.layers):
            raise ChatFileError(f"{path}: its tokens and its cache do not match; make it again")
        return cls(kv, tokens, spans)
