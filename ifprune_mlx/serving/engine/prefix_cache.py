"""KV caches of finished requests, for the next one that begins alike. Each is found only under its own selection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache

# A short conversation costs more in Python objects than in bytes of cache, which the bytes do not bound.
_MOST_CACHES = 1024


class PrefixCache:
    """KV caches by (selection key, tokens). Used in one thread.

    Args:
        max_bytes: size of all caches together; the oldest go first. 0 keeps none.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._caches = LRUPromptCache(_MOST_CACHES, max_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of all caches."""
        return int(self._caches.nbytes)

    def fetch(self, selection_key: str, tokens: Sequence[int]) -> tuple[list[Any] | None, int]:
        """A copy of the cache that shares the longest beginning with `tokens`, cut to it where its kind can be cut.

        Returns:
            The cache, or None, and how many tokens it holds: fewer than `tokens`, as one is left to read.
        """
        known = list(tokens[:-1])
        if not known:
            return None, 0
        cache, rest = self._caches.fetch_nearest_cache(selection_key, known)
        read = len(known) - len(rest)
        return (cache, read) if read else (None, 0)

    def store(self, selection_key: str, tokens: Sequence[int], cache: list[Any]) -> None:
        """Keep a cache that holds `tokens`. It must not be used otherwise afterwards."""
        if self._max_bytes:
            mx.eval([layer.state for layer in cache])  # else it holds on to the batch that it is cut from
            self._caches.insert_cache(selection_key, list(tokens), cache)

    def clear(self) -> None:
        """Forget all caches."""
        self._caches = LRUPromptCache(_MOST_CACHES, self._max_bytes)
