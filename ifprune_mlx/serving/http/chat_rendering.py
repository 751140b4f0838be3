"""Renders the conversations of both chat APIs as the tokens of a prompt."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, NamedTuple

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.chat_template import check_prompt, encode_prompt, instruction_of, plain_text
from ifprune_mlx.constraint import Grammar, Grammars
from ifprune_mlx.errors import ContextLengthError
from ifprune_mlx.model import Model
from ifprune_mlx.serving.engine.call_grammar import answer_rules
from ifprune_mlx.serving.http.errors import RequestError, field_error
from ifprune_mlx.serving.http.tools import ToolSplitter, beginning
from ifprune_mlx.tokenizer import encode_text, render_chat


@dataclass(frozen=True)
class Tools:
    """The tools that an answer may, or must, call."""

    offered: list[dict[str, Any]] = field(default_factory=list)  # each `{"type": "function", "function": {...}}`
    forced: bool = False  # the answer must be a call
    single: bool = False  # one call ends the answer

    @property
    def only(self) -> str | None:
        """The tool's name, if just one is offered."""
        return self.offered[0]["function"]["name"] if len(self.offered) == 1 else None


def choose_tools(functions: list[dict[str, Any]], choice: Any, name: str | None, *, single: bool, param: str) -> Tools:
    """Choose the tools that the prompt shows.

    Args:
        choice: `none`, `auto`, `any` or `required`; `tool` and `function` mean that `name` must be called.
        single: one call ends the answer, as it always does if `name` must be called.
        param: the request's field for error messages.

    Raises:
        RequestError: if a tool must be called that does not exist.
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
    """A conversation to answer, in the chat template's form."""

    messages: list[dict[str, Any]]  # role, content, and for tools tool_calls, tool_call_id and name
    tools: Tools = field(default_factory=Tools)
    prefill: str = ""  # the answer begins with it
    schema: dict[str, Any] | None = None  # the answer is JSON that this allows


class Prompt(NamedTuple):
    """A rendered prompt."""

    tokens: tuple[int, ...]
    instruction: str  # the selector reads it
    stop: tuple[str, ...] = ()  # strings of the template that end the answer
    instruction_tokens: tuple[int, ...] = ()  # see `Request`
    grammar: Grammar | None = None  # the answer must satisfy it
    continues: bool = False  # the answer continues the prompt's text


class ChatRenderer:
    """Renders conversations and texts for one model.

    Args:
        model, tokenizer: from `ifprune_mlx.load`.
    """

    def __init__(self, model: Model, tokenizer: TokenizerWrapper) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._grammars = Grammars(tokenizer)
        # No token stands for more text than the vocabulary's longest.
        longest = max((len(token) for token in tokenizer.get_vocab()), default=1)
        limit = model.context_length
        self._most_characters = math.inf if limit is None else limit * longest

    def prompts(self, prompts: Sequence[str | list[int]], schema: dict[str, Any] | None = None) -> list[Prompt]:
        """Encode prompts without a template; the selector reads all of the text.

        Args:
            schema: the answers are JSON that this allows.

        Raises:
            GrammarError: if the schema cannot be used.
            PromptError: if one is empty, or longer than the context.
        """
        rendered = []
        for prompt in prompts:
            if isinstance(prompt, str):
                self._check_length(len(prompt))
            tokens = encode_prompt(self._tokenizer, prompt)
            check_prompt(self._model, tokens)
            read = Prompt(tuple(tokens), instruction_of(self._tokenizer, prompt), continues=True)
            rendered.append(self._constrained(read, Tools(), schema))
        return rendered

    def constrained(self, conversation: Conversation, policy: str = "first") -> list[Prompt]:
        """As `conversation`, with the grammar that the schema and the tools ask for.

        Raises:
            GrammarError: if a schema cannot be used.
        """
        [prompt] = self.conversation(conversation, policy)
        return [self._constrained(prompt, conversation.tools, conversation.schema)]

    def _constrained(self, prompt: Prompt, tools: Tools, schema: dict[str, Any] | None) -> Prompt:
        rules = answer_rules(
            self._grammars, self._tokenizer, tools.offered, forced=tools.forced, single=tools.single, schema=schema
        )
        return prompt if rules is None else prompt._replace(grammar=self._grammars.compile(rules, prompt.tokens))

    def conversation(self, conversation: Conversation, policy: str = "first") -> list[Prompt]:
        """Render a conversation as one prompt, which includes the prefill or the beginning of a forced call.

        The selector reads the first user message, or for policies `turn` and `auto` the last. For `system` it reads the
        system prompt and the tools' names, which stay the same from one conversation of an agent to the next; without
        either that is as `first`.

        Raises:
            PromptError: if it is longer than the context, or the chat template refuses it.
            RequestError: if it has tools, but the chat template does not support them.
        """
        tokenizer, messages, tools = self._tokenizer, conversation.messages, conversation.tools
        calls = [message for message in messages if message["role"] == "tool" or "tool_calls" in message]
        if (tools.offered or calls) and not tokenizer.has_tool_calling:
            reason = "this model's chat template has no tools; ask without them"
            raise RequestError(reason, "tools", code="tools_not_supported")
        shown = json.dumps([tools.offered, calls], ensure_ascii=False) if tools.offered or calls else ""
        begun = conversation.prefill + (beginning(tokenizer) if tools.forced else "")
        self._check_length(len(begun) + len(shown) + sum(len(message["content"]) for message in messages))
        if tokenizer.has_chat_template:
            text = render_chat(tokenizer, messages, tools=tools.offered or None, add_generation_prompt=True)
            tokens = encode_text(tokenizer, text + begun, add_special_tokens=False)
        else:
            tokens = encode_text(tokenizer, plain_text(tokenizer, messages) + begun)
        check_prompt(self._model, tokens)
        end = tokenizer.tool_call_end if tools.offered and tools.single else None
        stop = (end,) if end else ()
        continues = bool(begun) or not tokenizer.has_chat_template
        if policy == "system" and (stable := _stable_part(conversation)):
            read = tuple(encode_text(tokenizer, stable, add_special_tokens=False))
            return [Prompt(tuple(tokens), stable, stop, read, continues=continues)]
        users = [message for message in messages if message["role"] == "user"] or messages
        instruction = users[-1 if policy in ("turn", "auto") else 0]["content"]
        return [Prompt(tuple(tokens), instruction, stop, continues=continues)]

    def splitter(self, tools: Tools) -> ToolSplitter | None:
        """The splitter for an answer's text and calls; None if no tool may be called."""
        if not tools.offered:
            return None
        begun = tools.forced and bool(beginning(self._tokenizer))
        return ToolSplitter(self._tokenizer, tools.offered, begun, tools.only if tools.forced else None)

    def _check_length(self, characters: int) -> None:
        """Refuse a prompt that must be too long, before the work of encoding it."""
        if characters > self._most_characters:
            limit = f"the model's context holds {self._model.context_length} tokens"
            raise ContextLengthError(f"the prompt has {characters} characters, {limit}; shorten it")


def _stable_part(conversation: Conversation) -> str:
    """What is the same in every conversation of one agent: the system prompt and the tools' names."""
    system = takewhile(lambda message: message["role"] == "system", conversation.messages)
    names = sorted(tool["function"]["name"] for tool in conversation.tools.offered)
    return "\n".join([*(message["content"] for message in system), *names]).strip()
