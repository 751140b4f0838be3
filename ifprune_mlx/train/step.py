"""The arms of a run, and the losses and gradients of one step.

Each arm has its own adapter (or weights) over one base model, and its own way to choose neurons:

learned         the predictor chooses for each sequence, by its instruction; its head may be trained too
static          the prior's best for every sequence: healed static
static-learned  the best by scores that are trained like the head, the same for every sequence: the strongest control
none            all neurons: healed dense

Arms that choose may also have a gain for every neuron, by which its activation is multiplied (DDP, arXiv 2603.08065).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import optimizers
from mlx.utils import tree_flatten

from ifprune_mlx.data.tokenize import Example
from ifprune_mlx.errors import IfpruneError
from ifprune_mlx.selection.predictor import Head, SparsityPredictor, features
from ifprune_mlx.selection.selection import Scores
from ifprune_mlx.sparse.soft_topk import hard_top_k, soft_top_k
from ifprune_mlx.train.config import TrainConfig
from ifprune_mlx.train.gradients import recomputed
from ifprune_mlx.train.loss import answer_logits, answer_rows, cross_entropy, log_softmax
from ifprune_mlx.train.trainable import Parameters, TrainableModel

GROUPS = ("adapter", "head", "scores", "gains")
"""What an arm's parameters belong to. A name begins with its group; those of the adapter have mlx-lm's names."""
SCORES, GAINS = "scores.neurons", "gains.neurons"
_CHOOSING = ("learned", "static-learned")
_HEAD = "head."
_BIAS = "head.second_bias"
_HEAD_ARRAYS = ("first", "first_bias", "second", "second_bias")
_Choice = tuple["list[mx.array] | None", "list[mx.array] | None"]
"""The ids and masks that `TrainableModel.choose` takes."""


@dataclass
class Arm:
    """One arm."""

    name: str  # from `train.config.ARMS`
    parameters: Parameters  # adapter or model weights, under `head.` the head's; `SCORES` and `GAINS`, `[neurons]`
    optimizers: Mapping[str, optimizers.Optimizer]  # by group; with one for `scores` it trains a head's bias as well
    gradients: Parameters = field(default_factory=dict)  # accumulated since the last step

    @property
    def adapter(self) -> Parameters:
        """The adapter's weights alone."""
        return {name: array for name, array in self.parameters.items() if group_of(name) == "adapter"}

    def head(self, like: Head) -> Head:
        """The head as it is now."""
        return head_with(like, self.parameters)

    def accumulate(self, gradients: Parameters) -> None:
        """Add the gradients of one sequence."""
        for name, value in gradients.items():
            self.gradients[name] = self.gradients[name] + value if name in self.gradients else value
        mx.eval(self.gradients)

    def step(self, clip: float) -> float:
        """Apply the accumulated gradients, clipped to a global norm per optimizer.

        Returns:
            The gradient's norm before clipping, of the adapter where it is trained.

        Raises:
            IfpruneError: if a gradient is not a number; nothing is changed then.
        """
        parts: dict[str, Parameters] = {group: {} for group in self.optimizers}
        for name, value in self.gradients.items():
            parts[self._optimizer_of(name)][name] = value
        clipped = [(self.optimizers[group], *_clipped(part, clip)) for group, part in parts.items() if part]
        norms = [float(norm) for _, _, norm in clipped]
        if not np.isfinite(norms).all():
            raise IfpruneError(
                f"the gradient of arm {self.name} is not a number; lower the learning rate, or give --dtype bfloat16 "
                "or float32 if it is float16"
            )
        self.gradients = {}
        del parts
        while clipped:
            optimizer, gradients, _ = clipped.pop()
            self.parameters |= optimizer.apply_gradients(gradients, {name: self.parameters[name] for name in gradients})
            # Old weights and gradients must be gone before the new ones are computed.
            del gradients
        mx.eval(self.parameters, [optimizer.state for optimizer in self.optimizers.values()])
        return norms[0]

    def _optimizer_of(self, name: str) -> str:
        """The bias of a head is what `static-learned` has for scores, and is trained like it where that arm is."""
        return "scores" if name == _BIAS and "scores" in self.optimizers else group_of(name)

    def state(self) -> Parameters:
        """The arm's parameters and optimizer states, by name."""
        arrays = {f"parameters/{name}": array for name, array in self.parameters.items()}
        for group, optimizer in self.optimizers.items():
            prefix = f"optimizer{GROUPS.index(group)}/"
            arrays |= {prefix + name: value for name, value in dict(tree_flatten(optimizer.state)).items()}
        return arrays

    def restore(self, arrays: Parameters) -> None:
        """Set parameters and optimizer states to what `state` returned."""
        for name in self.parameters:
            self.parameters[name] = arrays[f"parameters/{name}"]
        for group, optimizer in self.optimizers.items():
            prefix = f"optimizer{GROUPS.index(group)}/"
            found = [(name.removeprefix(prefix), value) for name, value in arrays.items() if name.startswith(prefix)]
            optimizer.state = _nested(found)


