"""Constrains answers to a grammar, such as the texts that a JSON schema allows. llguidance computes the masks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import mlx.core as mx
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.errors import GrammarError, reason_of
from ifprune_mlx.thinking import thinking_of

_MOST_CHARACTERS = 100_000
_SECONDS, _PATIENCE = 3, 30  # of computing; and on a clock, as a busy machine is slow
_KEPT = 32
_LAST_TOKENS = 64  # of a prompt: enough for a mark, and the space behind it
# Keywords of JSON schemas that hold schemas by name, and those that hold any JSON.
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_VALUES = ("enum", "const", "default", "examples")
# As `json.dumps` writes it. Models that are at a loss write more without end.
_SPACE = "( |\\n {0,32})?"
# llguidance bounds most of the work of a grammar, but some never end, and a thread cannot be ended.
_TRIAL = f"""
import resource, sys
if hasattr(resource, "RLIMIT_CPU"):
    resource.setrlimit(resource.RLIMIT_CPU, ({_SECONDS}, {_SECONDS}))
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
class Bytes:
    eos_token_id, bos_token_id, special_token_ids = 256, None, [256]
    tokens = [bytes([value]) for value in range(256)] + [b"<eos>"]
    def __call__(self, text):
        return list(text if isinstance(text, bytes) else text.encode())
matcher = LLMatcher(LLTokenizer(TokenizerWrapper(Bytes())), sys.stdin.buffer.read().decode(), log_level=0)
matcher.compute_bitmask()
sys.stdout.buffer.write(matcher.get_error().encode())
"""


def json_rule(schema: Mapping[str, Any], *, lenient: bool = False) -> str:
    """The Lark rule body of JSON texts that a schema allows; `lenient` ignores keywords that are not supported.

    Objects get no properties but those that the schema names, unless it says that they may.

    Raises:
        GrammarError: if the schema is too long.
    """
    options = {"whitespace_flexible": True, "whitespace_pattern": _SPACE, "lenient": lenient}
    try:
        closed = schema if _mixes(schema) else _closed(schema)
        text = json.dumps({**closed, "x-guidance": options}, allow_nan=False)
    except (ValueError, RecursionError) as exc:
        raise GrammarError(f"the schema is not JSON ({exc})") from exc
    if len(text) > _MOST_CHARACTERS:
        raise GrammarError(f"the schema has {len(text)} characters; give at most {_MOST_CHARACTERS}")
    return f"%json {text}"


def _mixes(value: Any) -> bool:
    """Whether some object's properties come from several schemas, so that closing one would exclude the others."""
    if isinstance(value, list):
        return any(map(_mixes, value))
    if not isinstance(value, Mapping):
        return False
    several = value.keys() & {"anyOf", "oneOf", "$ref"} and value.keys() & {"properties", "required"}
    return "allOf" in value or bool(several) or any(map(_mixes, value.values()))


def _closed(value: Any) -> Any:
    """A schema that says `additionalProperties: false` where it says nothing about them."""
    if isinstance(value, list):
        return [_closed(one) for one in value]
    if not isinstance(value, Mapping):
        return value
    closed: dict[str, Any] = {}
    for key, one in value.items():
        if key in _NAMED and isinstance(one, Mapping):
            closed[key] = {name: _closed(each) for name, each in one.items()}
        else:
            closed[key] = one if key in _VALUES else _closed(one)
    named, required = value.get("properties"), value.get("required", [])
    says_so = value.keys() & {"additionalProperties", "patternProperties", "minProperties"}
    if not says_so and isinstance(named, Mapping) and isinstance(required, list):
        closed |= {"additionalProperties": False} if all(one in [*named] for one in required) else {}
    return closed


@dataclass(frozen=True, eq=False)
class Grammar:
    """A compiled grammar, for any number of answers."""

    matcher: LLMatcher  # at the beginning of an answer

    def constraint(self) -> Constraint:
        """The logits processor of one answer."""
        return Constraint(self.matcher.deep_copy())


