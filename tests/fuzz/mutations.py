"""Damages a file of the corpus, as hypothesis draws it: by its structure where it has one, else byte by byte."""

from __future__ import annotations

import gzip
import json
import os
import struct
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]

_JSON_SETTINGS = ("ifprune_predictor", "ifprune_tokens", "ifprune_spans", "record")
DEEP = "[" * 3000 + "]" * 3000
PARTS = [b"\0", b"\n", b"[", b'{"text": "a"}\n', b" "]
MOST = 1 << 25
"""Bytes of the largest input that is written; a sparse file is said to be larger."""


# Texts within the file, each with another of its length.
_GGUF_TEXTS = [
    (b"llama", b"gemm3"), (b"gpt2", b"gpt9"), (b"block_count", b"block_c\x1b[m"), (b"im_end", b"\xff" * 6),
    (b"role", b"99.9"), (b"content", b"c*99999"), (b"token", b"\x9b31m"),
]  # fmt: skip


class Raw(str):
    """JSON that stands in a document as it is."""


# A loop that ends, loops that hardly do, and what asks for memory or for Python.
TEMPLATES = [
    "",
    "{{ messages[99].content }}",
    "{% for m in messages",
    "{{ raise_exception('no\x1b[31m') }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 3000000000 }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ ''.__class__.__mro__ }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ messages | tojson(indent=99999999) }}",
    "{{ 9 ** 9 ** 9 }}",
    "\ud800",
    "\x1b[2J{{ messages[0].content }}",
    "(" * 5000,
]
ODD_TEXTS = [
    "", " ", "\0", "\x1b[31mred\x1b[0m", "\x9b31m", "\r", "\ud800", "\udcff", "a/../../b", "/dev/zero", "x" * 9000,
    "ÿ" * 300, "1e999", "NaN", "-1", "9" * 5000, "llama", "gemma3", "mistral", "learned", "affine", "F64",
    "2001-99-99", "<|im_end|>", "(a+)+$", "\u202egnp.exe", "true", "null", "None",
]  # fmt: skip
ODD_NUMBERS = [
    0, 1, -1, 2, 3, 7, 31, 64, 128, 255, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30,
    0.0, -0.0, 1e-300, 1e-40, 0.5, 1.5, 1e38, 1e300, float("nan"), float("inf"), float("-inf"),
]  # fmt: skip
ODD = st.one_of(
    st.sampled_from([None, True, False, [], {}, [None], [[]], {"": {}}, [1, "a"], {"a": 1}, [-1], [2**63], [2**62, 4]]),
    st.sampled_from(ODD_NUMBERS),
    st.sampled_from(ODD_TEXTS),
    st.sampled_from(TEMPLATES),
    st.sampled_from(
        [Raw(DEEP), Raw("1" * 6000), Raw("1e999999"), Raw('{"a":1,"a":2}'), Raw("[" + "0," * 99999 + "0]")]
    ),
)


def _odd(draw: Draw) -> Any:
    return deepcopy(draw(ODD))  # what is drawn may be damaged further


def encoded(value: Any) -> str:
    """JSON of a document; lone surrogates are escaped, NaN and raw parts stand as they are."""
    raw: list[str] = []

    def marked(part: Any) -> Any:
        if isinstance(part, Raw):
            raw.append(str(part))
            return f"@@raw{len(raw) - 1}@@"
        if isinstance(part, dict):
            return {str(key): marked(item) for key, item in part.items()}
        return [marked(item) for item in part] if isinstance(part, list) else part

    text = json.dumps(marked(value))
    for number, part in enumerate(raw):
        text = text.replace(f'"@@raw{number}@@"', part)
    return text


