"""Policy `auto`: which selection a conversation has come to, by its user messages."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ifprune_mlx.selection.cache import SelectionCache
from ifprune_mlx.selection.selection import Selection
from ifprune_mlx.session import SWITCH_BELOW

_CONVERSATIONS = 64


class Topics:
    """Goes through conversations as a `Session` with policy `auto` does, and remembers where the last ones were.

    So a conversation's next message costs one run of the selector. All ranks call it alike.

    Args:
        widths: *d_ffn* per FFN of the model.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        self._widths = tuple(widths)
        self._known = SelectionCache(entries=_CONVERSATIONS)

    def come_to(self, selector: str, keep: tuple[int, ...], texts: Sequence[str]) -> tuple[int, Selection | None]:
        """How many of a conversation's messages are known already, and the selection after these; None for none."""
        keys = _keys(selector, keep, texts)
        for count in range(len(texts), 0, -1):
            if (found := self._known.get(keys[count - 1], self._widths, keep)) is not None:
                return count, found
        return 0, None

    def follow(
        self, selector: str, keep: tuple[int, ...], texts: Sequence[str], before: Selection | None, own: Selection
    ) -> Selection:
        """The selection after the last of these messages.

        Args:
            before: the selection after the others.
            own: what the last message selects by itself.
        """
        stays = before is not None and own.agreement(before) >= SWITCH_BELOW
        selection = before if before is not None and stays else own
        self._known.put(_keys(selector, keep, texts)[-1], selection)
        return selection


def _keys(selector: str, keep: tuple[int, ...], texts: Sequence[str]) -> list[str]:
    """One for each message with all before it."""
    digest, keys = hashlib.sha256(repr((selector, keep)).encode()), []
    for text in texts:
        digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
        keys.append(digest.hexdigest())
    return keys
