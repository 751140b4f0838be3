"""Conversations as clients send them, made into the tokens of a prompt. What both chat APIs boil down to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.chat_template import Messages, check_prompt, encode_prompt, instruction_of, render_messages
from ifprune_mlx.errors import PromptError
from ifprune_mlx.model import Model
from ifprune_mlx.serving.http.fields import RequestError
from ifprune_mlx.serving.http.tools import ToolSplitter, beginning

NONE, AUTO, REQUIRED, NAMED = "none", "auto", "required", "named"


@dataclass(frozen=True)
class Tools:
    """The tools that an answer may, or must, call.

    Attributes:
        functions: as the chat template takes them: `{"type": "function", "function": {...}}`.
        choice: `none`, `auto`, `required`, or `named`.
        name: the tool to be called, for `named`.
        several: whether one answer may have several calls.
    """

    functions: list[dict[str, Any]] = field(default_factory=list)
    choice: str = AUTO
    name: str | None = None
    several: bool = True

    @property
    def offered(self) -> list[dict[str, Any]]:
        """Those that the prompt shows: all, none, or the one to be called."""
        if self.choice == NONE:
            return []
        if self.choice == NAMED:
            return [tool for tool in self.functions if tool["function"]["name"] == self.name]
        return self.functions


@dataclass(frozen=True)
class Conversation:
    """What an answer is asked for.

    Attributes:
        messages: as the chat template takes them: role, content, and for tools tool_calls, tool_call_id and name.
        prefill: text that the answer begins with.
    """

    messages: list[dict[str, Any]]
    tools: Tools = field(default_factory=Tools)
    prefill: str = ""

    def instruction(self, policy: str) -> str:
        """What the selector reads: the first user message, or for policies `turn` and `auto` the last."""
        users = [message for message in self.messages if message["role"] == "user"] or self.messages
        return str(users[0 if policy == "first" else -1]["content"])


class ChatRenderer:
    """Makes conversations and texts into tokens of one model's prompt.

    Args:
        model, tokenizer: from `ifprune_mlx.load`.
    """

    def __init__(self, model: Model, tokenizer: TokenizerWrapper) -> None:
        self._model = model
        self._tokenizer = tokenizer
        # No token stands for more text than the longest of the vocabulary.
        longest = max((len(token) for token in tokenizer.get_vocab()), default=1)
        limit = model.context_length
        self._most_characters = None if limit is None else limit * longest

    def prompt(self, text: str | Sequence[int]) -> tuple[int, ...]:
        """The tokens of a prompt that is taken as it is.

        Raises:
            PromptError: if it is empty, or longer than the context.
        """
        if isinstance(text, str):
            self._check_length(len(text))
        return self._checked(encode_prompt(self._tokenizer, text))

    def instruction(self, prompt: str | Sequence[int]) -> str:
        """What the selector reads of such a prompt: all of it."""
        return instruction_of(self._tokenizer, prompt)

    def conversation(self, conversation: Conversation) -> tuple[int, ...]:
        """The tokens of a conversation, up to where the answer begins or, where a call is forced, goes on.

        Raises:
            PromptError: if it is longer than the context, or the chat template refuses it.
            RequestError: if it has tools, and the chat template has none.
        """
        messages, tools = conversation.messages, conversation.tools.offered
        calls = any(message["role"] == "tool" or "tool_calls" in message for message in messages)
        if (tools or calls) and not self._tokenizer.has_tool_calling:
            raise RequestError(
                "this model's chat template has no tools; ask without them", "tools", code="tools_not_supported"
            )
        shown = json.dumps(tools, ensure_ascii=False) if tools else ""
        self._check_length(len(conversation.prefill) + len(shown) + sum(_length(message) for message in messages))
        begun = conversation.prefill + self.begun(conversation.tools)
        if not tools and not calls and not begun:
            return self._checked(render_messages(self._tokenizer, messages))
        return self._checked(self._render(messages, tools, begun))

    def begun(self, tools: Tools) -> str:
        """What the prompt has of a call that is forced; empty where none is."""
        return beginning(self._tokenizer, _only(tools)) if tools.choice in (REQUIRED, NAMED) else ""

    def splitter(self, tools: Tools) -> ToolSplitter | None:
        """What tells calls from text in an answer; None where no tool may be called."""
        if not tools.offered:
            return None
        return ToolSplitter(self._tokenizer, tools.offered, self.begun(tools), _only(tools))

    def stops(self, tools: Tools) -> tuple[str, ...]:
        """Strings that end an answer which may have one call only."""
        end = self._tokenizer.tool_call_end if tools.offered else None
        return (end,) if end and (not tools.several or tools.choice == NAMED) else ()

    def _render(self, messages: Messages, tools: list[dict[str, Any]], begun: str) -> list[int]:
        tokenizer = self._tokenizer
        if not tokenizer.has_chat_template:
            text = "\n".join(str(message["content"]) for message in messages) + "\n"
            return list(tokenizer.encode(text + begun))
        try:
            text = tokenizer.apply_chat_template(
                list(messages), tools=tools or None, tokenize=False, add_generation_prompt=True
            )
        except Exception as exc:  # jinja and the templates themselves raise what they like
            reason = " ".join(str(exc).split())[:200]
            raise PromptError(f"the chat template refuses these messages ({reason})") from None
        return list(tokenizer.encode(text + begun, add_special_tokens=False))

    def _check_length(self, characters: int) -> None:
        """Refuse a prompt that is too long whatever its tokens are, before the work of finding them."""
        if self._most_characters is not None and characters > self._most_characters:
            raise PromptError(
                f"the prompt has {characters} characters, the model's context holds {self._model.context_length} "
                "tokens; shorten it"
            )

    def _checked(self, tokens: list[int]) -> tuple[int, ...]:
        check_prompt(self._model, tokens)
        return tuple(tokens)


def _only(tools: Tools) -> str | None:
    """The one tool that can be called, if there is just one."""
    return tools.offered[0]["function"]["name"] if len(tools.offered) == 1 else None


def _length(message: dict[str, Any]) -> int:
    calls = message.get("tool_calls")
    return len(message["content"]) + (len(json.dumps(calls, ensure_ascii=False)) if calls else 0)
