"""Rotary settings as transformers 5 writes them end up where mlx-lm's classes look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ifprune_convert.skeleton import with_flat_rope
from ifprune_mlx.errors import SourceError

LINEAR = {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0}
BY_LAYER = {"full_attention": LINEAR, "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "qwen2"}, {}),
        ({"model_type": "qwen2", "rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, {"rope_theta": 5.0}),
        ({"model_type": "qwen2", "rope_theta": 7.0, "rope_parameters": {"rope_theta": 5.0}}, {}),
        (
            {"model_type": "llama", "rope_parameters": LINEAR},
            {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        ),
        (
            {"model_type": "gemma3_text", "rope_parameters": BY_LAYER},
            {
                "rope_theta": 1e6,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "rope_local_base_freq": 1e4,
            },
        ),
        ({"model_type": "lfm2", "rope_parameters": {"rope_theta": 5.0}}, {}),  # its class reads them itself
        ({"model_type": [], "rope_parameters": {"rope_theta": 5.0}}, {"rope_theta": 5.0}),
    ],
)
def test_flat_settings(config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert with_flat_rope(Path("model"), config) == config | expected


@pytest.mark.parametrize(("outer", "inner"), [("pixtral", "llama"), ("gemma3", "gemma3_text"), ("qwen2_vl", "qwen2")])
def test_the_language_model_of_a_larger_one(outer: str, inner: str) -> None:
    nested = {"model_type": inner, "rope_parameters": LINEAR}
    found = with_flat_rope(Path("model"), {"model_type": outer, "text_config": nested})["text_config"]
    assert (found["rope_theta"], found["rope_scaling"]["factor"]) == (1e6, 8.0)


def test_settings_by_layer_that_no_class_reads_are_refused() -> None:
    with pytest.raises(SourceError, match="rope_parameters for each kind of layer, which mlx-lm's llama does not read"):
        with_flat_rope(Path("model"), {"model_type": "llama", "rope_parameters": BY_LAYER})
