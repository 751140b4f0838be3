"""Rotary settings as transformers 5 writes them end up where mlx-lm's classes look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ifprune_convert.skeleton import build_skeleton, with_flat_rope
from ifprune_mlx.errors import SourceError
from tests.family_configs import tiny_config

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


@pytest.mark.parametrize(
    ("config", "original"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, 512),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings": 128}, 128),
        ({"rope_scaling": {"type": "longrope", "long_factor": []}, "original_max_position_embeddings": 16}, 16),
        ({"rope_scaling": {"type": "su", "long_factor": []}, "original_max_position_embeddings": 16}, 16),
        ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 64}}, 64),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, 512),
    ],
)
def test_the_length_that_was_scaled_is_said(config: dict[str, Any], original: int) -> None:
    config = {"model_type": "llama", "max_position_embeddings": 512} | config
    assert with_flat_rope(Path("model"), config)["rope_scaling"]["original_max_position_embeddings"] == original


@pytest.mark.parametrize(
    ("family", "scaling"),
    [
        ("gemma2", {"rope_type": "linear", "factor": 4.0}),
        ("gemma", {"type": "dynamic", "factor": 2.0}),
        ("phi3", {"type": "yarn", "factor": 4.0, "long_factor": [1.0] * 8}),
        ("cohere", {"type": "yarn", "factor": 4.0}),
    ],
)
def test_scaling_that_a_class_does_not_look_at_is_refused(family: str, scaling: dict[str, Any]) -> None:
    config = tiny_config(family)
    assert config is not None
    build_skeleton(Path("model"), config, 100)
    with pytest.raises(SourceError, match=f"model: scales its rotary positions .* mlx-lm's {family} has no place"):
        build_skeleton(Path("model"), config | {"rope_scaling": scaling}, 100)


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3", "dynamic"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "granite"])
def test_scaling_that_it_looks_at_is_not(family: str, kind: str) -> None:
    config = tiny_config(family)
    assert config is not None
    for factor in (1.0, 4.0):
        build_skeleton(Path("model"), config | {"rope_scaling": {"type": kind, "factor": factor}}, 100)
