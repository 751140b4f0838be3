"""Files of strangers: ordinary ones of bounded size, and JSON files that hold an object, or an error.

A pipe can block for ever and a device need not end, whether we open it or a library does.
"""

from __future__ import annotations

import errno
import json
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

from ifprune_mlx.errors import CheckpointError, IfpruneError, reason_of

LARGEST_JSON = 1 << 24
"""Bytes of a config or a manifest."""
LARGEST_TEXT = 1 << 28
"""Bytes of any tokenizer file."""
_TEXTS = (".json", ".jinja", ".model", ".txt", ".tiktoken")
# What mlx-lm and transformers read by themselves beside the weights, and is small.
_CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")


def open_regular(path: Path) -> BufferedReader:
    """Open an ordinary file, or a link to one, for reading bytes.

    Raises:
        OSError: if it is anything else, or cannot be opened.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "is no ordinary file", str(path))
    return path.open("rb")


def read_bounded(path: Path, most: int) -> bytes:
    """All bytes of an ordinary file of at most `most` bytes.

    Raises:
        OSError: if it is longer, no ordinary file, or cannot be read.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"is larger than {most / 1e6:.0f} MB", str(path))
    return content


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


def check_ordinary(folder: Path, error: type[IfpruneError]) -> None:
    """Refuse what nobody could read to its end, before a library opens the folder's files by itself.

    Raises:
        IfpruneError: (the given subclass) if there is a pipe, socket or device in the folder, or a text without end.
    """
    for entry in (*sorted(folder.iterdir()), *sorted((folder / "additional_chat_templates").glob("*"))):
        if entry.is_dir() or not entry.exists():  # a dangling link is as good as nothing
            continue
        if not entry.is_file():
            raise error(f"{entry}: is no ordinary file; remove it, or get the model again")
        most = LARGEST_JSON if entry.name in _CONFIGS else LARGEST_TEXT
        if entry.suffix in _TEXTS and (size := entry.stat().st_size) > most:
            raise error(f"{entry}: has {size} bytes, more than any model's; get the model again")
