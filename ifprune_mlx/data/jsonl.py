"""Reads files of JSON lines."""

from __future__ import annotations

import bz2
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any, TypeVar

from ifprune_mlx.errors import DataError

T = TypeVar("T")


def parse_json_lines(path: str | Path, parse: Callable[[dict[str, Any]], T], expected: str) -> list[T]:
    """Parse every line of a UTF-8 file of JSON objects; empty lines are passed over.

    The first bad line is fatal: a test set without some of its lines would be another test set.

    Args:
        path: may be packed as .gz or .bz2.
        parse: takes a line's object; raises ValueError, saying why, for one that cannot be used.
        expected: what a line is to hold, for error messages.

    Raises:
        DataError: if the file cannot be read or holds no lines, or for its first bad line.
    """
    path = Path(path)
    result = []
    for number, value in json_lines(path):
        try:
            if not isinstance(value, dict):
                raise ValueError("no JSON object")
            result.append(parse(value))
        except ValueError as exc:
            raise DataError(f"{path}, line {number}: {exc}; expected {expected}") from exc
    if not result:
        raise DataError(f"{path}: holds no lines; give JSON lines with {expected}")
    return result


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The number and the value of every line that is not empty; the value is None where it is no JSON.

    Raises:
        DataError: as `text_lines`.
    """
    for number, line in enumerate(text_lines(path), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def filled_text(value: Any, what: str) -> str:
    """`value`, if it is text that is not blank; else ValueError, naming `what`."""
    if not checked_text(value, what).strip():
        raise ValueError(f"{what} is blank")
    return str(value)


def checked_text(value: Any, what: str) -> str:
    """`value`, if it is text that UTF-8 can hold; else ValueError, naming `what`."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is not text")
    try:
        value.encode()
    except UnicodeEncodeError as exc:
        raise ValueError(f"{what} holds half a surrogate pair, which is no character") from exc
    return value


def text_lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file, packed as .gz or .bz2 or not. Only line feeds end them: JSON strings may hold Unicode's
    other line breaks.

    Raises:
        DataError: if it cannot be read to its end as UTF-8.
    """
    number = 0
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: is no ordinary file; give a file of JSON lines")
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as exc:
        raise DataError(f"{path}, line {number}: not UTF-8 text; convert the file, for example with iconv") from exc
    except (EOFError, zlib.error) as exc:
        raise DataError(f"{path}: damaged after line {number} ({exc}); copy or download it again") from exc
    except OSError as exc:
        raise DataError(f"{path}: cannot be read ({exc.strerror or exc})") from exc


def _open(path: Path) -> BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    return bz2.open(path, "rb") if path.suffix == ".bz2" else path.open("rb")
