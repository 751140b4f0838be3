"""Prompts: text, token ids or chat messages, as the model reads them and as a selector does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.errors import PromptError, reason_of
from ifprune_mlx.thinking import Thinking, thinking_of

if TYPE_CHECKING:
    from ifprune_mlx.model import Model

Messages = Sequence[dict[str, Any]]
Prompt = str | Sequence[int] | Messages


def check_prompt(model: Model, tokens: Sequence[int]) -> None:
    """Raise PromptError if there is nothing to read, or more than the model's context holds."""
    if not tokens:
        raise PromptError("the prompt is empty; write something to answer")
    limit = model.context_length
    if limit is not None and len(tokens) >= limit:
        raise PromptError(
            f"the prompt has {len(tokens)} tokens, the model's context holds {limit}; shorten it or start anew"
        )


def encode_prompt(tokenizer: TokenizerWrapper, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: chat messages through the template, text as mlx-lm encodes it, ids as they are."""
    if isinstance(prompt, str):
        if not prompt.strip():
            return []
        special = tokenizer.bos_token is None or not prompt.startswith(tokenizer.bos_token)
        return list(tokenizer.encode(prompt, add_special_tokens=special))
    if messages := _messages(prompt):
        return render_messages(tokenizer, messages)
    return [int(item) for item in prompt if not isinstance(item, dict)]


def render_messages(tokenizer: TokenizerWrapper, messages: Messages) -> list[int]:
    """Token ids of chat messages, ready for an answer; plain lines where the tokenizer has no chat template.

    Raises:
        PromptError: if the template refuses the messages.
    """
    if not tokenizer.has_chat_template:
        return list(tokenizer.encode("\n".join(str(message["content"]) for message in messages) + "\n"))
    try:
        return list(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True))
    except Exception as exc:  # jinja and the templates themselves raise what they like
        raise PromptError(f"the chat template refuses these messages ({reason_of(exc)})") from None


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
    asked = [{"role": "user", "content": "Hello"}]
    try:
        text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    except Exception:  # a template that wants more; the chat's own messages will say so
        return thinking
    return replace(thinking, begun=str(text).rstrip().endswith(thinking.start))


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
