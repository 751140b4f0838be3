"""Measures the prior: the importance of every neuron over a set of chats, run through the dense model.

Only the tokens of answers count, since answers are what a selection computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from ifprune_mlx.chat_template import render_messages
from ifprune_mlx.data.dataset import Record, read_records
from ifprune_mlx.errors import DataError, SourceError
from ifprune_mlx.model import Model
from ifprune_mlx.selection.selection import Scores
from ifprune_mlx.sparse.importance import recorded

_STEP = 64
MAX_TOKENS = 512
"""Tokens of one chat that are looked at; the rest is cut off."""


def shipped_examples() -> list[Record]:
    """The calibration set that ships with the package (its sources and licences stand in `data/README.md`)."""
    return read_examples(Path(str(files("ifprune_convert") / "data" / "calibration.jsonl")))


def read_examples(file: Path) -> list[Record]:
    """Read chats from JSON lines: `{"messages": [...]}` or `{"prompt": ..., "completion": ...}`, as mlx-lm reads them.

    Raises:
        DataError: naming the file, and the line of the first that cannot be used, or if there is none.
    """
    records = read_records(file, "calibration", strict=True)
    if any(record.text is not None for record in records):
        raise DataError(f"{file}: holds plain text; calibration takes chats, with messages, or prompt and completion")
    return records


def calibrate(
    model: Model, tokenizer_folder: Path, examples: Sequence[Record], progress: Callable[[int, int], None]
) -> list[Scores]:
    """Run chats through the dense model.

    Args:
        progress: called with (tokens read, tokens).

    Returns:
        Per FFN, importance float32 `[d_ffn]` in the source's neuron order (see `ifprune_mlx.sparse.importance`).

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
            cache = make_prompt_cache(model.module)
            # In pieces: Ctrl-C and progress wait for the end of an evaluation, and a slow machine takes long for a
            # chat.
            for start in range(0, len(tokens), _STEP):
                piece = tokens[start : start + _STEP]
                answers = mx.arange(start, start + len(piece)) >= answer_start
                recorder.token_weights = answers.astype(mx.float32)
                model(mx.array([piece]), cache=cache)
                mx.eval(recorder.state(), [layer.state for layer in cache])
                done += len(piece)
                progress(done, total)
        return recorder.importance(model.down_norms)


def _encode(tokenizer: TokenizerWrapper, example: Record) -> tuple[list[int], int]:
    """Token ids of a chat, and where its last answer begins."""
    prompt = render_messages(tokenizer, example.messages[:-1])
    answer = list(tokenizer.encode(example.messages[-1]["content"], add_special_tokens=False))
    return (prompt + answer)[:MAX_TOKENS], len(prompt)
