"""KV caches of finished jobs, for the next job that begins alike. A cache is found only under its own selection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache

# A short conversation costs more in Python objects than in bytes of cache, which the bytes do not bound.
_MOST = 1024


class PrefixCache:
    """Caches by (owner, tokens), where an owner is a selection's hash or `dense`. Used in one thread.

    Args:
        max_bytes: what the caches may take together; the oldest go first. 0 keeps none.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._caches = LRUPromptCache(_MOST, max_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of all caches."""
        return int(self._caches.nbytes)

    def fetch(self, owner: str, tokens: Sequence[int]) -> tuple[list[Any] | None, int]:
        """A copy of the cache that shares the longest beginning with `tokens`, cut to it where its kind can be cut.

        Returns:
            The cache, or None, and how many tokens it holds: fewer than `tokens`, as one is left to read.
        """
        known = list(tokens[:-1])
        if not known:
            return None, 0
        cache, rest = self._caches.fetch_nearest_cache(owner, known)
        read = len(known) - len(rest)
        return (cache, read) if read else (None, 0)

    def store(self, owner: str, tokens: Sequence[int], cache: list[Any]) -> None:
        """Keep a cache that holds `tokens`. It must not be used otherwise afterwards."""
        if self._max_bytes:
            mx.eval([layer.state for layer in cache])  # else it holds on to the batch that it is cut from
            self._caches.insert_cache(owner, list(tokens), cache)

    def clear(self) -> None:
        """Forget all."""
        self._caches = LRUPromptCache(_MOST, self._max_bytes)
