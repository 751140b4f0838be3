"""The context length counts what scaled rotary positions add, and only once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ifprune_mlx import PromptError, load, stream_generate
from ifprune_mlx.checkpoint.context_length import context_length
from tests.tiny import write_checkpoint

LONG = [1.0] * 8


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({}, None),
        ({"text_config": {"max_position_embeddings": 64}}, 64),
        # Qwen 2.5 as its card says to extend it; DeepSeek states the scaled length.
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}}, 2048),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 2048),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}}, 512),
        ({"rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4}}, 512),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 2048),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4, "original_max_position_embeddings": 128}}, 512),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, 2048),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 1024),
        ({"rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"}}, 512),
        # Llama 3.1 and Phi 3 state it.
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}}, 512),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512}}, 4096),
        # Llama 3.2 and EXAONE 3.5, whose factors reach further than they do.
        ({"rope_scaling": {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 32}}, 512),
        ({"rope_scaling": {"type": "longrope", "factor": 32.0, "original_max_position_embeddings": 64}}, 512),
        ({"rope_scaling": {"type": "longrope", "long_factor": LONG}, "original_max_position_embeddings": 16}, 512),
        ({"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, 512),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]}}, 512),
        ({"rope_scaling": {"rope_type": "default"}}, 512),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}}, 1024),
        (
            {"text_config": {"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 2.0}}},
            128,
        ),
    ],
)
def test_lengths(config: dict[str, Any], length: int | None) -> None:
    stated = {} if not config or "text_config" in config else {"max_position_embeddings": 512}
    assert context_length(stated | config) == length


@pytest.mark.parametrize(
    ("family", "scaling"),
    [
        ("llama", {"type": "yarn", "factor": 4.0}),
        ("qwen2", {"type": "linear", "factor": 4.0}),
        ("mistral", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
        ("qwen3", {"rope_type": "dynamic", "factor": 4.0}),
    ],
)
def test_a_prompt_beyond_the_stated_length_is_answered(tmp_path: Path, family: str, scaling: dict[str, Any]) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", family, rope_scaling=scaling, max_position_embeddings=64)
    model, tokenizer = load(folder)
    assert model.context_length == 256
    ids = [5] * 100
    assert next(iter(stream_generate(model, tokenizer, ids, dense=True, max_tokens=1))) is not None
    with pytest.raises(PromptError, match="context holds 256"):
        next(iter(stream_generate(model, tokenizer, [5] * 257, dense=True, max_tokens=1)))
    model.close()
