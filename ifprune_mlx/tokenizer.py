"""Loads the tokenizer of a model folder, so that it can be relied on.

mlx-lm's TokenizerWrapper, with three differences: no token lies beyond the model's embeddings, chat templates render
within bounds (`ifprune_mlx.chat_sandbox`), and a vocabulary of bytes is decoded as bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx import nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer as lm_load_tokenizer
from tokenizers import decoders, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from ifprune_mlx.chat_sandbox import ChatTemplate
from ifprune_mlx.errors import IfpruneError, PromptError, reason_of

DEFAULT, TOOL_USE = "default", "tool_use"
"""The names of the chat templates that are used; a model may have others."""
# Far more than any tokenizer needs: the slowest read 100,000 characters a second.
_SECONDS, _CHARACTERS_A_SECOND = 5.0, 10_000
_NOT_OF_TOKENS = ("wpe", "position_embedding_table")


def load_tokenizer(
    folder: Path,
    error: type[IfpruneError],
    advice: str,
    *,
    rows: int | None = None,
    eos_token_ids: Any = None,
    trust_remote_code: bool = False,
) -> TokenizerWrapper:
    """Load the tokenizer files of a folder.

    Args:
        error, advice: what is raised if they cannot be used, and what its message tells to do.
        rows: tokens that the model has embeddings for; see `embedding_rows`.
        eos_token_ids: an id or ids that end an answer, beside the tokenizer's own.

    Raises:
        IfpruneError: (the given subclass) naming the folder.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        with panics_as_errors():
            tokenizer = lm_load_tokenizer(folder, options, eos_token_ids=eos_token_ids)
            if isinstance(tokenizer.chat_template, dict):
                templates = {str(name): str(text) for name, text in tokenizer.chat_template.items()}
                # mlx-lm finds the dialect of tool calls in the text of a single template.
                options["chat_template"] = templates.get(TOOL_USE, templates.get(DEFAULT))
                tokenizer = lm_load_tokenizer(folder, options, eos_token_ids=eos_token_ids)
                tokenizer.chat_template = templates
            _bound_template(tokenizer)
            _decode_bytes(tokenizer)
            largest = max(tokenizer.encode("a"), default=0)
            vocabulary: dict[str, int] = tokenizer.get_vocab()
            added: dict[str, int] = tokenizer.get_added_vocab()
    except Exception as exc:  # transformers' parsers raise many types
        raise error(f"{folder}: the tokenizer cannot be loaded ({reason_of(exc)}); {advice}") from exc
    # Gemma 3's text models have an added token without an embedding: prompts without it are fine (`tokens_beyond`).
    own = ((token, number) for token, number in vocabulary.items() if token not in added)
    token, number = max(own, key=lambda item: item[1], default=("", 0))
    if rows is not None and max(number, largest) >= rows:
        what = f"gives {token[:80]!r} the id {number}" if number >= rows else f"puts the id {largest} around texts"
        raise error(
            f"{folder}: the tokenizer {what}, and the model has embeddings for {rows} tokens only; they do not belong "
            f"together: {advice}"
        )
    return tokenizer


def tokens_beyond(tokenizer: TokenizerWrapper, rows: int | None) -> list[str]:
    """Added tokens that the model has no embeddings for; a prompt that holds one is refused."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return [] if rows is None else sorted(token for token, number in vocabulary.items() if number >= rows)


def embedding_rows(module: nn.Module) -> int | None:
    """For how many tokens a model has embeddings; None if its class does not show it."""
    return min(
        (
            int(getattr(layer, "all_rows", layer.weight.shape[0]))  # of a table that several ranks share
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Embedding | nn.QuantizedEmbedding) and name.rpartition(".")[2] not in _NOT_OF_TOKENS
        ),
        default=None,
    )


def encode_text(tokenizer: TokenizerWrapper, text: str, **options: Any) -> list[int]:
    """Token ids of a text, as `tokenizer.encode` gives them.

    Raises:
        PromptError: if the text cannot be encoded, or not in time; the work then goes on in a thread of its own, as
            nothing can end it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise PromptError(
            f"the text holds half a character ({text[exc.start]!a} at {exc.start}), which no tokenizer reads; "
            "give valid Unicode"
        ) from exc
    result: Future[list[int]] = Future()

    def work() -> None:
        try:
            with panics_as_errors():
                result.set_result(list(tokenizer.encode(text, **options)))
        except Exception as exc:  # tokenizers raises bare Exceptions
            result.set_exception(exc)

    threading.Thread(target=work, name="ifprune-encode", daemon=True).start()
    seconds = _SECONDS + len(text) / _CHARACTERS_A_SECOND
    if not wait([result], seconds).done:
        raise PromptError(f"the tokenizer takes more than {seconds:.0f} s for this text; change it")
    try:
        return result.result()
    except Exception as exc:
        raise PromptError(f"the tokenizer fails on this text ({reason_of(exc)}); change it") from exc


def render_chat(tokenizer: TokenizerWrapper, messages: Sequence[Any], **options: Any) -> str:
    """The text of chat messages, by the tokenizer's chat template; it takes the arguments of `apply_chat_template`.

    Raises:
        PromptError: if the template refuses the messages, fails, or takes too long.
    """
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
    except Exception as exc:  # jinja and the templates themselves raise what they like
        raise PromptError(f"the chat template refuses these messages ({reason_of(exc)})") from exc


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise what tokenizers' Rust code panics with as a ValueError."""
    try:
        yield
    except BaseException as exc:
        if type(exc).__name__ != "PanicException":  # the class has no public name
            raise
        raise ValueError(str(exc)) from exc


def _bound_template(tokenizer: TokenizerWrapper) -> None:
    """Let mlx-lm render the tokenizer's own templates within bounds."""
    given, inner = tokenizer.chat_template, tokenizer._tokenizer
    # A class with Python code of its own may render in its own way; that code is trusted.
    own = type(inner).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
    if given is None or own or tokenizer._chat_template is not None:
        return
    templates = given if isinstance(given, dict) else {DEFAULT: given}
    if DEFAULT not in templates:
        raise ValueError(f"it has chat templates {', '.join(sorted(templates))}, and none is the {DEFAULT}")
    tokens = {name: str(token) for name, token in inner.special_tokens_map.items() if isinstance(token, str)}
    tokenizer._chat_template = ChatTemplate(templates[DEFAULT], templates.get(TOOL_USE), tokens)


def _decode_bytes(tokenizer: TokenizerWrapper) -> None:
    """Decode a byte-level vocabulary so, where the class or the files name another decoder."""
    backend = getattr(tokenizer._tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    vocabulary = tokenizer.get_vocab()
    of_bytes = "\u2581" not in vocabulary and all(one in vocabulary for one in pre_tokenizers.ByteLevel.alphabet())
    if of_bytes and "ByteLevel" not in repr(backend.decoder):
        backend.decoder = decoders.ByteLevel()
