"""How many tokens a model reads, by its config: scaled rotary positions reach further than it may state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Where nothing says what was scaled, the stated length was.
_SCALE_THE_STATED = ("linear", "dynamic", "yarn")
# Of these the stated length is the scaled one, if it is beyond the original at all: Llama 3.2's factor is 32, and it
# was trained for 16 times the original.
_STATE_THE_SCALED = ("llama3", "longrope", "su")
_SCALING = (*_SCALE_THE_STATED, *_STATE_THE_SCALED, "deepseek_yarn", "telechat3-yarn")
_MOST = 2**53
_ORIGINAL = "original_max_position_embeddings"


def context_length(config: Mapping[str, Any]) -> int | None:
    """The most tokens that a model of this config reads; None if it does not say.

    Configs that state the scaled length already, as most do, are taken at their word.
    """
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) and "max_position_embeddings" not in config else config
    stated = text.get("max_position_embeddings")
    if not isinstance(stated, int | float) or not 1 <= stated <= _MOST:
        return None
    scaling = rope_scaling(text)
    kind, factor = rope_kind(scaling), scaling.get("factor")
    original = scaling.get(_ORIGINAL) or text.get(_ORIGINAL)
    # Gemma 3's lengths are scaled already, by its authors' habit.
    if original is None and kind in _SCALE_THE_STATED and not str(text.get("model_type")).startswith("gemma3"):
        original = stated
    if kind not in _SCALING or not isinstance(factor, int | float) or not isinstance(original, int | float):
        return int(stated)
    if kind in _STATE_THE_SCALED and stated > original:
        return int(stated)
    return int(max(stated, min(factor * original, _MOST)))


def rope_scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config's settings of scaled rotary positions, those of layers that see everything where layers differ; empty
    if it has none."""
    found = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(found, dict):
        return {}
    layers = found.get("full_attention")
    return layers if isinstance(layers, dict) else found


def rope_kind(scaling: Mapping[str, Any]) -> str:
    """What scaled rotary positions are called; read as mlx-lm does it."""
    return str(scaling.get("type") or scaling.get("rope_type") or "default")
