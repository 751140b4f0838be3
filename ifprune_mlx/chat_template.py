"""Prompts: text, token ids or chat messages, as the model reads them and as a selector does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.errors import PromptError
from ifprune_mlx.tokenizer import encode_text, render_chat

if TYPE_CHECKING:
    from ifprune_mlx.model import Model

Messages = Sequence[dict[str, Any]]
Prompt = str | Sequence[int] | Messages


def check_prompt(model: Model, tokens: Sequence[int]) -> None:
    """Raise PromptError if there is nothing to read, more than the model's context holds, or tokens it has not."""
    if not tokens:
        raise PromptError("the prompt is empty; write something to answer")
    check_ids(model, tokens)
    limit = model.context_length
    if limit is not None and len(tokens) >= limit:
        raise PromptError(
            f"the prompt has {len(tokens)} tokens, the model's context holds {limit}; shorten it or start anew"
        )


def check_ids(model: Model, tokens: Sequence[int]) -> None:
    """Raise PromptError unless the model has an embedding for every token: it would read beyond them in memory."""
    rows = model.vocabulary
    if tokens and rows is not None and not 0 <= min(tokens) <= max(tokens) < rows:
        wrong = next(token for token in tokens if not 0 <= token < rows)
        raise PromptError(
            f"the prompt holds the token id {wrong}, and the model has ids from 0 to {rows - 1}; encode it with the "
            "model's own tokenizer"
        )


def encode_prompt(tokenizer: TokenizerWrapper, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: chat messages through the template, text as mlx-lm encodes it, ids as they are."""
    if isinstance(prompt, str):
        if not prompt.strip():
            return []
        special = tokenizer.bos_token is None or not prompt.startswith(tokenizer.bos_token)
        return encode_text(tokenizer, prompt, add_special_tokens=special)
    if messages := _messages(prompt):
        return render_messages(tokenizer, messages)
    return [int(item) for item in prompt if not isinstance(item, dict)]


def is_chat(tokenizer: TokenizerWrapper, prompt: Prompt) -> bool:
    """Whether a prompt goes through a chat template, so that its answer is a message of its own."""
    return not isinstance(prompt, str) and bool(_messages(prompt)) and bool(tokenizer.has_chat_template)


def render_messages(tokenizer: TokenizerWrapper, messages: Messages) -> list[int]:
    """Token ids of chat messages, ready for an answer; plain lines where the tokenizer has no chat template.

    Raises:
        PromptError: if the template refuses the messages.
    """
    if not tokenizer.has_chat_template:
        return encode_text(tokenizer, "\n".join(str(message["content"]) for message in messages) + "\n")
    text = render_chat(tokenizer, messages, add_generation_prompt=True)
    return encode_text(tokenizer, text, add_special_tokens=False)


def instruction_of(tokenizer: TokenizerWrapper, prompt: Prompt) -> str:
    """What a selector reads of a prompt: the first user message, or all of it."""
    if isinstance(prompt, str):
        return prompt
    messages = _messages(prompt)
    if not messages:
        return str(tokenizer.decode(encode_prompt(tokenizer, prompt)))
    users = [message for message in messages if message["role"] == "user"]
    return str((users or messages)[0]["content"])


def _messages(prompt: Sequence[int] | Messages) -> list[dict[str, Any]]:
    return [item for item in prompt if isinstance(item, dict)]
