"""Wording that several error messages share."""

from __future__ import annotations


def listing(names: list[str]) -> str:
    """The first few of many names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def first_line(exc: BaseException) -> str:
    return str(exc).splitlines()[0] if str(exc) else type(exc).__name__


def reason(exc: BaseException) -> str:
    """An exception from inside mlx-lm in one line; its type says what a bare key or number does not."""
    return f"{type(exc).__name__}: {first_line(exc)}"
