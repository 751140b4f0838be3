"""Targets are what they say, and the closed-form fit finds what is there, and nothing where nothing is."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_convert.pipeline import Options
from ifprune_mlx import DataError, Instruction, Model, PredictorError, load, make_selector
from ifprune_mlx.data.dataset import Record
from ifprune_mlx.data.tokenize import Example, encode
from ifprune_mlx.selection.predictor import POOLINGS, Head, hidden_states
from ifprune_mlx.selection.selection import top_k
from ifprune_mlx.train import attribution as measuring
from ifprune_mlx.train.attribution import Backbone, Targets, log_importance, measure
from ifprune_mlx.train.distill import Fit, distill
from tests.ifprune_mlx.reference import MaskedDown, source_model
from tests.tiny import write_checkpoint, write_source

Tiny = tuple[Model, TokenizerWrapper]


def chats(tokenizer: TokenizerWrapper, count: int) -> list[Example]:
    records = [
        Record(
            ({"role": "user", "content": f"Question {i}"}, {"role": "assistant", "content": "Answer " * (1 + i % 3)}),
            "ab"[i % 2],
        )
        for i in range(count)
    ]
    encoded = [encode(tokenizer, record, 64) for record in records]
    return [chat for chat in encoded if chat is not None]


@pytest.mark.parametrize("together", [1, 2])
def test_targets_are_what_a_slow_reference_gives(tiny: Tiny, tmp_path: Path, together: int) -> None:
    """One by one, and two chats of different lengths together, each in its own place."""
    model, tokenizer = tiny
    examples = chats(tokenizer, 3)
    found = measure(model, examples, tmp_path / "targets", Backbone.first_layers(model, 1), micro_batch_size=together)
    assert found.domains == ["a", "b", "a"]
    assert (found.layers, found.widths) == (1, (128, 128))
    for row, chat in enumerate(examples):
        hidden = np.array(hidden_states(model.module, mx.array(chat.tokens[None, : chat.prompt_length]), 1)[0])
        expected = np.concatenate([hidden[-1], hidden.mean(axis=0)])
        np.testing.assert_allclose(found.features[row], expected, atol=1e-5)
        wanted = np.concatenate(slow_attribution(model, chat))
        np.testing.assert_allclose(found.importance[row].astype(np.float32), wanted, rtol=2e-3, atol=1e-4)


def slow_attribution(model: Model, chat: Example) -> list[np.ndarray]:
    """The same on the stock model: full logits, and a mask `[tokens, d_ffn]` before every down projection."""
    dense = source_model(model.checkpoint.path)
    tokens = mx.array(chat.tokens[None, :-1])
    masks = []
    for prior in model.prior:
        kept = np.argsort(-prior)[: len(prior) // 2]
        mask = np.full(len(prior), 0.5, np.float32)
        mask[kept] = 1
        masks.append(mx.array(np.tile(mask, (tokens.shape[1], 1))))

    def loss(given: list[mx.array]) -> mx.array:
        for layer, down, mask in zip(dense.model.layers, downs, given, strict=True):
            layer.mlp.down_proj = MaskedDown(down, mask)
        logits = dense(tokens)[0]
        wanted = mx.array(chat.tokens[1:])
        losses = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]
        return (losses * mx.array(chat.mask[1:]).astype(mx.float32)).sum()

    downs = [layer.mlp.down_proj for layer in dense.model.layers]
    sums = [np.abs(np.array(gradient)).sum(axis=0) for gradient in mx.grad(loss)(masks)]
    return [total / total.mean() for total in sums]


def test_a_run_that_died_goes_on_after_its_last_part(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny
    monkeypatch.setattr(measuring, "PART", 2)
    examples = chats(tokenizer, 5)
    backbone = Backbone.first_layers(model, 2)
    whole = measure(model, examples, tmp_path / "whole", backbone)

    def dies(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(model, examples, tmp_path / "again", backbone, dies)
    assert len(measuring.load(tmp_path / "again").features) == 4
    seen: list[int] = []
    again = measure(model, examples, tmp_path / "again", backbone, lambda done, total: seen.append(done))
    np.testing.assert_array_equal(again.importance, whole.importance)
    np.testing.assert_array_equal(again.features, whole.features)
    with pytest.raises(DataError, match="of other chats or of another model"):
        measure(model, examples[:4], tmp_path / "again", backbone)
    with pytest.raises(DataError, match="holds no targets"):
        measuring.load(tmp_path / "nowhere")
    told: list[tuple[int, int]] = []
    measure(model, examples, tmp_path / "few", backbone, lambda *now: told.append(now), count=3)
    assert told[-1] == (4, 4)  # whole parts are measured, and a rate has to be of what was done


def test_targets_read_by_a_backbone_of_its_own(tiny: Tiny, tmp_path: Path) -> None:
    """Its features with the same importance; another backbone, or none, may not go on with them."""
    model, tokenizer = tiny
    examples = chats(tokenizer, 3)
    one, other = (
        Backbone.load(write_source(tmp_path / f"small-{seed}", "qwen2", seed, hidden_size=32)) for seed in (1, 2)
    )
    first_layer = Backbone.first_layers(model, 1)
    plain = measure(model, examples, tmp_path / "plain", first_layer)
    found = measure(model, examples, tmp_path / "targets", one)
    assert (found.layers, found.features.shape) == (None, (3, 64))
    for row, chat in enumerate(examples):
        np.testing.assert_array_equal(found.features[row], np.array(one.features([chat.instruction]))[0])
    np.testing.assert_array_equal(found.importance, plain.importance)
    again = measure(model, examples, tmp_path / "targets", one)
    np.testing.assert_array_equal(again.features, found.features)
    for backbone in (other, first_layer):
        with pytest.raises(DataError, match="or of another model or backbone"):
            measure(model, examples, tmp_path / "targets", backbone)


def planted(count: int, signal: float, seed: int = 0) -> Targets:
    """Two features decide which half of each FFN matters; the others are noise."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(count, 8)).astype(np.float32)
    widths = (40, 24)
    parts = []
    for layer, width in enumerate(widths):
        half = np.where(np.arange(width) < width // 2, 1.0, -1.0)
        logs = signal * features[:, layer, None] * half + 0.1 * generator.normal(size=(count, width))
        parts.append(np.exp(logs + np.linspace(0, 1, width)))
    return Targets(features, np.concatenate(parts, axis=1).astype(np.float16), ["x"] * count, 1, widths)


def predicted(fit: Fit, features: np.ndarray) -> np.ndarray:
    head = fit.head
    inner = features @ np.array(head.first).T + np.array(head.first_bias)
    return inner @ np.array(head.second).T + np.array(head.second_bias)


def test_a_planted_signal_is_found() -> None:
    targets, fresh = planted(400, 0.5), planted(100, 0.5, seed=1)
    fit = distill(targets, rank=4)
    assert max(fit.explained.values()) > 0.8
    wanted = np.concatenate([*log_importance(fresh)], axis=1)
    got = predicted(fit, fresh.features)
    for row in range(100):
        sparse = top_k([wanted[row, :40], wanted[row, 40:]], (16, 8), "oracle")
        ours = top_k([got[row, :40], got[row, 40:]], (16, 8), "learned")
        if abs(fresh.features[row, :2]).min() > 0.5:
            assert ours.overlap(sparse) > 0.7


def test_without_a_signal_the_predictor_is_the_prior() -> None:
    targets = planted(300, 0.0)
    fit = distill(targets)
    assert max(fit.explained.values()) < 0.05
    mean = np.concatenate([*log_importance(targets)], axis=1).mean(axis=0)
    np.testing.assert_allclose(np.array(fit.head.second_bias), mean, atol=1e-5)
    assert np.abs(predicted(fit, targets.features) - mean).max() < 0.1


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_head_reads_what_its_pooling_says(pooling: str) -> None:
    """Of the same targets: fitted on the last token's half of the features, where the signal is, on the other, or both;
    what the head gives for hidden states is what was fitted."""
    targets = planted(300, 0.5)
    fit = distill(targets, rank=4, pooling=pooling)
    assert (fit.head.pooling, fit.head.first.shape[1]) == (pooling, 8 if pooling == "both" else 4)
    best = max(fit.explained.values())
    assert best < 0.05 if pooling == "mean" else best > 0.8
    hidden = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    halves = {"last": hidden[-1:], "mean": hidden.mean(axis=0, keepdims=True)}
    features = np.concatenate([*halves.values()], axis=1) if pooling == "both" else halves[pooling]
    np.testing.assert_allclose(np.array(fit.head(mx.array(hidden))), predicted(fit, features)[0], atol=1e-4)


def test_full_rank_is_plain_ridge_regression() -> None:
    targets = planted(200, 0.3)
    fit = distill(targets, rank=64, penalties=(0.5,))
    x = (targets.features - targets.features.mean(axis=0)) / (targets.features.std(axis=0) + 1e-6)
    y = np.concatenate([*log_importance(targets)], axis=1)
    solution = np.linalg.solve(x.T @ x + 0.5 * 200 * np.eye(8), x.T @ (y - y.mean(axis=0)))
    np.testing.assert_allclose(predicted(fit, targets.features), y.mean(axis=0) + x @ solution, atol=2e-3)


def test_too_few_chats_are_refused() -> None:
    with pytest.raises(DataError, match="12 chats are too few"):
        distill(planted(12, 0.5))


def test_a_distilled_predictor_in_a_checkpoint_selects_what_its_scores_say(tiny: Tiny, tmp_path: Path) -> None:
    model, tokenizer = tiny
    targets = measure(model, chats(tokenizer, 24), tmp_path / "targets", Backbone.first_layers(model, 1))
    fit = distill(targets, rank=8)
    (tmp_path / "predictor").mkdir()
    fit.head.save(tmp_path / "predictor" / "head.safetensors")
    folder = write_checkpoint(tmp_path / "checkpoint", options=Options(predictor=tmp_path / "predictor"))
    learned, _ = load(folder)
    selector = make_selector(learned)
    assert selector.name == "learned"
    keep = learned.keep(0.25)
    chosen = selector.select(Instruction("Question 7", ()), keep).selection
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Question 7"}], add_generation_prompt=True)
    hidden = np.array(hidden_states(model.module, mx.array([ids]), 1)[0])
    scores = predicted(fit, np.concatenate([hidden[-1], hidden.mean(axis=0)])[None])[0]
    assert chosen.hash == top_k([scores[:128], scores[128:]], keep, "learned").hash
    # It must read dense layers: the same again while a selection is live.
    learned.switch(make_selector(learned, "random").select(Instruction("x", ()), keep).selection)
    assert selector.select(Instruction("Question 7", ()), keep).selection.hash == chosen.hash


def test_more_layers_than_the_model_has_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    head = Head(mx.zeros((4, 64)), None, mx.zeros((256, 4)), None, (128, 128), layers=3)
    (tmp_path / "predictor").mkdir()
    head.save(tmp_path / "predictor" / "head.safetensors")
    folder = write_checkpoint(tmp_path / "checkpoint", options=Options(predictor=tmp_path / "predictor"))
    with pytest.raises(PredictorError, match="reads 3 layers, the model has 2"):
        make_selector(load(folder)[0])
