"""Random JSON schemas of moderate size. Their texts are bounded, but for white space, so that any model ends them."""

from __future__ import annotations

import random
from typing import Any

_PATTERNS = ("^[a-z]{1,6}$", "^(red|green|blue)-[0-9]{2}$", "^[A-Z][a-z]{0,4}( [A-Z][a-z]{0,4})?$", "^$|^x+y{2}$")
_FORMATS = ("date", "uuid", "ipv4")


def random_schema(seed: int) -> dict[str, Any]:
    """An object with nested objects, arrays, enums, anyOf, references, patterns, bounds and optional properties."""
    chance = random.Random(seed)
    schema = _object(chance, 3)
    schema["$defs"] = {"point": _number_pair(chance), "tree": _tree(chance)}
    schema["properties"]["where"] = {"$ref": "#/$defs/point"}
    if chance.random() < 0.3:
        schema["properties"]["tree"] = {"$ref": "#/$defs/tree"}
    schema["required"].append("where")
    return schema


def _value(chance: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_string, _number, _integer, _enum, _simple, _reference]
    if depth > 0:
        kinds += [_choice, _array, _array, _object, _object]
    return chance.choice(kinds)(chance, depth)


def _object(chance: random.Random, depth: int) -> dict[str, Any]:
    names = chance.sample(
        ["id", "name", "größe", "tags", 'a "b"', "x/y", "on", "meta", "_k", "n1"], chance.randint(1, 4)
    )
    properties = {name: _value(chance, depth - 1) for name in names}
    required = [name for name in names if chance.random() < 0.6]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(chance: random.Random, depth: int) -> dict[str, Any]:
    least = chance.randint(0, 2)
    bounds = {"minItems": least, "maxItems": least + chance.randint(0, 2)}
    return {"type": "array", "items": _value(chance, depth - 1), **bounds}


def _choice(chance: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_value(chance, depth - 1) for _ in range(chance.randint(2, 3))]}


def _string(chance: random.Random, depth: int) -> dict[str, Any]:
    least = chance.randint(0, 3)
    return {
        "type": "string",
        **chance.choice(
            [
                {"minLength": least, "maxLength": least + chance.randint(0, 6)},
                {"pattern": chance.choice(_PATTERNS), "maxLength": 20},
                {"format": chance.choice(_FORMATS)},
            ]
        ),
    }


def _number(chance: random.Random, depth: int) -> dict[str, Any]:
    low = chance.randint(-1000, 1000) / 4  # without `multipleOf`, a number may have any number of digits
    bound = chance.choice(["maximum", "exclusiveMaximum"])
    return {"type": "number", "minimum": low, bound: low + chance.randint(1, 90), "multipleOf": 0.25}


def _integer(chance: random.Random, depth: int) -> dict[str, Any]:
    low = chance.randint(-100, 1000)
    bound = chance.choice(["minimum", "exclusiveMinimum"])
    return {"type": ["integer", "null"], bound: low, "maximum": low + chance.randint(2, 500)}


def _enum(chance: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": chance.sample(["low", "high", "é☃", 'quo"ted', 5, 2.5, None, True, "two words"], 3)}


def _simple(chance: random.Random, depth: int) -> dict[str, Any]:
    return chance.choice([{"type": "boolean"}, {"type": "null"}, {"const": "fixed"}])


def _reference(chance: random.Random, depth: int) -> dict[str, Any]:
    return {"$ref": "#/$defs/point"}


def _number_pair(chance: random.Random) -> dict[str, Any]:
    items = [{"type": "integer", "minimum": 0, "maximum": 99}, {"type": "boolean"}]
    return {"type": "array", "prefixItems": items, "minItems": 2, "maxItems": 2, "items": False}


def _tree(chance: random.Random) -> dict[str, Any]:
    kids = {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1}
    properties = {"leaf": {"type": "boolean"}, "kids": kids}
    return {"type": "object", "properties": properties, "required": ["leaf"], "additionalProperties": False}
