"""Renders chat templates, which are programs from a stranger, within bounds of time and of size.

transformers' sandbox keeps a template from files and Python's internals. Here every loop, call, filter, operator and
literal is checked besides: whether its value is small enough, and whether there is time left. What one such step does
to values of that size is quick.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from string import Formatter
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from transformers.utils.chat_template_utils import _compile_jinja_template

_SECONDS = 5.0
# Characters and items of the largest value, the prompt included; and so many more for each one of the messages.
_LEAST_SIZE, _SIZE_SHARE = 1_000_000, 8
_LONGEST_TEMPLATE = 2_000_000
_WIDEST, _MOST_BITS = 1000, 10_000
# Filters and methods that make as much as a number says.
_WIDTHS = frozenset({"batch", "center", "indent", "round", "slice", "tojson", "wordwrap"})
_WIDTH_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "to_bytes"})
# The flags, width and precision behind a `%`, and its key where that is no plain one.
_PERCENT = re.compile(r"%(?=(?:\([^()]*\))?([-#+ 0-9.*]*\(?))")
_DROPPED_FILTERS = ("urlize", "xmlattr", "pprint", "random")
_END = "CONTINUE_FINAL_MESSAGE_TAG "  # marks the end of a message that is to be continued
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of an earlier answer's thoughts


class TemplateLimitError(TemplateRuntimeError):
    """A template takes too long, or makes too much text."""


class ChatTemplate:
    """A chat template, compiled when it is first needed; mlx-lm's TokenizerWrapper calls it.

    Args:
        template: Jinja source.
        for_tools: another source, for conversations with tools.
        tokens: names such as `bos_token` that templates use, with their texts.
    """

    def __init__(self, template: str, for_tools: str | None, tokens: Mapping[str, str]) -> None:
        self._environment = _Environment()
        self._tokens = dict(tokens)
        self._plain = template
        self._for_tools = template if for_tools is None else for_tools
        self._compiled: dict[str, Any] = {}

    def __call__(
        self,
        messages: Iterable[Any],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The text of a conversation.

        Args:
            continue_final_message: end with the last message's text, which is to be continued.
            variables: seen by the template, such as `enable_thinking`.

        Raises:
            ValueError: if the template is no valid Jinja, or far too long.
            TemplateLimitError: if it takes too long or makes too much text.
            Exception: whatever the template raises.
        """
        chat = [_message(message) for message in _plain(list(messages))]
        if continue_final_message:
            chat[-1] = chat[-1] | {"content": chat[-1]["content"] + _END}
        given = {"messages": chat, "tools": _plain(tools), "documents": None}
        given |= self._tokens | _plain(variables) | {"add_generation_prompt": add_generation_prompt}
        template = self._compile(self._for_tools if tools else self._plain)
        with self._environment.bounded(given):
            text = str(template.render(given))
        if not continue_final_message:
            return text
        before, found, behind = text.rpartition(_END.strip())
        if not found:
            raise ValueError("it does not show the last message, which is to be continued")
        # Without the space that `_END` ends with, the template strips messages.
        return before if behind.startswith(" ") else before.rstrip()

    def _compile(self, source: str) -> Any:
        if source not in self._compiled:
            if len(source) > _LONGEST_TEMPLATE:
                raise ValueError(f"it has {len(source)} characters")
            with self._environment.bounded({}):
                try:
                    self._compiled[source] = self._environment.from_string(source)
                except Exception as exc:  # jinja's and Python's own parsers
                    raise ValueError(f"it is not valid Jinja: {exc}") from exc
        return self._compiled[source]


def _plain(value: Any) -> Any:
    """The value as JSON has it: a template sees no objects with methods of their own."""
    return json.loads(json.dumps(value, default=lambda other: f"<{type(other).__name__}>"))


def _message(message: Any) -> dict[str, Any]:
    """A message as transformers hands it to templates: without what is null, its thoughts under every name."""
    if not isinstance(message, dict):
        raise TypeError(f"a message is {type(message).__name__}, not an object with role and content")
    given = {name: value for name, value in message.items() if value is not None}
    thoughts = next((given[name] for name in _REASONING if name in given), None)
    return given if thoughts is None else {"thinking": thoughts, **given, "reasoning_content": thoughts}


