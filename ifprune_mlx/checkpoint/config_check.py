"""Checks that the values of a model's config are of the kinds that mlx-lm's class for it expects.

The classes take whatever stands there, and a text where a number belongs fails with the first token, somewhere inside.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from ifprune_mlx.errors import IfpruneError

_KINDS: dict[type, str] = {int: "number", float: "number", bool: "number", str: "text", dict: "object", list: "list"}
# Their annotations do not tell, or do not hold.
_FREE = frozenset({"rope_scaling", "rope_parameters", "eos_token_id", "bos_token_id", "pad_token_id"})
_POSITIVE = ("rope_theta", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps")
_TOKENS = ("eos_token_id", "bos_token_id", "pad_token_id")
# Annotated as numbers, and read as lists of one for each layer, too.
_BY_LAYER = frozenset({("hunyuan", "moe_topk"), ("hunyuan", "num_shared_expert"), ("step3p5", "rope_theta")})
_ADVICE = "compare it with the model's own config.json"


def check_config(config: Mapping[str, Any], arguments: Any, where: Path, error: type[IfpruneError]) -> None:
    """Raise `error`, in one line, if a value of a config is of a kind that its class does not expect.

    Args:
        arguments: the class's `ModelArgs`; None if it is not known.
    """
    wrong: str | None = None
    hints = _hints(arguments)
    given = [
        (name, one)
        for name, value in config.items()
        for one in (value if isinstance(value, list) and (config.get("model_type"), name) in _BY_LAYER else [value])
    ]
    for name, value in given:
        allowed = None if name in _FREE else _allowed(hints.get(name, Any))
        if value is not None and allowed is not None and (kind := _KINDS.get(type(value))) not in allowed:
            wrong = f"{name} is {_shown(value)}, a {kind}, and must be a {' or '.join(allowed)}"
    for name, value in given:
        if name in _POSITIVE and value is not None and (not _is_number(value) or not 0 < value < math.inf):
            wrong = f"{name} is {_shown(value)}, and must be a number above 0"
    for name in _TOKENS:
        value = config.get(name)
        if value is not None and not all(type(one) is int for one in (value if isinstance(value, list) else [value])):
            wrong = f"{name} is {_shown(value)}, and must be token ids"
    if wrong is not None:
        raise error(
            f"{where}: mlx-lm cannot build a {config.get('model_type')} model from the config ({wrong}); {_ADVICE}"
        )


def refuse_custom_code(config: Mapping[str, Any], where: Path, error: type[IfpruneError]) -> None:
    """Raise `error` if a config names a Python file: some releases of mlx-lm would run it."""
    if config.get("model_file") is not None:
        raise error(f"{where}: wants to run code that comes with it ({config['model_file']!r}); this is not supported")


def check_names(config: Mapping[str, Any], where: Path, error: type[IfpruneError]) -> None:
    """Raise `error` unless a config names its model's type, and its architectures, if any, as texts."""
    if not isinstance(config.get("model_type"), str):
        raise error(f"{where}: the config names no model_type; {_ADVICE}")
    given = config.get("architectures")
    if given is not None and not all(isinstance(name, str) for name in (given if isinstance(given, list) else [given])):
        raise error(f"{where}: architectures in the config is {_shown(given)}, and must be a list of names; {_ADVICE}")


def _hints(arguments: Any) -> dict[str, Any]:
    if not is_dataclass(arguments):
        return {}
    try:
        hints = get_type_hints(arguments)
    except (NameError, TypeError):  # an annotation that Python cannot resolve
        return {}
    return {field.name: hints[field.name] for field in fields(arguments)}


def _allowed(hint: Any) -> list[str] | None:
    """The kinds of values of an annotation, or None if it allows anything."""
    if get_origin(hint) in (Union, types.UnionType):
        parts = [_allowed(part) for part in get_args(hint) if part is not type(None)]
        return None if None in parts else sorted({kind for part in parts for kind in part or ()})
    kind = _KINDS.get(get_origin(hint) or hint)
    return None if kind is None else [kind]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
