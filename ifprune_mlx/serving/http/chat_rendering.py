"""Conversations as clients send them, made into the tokens of a prompt. What both chat APIs boil down to."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.chat_template import check_prompt, encode_prompt, instruction_of
from ifprune_mlx.errors import PromptError
from ifprune_mlx.model import Model
from ifprune_mlx.serving.http.errors import RequestError, field_error
from ifprune_mlx.serving.http.tools import ToolSplitter, beginning


@dataclass(frozen=True)
class Tools:
    """The tools that an answer may, or must, call.

    Attributes:
        offered: as the chat template takes them: `{"type": "function", "function": {...}}`.
        forced: whether the answer must be a call.
        single: whether one call ends the answer.
    """

    offered: list[dict[str, Any]] = field(default_factory=list)
    forced: bool = False
    single: bool = False

    @property
    def only(self) -> str | None:
        """The name of the one tool that can be called, if there is just one."""
        return self.offered[0]["function"]["name"] if len(self.offered) == 1 else None


def choose_tools(functions: list[dict[str, Any]], choice: Any, name: str | None, *, single: bool, param: str) -> Tools:
    """Those that the prompt shows.

    Args:
        choice: `none`, `auto`, `any` or `required`; of `tool` and `function`, the one called `name` must be called.
        single: whether one call ends the answer; it does anyway where it is known which.
        param: the field that says so.

    Raises:
        RequestError: if a tool must be called that is not there.
    """
    if choice in ("tool", "function"):
        functions = [function for function in functions if function["function"]["name"] == name]
        if not functions:
            raise field_error(param, "is required" if name is None else "is none of the tools")
        return Tools(functions, forced=True, single=True)
    forced = choice in ("any", "required")
    if forced and not functions:
        raise field_error(param, "needs tools to choose from")
    return Tools([] if choice == "none" else functions, forced, single)


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


class Prompt(NamedTuple):
    """What the model reads, what the selector reads of it, and strings of the template that end its answer."""

    tokens: tuple[int, ...]
    instruction: str
    stop: tuple[str, ...] = ()


class ChatRenderer:
    """Makes conversations and texts into tokens of one model's prompt.

    Args:
        model, tokenizer: from `ifprune_mlx.load`.
    """

    def __init__(self, model: Model, tokenizer: TokenizerWrapper) -> None:
        self._model, self._tokenizer = model, tokenizer
        # No token stands for more text than the longest of the vocabulary.
        longest = max((len(token) for token in tokenizer.get_vocab()), default=1)
        limit = model.context_length
        self._most_characters = math.inf if limit is None else limit * longest

    def prompts(self, prompts: Sequence[str | list[int]]) -> list[Prompt]:
        """Prompts that are taken as they are; the selector reads all of them.

        Raises:
            PromptError: if one is empty, or longer than the context.
        """
        rendered = []
        for prompt in prompts:
            if isinstance(prompt, str):
                self._check_length(len(prompt))
            tokens = encode_prompt(self._tokenizer, prompt)
            check_prompt(self._model, tokens)
            rendered.append(Prompt(tuple(tokens), instruction_of(self._tokenizer, prompt)))
        return rendered

    def conversation(self, conversation: Conversation, policy: str = "first") -> list[Prompt]:
        """The one prompt of a conversation, up to where the answer begins or, where a call is forced, goes on. The
        selector reads the first user message, or for policies `turn` and `auto` the last.

        Raises:
            PromptError: if it is longer than the context, or the chat template refuses it.
            RequestError: if it has tools, and the chat template has none.
        """
        tokenizer, messages, tools = self._tokenizer, conversation.messages, conversation.tools
        calls = [message for message in messages if message["role"] == "tool" or "tool_calls" in message]
        if (tools.offered or calls) and not tokenizer.has_tool_calling:
            reason = "this model's chat template has no tools; ask without them"
            raise RequestError(reason, "tools", code="tools_not_supported")
        shown = json.dumps([tools.offered, calls], ensure_ascii=False) if tools.offered or calls else ""
        begun = conversation.prefill + (beginning(tokenizer, tools.only) if tools.forced else "")
        self._check_length(len(begun) + len(shown) + sum(len(message["content"]) for message in messages))
        if tokenizer.has_chat_template:
            try:
                text = tokenizer.apply_chat_template(
                    messages, tools=tools.offered or None, tokenize=False, add_generation_prompt=True
                )
            except Exception as exc:  # jinja and the templates themselves raise what they like
                reason = " ".join(str(exc).split())[:200]
                raise PromptError(f"the chat template refuses these messages ({reason})") from None
            tokens = tokenizer.encode(text + begun, add_special_tokens=False)
        else:
            tokens = tokenizer.encode("\n".join(message["content"] for message in messages) + "\n" + begun)
        check_prompt(self._model, tokens)
        users = [message for message in messages if message["role"] == "user"] or messages
        instruction = users[0 if policy == "first" else -1]["content"]
        end = tokenizer.tool_call_end if tools.offered and tools.single else None
        return [Prompt(tuple(tokens), instruction, (end,) if end else ())]

    def splitter(self, tools: Tools) -> ToolSplitter | None:
        """What tells calls from text in an answer; None where no tool may be called."""
        if not tools.offered:
            return None
        begun = beginning(self._tokenizer, tools.only) if tools.forced else ""
        return ToolSplitter(self._tokenizer, tools.offered, begun, tools.only)

    def _check_length(self, characters: int) -> None:
        """Refuse a prompt that is too long whatever its tokens are, before the work of finding them."""
        if characters > self._most_characters:
            limit = f"the model's context holds {self._model.context_length} tokens"
            raise PromptError(f"the prompt has {characters} characters, {limit}; shorten it")