class _Bounds(threading.local):
    """The bounds of the rendering that is under way in this thread."""

    size = _LEAST_SIZE
    end = 0.0


class _Bounded(NodeTransformer):
    """Puts checks where generated code would call nothing of the environment's."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered("_each", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered("_joined", nodes.List(node.nodes, lineno=node.lineno))

    def _visit_literal(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _filtered("_made", node)

    visit_List = visit_Dict = visit_Tuple = _visit_literal


def _filtered(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment of templates, with bounds."""

    intercepted_binops = frozenset({"+", "*", "**", "%", "-", "/", "//"})

    def __init__(self) -> None:
        theirs: Any = _compile_jinja_template("").environment
        extensions = [type(extension) for extension in theirs.extensions.values()]
        # Not optimized: that would compute constants while it compiles.
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False)
        self._bounds = _Bounds()
        self.globals.update(theirs.globals)
        self.globals.pop("lipsum", None)
        self.filters = {name: self._checked(name, used) for name, used in theirs.filters.items()}
        for name in _DROPPED_FILTERS:
            self.filters.pop(name, None)
        self.filters |= {"_each": self._each, "_joined": self._joined, "_made": self._weighed}
        self.finalize = self._weighed
        self.concat = self._concat  # type: ignore[method-assign]

    class _Rendering:
        def __init__(self, bounds: _Bounds, size: int) -> None:
            self._bounds, self._size = bounds, size

        def __enter__(self) -> None:
            self._bounds.size, self._bounds.end = self._size, time.monotonic() + _SECONDS

        def __exit__(self, *_: object) -> None:
            self._bounds.end = 0.0

    def bounded(self, given: Mapping[str, Any]) -> _Rendering:
        """A context in which templates may be compiled and rendered, with these variables."""
        return self._Rendering(self._bounds, _LEAST_SIZE + _SIZE_SHARE * len(json.dumps(given)))

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        tree = _Bounded().visit(source)
        for node in tree.find_all(nodes.Node):
            node.environment = self
        return str(super()._generate(tree, *args, **kwargs))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method of the template's."""
        __self._check_time()
        __self._check_method(__obj, args, kwargs)
        return __self._weighed(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right`."""
        self._check_time()
        if operator == "%" and isinstance(left, str):
            self._check_format(left, right, _PERCENT.findall(left))
        elif operator == "**":
            bits = left.bit_length() if isinstance(left, int) else 0
            if isinstance(right, int) and bits * abs(right) > _MOST_BITS:
                raise TemplateLimitError("it computes a number that is too large")
        elif operator == "*":
            count = next((value for value in (left, right) if isinstance(value, int)), 1)
            other = right if isinstance(left, int) else left
            if isinstance(other, int) and other.bit_length() + count.bit_length() > _MOST_BITS:
                raise TemplateLimitError("it computes a number that is too large")
            if not isinstance(other, int | float):
                self._check_size(count * self._weight(other))
        elif operator == "+" and not isinstance(left, int | float):
            self._check_size(self._weight(left) + self._weight(right))
        return self._weighed(super().call_binop(context, operator, left, right))

    def _check_time(self) -> None:
        if time.monotonic() > self._bounds.end:
            raise TemplateLimitError(f"it takes more than {_SECONDS:.0f} seconds")

    def _check_size(self, size: float) -> None:
        if size > self._bounds.size:
            raise TemplateLimitError(f"it makes a text or list of more than {self._bounds.size} characters or items")

    def _check_width(self, numbers: Iterable[Any], count: int = 1) -> None:
        widest = max((abs(number) for number in numbers if isinstance(number, int)), default=0)
        if widest > _WIDEST:
            raise TemplateLimitError(f"it pads or rounds to {widest} places")
        self._check_size(widest * count)

    def _check_format(self, text: str, given: Any, specs: Sequence[str]) -> None:
        """Check a `%` or `format` template: the widths in its placeholders, and how often it repeats what it is given.

        Args:
            specs: what follows the `%` or `:` of each placeholder.
        """
        if any(mark in spec for spec in specs for mark in "*{("):
            raise TemplateLimitError("it formats with a width that is computed")
        widths = [int(digits[:20]) for spec in specs for digits in re.findall(r"[0-9]+", spec)]
        self._check_width(widths, len(widths))
        self._check_size(len(specs) * self._weight(given) + len(text))

    def _check_method(self, method: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Check a call of a text's or number's own method, before it makes too much."""
        name = getattr(method, "__name__", "")
        # The sandbox wraps `format`.
        owner = getattr(getattr(method, "__wrapped__", method), "__self__", None)
        if not isinstance(owner, str | bytes | int):
            return
        if name in ("format", "format_map"):
            specs = [spec or "" for _, field, spec, _ in Formatter().parse(str(owner)) if field is not None]
            self._check_format(str(owner), [*args, *kwargs.values()], specs)
        elif name in _WIDTH_METHODS:
            self._check_width([*args, *kwargs.values()])
        elif isinstance(owner, int):
            return
        elif name == "expandtabs":
            self._check_width([*args, *kwargs.values()], len(owner))
        elif name == "replace":
            self._check_replace(owner, args)
        elif name == "join":
            self._check_join(owner, *args)
        elif name in ("translate", "maketrans"):
            raise SecurityError(f"a template may not use {name}")

    def _check_replace(self, text: Any, args: Sequence[Any]) -> None:
        if len(args) > 1 and isinstance(args[0], type(text)) and isinstance(args[1], type(text)):
            self._check_size(len(text) + text.count(args[0]) * len(args[1]))

    def _check_join(self, separator: Any, items: Any = ()) -> None:
        if hasattr(items, "__len__"):
            self._check_size(self._weight(items) + len(items) * len(separator))

    def _checked(self, name: str, used: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that checks what it is given before and what it made behind."""
        # jinja looks at the function's attributes for what else to pass, so the text is not always the first.
        at = 1 if hasattr(used, "jinja_pass_arg") else 0

        @wraps(used)
        def checked(*args: Any, **kwargs: Any) -> Any:
            self._check_time()
            value, others = args[at], [*args[at + 1 :], *kwargs.values()]
            if name in _WIDTHS:
                self._check_width(others, str(value).count("\n") + 1 if name == "indent" else 1)
            elif name == "format":
                self._check_format(str(value), others, _PERCENT.findall(str(value)))
            elif name == "replace":
                self._check_replace(str(value), [str(other) for other in others[:2]])
            elif name in ("join", "sum"):
                items = list(self._each(value))
                args = (*args[:at], items, *args[at + 1 :])
                if name == "join":
                    self._check_join(str(others[0]) if others else "", items)
                elif any(not isinstance(start, int | float) for start in [*args[at + 2 :], kwargs.get("start", 0)]):
                    raise TemplateLimitError("it adds up what are no numbers")
            made = used(*args, **kwargs)
            return self._each(made) if isinstance(made, Iterator) else self._weighed(made)

        return checked

    def _each(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items of a loop, for as long as there is time."""
        for item in items:
            self._check_time()
            yield item

    def _joined(self, items: Sequence[Any]) -> str:
        self._check_size(self._weight(items))
        return "".join(map(str, items))

    def _concat(self, parts: Iterable[str]) -> str:
        """The texts that a template, macro or block has put out, as one."""
        kept, size = [], 0
        for part in parts:
            size += len(part)
            self._check_size(size)
            self._check_time()
            kept.append(part)
        return "".join(kept)

    def _weighed(self, value: Any) -> Any:
        """The value, once it is known to be small enough."""
        if isinstance(value, str | bytes | list | tuple | dict | set | frozenset):
            self._check_size(self._weight(value))
        return value

    def _weight(self, value: Any) -> int:
        """Characters and items of a value, all the way down; those of what occurs twice count twice."""
        weight, left = 0, [value]
        while left:
            one = left.pop()
            weight += len(one) if isinstance(one, str | bytes) else 1
            if isinstance(one, dict):
                left += [*one.keys(), *one.values()]
            elif isinstance(one, list | tuple | set | frozenset):
                left += one
            if weight + len(left) > self._bounds.size:
                break
        return weight + len(left)
