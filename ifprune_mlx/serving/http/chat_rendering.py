"""Renders the conversations of both chat APIs as the tokens of a prompt."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple

from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import PreTrainedTokenizerBase

from ifprune_mlx.chat_sandbox import TemplateLimitError
from ifprune_mlx.chat_template import check_prompt, encode_prompt, instruction_of, plain_text
from ifprune_mlx.constraint import Grammar, Grammars
from ifprune_mlx.errors import ContextLengthError, PromptError
from ifprune_mlx.model import Model
from ifprune_mlx.serving.engine.call_formats import call_format
from ifprune_mlx.serving.engine.call_grammar import answer_rules
from ifprune_mlx.serving.engine.request import ThinkingBudget
from ifprune_mlx.serving.http.errors import RequestError, field_error
from ifprune_mlx.serving.http.template_fitting import Messages, forms, probe_of_parallel_calls, with_fitting_ids
from ifprune_mlx.serving.http.tools import ToolSplitter, beginning
from ifprune_mlx.thinking import Thinking, template_text, thinking_of
from ifprune_mlx.tokenizer import encode_text, render_chat

# The most tokens of thoughts where the chat template knows no efforts; None is as many as the model likes.
EFFORTS = {"none": 0, "minimal": 256, "low": 1024, "medium": 4096, "high": None, "xhigh": None, "max": None}
# What templates get from elsewhere: clients must not set it.
_OWN_VARIABLES = {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters} - {
    "documents"
}


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
class ThinkingOptions:
    """Whether, and how much, the model thinks before it answers."""

    enabled: bool | None = None  # None leaves it to the chat template
    effort: str | None = None  # `minimal`, `low`, `medium`, `high`, ...
    budget: int | None = None  # the most tokens of thoughts
    variables: Mapping[str, Any] = field(default_factory=dict)  # more variables of the chat template


@dataclass(frozen=True)
class Conversation:
    """A conversation to answer, in the chat template's form."""

    # role, content, for answers of thinking models reasoning_content, and for tools tool_calls, tool_call_id and name
    messages: list[dict[str, Any]]
    tools: Tools = field(default_factory=Tools)
    prefill: str = ""  # the answer begins with it
    schema: dict[str, Any] | None = None  # the answer is JSON that this allows
    thinking: ThinkingOptions = field(default_factory=ThinkingOptions)


class Prompt(NamedTuple):
    """A rendered prompt."""

    tokens: tuple[int, ...]
    instruction: str  # the selector reads it
    stop: tuple[str, ...] = ()  # strings of the template that end the answer
    instruction_tokens: tuple[int, ...] = ()  # see `Request`
    grammar: Grammar | None = None  # the answer must satisfy it
    continues: bool = False  # the answer continues the prompt's text
    thinking: Thinking | None = None  # None if no thoughts can come
    budget: ThinkingBudget | None = None
    earlier: tuple[str, ...] = ()  # see `Request`


