"""KV caches of finished requests, for later requests with the same selection and the same first tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache

from ifprune_mlx.model import Model

# Bounds the Python objects: for short conversations they need more memory than the KV caches.
_MOST_CACHES = 1024


class PrefixCache:
    """KV caches by (selection key, tokens). Not thread-safe.

    Args:
        max_bytes: size of all caches; the oldest go first. 0 keeps none.
        model: computes them. Its ranks keep the same ones, as many as fit on the leader.
    """

    def __init__(self, max_bytes: int, model: Model) -> None:
        self._max_bytes, self._model = max_bytes, model
        self.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all caches."""
        return int(self._caches.nbytes)

    def fetch(self, selection_key: str, tokens: Sequence[int]) -> tuple[list[Any] | None, int]:
        """A copy of the cache with the longest common prefix with `tokens`, trimmed to it if its kind can be trimmed.

        Returns:
            The cache or None, and how many tokens it holds: fewer than `tokens`, as one must be left to read.
        """
        known = list(tokens[:-1])
        if not known:
            return None, 0
        cache, rest = self._caches.fetch_nearest_cache(selection_key, known)
        read = len(known) - len(rest)
        return (cache, read) if read else (None, 0)

    def store(self, selection_key: str, tokens: Sequence[int], cache: list[Any]) -> None:
        """Keep a cache that holds `tokens`. The caller must not use it afterwards."""
        if self._max_bytes:
            mx.eval([layer.state for layer in cache])  # else it keeps the whole batch in memory
            self._caches.insert_cache(selection_key, list(tokens), cache)
            self._caches.trim_to(n_sequences=self._model.agreed(len(self._caches)))

    def clear(self) -> None:
        """Forget all caches."""
        leads = self._model.ranks is None or self._model.ranks.leads
        self._caches = LRUPromptCache(_MOST_CACHES, self._max_bytes if leads else 1 << 63)
