"""A backbone sees what the predictor will see, is told apart from others, and is copied whole."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model

from ifprune_mlx import Model, PredictorError
from ifprune_mlx.selection.predictor import Head, SparsityPredictor
from ifprune_mlx.train.attribution import Backbone, copy_backbone
from tests.tiny import TEMPLATE, write_source
from tests.tiny_predictor import write_predictor

TEXT = "Sort these numbers."


def pooled(hidden: mx.array) -> np.ndarray:
    return np.concatenate([np.array(hidden[-1]), np.array(hidden.mean(axis=0))])


def test_a_backbone_of_its_own_reads_as_the_predictor_will(tmp_path: Path) -> None:
    """With its own tokenizer and template, cut to the window; the states of its last layer, after the norm."""
    folder = write_predictor(tmp_path / "small")
    backbone = Backbone.load(folder)
    predictor = SparsityPredictor.load(folder)
    model, _ = load_model(folder)
    for text in (TEXT, "long " * 200):
        tokens = predictor.tokens(text)
        assert len(tokens) == min(256, len(text) + len("<user\n>\n<assistant\n"))  # a byte is a token, as is <
        np.testing.assert_allclose(
            np.array(backbone.features([text]))[0], pooled(model.model(mx.array([tokens]))[0]), atol=1e-5
        )
    (tmp_path / "small" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(PredictorError, match="the instruction is empty"):
        Backbone.load(folder).features([""])


def test_the_first_layers_read_as_the_predictor_will(tiny: tuple[Model, TokenizerWrapper]) -> None:
    """The model's own tokenizer and layers; the head's `layers` are the backbone's."""
    model, tokenizer = tiny
    head = Head(mx.zeros((4, 64)), None, mx.zeros((256, 4)), None, (128, 128), layers=1)
    predictor = SparsityPredictor(model.module, tokenizer, head, model.context_length)
    inner = model.module.model
    hidden = inner.norm(inner.layers[0](inner.embed_tokens(mx.array([predictor.tokens(TEXT)])), "causal", None))[0]
    backbone = Backbone.first_layers(model, 1)
    np.testing.assert_allclose(np.array(backbone.features([TEXT]))[0], pooled(hidden), atol=1e-5)
    assert backbone.identity() == {"layers": 1}


def test_backbones_are_told_apart(tmp_path: Path) -> None:
    """By weights of the same shapes, and by the chat template; not by a head or a note beside them."""
    one = write_source(tmp_path / "one", "qwen2", seed=7)
    same = write_predictor(tmp_path / "same")
    (same / "notes.md").write_text("mine")
    other = write_source(tmp_path / "other", "qwen2", seed=8)
    templated = write_source(tmp_path / "templated", "qwen2", seed=7)
    (templated / "chat_template.jinja").write_text(TEMPLATE + " ")
    identities = [Backbone.load(folder).identity() for folder in (one, same, other, templated)]
    assert identities[0] == identities[1]
    assert len({str(identity) for identity in identities}) == 3


def test_a_copy_is_the_same_backbone(tmp_path: Path) -> None:
    """Without the head, which is going to be another; onto itself it stays as it is."""
    folder = write_predictor(tmp_path / "small")
    copy_backbone(folder, tmp_path / "out" / "predictor")
    copy_backbone(tmp_path / "out" / "predictor", tmp_path / "out" / "predictor")
    assert Backbone.load(tmp_path / "out" / "predictor").identity() == Backbone.load(folder).identity()
    assert not (tmp_path / "out" / "predictor" / "head.safetensors").exists()


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("config.json", "small: has no config.json; give an mlx-lm model folder"),
        ("model.safetensors", "small: the backbone cannot be loaded"),
        ("tokenizer*", "small: has no tokenizer"),
    ],
)
def test_what_is_no_model_folder_is_refused(tmp_path: Path, missing: str, words: str) -> None:
    """In one line that names the folder."""
    folder = write_source(tmp_path / "small", "qwen2")
    for file in folder.glob(missing):
        file.unlink()
    with pytest.raises(PredictorError, match=words) as caught:
        Backbone.load(folder)
    assert "\n" not in str(caught.value)