class Constraint:
    """Allows one answer only the tokens that its grammar does; a logits processor, called once for each token.

    Attributes:
        error: why the grammar cannot go on, if so; then only an end-of-text token is allowed.
    """

    def __init__(self, matcher: LLMatcher) -> None:
        self.error: str | None = None
        self._matcher = matcher
        self._begun = False

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Mask what must not come next.

        Args:
            tokens: `[n]`, at first of the prompt, then with the token that was chosen last.
            logits: `[1, vocabulary]`.
        """
        mx.async_eval(logits)  # type: ignore[no-untyped-call]  # the model computes while the mask is found
        if self._begun and not self._matcher.is_stopped():
            self._matcher.consume_token(int(np.array(tokens[-1:])[0]))
        self._begun = True
        words = mx.array(np.frombuffer(self._matcher.compute_bitmask(), np.uint32))
        if self._matcher.is_error():
            self.error = _short(self._matcher.get_error())
        allowed = ((words[:, None] >> mx.arange(32, dtype=mx.uint32)) & 1).reshape(1, -1).astype(mx.bool_)
        size = logits.shape[-1]
        if allowed.shape[-1] < size:  # models pad their vocabularies
            allowed = mx.pad(allowed, [(0, 0), (0, size - allowed.shape[-1])])
        return mx.where(allowed[:, :size], logits, -mx.inf)


class Grammars:
    """Compiles grammars for one tokenizer; may be used in any thread."""

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer = tokenizer
        self._lock = Lock()
        self._compiled: OrderedDict[str, Grammar] = OrderedDict()

    def literal(self, text: str) -> str:
        """The Lark form of a text, with tokens of their own (`<tool_call>`) where the tokenizer has them."""
        parts = re.split(f"({'|'.join(map(re.escape, self._marks))})", text) if self._marks else [text]
        return " ".join(f"<[{self._marks[p]}]>" if p in self._marks else json.dumps(p) for p in parts if p) or '""'

    def compile(self, answer: str, prompt: Sequence[int], *, continues: bool = False) -> Grammar:
        """Compile a grammar.

        Args:
            answer: Lark rules, `answer` among them. It is what follows the model's thoughts, if it thinks.
            prompt: the tokens that the answer follows; they tell whether the model thinks.
            continues: the answer continues the prompt's text, so that no thoughts begin with it.

        Raises:
            GrammarError: if the grammar cannot be compiled, or not soon enough.
        """
        text = f"%llguidance {{}}\n{self._beginning(prompt, continues)}\n{answer}\n"
        with self._lock:
            if text in self._compiled:
                self._compiled.move_to_end(text)
                return self._compiled[text]
        _try(text)
        matcher = LLMatcher(self._ll_tokenizer, text, log_level=0, limits=LLParserLimits(verbose_errors=False))
        if matcher.is_error():
            raise GrammarError(f"the schema cannot be used ({_short(matcher.get_error())})")
        with self._lock:
            self._compiled[text] = Grammar(matcher)
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
            return self._compiled[text]

    def _beginning(self, prompt: Sequence[int], continues: bool) -> str:
        """The rules of what comes before `answer`."""
        marks = thinking_of(self._tokenizer)
        if marks is None:
            return "start: answer"
        text = self._tokenizer.decode(list(prompt[-_LAST_TOKENS:])).rstrip()
        opened = text.endswith(marks.start)
        if not opened and (continues or text.endswith(marks.end)):
            return "start: answer"
        end = self.literal(marks.end)
        rules = "SPACE: /[ \\n]{0,4}/\n"
        if "<[" in end:  # a token
            rules += f"thoughts: TEXT {end} SPACE\nTEXT: /(.|\\n)*/"
        else:
            rules += f"thoughts: told SPACE\ntold[suffix={end}]: /(.|\\n)*/"
        return f"start: {'thoughts' if opened else f'({self.literal(marks.start)} thoughts)?'} answer\n{rules}"

    @cached_property
    def _ll_tokenizer(self) -> LLTokenizer:
        tokenizer = self._tokenizer
        try:
            return from_tokenizer(tokenizer._tokenizer, eos_token=sorted(tokenizer.eos_token_ids))
        except Exception as exc:  # tokenizers without a tokenizer.json, decoders that llguidance does not know
            raise GrammarError(f"this model's tokenizer cannot constrain answers ({reason_of(exc)})") from exc

    @cached_property
    def _marks(self) -> dict[str, int]:
        """The tokens that llguidance does not take for text, by their text."""
        added = self._tokenizer.get_added_vocab()
        return {text: token for text, token in added.items() if self._ll_tokenizer.is_special_token(token)}


def _try(text: str) -> None:
    """Compile a grammar in a process of its own, which can be ended; it knows bytes, and no other tokens."""
    given = re.sub(r"<\[\d+\]>", '"<>"', text).encode()
    command = [sys.executable, "-I", "-c", _TRIAL]
    try:
        ended = subprocess.run(command, input=given, capture_output=True, timeout=_PATIENCE, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as exc:
        raise GrammarError(f"the schema takes more than {_SECONDS} s to compile; give a simpler one") from exc
    if ended.stdout:
        raise GrammarError(f"the schema cannot be used ({_short(ended.stdout.decode())})")


def _short(text: str) -> str:
    """Llguidance's reason on one line, without the grammar's lines around it."""
    reason = re.split(r"\n *\d+ \|", text)[0]
    return " ".join(re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", reason).split())[:200]
