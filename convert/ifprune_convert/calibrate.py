"""Measures the prior: the importance of every neuron over a set of chats, run through the dense model.

Only the tokens of answers count, since answers are what a selection computes. Knows chats and a loaded model; not how
checkpoints are written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from ifprune_mlx.errors import SourceError
from ifprune_mlx.importance import recorded
from ifprune_mlx.model import Model
from ifprune_mlx.prompts import render_messages
from ifprune_mlx.selection import Scores

MAX_TOKENS = 512
"""Tokens of one chat that are looked at; the rest is cut off."""


@dataclass(frozen=True)
class Example:
    """One chat: messages that end with the assistant's."""

    messages: tuple[dict[str, str], ...]


def shipped_examples() -> list[Example]:
    """The calibration set that ships with the package (its sources and licences stand in `data/README.md`)."""
    return read_examples(Path(str(files("ifprune_convert") / "data" / "calibration.jsonl")))


def read_examples(file: Path) -> list[Example]:
    """Read chats from JSON lines: `{"messages": [...]}` or `{"prompt": ..., "completion": ...}`, as mlx-lm reads them.

    Raises:
        SourceError: naming the file and line of the first that cannot be used, or if there is none.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as exc:
        raise SourceError(f"{file}: cannot be read ({exc.strerror or exc})") from None
    except UnicodeDecodeError:
        raise SourceError(f"{file}: not UTF-8 text; calibration chats are JSON lines") from None
    examples = [_example(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not examples:
        raise SourceError(f"{file}: holds no chats; give JSON lines with messages, or prompt and completion")
    return examples


def calibrate(
    model: Model, tokenizer_folder: Path, examples: list[Example], progress: Callable[[int, int], None]
) -> list[Scores]:
    """Run chats through the dense model.

    Args:
        progress: called with (tokens read, tokens).

    Returns:
        Per FFN, importance float32 `[d_ffn]` in the source's neuron order (see `ifprune_mlx.importance`).

    Raises:
        SourceError: if no chat has an answer within the first `MAX_TOKENS` tokens.
    """
    tokenizer = load_tokenizer(tokenizer_folder, {"trust_remote_code": False})
    encoded = [pair for pair in (_encode(tokenizer, example) for example in examples) if pair[1] < len(pair[0])]
    if not encoded:
        raise SourceError(f"no calibration chat has an answer within its first {MAX_TOKENS} tokens; give shorter ones")
    total, done = sum(len(tokens) for tokens, _ in encoded), 0
    model.switch(None)
    with recorded(model.down_leaves) as recorder:
        for tokens, answer_start in encoded:
            recorder.token_weights = (mx.arange(len(tokens)) >= answer_start).astype(mx.float32)
            logits = model(mx.array([tokens]))
            mx.eval(recorder.state())
            del logits
            done += len(tokens)
            progress(done, total)
        return recorder.importance(model.down_norms)


def _encode(tokenizer: TokenizerWrapper, example: Example) -> tuple[list[int], int]:
    """Token ids of a chat, and where its last answer begins."""
    prompt = render_messages(tokenizer, example.messages[:-1])
    answer = list(tokenizer.encode(example.messages[-1]["content"], add_special_tokens=False))
    return (prompt + answer)[:MAX_TOKENS], len(prompt)


def _example(line: str, where: str) -> Example:
    try:
        record: Any = json.loads(line)
        if "messages" in record:
            messages = tuple({"role": str(m["role"]), "content": _text(m["content"])} for m in record["messages"])
        else:
            messages = (
                {"role": "user", "content": _text(record["prompt"])},
                {"role": "assistant", "content": _text(record["completion"])},
            )
    except (ValueError, TypeError, KeyError, RecursionError):
        raise SourceError(f"{where}: not a chat; expected JSON with messages, or prompt and completion") from None
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise SourceError(f"{where}: a calibration chat has at least two messages and ends with the assistant's")
    return Example(messages)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("content must be text")
    return value
