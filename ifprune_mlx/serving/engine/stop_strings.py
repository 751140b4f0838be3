"""Stop strings: where a text ends, whatever pieces it comes in."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Passes text on as soon as no stop string can begin in it any more.

    Where several stop strings could end the text, the one that is complete first does.

    Attributes:
        matched: the stop string that ended the text; nothing comes after it. None so far.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.matched: str | None = None
        self._stops = stops
        self._pending = ""

    def feed(self, text: str) -> str:
        """Take in the next piece; what is final now."""
        if self.matched is not None:
            return ""
        self._pending += text
        found = [(self._pending.find(stop), stop) for stop in self._stops if stop in self._pending]
        if found:
            start, self.matched = min(found, key=lambda at: (at[0] + len(at[1]), at[0]))
            final, self._pending = self._pending[:start], ""
            return final
        held = max((self._overhang(stop) for stop in self._stops), default=0)
        final, self._pending = self._pending[: len(self._pending) - held], self._pending[len(self._pending) - held :]
        return final

    def flush(self) -> str:
        """The text ended by itself: what was still withheld."""
        final, self._pending = self._pending, ""
        return final

    def _overhang(self, stop: str) -> int:
        """How many of the last characters may be the beginning of `stop`."""
        longest = min(len(self._pending), len(stop) - 1)
        return next((n for n in range(longest, 0, -1) if self._pending.endswith(stop[:n])), 0)