def damaged_json(draw: Draw, value: Any) -> Any:
    """A document in which one to three parts are replaced, taken away, added or renamed."""
    root = [value]
    for _ in range(draw(st.integers(1, 3))):
        holder: Any = root
        key: Any = 0
        while isinstance(holder[key], dict | list) and not isinstance(holder[key], Raw) and holder[key]:
            if draw(st.integers(0, 3)) == 0:
                break
            holder = holder[key]
            key = draw(st.sampled_from(list(holder) if isinstance(holder, dict) else list(range(len(holder)))))
        what = draw(st.integers(0, 9))
        if what == 0 and holder is not root:
            del holder[key]
        elif what == 1 and isinstance(holder, dict):
            holder[draw(st.sampled_from(ODD_TEXTS))] = holder.pop(key)
        elif what == 2 and isinstance(holder, dict):
            holder[draw(st.sampled_from(ODD_TEXTS))] = _odd(draw)
        elif what == 3 and isinstance(holder, list) and holder is not root:
            holder.append(_odd(draw))
        else:
            holder[key] = _odd(draw)
    return root[0]


def damaged_bytes(draw: Draw, content: bytes, within: int | None = None) -> bytes:
    """Flipped, cut, doubled, zeroed or inserted bytes, of the first `within` if given."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        end = min(len(data), within or len(data))
        at = draw(st.integers(0, max(end - 1, 0)))
        what = draw(st.integers(0, 6))
        if what <= 2 and data:
            data[at] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, data[at] ^ 1, data[at] ^ 0x80]))
        elif what == 3:
            del data[at:]
        elif what == 4:
            data[at:at] = draw(
                st.sampled_from([b"\0" * 8, b"\xff" * 8, b"\x1b[31m", b'"', b"{", b"\n", b"\xed\xa0\x80"])
            )
        elif what == 5:
            length = draw(st.integers(1, 64))
            data[at : at + length] = data[:length]
        else:
            data[at : at + 8] = struct.pack("<Q", draw(st.sampled_from([0, 1, 2**31, 2**40, 2**63, 2**64 - 1])))
    return bytes(data)


def damaged_safetensors(draw: Draw, content: bytes) -> bytes:
    """A header damaged as JSON, its length kept true or not, or numbers that are not."""
    length = int.from_bytes(content[:8], "little")
    what = draw(st.integers(0, 5))
    if what == 0:
        return damaged_bytes(draw, content, 8 + length)
    if what == 1:
        return damaged_bytes(draw, content)
    if what == 2:
        fill = draw(st.sampled_from([b"\xff\xff\xc0\x7f", b"\0\0\x80\x7f", b"\xff" * 4, b"\0" * 4]))
        return content[: 8 + length] + (fill * (len(content) // 4 + 1))[: len(content) - 8 - length]
    header = json.loads(content[8 : 8 + length])
    metadata = header.get("__metadata__") or {}
    settings = [name for name in metadata if name in _JSON_SETTINGS]  # JSON within a text
    if settings and draw(st.booleans()):
        name = draw(st.sampled_from(settings))
        metadata[name] = encoded(damaged_json(draw, json.loads(metadata[name])))
    else:
        header = damaged_json(draw, header)
    raw = encoded(header).encode()
    return len(raw).to_bytes(8, "little") + raw + content[8 + length :]


def damaged_yaml(draw: Draw, content: bytes) -> bytes:
    """Settings with odd values, and what only YAML has."""
    odd = [
        "2001-99-99", "!!int x", "!!float x", "!!bool x", "!!timestamp x", "!!binary x",
        "!!python/object:os.system x", "[" * 3000, "{" * 3000, "&a [*a, *a]", "&a [1, 2]", "*a", "0x" + "f" * 9000,
        "9" * 6000, "1:" * 900 + "1", ".nan", ".inf", "!!null x", "? [1, 2]\n: 3", "'\\u0000'", '"\\0"', '"\\uD800"',
        '"\\x1b[31m"', "1e999", "- 1\n- 2", "|\n  text", "0o9", "2001-01-01", "!!set {a, b}", "!!omap [a: 1]",
        "{a: {b: {c: 1}}}", "[[1]]", "~", "yes", "0.5", "-1", "1_000", "x" * 9000, "0b" + "1" * 9000,
    ]  # fmt: skip
    lines = content.decode().splitlines()
    pairs = list(pairwise(ascii_lowercase))
    bombs = [
        "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairs),
        "a: &a {x: 1}\n" + "".join(f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in pairs[:9]),
        "? {a: 1}\n: 2", "1: 2", "null: 3", "true: 4", "'\\e[31m': 1", "<<: 5", "stage: sft\nstage: pretrain",
        "--- a\n--- b", "\t- x",
    ]  # fmt: skip
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(lines) - 1))
        if draw(st.integers(0, 4)) == 0:
            lines.insert(at, draw(st.sampled_from(bombs)))
        else:
            name = lines[at].partition(":")[0]
            lines[at] = f"{name}: {draw(st.sampled_from(odd))}"
    text = "\n".join(lines).encode()
    return damaged_bytes(draw, text) if draw(st.integers(0, 5)) == 0 else text


def damaged_lines(draw: Draw, content: bytes) -> bytes:
    """JSON lines with odd values, and bombs of one long line or of many."""
    what = draw(st.integers(0, 9))
    if what == 0:
        part = draw(st.sampled_from(PARTS))
        return part * (draw(st.sampled_from([1 << 20, 1 << 22, MOST])) // len(part))
    if what <= 2:
        return damaged_bytes(draw, content)
    lines = content.decode().splitlines()
    at = draw(st.integers(0, len(lines) - 1))
    lines[at] = encoded(damaged_json(draw, json.loads(lines[at])))
    return "\n".join(lines).encode()


def damaged_gguf(draw: Draw, content: bytes) -> bytes:
    """Numbers and bytes of the header; the names that it holds lie within its first part."""
    end = content.find(b"output_norm.weight")
    data = damaged_bytes(draw, content, max(end, 64) + 64)
    if draw(st.booleans()):
        old, new = draw(st.sampled_from(_GGUF_TEXTS))
        data = data.replace(old, new)
    return data


def damaged_special(draw: Draw, file: Path) -> None:
    """Put something else than an ordinary file in its place, or nothing."""
    what = draw(st.sampled_from(["fifo", "zero", "null", "folder", "nowhere", "itself", "empty", "gone", "sparse"]))
    file.unlink()
    if what == "fifo":
        os.mkfifo(file)
    elif what == "folder":
        file.mkdir()
    elif what == "empty":
        file.touch()
    elif what == "sparse":
        with file.open("wb") as out:
            out.truncate(1 << 36)
    elif what != "gone":
        file.symlink_to({"zero": "/dev/zero", "null": "/dev/null", "nowhere": "nowhere", "itself": file.name}[what])


def damage(draw: Draw, file: Path) -> None:
    """Damage one file in place, as its kind asks."""
    if file.name == "name.json":
        name = draw(st.one_of(st.sampled_from(ODD_TEXTS), st.text(min_size=1, max_size=20)))
        file.write_text(json.dumps({"name": name}))
        return
    if draw(st.integers(0, 11)) == 0:
        damaged_special(draw, file)
        return
    content = file.read_bytes()
    if file.suffix == ".safetensors":
        content = damaged_safetensors(draw, content)
    elif file.suffix == ".gguf":
        content = damaged_gguf(draw, content)
    elif file.suffix == ".json" and draw(st.integers(0, 7)):
        content = encoded(damaged_json(draw, json.loads(content))).encode()
    elif file.suffix == ".yaml":
        content = damaged_yaml(draw, content)
    elif file.suffix == ".jsonl":
        content = damaged_lines(draw, content)
    elif file.suffix == ".gz":
        lines = gzip.compress(damaged_lines(draw, gzip.decompress(content)))
        content = lines if draw(st.booleans()) else damaged_bytes(draw, lines)
    else:
        content = damaged_bytes(draw, content)
    file.write_bytes(content)
