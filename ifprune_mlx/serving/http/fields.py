"""Reads what clients send: JSON bodies and their fields, with the field's name and a reason for all that is refused.

A field that is null counts as left out, as OpenAI's clients mean it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ifprune_mlx.errors import IfpruneError
from ifprune_mlx.serving.engine.request import POLICIES, SamplingParams

SELECTORS = ("learned", "activation", "static", "random")
MAX_STOPS, MAX_STOP_LENGTH = 16, 1000
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_SEEDS = 2**32


class RequestError(IfpruneError):
    """A request that is refused.

    Attributes:
        status: of HTTP, 400 to 499.
        param: the field at fault, such as `messages[1].content`; None if there is no such field.
        code: a short name of what is wrong, for programs; None if there is none.
        headers: of the answer.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})


def decode_json(body: bytes) -> Fields:
    """The JSON object that a body holds.

    Raises:
        RequestError: if it is not one, is nested too deeply, has a key twice, or numbers or text that JSON cannot hold.
    """
    try:
        value = json.loads(
            body.decode("utf-8"), parse_constant=_constant, parse_float=_finite, object_pairs_hook=_object
        )
        if _SURROGATE.search(body):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise RequestError("the body is nested too deeply", code="invalid_json") from None
    except UnicodeEncodeError:
        raise RequestError("the body has half a surrogate pair in a string", code="invalid_json") from None
    except UnicodeDecodeError as exc:
        raise RequestError(f"the body is not UTF-8 text (byte {exc.start})", code="invalid_json") from None
    except ValueError as exc:
        raise RequestError(f"the body is not JSON ({exc})", code="invalid_json") from None
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, not {_kind(value)}", code="invalid_json")
    return Fields(value)


class Fields:
    """The fields of one JSON object, read by type.

    Args:
        values: the object.
        path: where it lies in the body, for messages.

    Every reader returns None for a field that is left out, and raises RequestError for one of another type or range.
    """

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self._values = values
        self._path = path

    def name(self, field: str) -> str:
        """The field's full name."""
        return f"{self._path}.{field}" if self._path else field

    def refuse(self, field: str, reason: str, code: str | None = None) -> RequestError:
        """An error about a field, to be raised."""
        return RequestError(f"{self.name(field)}: {reason}", self.name(field), code=code)

    def raw(self, field: str) -> Any:
        """The value as it is."""
        return self._values.get(field)

    def text(self, field: str) -> str | None:
        """A string."""
        value: str | None = self._typed(field, str, "a string")
        return value

    def flag(self, field: str) -> bool | None:
        """true or false."""
        value: bool | None = self._typed(field, bool, "true or false")
        return value

    def integer(self, field: str, least: int, most: int) -> int | None:
        """A whole number from `least` to `most`; 2.0 is one."""
        value = self.raw(field)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse(field, f"must be a whole number, not {_kind(value)}")
        if not least <= value <= most:
            raise self.refuse(field, f"must be from {least} to {most}")
        return value

    def number(self, field: str, least: float, most: float, *, above: bool = False) -> float | None:
        """A number from `least` (or, with `above`, above it) to `most`."""
        value = self.raw(field)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.refuse(field, f"must be a number, not {_kind(value)}")
        if not (least < value if above else least <= value) or value > most:
            raise self.refuse(
                field, f"must be {'above' if above else 'from'} {least:g} {'and at most' if above else 'to'} {most:g}"
            )
        return float(value)

    def one_of(self, field: str, allowed: Sequence[str]) -> str | None:
        """One of some strings."""
        value = self.text(field)
        if value is not None and value not in allowed:
            raise self.refuse(field, f"must be one of {', '.join(allowed)}")
        return value

    def object(self, field: str) -> Fields | None:
        """An object."""
        value = self._typed(field, dict, "an object")
        return None if value is None else Fields(value, self.name(field))

    def array(self, field: str) -> list[Any] | None:
        """An array of anything."""
        value: list[Any] | None = self._typed(field, list, "an array")
        return value

    def objects(self, field: str) -> list[Fields] | None:
        """An array of objects."""
        values = self.array(field)
        if values is None:
            return None
        found = []
        for index, value in enumerate(values):
            if not isinstance(value, dict):
                raise self.refuse(f"{field}[{index}]", f"must be an object, not {_kind(value)}")
            found.append(Fields(value, self.name(f"{field}[{index}]")))
        return found

    def values(self) -> dict[str, Any]:
        """All of the object, as it is."""
        return dict(self._values)

    def required(self, field: str) -> None:
        """Raise RequestError if a field is left out."""
        if self.raw(field) is None:
            raise self.refuse(field, "is required", "missing_required_parameter")

    def _typed(self, field: str, kind: type, called: str) -> Any:
        value = self.raw(field)
        if value is not None and not isinstance(value, kind):
            raise self.refuse(field, f"must be {called}, not {_kind(value)}")
        return value