def group_of(name: str) -> str:
    """The group of a parameter."""
    group = name.partition(".")[0]
    return group if group in GROUPS else "adapter"


def head_parameters(head: Head) -> Parameters:
    """A head's arrays, float32, as an arm holds them."""
    head = head.unpacked()
    arrays = {name: getattr(head, name) for name in _HEAD_ARRAYS}
    return {_HEAD + name: array.astype(mx.float32) for name, array in arrays.items() if array is not None}


def head_with(head: Head, parameters: Parameters) -> Head:
    """A head of the same kind with these arrays."""
    arrays: dict[str, Any] = {name: parameters.get(_HEAD + name) for name in _HEAD_ARRAYS}
    return replace(head.unpacked(), **arrays)


@dataclass(frozen=True)
class TeacherOutput:
    """The dense base model's predictions of the target tokens, one sequence after the other."""

    probabilities: mx.array  # float32 `[a, vocabulary]`
    entropy: mx.array  # of each distribution, float32 `[a]`, nats


@dataclass(frozen=True)
class SequenceLoss:
    """The losses of one sequence under one arm: sums over the tokens to be predicted, in nats."""

    cross_entropy: float
    divergence: float


class TrainStep:
    """Computes the losses and gradients of sequences under the arms.

    A single sequence runs on its own neurons, at the cost of a small model. Several together run on all neurons, with
    masks: more work in fewer, larger steps, meant for a GPU. The results are the same up to rounding.

    Args:
        trainable: the model.
        predictor: of the learned arm; its head gives the first values. None if there is no such arm.
        prior: per FFN, float32 `[d_ffn]`; the static arm keeps the neurons that it ranks first.
        config: of it `teacher`, `epsilon`, `margin` and `grad_checkpoint`.
    """

    def __init__(
        self,
        trainable: TrainableModel,
        predictor: SparsityPredictor | None,
        prior: Sequence[Scores],
        config: TrainConfig,
    ) -> None:
        self._trainable = trainable
        self._predictor = predictor
        self._ranked = [mx.array(np.argsort(-scores, kind="stable").astype(np.int32)) for scores in prior]
        self._prior = [mx.array(scores.astype(np.float32)) for scores in prior]
        self._config = config

    def teacher_output(self, examples: Sequence[Example]) -> TeacherOutput | None:
        """The dense base model's predictions; None without a teacher."""
        if not self._config.teacher:
            return None
        self._trainable.use(None)
        self._trainable.multiply(None)
        self._trainable.choose(None)
        tokens, rows, _ = answer_rows(examples)
        log_probs = log_softmax(answer_logits(self._trainable.model.module, tokens, rows))
        # Kept, since every arm needs it and `exp` over a vocabulary is slow on a CPU.
        probabilities = mx.exp(log_probs)
        teacher = TeacherOutput(probabilities, -(probabilities * log_probs).sum(axis=-1))
        mx.eval(teacher.probabilities, teacher.entropy)
        return teacher

    def accumulate(
        self,
        arm: Arm,
        examples: Sequence[Example],
        keep: Sequence[Sequence[int]],
        teacher: TeacherOutput | None,
        targets: int,
        *,
        learn_head: bool,
    ) -> list[SequenceLoss]:
        """Compute sequences together under an arm, and add their gradients to the arm's.

        Args:
            keep: per sequence and FFN, *k*.
            teacher: of the same sequences.
            targets: tokens to be predicted in the whole step; the gradients are divided by it.
            learn_head: compute the gradients of the head, or of the scores, too.

        Returns:
            The losses of every sequence before the step.
        """
        joint = learn_head and arm.name in _CHOOSING
        fixed = () if joint else ("head", "scores")
        moving = {name: value for name, value in arm.parameters.items() if group_of(name) not in fixed}
        instructions = self._features(arm, examples)
        choose = self._choose_for_one if len(examples) == 1 else self._choose_for_many
        chosen = None if joint else choose(arm.name, arm.parameters, instructions, keep, joint=False)

        def loss(parameters: Parameters) -> tuple[mx.array, mx.array, mx.array]:
            self._trainable.use({name: value for name, value in parameters.items() if group_of(name) == "adapter"})
            self._trainable.multiply(self._split(parameters.get(GAINS)))
            self._trainable.choose(
                *(choose(arm.name, parameters, instructions, keep, joint=True) if chosen is None else chosen)
            )
            return self._loss(examples, teacher)

        with recomputed(self._trainable.model.layers) if self._config.grad_checkpoint else nullcontext():
            (_, ce, kl), gradients = mx.value_and_grad(loss)(moving)
        # Divided here and not in the loss, where gradients a thousand times smaller would underflow in float16.
        gradients = {name: value.astype(mx.float32) / targets for name, value in gradients.items()}
        mx.eval(ce, kl, gradients)
        arm.accumulate(gradients)
        ends = np.cumsum([int(example.mask[1:].sum()) for example in examples])[:-1]
        sums = [[float(part.sum(dtype=np.float64)) for part in np.split(np.array(each), ends)] for each in (ce, kl)]
        return [SequenceLoss(*pair) for pair in zip(*sums, strict=True)]

    def _features(self, arm: Arm, examples: Sequence[Example]) -> mx.array | None:
        """The instructions' features, `[n, 2 d]`, by the backbone as it is now and without a gradient; None for an arm
        without a head."""
        if arm.name != "learned":
            return None
        predictor = self._predictor
        assert predictor is not None
        if predictor.head.layers is not None:
            self._trainable.use(arm.adapter)
            self._trainable.multiply(self._split(arm.parameters.get(GAINS)))
            self._trainable.choose(None)
        texts = [predictor.tokens(example.instruction) for example in examples]
        found = mx.stop_gradient(features(predictor.backbone, texts, predictor.head.layers))
        mx.eval(found)
        return found

    def _scores(self, parameters: Parameters, instructions: mx.array | None) -> list[mx.array]:
        """Per FFN, float32 `[n, d_ffn]`; n is 1 where they are the same for every sequence."""
        if instructions is None:
            return [scores[None] for scores in self._split(parameters[SCORES]) or ()]
        assert self._predictor is not None
        return self._split(head_with(self._predictor.head, parameters).scores(instructions)) or []

    def _split(self, neurons: mx.array | None) -> list[mx.array] | None:
        """What belongs to each FFN of an array over all neurons `[..., neurons]`."""
        if neurons is None:
            return None
        return list(mx.split(neurons, np.cumsum([len(prior) for prior in self._prior])[:-1].tolist(), axis=-1))

    def _choose_for_one(
        self,
        arm: str,
        parameters: Parameters,
        instructions: mx.array | None,
        keep: Sequence[Sequence[int]],
        *,
        joint: bool,
    ) -> _Choice:
        """The neurons of one sequence. Where the head learns (`joint`): ids of the k best and of those just behind,
        and a mask of 1 and 0 that has the gradient of soft top-k. Neurons further behind get no gradient; it would be
        next to nothing."""
        (counts,) = keep
        if arm == "none":
            return None, None
        if arm == "static":
            return [ids[:k] for ids, k in zip(self._ranked, counts, strict=True)], None
        chosen, masks = [], []
        for (scores,), k in zip(self._scores(parameters, instructions), counts, strict=True):
            ids = mx.argsort(-mx.stop_gradient(scores)).astype(mx.int32)[: self._near(k, len(scores)) if joint else k]
            chosen.append(ids)
            if joint:
                soft = soft_top_k(scores, k, self._config.epsilon)
                masks.append(_straight_through(mx.arange(len(ids)) < k, soft[ids]))
        if not joint:
            mx.eval(chosen)
        return chosen, masks or None

    def _choose_for_many(
        self,
        arm: str,
        parameters: Parameters,
        instructions: mx.array | None,
        keep: Sequence[Sequence[int]],
        *,
        joint: bool,
    ) -> _Choice:
        """All neurons, and a mask for each sequence, `[n, 1, d_ffn]`, with the same values as in `_choose_for_one`."""
        if arm == "none":
            return None, None
        self._trainable.choose(None)
        masks = []
        scores_of_arm = self._prior if arm == "static" else self._scores(parameters, instructions)
        for ffn_scores, active, counts in zip(
            scores_of_arm, self._trainable.active, zip(*keep, strict=True), strict=True
        ):
            k, width = mx.array(counts), ffn_scores.shape[-1]
            scores = mx.broadcast_to(ffn_scores, (len(counts), width))
            mask = hard_top_k(mx.stop_gradient(scores), k)
            if joint:
                near = hard_top_k(mx.stop_gradient(scores), mx.array([self._near(count, width) for count in counts]))
                mask = _straight_through(mask, near * soft_top_k(scores, k, self._config.epsilon))
            order = active.neurons()
            masks.append((mask if order is None else mx.take(mask, order, axis=1))[:, None])
        if not joint:
            mx.eval(masks)
        return None, masks

    def _near(self, k: int, width: int) -> int:
        return min(width, k + max(int(self._config.margin * k), 1))

    def _loss(self, examples: Sequence[Example], teacher: TeacherOutput | None) -> tuple[mx.array, mx.array, mx.array]:
        """The loss, and cross-entropy and divergence of every token to be predicted, `[a]`."""
        tokens, rows, wanted = answer_rows(examples)
        logits = answer_logits(self._trainable.model.module, tokens, rows)
        if teacher is None:
            ce = cross_entropy(logits, wanted)
            return ce.sum(), ce, mx.zeros_like(ce)
        log_probs = log_softmax(logits)
        ce = -mx.take_along_axis(log_probs, wanted[:, None], axis=-1)[:, 0]
        kl = -(teacher.probabilities * log_probs).sum(axis=-1) - teacher.entropy
        share = self._config.teacher
        return (1 - share) * ce.sum() + share * kl.sum(), ce, kl


def _straight_through(hard: mx.array, soft: mx.array) -> mx.array:
    """The value of `hard` with the gradient of `soft`."""
    # In this order the soft part cancels to exactly 0.
    return hard.astype(mx.float32) + (soft - mx.stop_gradient(soft))


def _clipped(gradients: Parameters, largest: float) -> tuple[Parameters, mx.array]:
    """Gradients scaled down to a global norm, and their norm before."""
    norm = mx.sqrt(mx.stack([(value.astype(mx.float32) ** 2).sum() for value in gradients.values()]).sum())
    scale = mx.minimum(largest / (norm + 1e-6), 1.0)
    return {name: value * scale for name, value in gradients.items()}, norm


def _nested(pairs: list[tuple[str, mx.array]]) -> Any:
    """The tree of an optimizer's state. Parameter names hold dots, as paths in the tree do, so only the end of a name
    tells what it is: `step`, `learning_rate`, or one of the moments `NAME.m` and `NAME.v`."""
    tree: dict[str, Any] = {}
    for name, value in pairs:
        parameter, _, moment = name.rpartition(".")
        if moment in ("m", "v") and parameter:
            tree.setdefault(parameter, {})[moment] = value
        else:
            tree[name] = value
    return tree
