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


def with_flat_rope(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A Hugging Face config whose rotary settings mlx-lm's class reads; the same one where that is so already.

    Args:
        path: where it comes from, for the message.

    Raises:
        SourceError: if they differ by layer, and the class does not know `rope_parameters`.
    """
    given = config.get("rope_parameters")
    if not isinstance(given, dict):
        return config
    try:
        _, arguments = _get_classes(config)
    except (KeyError, ValueError, AttributeError, SystemExit):
        return config  # whoever builds the model says what is wrong with its type
    if any(field.name == "rope_parameters" for field in fields(arguments)):
        return config
    if any(isinstance(value, dict) for value in given.values()):
        raise SourceError(
            f"{path}: its config has rope_parameters for each kind of layer, which mlx-lm's {config['model_type']} "
            "does not read; save it with transformers 4, or take a model whose config has rope_theta"
        )
    flat = {key: given[key] for key in _FLAT if key in given}
    if given.get("rope_type", "default") != "default":
        flat["rope_scaling"] = {key: value for key, value in given.items() if key not in _FLAT}
    return config | {key: value for key, value in flat.items() if config.get(key) is None}
