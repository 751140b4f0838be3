"""The prior: the importance of every neuron, measured over chats that run through the dense model, or read from a file.

Only the tokens of answers count, since answers are what a selection computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.chat_template import render_messages
from ifprune_mlx.checkpoint.neuron_layout import FLOATS
from ifprune_mlx.checkpoint.safetensors_io import load_arrays, read_safetensors_header
from ifprune_mlx.data.dataset import Record, read_records, split
from ifprune_mlx.errors import DataError, SourceError
from ifprune_mlx.eval.density_curve import LEAST_PROMPTS
from ifprune_mlx.model import Model
from ifprune_mlx.selection.selection import Scores
from ifprune_mlx.sparse.importance import recorded
from ifprune_mlx.tokenizer import encode_text, load_tokenizer

from .skeleton import listing

SHIPPED = Path(str(files("ifprune_convert") / "data" / "calibration.jsonl"))
"""The calibration set that comes with the package (its sources and licences stand in `data/README.md`)."""
_MEASURED = "give one that was measured on this model, such as priors.safetensors of a checkpoint made from it"
_STEP = 64
_HELD_OUT = 0.2
MAX_TOKENS = 512
"""Tokens of one chat that are looked at; the rest is cut off."""


def shipped_examples() -> list[Record]:
    """The chats of `SHIPPED`."""
    return read_examples(SHIPPED)


def read_examples(file: Path) -> list[Record]:
    """Read chats from JSON lines: `{"messages": [...]}` or `{"prompt": ..., "completion": ...}`, as mlx-lm reads them.

    Raises:
        DataError: naming the file, and the line of the first that cannot be used, or if there is none.
    """
    records = read_records(file, "calibration", strict=True)
    if any(record.text is not None for record in records):
        raise DataError(f"{file}: holds plain text; calibration takes chats, with messages, or prompt and completion")
    return records


def hold_out(examples: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """The chats to calibrate on, and about a fifth of them apart, to measure densities on.

    A prompt alone decides on which side it is; those held out stand in an order of no meaning, each once. Where they
    would be too few to measure anything, all are calibrated on.
    """
    fitted = [chat for chat in examples if split(chat, _HELD_OUT) == "train"]
    held_out = {chat.key: chat for chat in examples if split(chat, _HELD_OUT) == "valid"}
    if not fitted or len(held_out) < LEAST_PROMPTS:
        return list(examples), []
    return fitted, [held_out[key] for key in sorted(held_out)]


def measure_prior(
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
    tokenizer = load_tokenizer(tokenizer_folder, SourceError, "convert the source again")
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
    answer = encode_text(tokenizer, example.messages[-1]["content"], add_special_tokens=False)
    return (prompt + answer)[:MAX_TOKENS], len(prompt)


def read_prior(file: Path, widths: Sequence[int]) -> tuple[list[Scores], str]:
    """Read the tensors `prior.N` of a safetensors file; tensors `down_norm.N` may be there and are ignored.

    Args:
        widths: `d_ffn` of every FFN of the model.

    Returns:
        Per FFN, importance float32 `[d_ffn]` in the source's neuron order; and the file's own word for where it comes
        from (`weights` or `calibrated`, the latter if it says nothing).

    Raises:
        SourceError: naming the file, if it is missing or damaged, belongs to a model of another shape, or holds
            anything but finite numbers of 0 and above.
    """
    if not file.is_file():
        raise SourceError(f"{file}: no such prior file; {_MEASURED}")
    header = read_safetensors_header(file, SourceError)
    expected = {f"prior.{index}": (width,) for index, width in enumerate(widths)}
    if missing := [name for name in expected if name not in header.tensors]:
        raise SourceError(f"{file}: lacks {listing(missing)}, and the model has {len(widths)} FFNs; {_MEASURED}")
    found = [name for name in header.tensors if not name.startswith("down_norm.")]
    if extra := [name for name in found if name not in expected]:
        raise SourceError(f"{file}: holds {listing(extra)}, and the model has {len(widths)} FFNs; {_MEASURED}")
    for name, shape in expected.items():
        info = header.tensors[name]
        if info.shape != shape or info.dtype not in FLOATS:
            raise SourceError(
                f"{file}: tensor {name} is {info.dtype} {list(info.shape)}, and the model needs F32 {list(shape)}; "
                f"{_MEASURED}"
            )
    arrays = load_arrays(file)
    prior = [np.array(arrays[name].astype(mx.float32)) for name in expected]
    for name, values in zip(expected, prior, strict=True):
        if not np.isfinite(values).all() or values.min() < 0:
            raise SourceError(
                f"{file}: tensor {name} holds NaN, infinity or negative numbers, which no importance is; "
                "measure the prior again"
            )
    method = header.metadata.get("method")
    return prior, "weights" if method == "weights" else "calibrated"