@dataclass(frozen=True)
class Wish:
    """Which neurons a request asks for, as given; None and False where it says nothing.

    Attributes:
        task: the name of a saved selection.
        policy: `first`, `turn` or `auto`; see `SelectionParams`.
    """

    task: str | None = None
    selector: str | None = None
    dense: bool = False
    density: float | None = None
    active_parameters: int | None = None
    policy: str | None = None


def read_wish(fields: Fields, headers: Mapping[str, str]) -> Wish:
    """The wish in a body's `ifprune` object, or in `x-ifprune-*` headers where that does not say.

    Args:
        headers: with lower-case names.

    Raises:
        RequestError: on values of another type or range, or two of which one would be ignored.
    """
    given = fields.object("ifprune") or Fields({}, "ifprune")
    density = given.number("density", 0, 1, above=True)
    wish = Wish(
        task=given.text("task") or headers.get("x-ifprune-task"),
        selector=given.one_of("selector", SELECTORS),
        dense=bool(given.flag("dense")),
        density=_header_density(headers) if density is None else density,
        active_parameters=given.integer("active_parameters", 1, 2**53),
        policy=given.one_of("policy", POLICIES) or _header_policy(headers),
    )
    for first, others in (
        ("task", ("dense", "selector", "density", "active_parameters", "policy")),
        ("dense", ("selector", "density", "active_parameters", "policy")),
        ("density", ("active_parameters",)),
    ):
        both = [other for other in others if getattr(wish, first) and getattr(wish, other)]
        if both:
            raise given.refuse(both[0], f"excludes {given.name(first)}; give one of them")
    return wish


def read_sampling(fields: Fields, defaults: SamplingParams, vocabulary: int) -> SamplingParams:
    """How to draw tokens, for what a body says of it; `defaults` for the rest.

    Args:
        vocabulary: how many token ids there are.
    """
    top_k = fields.integer("top_k", 0, 2**31)
    seed = fields.integer("seed", -(2**63), 2**63 - 1)
    given = {
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 0, 1, above=True),
        "top_k": 0 if top_k is not None and top_k >= vocabulary else top_k,
        "min_p": fields.number("min_p", 0, 1),
        "repetition_penalty": fields.number("repetition_penalty", 0, 10, above=True),
        "presence_penalty": fields.number("presence_penalty", -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2),
        "logit_bias": _logit_bias(fields, vocabulary),
        "seed": None if seed is None else seed % _SEEDS,
    }
    return SamplingParams(**{**vars(defaults), **{name: value for name, value in given.items() if value is not None}})


def seeded(sampling: SamplingParams, index: int) -> SamplingParams:
    """The same for the `index`-th of several answers to one request: its seed differs."""
    seed = sampling.seed
    return sampling if seed is None else SamplingParams(**{**vars(sampling), "seed": (seed + index) % _SEEDS})


def read_stops(fields: Fields, field: str) -> tuple[str, ...]:
    """Stop strings: a string, or an array of some."""
    value = fields.raw(field)
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise fields.refuse(field, "must be a string or an array of strings")
    if len(stops) > MAX_STOPS:
        raise fields.refuse(field, f"holds {len(stops)} strings; give at most {MAX_STOPS}")
    if any(not stop or len(stop) > MAX_STOP_LENGTH for stop in stops):
        raise fields.refuse(field, f"a stop string must have 1 to {MAX_STOP_LENGTH} characters")
    return tuple(stops)


def _logit_bias(fields: Fields, vocabulary: int) -> dict[int, float] | None:
    given = fields.object("logit_bias")
    if given is None:
        return None
    bias: dict[int, float] = {}
    for token in given.values():
        if not re.fullmatch(r"[0-9]{1,9}", token) or int(token) >= vocabulary:
            raise given.refuse(token[:20], f"is no token id; they go from 0 to {vocabulary - 1}")
        value = given.number(token, -100, 100)
        if value is not None:
            bias[int(token)] = value
    return bias


def _header_density(headers: Mapping[str, str]) -> float | None:
    text = headers.get("x-ifprune-density")
    if text is None:
        return None
    try:
        density = float(text)
    except ValueError:
        density = math.nan
    if not 0 < density <= 1:
        raise RequestError(
            "header x-ifprune-density: must be a number above 0 and at most 1, such as 0.5", "x-ifprune-density"
        )
    return density


def _header_policy(headers: Mapping[str, str]) -> str | None:
    policy = headers.get("x-ifprune-policy")
    if policy is not None and policy not in POLICIES:
        raise RequestError(f"header x-ifprune-policy: must be one of {', '.join(POLICIES)}", "x-ifprune-policy")
    return policy


def _kind(value: Any) -> str:
    names = {
        bool: "true or false",
        str: "a string",
        int: "a number",
        float: "a number",
        list: "an array",
        dict: "an object",
    }
    return names.get(type(value), "null")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("an object has a key twice")
    return value


def _constant(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("a number is too large")
    return value
