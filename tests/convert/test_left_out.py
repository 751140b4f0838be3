"""What mlx-lm's classes would leave out of a source without a word is kept, or the source is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from ifprune_convert.pipeline import Options, convert
from ifprune_convert.readers import open_source
from ifprune_mlx import load
from ifprune_mlx.errors import SourceError
from tests.family_configs import tiny_config
from tests.tiny import make_model, write_tokenizer

TIED = "tie_word_embeddings"
UNTIED_BY_DEFAULT = ["llama", "mistral", "qwen2", "qwen3", "granite", "seed_oss", "olmo2"]


def config_of(family: str) -> dict[str, Any]:
    config = tiny_config("llama" if family == "mistral" else family)
    assert config is not None
    return config | {"model_type": family}


def write(folder: Path, config: dict[str, Any], weights: dict[str, mx.array]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    write_tokenizer(folder)
    return folder


def untied(family: str, seed: int = 3) -> tuple[dict[str, Any], Any, dict[str, mx.array]]:
    """A family's config without a word on its output layer, a model that has one, and its weights."""
    config = config_of(family)
    model = make_model(config | {TIED: False}, seed)
    return {key: value for key, value in config.items() if key != TIED}, model, dict(tree_flatten(model.parameters()))


def answers_alike(folder: Path, out: Path, model: Any) -> None:
    convert(open_source(folder), out, Options())
    ours, _ = load(out)
    tokens = mx.array([[5, 7, 11]])
    assert mx.allclose(ours(tokens), model(tokens), atol=1e-4)
    ours.close()


@pytest.mark.parametrize("family", UNTIED_BY_DEFAULT)
def test_an_output_layer_that_the_config_does_not_mention_is_kept(tmp_path: Path, family: str) -> None:
    config, model, weights = untied(family)
    answers_alike(write(tmp_path / "source", config, weights), tmp_path / "out", model)


def test_so_is_that_of_a_larger_model(tmp_path: Path) -> None:
    text, _, _ = untied("qwen2")
    config = {"model_type": "qwen2_vl", "text_config": text}
    model = make_model({"model_type": "qwen2_vl", "text_config": text | {TIED: False}})
    answers_alike(write(tmp_path / "m", config, dict(tree_flatten(model.parameters()))), tmp_path / "out", model)


@pytest.mark.parametrize("family", UNTIED_BY_DEFAULT)
def test_one_that_differs_from_the_embedding_is_refused_where_the_config_ties_them(tmp_path: Path, family: str) -> None:
    config, _, weights = untied(family)
    with pytest.raises(SourceError, match=r"has (an output layer )?lm_head\.weight.* (differs|does not know)"):
        open_source(write(tmp_path / "m", config | {TIED: True}, weights))


@pytest.mark.parametrize("family", [*UNTIED_BY_DEFAULT, "gemma", "gemma2"])
@pytest.mark.parametrize("stated", [{}, {TIED: True}])
def test_one_that_is_the_embedding_is_not_needed(tmp_path: Path, family: str, stated: dict[str, bool]) -> None:
    config = config_of(family) | {TIED: True}
    model = make_model(config)
    weights = dict(tree_flatten(model.parameters()))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    config = {key: value for key, value in config.items() if key != TIED} | stated
    answers_alike(write(tmp_path / "m", config, weights), tmp_path / "out", model)


def test_a_family_that_must_be_told_is_told(tmp_path: Path) -> None:
    model = make_model(config_of("qwen3") | {TIED: True})
    config = {key: value for key, value in config_of("qwen3").items() if key != TIED}
    answers_alike(write(tmp_path / "m", config, dict(tree_flatten(model.parameters()))), tmp_path / "out", model)


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.self_attn.sinks", "model.norm.extra", "lm_head.bias"],
)
def test_other_numbers_that_a_class_drops_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config, model, weights = untied("llama")
    dropping = type(model).sanitize

    def sanitize(self: Any, given: dict[str, mx.array]) -> dict[str, mx.array]:
        # As mlx-lm's own classes do it with what they do not use.
        return {key: value for key, value in dropping(self, given).items() if key != name}

    monkeypatch.setattr(type(model), "sanitize", sanitize)
    with pytest.raises(SourceError, match=f"has {name}, which mlx-lm's llama leaves out"):
        open_source(write(tmp_path / "m", config, weights | {name: mx.ones((64,))}))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "visual.blocks.0.attn.qkv.weight",
        "vision_tower.patch_embed.weight",
    ],
)
def test_what_the_next_token_does_not_depend_on_may_go(tmp_path: Path, name: str) -> None:
    text = config_of("qwen2") | {TIED: False}
    config = text if "rotary" in name else {"model_type": "qwen2_vl", "text_config": text}
    model = make_model(config)
    weights = dict(tree_flatten(model.parameters()))
    answers_alike(write(tmp_path / "m", config, weights | {name: mx.ones((4, 4))}), tmp_path / "out", model)
