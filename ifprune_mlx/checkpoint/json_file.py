"""Reads JSON files of strangers: of bounded size, and an object or an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ifprune_mlx.checkpoint.regular_file import LARGEST_JSON, read_bounded
from ifprune_mlx.errors import CheckpointError, IfpruneError, reason_of


def read_json_object(file: Path, error: type[IfpruneError] = CheckpointError) -> dict[str, Any]:
    """A JSON file that must hold an object.

    Raises:
        IfpruneError: (the given subclass) naming the file.
    """
    try:
        value = json.loads(read_bounded(file, LARGEST_JSON).decode("utf-8"))
    except OSError as exc:
        raise error(f"{file}: cannot be read ({reason_of(exc)})") from exc
    except (ValueError, RecursionError) as exc:
        raise error(f"{file}: not valid JSON; the file is damaged, get it again") from exc
    if not isinstance(value, dict):
        raise error(f"{file}: must hold a JSON object; the file is damaged, get it again")
    return value
