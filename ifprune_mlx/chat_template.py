"""Prompts: text, token ids or chat messages, as the model reads them and as a selector does."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.errors import ContextLengthError, PromptError
from ifprune_mlx.thinking import Thinking, thinking_of
from ifprune_mlx.tokenizer import encode_text, render_chat

if TYPE_CHECKING:
    from ifprune_mlx.model import Model

_log = logging.getLogger(__name__)

Messages = Sequence[dict[str, Any]]
Prompt = str | Sequence[int] | Messages


def check_prompt(model: Model, tokens: Sequence[int]) -> None:
    """Raise PromptError if there is nothing to read, or tokens that the model has not, ContextLengthError if it is more
    than the context holds.

    Raises:
        ModelClosedError: if the model was closed.
    """
    model.lock.check_open()
    if not tokens:
        raise PromptError("the prompt is empty; write something to answer")
    check_ids(model, tokens)
    limit = model.context_length
    if limit is not None and len(tokens) >= limit:
        raise ContextLengthError(
            f"the prompt has {len(tokens)} tokens, the model's context holds {limit}; shorten it or start anew"
        )


def check_ids(model: Model, tokens: Sequence[int]) -> None:
    """Raise PromptError unless the model has an embedding for every token: it would read beyond them in memory."""
    rows = model.vocabulary
    if tokens and rows is not None and not 0 <= min(tokens) <= max(tokens) < rows:
        wrong = next(token for token in tokens if not 0 <= token < rows)
        raise PromptError(
            f"the prompt holds the token {wrong}, and the model has token ids from 0 to {rows - 1}; encode it with the "
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
    """Token ids of chat messages, ready for an answer; of `plain_text` where the tokenizer has no chat template.

    Raises:
        PromptError: if the template refuses the messages.
    """
    if not tokenizer.has_chat_template:
        return encode_text(tokenizer, plain_text(tokenizer, messages))
    text = render_chat(tokenizer, messages, add_generation_prompt=True)
    return encode_text(tokenizer, text, add_special_tokens=False)


def plain_text(tokenizer: TokenizerWrapper, messages: Messages) -> str:
    """Messages as a base model reads them: each begins a line, but for an answer that continues one with a space."""
    if tokenizer.chat_template is None:  # and not `without_template`
        _say_plain(tokenizer.name_or_path)
    text = ""
    for message in messages:
        content = str(message["content"])
        continues = message["role"] == "assistant" and content[:1].isspace()
        text += content if continues or not text else f"\n{content}"
    return text


@cache
def _say_plain(name: str) -> None:
    """Say it once for each tokenizer."""
    _log.warning("%s: has no chat template, so messages are read as plain text that the model continues", name)


def without_template(tokenizer: TokenizerWrapper) -> TokenizerWrapper:
    """The same tokenizer, but messages are read as plain text (`plain_text`); the given one stays as it is."""
    plain: TokenizerWrapper = object.__new__(type(tokenizer))
    # Tools are shown by the template.
    vars(plain).update(vars(tokenizer), has_chat_template=False, _tool_call_start=None)
    return plain


def with_variables(tokenizer: TokenizerWrapper, variables: Mapping[str, Any]) -> TokenizerWrapper:
    """The same tokenizer, whose chat template gets these variables; the given one stays as it is."""
    changed: TokenizerWrapper = object.__new__(type(tokenizer))
    apply = partial(tokenizer.apply_chat_template, **variables)
    vars(changed).update(vars(tokenizer), apply_chat_template=apply)
    return changed


def thinking_in_chats(tokenizer: TokenizerWrapper) -> Thinking | None:
    """How thoughts are marked in the answers of a chat; None if the model does not think before it answers."""
    thinking = thinking_of(tokenizer)
    if thinking is None or not tokenizer.has_chat_template:
        return None
    try:
        text = render_chat(tokenizer, [{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    except PromptError:  # a template that wants more; the chat's own messages will say so
        return thinking
    return replace(thinking, begun=text.rstrip().endswith(thinking.start))


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
