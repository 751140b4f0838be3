"""Losses and gradients of the arms equal slow references: stock models, full masks, NumPy in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.optimizers import SGD
from mlx.utils import tree_flatten, tree_unflatten

from ifprune_mlx import DataError, IfpruneError, SparsityPredictor, load
from ifprune_mlx.data.dataset import Record
from ifprune_mlx.data.tokenize import Example, chunked, encode
from ifprune_mlx.selection.predictor import Head, load_predictor
from ifprune_mlx.selection.selection import Selection, top_k
from ifprune_mlx.sparse.soft_topk import hard_top_k, soft_top_k
from ifprune_mlx.train.config import ARMS
from ifprune_mlx.train.lora import LoRAModel, Parameters
from ifprune_mlx.train.step import GAINS, GROUPS, SCORES, Arm, TrainStep, group_of, head_parameters, head_with
from tests.ifprune_mlx.reference import mask_ffns
from tests.ifprune_mlx.train.configs import config
from tests.tiny import write_checkpoint
from tests.tiny_predictor import write_predictor

WIDTHS = (128, 128)
KEEP = (40, 64)
EVERYTHING = 100.0
"""A margin, as a share of k, that covers all neurons."""
LEARNED_SCORES = np.random.default_rng(17).normal(size=256).astype(np.float32)
"""Of the arm static-learned: others than the prior's."""


@dataclass
class Bench:
    """A tiny model with adapters and a predictor, and its stock references."""

    folder: Path
    adapted: LoRAModel
    predictor: SparsityPredictor
    prior: list[Any]
    examples: dict[str, Example]
    adapter: Path
    trained: Parameters

    @property
    def head(self) -> Head:
        return self.predictor.head

    def stepper(self, **settings: Any) -> TrainStep:
        return TrainStep(self.adapted, self.predictor, self.prior, config(**settings))

    def arm(self, name: str, parameters: Parameters | None = None) -> Arm:
        held = dict(self.trained if parameters is None else parameters)
        if name == "static-learned":
            held[SCORES] = mx.array(LEARNED_SCORES)
        return Arm(
            name,
            held | (head_parameters(self.head) if name == "learned" else {}),
            {group: SGD(1.0) for group in GROUPS if group != "scores" or name == "static-learned"},
        )

    def dense(self, *, adapter: bool = True) -> Any:
        """The stock mlx-lm model, with mlx-lm's own adapters or without."""
        source = self.folder.with_name(f"source-of-{self.folder.name}")
        model, _ = mlx_lm.load(str(source), adapter_path=str(self.adapter) if adapter else None)
        model.eval()
        return model

    def hidden(self, text: str) -> mx.array:
        """What the head reads: the first layer of the adapted dense model, then its norm; or the backbone's states."""
        tokens = mx.array([self.predictor.tokens(text)])
        if self.head.layers is None:
            return self.predictor.backbone(tokens)[0]
        model = self.dense()
        model.model.layers = model.model.layers[: self.head.layers]
        return model.model(tokens)[0]

    def selection(self, name: str, example: Example) -> Selection:
        if name == "static":
            return top_k(self.prior, KEEP, "static")
        if name == "none":
            return top_k(self.prior, WIDTHS, "none")
        if name == "static-learned":
            return top_k(np.split(LEARNED_SCORES, [128]), KEEP, "static-learned")
        scores = np.array(self.head(self.hidden(example.instruction)))
        return top_k(np.split(scores, [128]), KEEP, "learned")

    def masked(self, name: str, example: Example) -> Any:
        return mask_ffns(self.dense(), self.selection(name, example))


