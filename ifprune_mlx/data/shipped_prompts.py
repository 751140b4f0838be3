"""The prompts that come with the package, for whoever has no data; PROMPTS.md says where they are from."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from ifprune_mlx.data.dataset import Record
from ifprune_mlx.data.jsonl import filled_text, parse_json_lines


def shipped_prompts(limit: int | None = None) -> list[Record]:
    """Prompts without answers: each record holds one user message, and `code`, `maths` or `general` as its domain.

    The order is always the same. Domains take turns, and so do the sources of each, so that any first part is varied.

    Args:
        limit: give the first so many; None gives all (3600).

    Raises:
        DataError: if the installed file is damaged.
    """
    return parse_json_lines(Path(str(files("ifprune_mlx.data") / "prompts.jsonl")), _record, "domain and prompt")[
        :limit
    ]


def _record(value: dict[str, object]) -> Record:
    prompt = {"role": "user", "content": filled_text(value.get("prompt"), "prompt")}
    return Record((prompt,), filled_text(value.get("domain"), "domain"))
