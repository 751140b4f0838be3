"""Reads files of JSON lines."""

from __future__ import annotations

import bz2
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator
from io import BufferedIOBase, BufferedReader
from pathlib import Path
from typing import Any, TypeVar

from ifprune_mlx.checkpoint.regular_file import open_regular
from ifprune_mlx.errors import DataError, reason_of

T = TypeVar("T")

_UNPACKING: dict[str, Callable[[BufferedReader], BufferedIOBase]] = {
    ".gz": lambda packed: gzip.GzipFile(fileobj=packed),
    ".bz2": bz2.BZ2File,
}
_LONGEST_LINE = 1 << 24  # bytes
# A packed file may unpack to this many bytes, or to this many times its own size. Every line counts for some
# more, since millions of tiny ones take long.
_UNPACKED, _RATIO, _OF_A_LINE = 1 << 26, 50, 64
_BLANK_LINES = 1_000_000


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
    number = total = blank = 0
    unpacking = _UNPACKING.get(path.suffix)
    try:
        with open_regular(path) as packed:
            file: BufferedIOBase = packed if unpacking is None else unpacking(packed)
            most = math.inf if unpacking is None else max(_UNPACKED, _RATIO * path.stat().st_size)
            while line := file.readline(_LONGEST_LINE + 1):
                number, total, blank = number + 1, total + len(line) + _OF_A_LINE, blank + line.isspace()
                if len(line) > _LONGEST_LINE:
                    raise DataError(f"{path}, line {number}: is longer than 16 MB; give a chat or a text a line")
                if blank > _BLANK_LINES:
                    raise DataError(f"{path}: holds more than {_BLANK_LINES} blank lines; take them out")
                if total > most:
                    raise DataError(f"{path}: unpacks to more than {_RATIO} times its size; unpack it first")
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as exc:
        raise DataError(f"{path}, line {number}: not UTF-8 text; convert the file, for example with iconv") from exc
    except (EOFError, zlib.error) as exc:
        raise DataError(f"{path}: damaged after line {number} ({exc}); copy or download it again") from exc
    except OSError as exc:
        raise DataError(f"{path}: cannot be read ({reason_of(exc)}); give a file of JSON lines") from exc
