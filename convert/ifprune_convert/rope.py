"""Rotary settings where mlx-lm looks for them: transformers 5 writes them as `rope_parameters`, earlier ones flat.

A class of mlx-lm that does not know `rope_parameters` ignores it without a word, and turns by its own default.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from mlx_lm.utils import _get_classes

from ifprune_mlx.errors import SourceError

_FLAT = ("rope_theta", "partial_rotary_factor")
_BY_LAYER = {"full_attention", "sliding_attention"}


def with_flat_rope(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A Hugging Face config whose rotary settings mlx-lm's class reads; the same one where that is so already.

    Args:
        path: where it comes from, for the message.

    Raises:
        SourceError: if they differ by layer, and the class does not know `rope_parameters`.
    """
    config = _flat(path, config)
    nested = config.get("text_config")
    return config | {"text_config": _flat(path, nested)} if isinstance(nested, dict) else config


def _flat(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    given = config.get("rope_parameters")
    if not isinstance(given, dict):
        return config
    names = _fields(config)
    if names is not None and "rope_parameters" in names:
        return config
    if any(isinstance(value, dict) for value in given.values()):
        if names is None:
            return config  # a part of a larger model, whose class may read it
        if set(given) != _BY_LAYER or "rope_local_base_freq" not in names:
            raise SourceError(
                f"{path}: its config has rope_parameters for each kind of layer, which mlx-lm's "
                f"{config['model_type']} does not read; save it with transformers 4, or take a model whose config has "
                "rope_theta"
            )
        flat = _flattened(given["full_attention"])
        if "rope_theta" in given["sliding_attention"]:
            flat["rope_local_base_freq"] = given["sliding_attention"]["rope_theta"]
    else:
        flat = _flattened(given)
    return config | {key: value for key, value in flat.items() if config.get(key) is None}


def _flattened(given: dict[str, Any]) -> dict[str, Any]:
    flat = {key: given[key] for key in _FLAT if key in given}
    if given.get("rope_type", "default") != "default":
        flat["rope_scaling"] = {key: value for key, value in given.items() if key not in _FLAT}
    return flat


def _fields(config: dict[str, Any]) -> set[str] | None:
    """The fields of mlx-lm's `ModelArgs` for a config; None if its type is not known, which its builder will tell."""
    try:
        _, arguments = _get_classes(config)
    except (KeyError, ValueError, AttributeError, TypeError, SystemExit):
        return None
    return {field.name for field in fields(arguments)}