@pytest.fixture(scope="module", params=["first layers", "own backbone"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = write_checkpoint(tmp_path_factory.mktemp("arms") / "checkpoint", "llama-bias")
    model, tokenizer = load(folder)
    predictor_folder = tmp_path_factory.mktemp("predictor")
    if request.param == "own backbone":
        write_predictor(predictor_folder, WIDTHS)
    else:
        mx.random.seed(11)
        arrays = [mx.random.normal(shape) for shape in ((8, 128), (8,), (256, 8), (256,))]
        Head(*arrays, WIDTHS, "both", "silu", layers=1).save(predictor_folder / "head.safetensors")
    predictor = load_predictor(predictor_folder, model.module, tokenizer, 512, WIDTHS)
    adapted = LoRAModel(model, rank=4, scale=2.0)
    mx.random.seed(5)
    trained = {name: array + 0.05 * mx.random.normal(array.shape) for name, array in adapted.initial.items()}
    adapter = tmp_path_factory.mktemp("adapter")
    adapted.save(adapter, trained)
    messages = [
        {"role": role, "content": content}
        for role, content in (("user", "What?"), ("assistant", "This."), ("user", "And?"), ("assistant", "That one."))
    ]
    chat = encode(tokenizer, Record(tuple(messages), "d"), 256)
    assert chat is not None
    (chunk, *_) = chunked(tokenizer, Record((), "d", "A text of two chunks, the second of them shorter."), 30)
    answer = chunk.tokens[chunk.prompt_length :]
    alone = Example(answer, np.arange(len(answer)) > 0, 0, chunk.instruction, "d", "alone")
    examples = {"chat": chat, "chunk": chunk, "chunk alone": alone}
    return Bench(folder, adapted, predictor, list(model.prior), examples, adapter, trained)


def slow_losses(said: np.ndarray[Any, Any], taught: np.ndarray[Any, Any], example: Example) -> tuple[float, float]:
    """Cross-entropy and KL(taught || said), float64, token by token."""
    ce = kl = 0.0
    for place in range(1, len(example.tokens)):
        if not example.mask[place]:
            continue
        logs = []
        for logits in (taught[place - 1].astype(np.float64), said[place - 1].astype(np.float64)):
            exponentials = np.exp(logits - logits.max())
            logs.append(np.log(exponentials / exponentials.sum()))
        ce -= logs[1][example.tokens[place]]
        kl += float((np.exp(logs[0]) * (logs[0] - logs[1])).sum())
    return ce, kl


def full_logits(model: Any, example: Example) -> np.ndarray[Any, Any]:
    return np.array(model(mx.array(example.tokens[None]))[0])


def objective_of(model: Any, example: Example, taught: mx.array, share: float) -> mx.array:
    """The loss over full logits of a stock model, summed over tokens."""
    places = np.flatnonzero(example.mask)
    logits = model(mx.array(example.tokens[None]))[0][mx.array(places - 1)]
    logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    ce = -mx.take_along_axis(logs, mx.array(example.tokens[places])[:, None], axis=-1).sum()
    teacher = taught[mx.array(places - 1)]
    teacher = teacher - mx.logsumexp(teacher, axis=-1, keepdims=True)
    kl = (mx.exp(teacher) * (teacher - logs)).sum()
    return (1 - share) * ce + share * kl


def assert_close(found: Parameters, wanted: Parameters, tolerance: float = 2e-4) -> None:
    """Equal up to a share of each array's largest value."""
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        largest = float(mx.abs(array).max())
        np.testing.assert_allclose(np.array(found[name]), np.array(array), atol=tolerance * largest, err_msg=name)


@pytest.mark.parametrize("kind", ["chat", "chunk", "chunk alone"])
@pytest.mark.parametrize("name", ARMS)
def test_losses_equal_those_of_numpy(bench: Bench, name: str, kind: str) -> None:
    """Cross-entropy and divergence, summed over answer tokens, of every arm on chats and on stage 1 chunks."""
    example = bench.examples[kind]
    stepper = bench.stepper(teacher=0.3)
    taught = stepper.teacher_output([example])
    (measured,) = stepper.accumulate(bench.arm(name), [example], [KEEP], taught, 7, learn_head=False)
    said = full_logits(bench.masked(name, example), example)
    ce, kl = slow_losses(said, full_logits(bench.dense(adapter=False), example), example)
    assert measured.cross_entropy == pytest.approx(ce, rel=1e-5)
    assert measured.divergence == pytest.approx(kl, rel=1e-3)
    assert kl > 1e-3


@pytest.mark.parametrize("name", ARMS)
def test_adapter_gradients_equal_those_of_the_masked_model(bench: Bench, name: str) -> None:
    """Of `((1 - share) ce + share kl) / targets`, the sum over sequences accumulated."""
    share, targets = 0.3, 11
    stepper, arm = bench.stepper(teacher=share), bench.arm(name)
    wanted: Parameters = {}
    for example in (bench.examples["chat"], bench.examples["chunk"]):
        stepper.accumulate(arm, [example], [KEEP], stepper.teacher_output([example]), targets, learn_head=False)
        model = bench.masked(name, example)
        taught = mx.array(full_logits(bench.dense(adapter=False), example))

        def loss(given: dict[str, Any], model: Any = model, example: Example = example, taught: Any = taught) -> Any:
            model.update(tree_unflatten(list(given.items())))
            return objective_of(model, example, taught, share) / targets

        lora = {path: array for path, array in tree_flatten(model.parameters()) if "lora" in path}
        for path, value in mx.grad(loss)(lora).items():
            place = path.replace("down_proj.down.", "down_proj.")
            wanted[place] = wanted[place] + value if place in wanted else value
    assert_close(arm.gradients, wanted)


@pytest.mark.parametrize("epsilon", [0.1, 1.0])
def test_the_heads_gradient_is_straight_through(bench: Bench, epsilon: float) -> None:
    """With a margin over all neurons: that of full masks `hard + soft - stop_gradient(soft)` on the dense model."""
    share, example = 0.3, bench.examples["chat"]
    stepper, arm = bench.stepper(teacher=share, epsilon=epsilon, margin=EVERYTHING), bench.arm("learned")
    stepper.accumulate(arm, [example], [KEEP], stepper.teacher_output([example]), 5, learn_head=True)
    model = bench.masked("learned", example)
    taught = mx.array(full_logits(bench.dense(adapter=False), example))
    hidden = bench.hidden(example.instruction)

    def loss(given: Parameters) -> mx.array:
        scores = mx.split(head_with(bench.head, given)(hidden), [128])
        for layer, values, k in zip(model.model.layers, scores, KEEP, strict=True):
            soft = soft_top_k(values, k, epsilon)
            layer.mlp.down_proj._mask = hard_top_k(values, k) + soft - mx.stop_gradient(soft)
        return objective_of(model, example, taught, share) / 5

    wanted = mx.grad(loss)(head_parameters(bench.head))
    assert all(float(mx.abs(value).max()) > 0 for value in wanted.values())
    assert_close({name: value for name, value in arm.gradients.items() if name in wanted}, wanted, 1e-3)


def test_learned_scores_have_the_gradient_of_a_straight_through_mask(bench: Bench) -> None:
    """Those of `static-learned`: as the head's, but the same scores for every sequence."""
    example = bench.examples["chat"]
    stepper, arm = bench.stepper(teacher=0.0, margin=EVERYTHING), bench.arm("static-learned")
    stepper.accumulate(arm, [example], [KEEP], None, 5, learn_head=True)
    model = bench.masked("static-learned", example)
    nothing = mx.zeros((len(example.tokens), 320))

    def loss(given: mx.array) -> mx.array:
        for layer, values, k in zip(model.model.layers, mx.split(given, [128]), KEEP, strict=True):
            soft = soft_top_k(values, k, 0.1)
            layer.mlp.down_proj._mask = hard_top_k(values, k) + soft - mx.stop_gradient(soft)
        return objective_of(model, example, nothing, 0.0) / 5

    wanted = mx.grad(loss)(mx.array(LEARNED_SCORES))
    assert float(mx.abs(wanted).max()) > 0
    assert_close({SCORES: arm.gradients[SCORES]}, {SCORES: wanted}, 1e-3)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("name", ["learned", "static", "static-learned"])
def test_gains_multiply_the_activations(bench: Bench, name: str, learn: bool, together: bool) -> None:
    """Losses and the gains' gradient equal those of a mask with the gains in place of ones."""
    gains = np.random.default_rng(3).uniform(0.5, 1.5, 256).astype(np.float32)
    chosen = [bench.examples["chat"]] * (1 + together)
    stepper, arm = bench.stepper(teacher=0.0), bench.arm(name)
    arm.parameters[GAINS] = mx.array(gains)
    found = stepper.accumulate(arm, chosen, [KEEP] * len(chosen), None, len(chosen), learn_head=learn)
    model = bench.masked(name, chosen[0])
    selection = bench.selection(name, chosen[0])
    if name == "learned" and bench.head.layers is not None:
        # The predictor reads with the model's first layers, whose neurons have gains as well.
        reader = mask_ffns(bench.dense(), top_k(bench.prior, WIDTHS, "all"))
        for layer, part in zip(reader.model.layers, np.split(gains, [128]), strict=True):
            layer.mlp.down_proj._mask = mx.array(part)
        reader.model.layers = reader.model.layers[: bench.head.layers]
        scores = bench.head(reader.model(mx.array([bench.predictor.tokens(chosen[0].instruction)]))[0])
        selection = top_k(np.split(np.array(scores), [128]), KEEP, "learned")
    hard = [np.isin(np.arange(128), kept).astype(np.float32) for kept in selection.ids]

    def loss(given: mx.array) -> mx.array:
        for layer, kept, part in zip(model.model.layers, hard, mx.split(given, [128]), strict=True):
            layer.mlp.down_proj._mask = mx.array(kept) * part
        return objective_of(model, chosen[0], mx.zeros((len(chosen[0].tokens), 320)), 0.0)

    value, wanted = mx.value_and_grad(loss)(mx.array(gains))
    assert [one.cross_entropy for one in found] == pytest.approx([float(value)] * len(found), rel=1e-5)
    assert_close({GAINS: arm.gradients[GAINS]}, {GAINS: wanted}, 1e-3)
    bench.adapted.multiply(None)


def test_a_margin_leaves_out_little(bench: Bench) -> None:
    """The default margin gives nearly the gradient of all neurons, where epsilon is small beside the scores."""
    example = bench.examples["chat"]
    found = []
    for margin in (0.25, EVERYTHING):
        stepper, arm = bench.stepper(teacher=0.0, margin=margin), bench.arm("learned")
        stepper.accumulate(arm, [example], [KEEP], None, 1, learn_head=True)
        found.append(np.array(arm.gradients["head.second"]).ravel())
    near, whole = found
    assert near @ whole / (np.linalg.norm(near) * np.linalg.norm(whole)) > 0.999


@pytest.mark.parametrize("margin", [0.0, 0.25, EVERYTHING])
def test_a_learning_head_sees_the_hard_mask(bench: Bench, margin: float) -> None:
    """Forwards the straight-through mask is exactly 1 and 0, so that training sees what inference will."""
    example = bench.examples["chat"]
    stepper = bench.stepper(teacher=0.3, margin=margin)
    taught = stepper.teacher_output([example])
    (joint,) = stepper.accumulate(bench.arm("learned"), [example], [KEEP], taught, 1, learn_head=True)
    ids = [chosen.ids for chosen in bench.adapted.active]
    masks = [chosen.mask for chosen in bench.adapted.active]
    for k, values, chosen, wanted in zip(KEEP, masks, ids, bench.selection("learned", example).ids, strict=True):
        assert values is not None
        assert chosen is not None
        np.testing.assert_array_equal(np.array(values), np.arange(len(chosen)) < k)
        np.testing.assert_array_equal(np.sort(np.array(chosen)[:k]), wanted)
    (frozen,) = stepper.accumulate(bench.arm("learned"), [example], [KEEP], taught, 1, learn_head=False)
    assert joint.cross_entropy == pytest.approx(frozen.cross_entropy, rel=1e-6)
    assert joint.divergence == pytest.approx(frozen.divergence, rel=1e-4)


def test_a_head_that_holds_still_changes_no_adapter_gradient(bench: Bench) -> None:
    """Whether the head learns or not, the adapter's gradients are the same; only a learning head gets its own."""
    example = bench.examples["chat"]
    stepper, joint, frozen = bench.stepper(), bench.arm("learned"), bench.arm("learned")
    taught = stepper.teacher_output([example])
    stepper.accumulate(joint, [example], [KEEP], taught, 3, learn_head=True)
    stepper.accumulate(frozen, [example], [KEEP], taught, 3, learn_head=False)
    assert joint.gradients.keys() - frozen.gradients.keys() == head_parameters(bench.head).keys()
    assert_close({name: joint.gradients[name] for name in frozen.gradients}, frozen.gradients)


@pytest.mark.parametrize("name", ["static", "none"])
def test_arms_without_a_head_ignore_that_it_learns(bench: Bench, name: str) -> None:
    """`learn_head` is of the learned arm alone."""
    stepper, arm = bench.stepper(teacher=0.0), bench.arm(name)
    stepper.accumulate(arm, [bench.examples["chat"]], [KEEP], None, 1, learn_head=True)
    assert arm.gradients.keys() == bench.trained.keys()


def test_an_untrained_dense_arm_says_what_the_teacher_says(bench: Bench) -> None:
    """Divergence 0, and a gradient that is 0 where the teacher is all there is to the loss."""
    example = bench.examples["chat"]
    stepper, arm = bench.stepper(teacher=1.0), bench.arm("none", bench.adapted.initial)
    (measured,) = stepper.accumulate(arm, [example], [KEEP], stepper.teacher_output([example]), 1, learn_head=False)
    assert measured.divergence == pytest.approx(0, abs=1e-5)
    assert measured.cross_entropy > 1
    assert max(float(mx.abs(value).max()) for value in arm.gradients.values()) < 1e-4


def test_the_teacher_is_the_base_model(bench: Bench) -> None:
    """Whatever adapter and neurons were in use before."""
    example = bench.examples["chat"]
    stepper = bench.stepper()
    stepper.accumulate(bench.arm("static"), [example], [KEEP], None, 1, learn_head=False)
    taught = stepper.teacher_output([example])
    assert taught is not None
    logits = full_logits(bench.dense(adapter=False), example)[np.flatnonzero(example.mask) - 1]
    wanted = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(np.array(taught.probabilities), wanted, rtol=1e-4)
    np.testing.assert_allclose(np.array(taught.entropy), -(wanted * np.log(wanted)).sum(axis=-1), rtol=1e-4)


def test_without_a_teacher_there_is_no_divergence(bench: Bench) -> None:
    """A share of 0 runs no teacher at all."""
    stepper = bench.stepper(teacher=0.0)
    assert stepper.teacher_output([bench.examples["chat"]]) is None
    (measured,) = stepper.accumulate(bench.arm("none"), [bench.examples["chat"]], [KEEP], None, 1, learn_head=False)
    assert measured.divergence == 0
    assert measured.cross_entropy > 1


@pytest.mark.parametrize("name", ARMS)
def test_gradient_checkpointing_changes_no_gradient(bench: Bench, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapter and head, whose gradient comes through the masks alone; every layer runs once more. Afterwards all is as
    it was."""
    example, family = bench.examples["chat"], type(bench.adapted.model.layers[0])
    calls = []
    plain = family.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> mx.array:
        calls.append(self)
        result: mx.array = plain(self, *args, **kwargs)
        return result

    monkeypatch.setattr(family, "__call__", counted)
    found, counts = [], []
    for again in (False, True):
        arm = bench.arm(name)
        stepper = bench.stepper(grad_checkpoint=again)
        taught = stepper.teacher_output([example])
        calls.clear()
        (measured,) = stepper.accumulate(arm, [example], [KEEP], taught, 3, learn_head=True)
        found.append((measured, arm.gradients))
        counts.append(len(calls))
    (kept, gradients), (repeated, same) = found
    assert counts[1] - counts[0] == 2
    assert repeated.cross_entropy == pytest.approx(kept.cross_entropy, rel=1e-6)
    assert (name == "learned") == ("head.second" in same)
    assert (name == "static-learned") == (SCORES in same)
    assert_close(same, gradients, 1e-6)
    assert all(type(layer) is family for layer in bench.adapted.model.layers)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", ARMS)
def test_sequences_together_are_as_alone(bench: Bench, name: str, joint: bool, checkpointed: bool) -> None:
    """Losses of each and the sum of their gradients, at densities of their own; also where a switch moved the neurons,
    and after a sequence that ran alone."""
    examples, keep = list(bench.examples.values()), [KEEP, (64, 32), (128, 100)]
    stepper = bench.stepper(teacher=0.3, grad_checkpoint=checkpointed)
    alone, together = bench.arm(name), bench.arm(name)
    wanted = []
    for example, counts in zip(examples, keep, strict=True):
        wanted += stepper.accumulate(alone, [example], [counts], stepper.teacher_output([example]), 9, learn_head=joint)
    bench.adapted.choose(None)
    bench.adapted.model.switch(bench.selection("static", examples[0]))
    bench.adapted.model.switch(None)
    try:
        found = stepper.accumulate(together, examples, keep, stepper.teacher_output(examples), 9, learn_head=joint)
    finally:
        bench.adapted.in_order()
    for one, other in zip(found, wanted, strict=True):
        assert one.cross_entropy == pytest.approx(other.cross_entropy, rel=1e-5)
        assert one.divergence == pytest.approx(other.divergence, rel=1e-3)
    assert_close(together.gradients, alone.gradients, 1e-3)


def norm(values: Sequence[mx.array]) -> float:
    return float(np.sqrt(sum(float((value**2).sum()) for value in values)))


@pytest.mark.parametrize("clip", [1e-3, 1e6])
def test_a_step_is_clipped_apart_for_adapter_and_head(bench: Bench, clip: float) -> None:
    """With plain SGD a step is minus the gradient, at most `clip` long for each of the two; then gradients are gone."""
    stepper, arm = bench.stepper(teacher=0.0), bench.arm("learned")
    stepper.accumulate(arm, [bench.examples["chat"]], [KEEP], None, 1, learn_head=True)
    gradients, before = dict(arm.gradients), dict(arm.parameters)
    told = arm.step(clip)
    assert arm.gradients == {}
    for group in ("adapter", "head"):
        names = [name for name in gradients if group_of(name) == group]
        length = norm([gradients[name] for name in names])
        if group == "adapter":
            assert told == pytest.approx(length, rel=1e-5)
        moved = norm([before[name] - arm.parameters[name] for name in names])
        assert moved == pytest.approx(min(length, clip), rel=1e-2)
        for name in names:
            wanted = np.array(gradients[name]) * min(1, clip / length)
            np.testing.assert_allclose(
                np.array(before[name] - arm.parameters[name]), wanted, atol=1e-2 * np.abs(wanted).max() + 1e-6
            )


@pytest.mark.parametrize("place", ["model.layers.0.mlp.up_proj.lora_a", "head.second"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_changes_nothing(bench: Bench, place: str, wrong: float) -> None:
    """The step is refused whole, the adapter's part too where only the head's is damaged."""
    stepper, arm = bench.stepper(teacher=0.0), bench.arm("learned")
    stepper.accumulate(arm, [bench.examples["chat"]], [KEEP], None, 1, learn_head=True)
    arm.gradients[place] = arm.gradients[place] * wrong
    before = dict(arm.parameters)
    with pytest.raises(IfpruneError, match="of arm learned is not a number"):
        arm.step(1.0)
    assert all(mx.array_equal(arm.parameters[name], value) for name, value in before.items())


def test_a_head_comes_back_as_it_went(bench: Bench) -> None:
    """`head_with(head, head_parameters(head))` is the same head."""
    again = head_with(bench.head, head_parameters(bench.head))
    for name in ("first", "first_bias", "second", "second_bias"):
        one, other = getattr(again, name), getattr(bench.head, name)
        assert (one is None) == (other is None)
        assert one is None or mx.array_equal(one, other)
    assert (again.widths, again.pooling, again.layers) == (bench.head.widths, bench.head.pooling, bench.head.layers)


@pytest.mark.parametrize(
    "wrong", [{"teacher": 1.5}, {"teacher": -0.1}, {"epsilon": 0.0}, {"epsilon": float("nan")}, {"margin": -1.0}]
)
def test_an_objective_out_of_range_is_refused(wrong: dict[str, float]) -> None:
    """Shares outside 0 to 1, and an epsilon that soft top-k cannot use."""
    with pytest.raises(DataError, match="give a teacher from 0 to 1, an epsilon above 0"):
        config(**wrong)