class ChatRenderer:
    """Renders conversations and texts for one model.

    Args:
        model, tokenizer: from `ifprune_mlx.load`.

    Attributes:
        thinks: the model can think before it answers.
    """

    def __init__(self, model: Model, tokenizer: TokenizerWrapper) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._grammars = Grammars(tokenizer)
        self._template = template_text(tokenizer)
        self._marks = thinking_of(tokenizer) if tokenizer.has_chat_template else None
        self._has_tools = call_format(tokenizer) is not None
        self.thinks = self._marks is not None or self.knows("reasoning_effort")
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
        if rules is None:
            return prompt
        grammar = self._grammars.compile(rules, prompt.tokens, continues=prompt.continues)
        return prompt._replace(grammar=grammar)

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
        if (tools.offered or calls) and not self._has_tools:
            reason = "this model's chat template has no tools; ask without them"
            raise RequestError(reason, "tools", code="tools_not_supported")
        shown = json.dumps([tools.offered, calls], ensure_ascii=False) if tools.offered or calls else ""
        begun = conversation.prefill + (beginning(tokenizer, tools.only) if tools.forced else "")
        self._check_length(len(begun) + len(shown) + sum(map(_length, messages)))
        thinking, options = None, conversation.thinking
        if tokenizer.has_chat_template:
            text = self._rendered(messages, tools.offered, self._variables(options))
            if self._marks is not None:
                text, thinking = self._before_answer(text, conversation, begun)
            tokens = encode_text(tokenizer, text + begun, add_special_tokens=False)
        else:
            tokens = encode_text(tokenizer, plain_text(tokenizer, messages) + begun)
        check_prompt(self._model, tokens)
        end = tokenizer.tool_call_end if tools.offered and tools.single else None
        instruction, read, earlier = self._read_by_selector(conversation, policy)
        prompt = Prompt(
            tuple(tokens),
            instruction,
            (end,) if end else (),
            read,
            continues=bool(begun) or not tokenizer.has_chat_template,
            thinking=thinking,
            budget=None if thinking is None else self._budget(thinking, options),
            earlier=earlier,
        )
        return [prompt]

    def _read_by_selector(
        self, conversation: Conversation, policy: str
    ) -> tuple[str, tuple[int, ...], tuple[str, ...]]:
        """The instruction; its tokens if policy `system` selects by it alone; and what `auto` reads before it."""
        if policy == "system" and (stable := _stable_part(conversation)):
            return stable, tuple(encode_text(self._tokenizer, stable, add_special_tokens=False)), ()
        messages = conversation.messages
        users = [message["content"] for message in messages if message["role"] == "user"]
        users = users or [messages[0]["content"], messages[-1]["content"]]
        last = users[-1 if policy in ("turn", "auto") else 0]
        return last, (), tuple(text for text in users[:-1] if text.strip()) if policy == "auto" else ()

    def knows(self, variable: str) -> bool:
        """Whether the chat template uses a variable."""
        return re.search(rf"\b{re.escape(variable)}\b", self._template) is not None

    def check_variables(self, given: Mapping[str, Any], param: str) -> None:
        """Raise RequestError if a client must not, or cannot, set one of these variables of the chat template."""
        for name in given:
            if name in _OWN_VARIABLES or name.endswith("_token"):
                raise field_error(f"{param}.{name[:64]}", "is set by the server")
            if name != "enable_thinking" and not self.knows(name):
                raise field_error(f"{param}.{name[:64]}", "is no variable of this model's chat template")

    def _variables(self, options: ThinkingOptions) -> dict[str, Any]:
        effort = {} if options.effort is None else {"reasoning_effort": options.effort}
        switch = {} if options.enabled is None else {"enable_thinking": options.enabled, "thinking": options.enabled}
        return {**effort, **switch, **options.variables}

    def _rendered(self, messages: Messages, tools: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        """The prompt, from the first form of the messages that the chat template accepts.

        Raises:
            PromptError: if it accepts none.
        """
        refusal: PromptError | None = None
        for form in forms(with_fitting_ids(messages), lambda: self._shows_parallel_calls):
            try:
                return self._apply_template(form, tools, variables)
            except PromptError as exc:
                if isinstance(exc.__cause__, TemplateLimitError):
                    raise
                refusal = refusal or exc
        assert refusal is not None
        raise refusal

    def _apply_template(self, messages: Messages, tools: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        return render_chat(self._tokenizer, messages, tools=tools or None, add_generation_prompt=True, **variables)

    @cached_property
    def _shows_parallel_calls(self) -> bool:
        messages, names = probe_of_parallel_calls()
        try:
            text = self._apply_template(messages, [], {})
        except PromptError:
            return False
        return all(name in text for name in names)

    def _before_answer(self, text: str, conversation: Conversation, begun: str) -> tuple[str, Thinking | None]:
        """The prompt with its thoughts closed where none are wanted, and how thoughts are marked if some may come.

        Args:
            begun: the beginning of the answer.
        """
        marks, options = self._marks, conversation.thinking
        assert marks is not None
        opened = text.rstrip().endswith(marks.start)
        closing = f"\n\n{marks.end}\n\n"
        if opened and (begun or options.enabled is False):
            text, opened = text.rstrip() + closing, False
        elif options.enabled is False and not text.rstrip().endswith(marks.end) and marks.end in self._template:
            thinks = self._variables(replace(options, enabled=True))
            if text == self._rendered(conversation.messages, conversation.tools.offered, thinks):  # not switched off
                text += marks.start + closing
        # Some models think all the same when their answer is begun for them, but not within a call.
        return text, None if begun != conversation.prefill else replace(marks, begun=opened)

    def _budget(self, thinking: Thinking, options: ThinkingOptions) -> ThinkingBudget | None:
        effort = None if self.knows("reasoning_effort") else EFFORTS.get(options.effort or "")
        limit = min((given for given in (options.budget, effort) if given is not None), default=None)
        if limit is None:
            return None

        def ids(text: str) -> tuple[int, ...]:
            return tuple(encode_text(self._tokenizer, text, add_special_tokens=False))

        start = () if thinking.begun else ids(thinking.start)
        return ThinkingBudget(limit, start, ids(thinking.end), ids(f"\n{thinking.end}\n\n"))

    def splitter(self, tools: Tools) -> ToolSplitter | None:
        """The splitter for an answer's text and calls; None if no tool may be called."""
        if not tools.offered:
            return None
        begun, only = (beginning(self._tokenizer, tools.only), tools.only) if tools.forced else ("", None)
        return ToolSplitter(self._tokenizer, tools.offered, begun, only, single=tools.single)

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


def _length(message: dict[str, Any]) -> int:
    return len(message["content"]) + len(message.get("reasoning_content", ""))
