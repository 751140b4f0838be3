"""The arms of a paired run: each its own adapter (or weights) over one base model, each its own way to choose neurons.

learned   the predictor chooses for each sequence, from its instruction; the head may learn along
static    the prior's best, the same for every sequence: healed static, the opponent that counts
none      all neurons: healed dense

"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import optimizers
from mlx.utils import tree_flatten

from ifprune_mlx.data.tokenize import Encoded
from ifprune_mlx.errors import DataError, IfpruneError
from ifprune_mlx.selection.predictor import Head, SparsityPredictor, features
from ifprune_mlx.sparse.soft_topk import hard_top_k, soft_top_k
from ifprune_mlx.train.grad_checkpoint import recomputed
from ifprune_mlx.train.logits import answer_logits, answer_rows, log_softmax
from ifprune_mlx.train.trainable import Parameters, Tuned

ARMS = ("learned", "static", "none")
_HEAD = "head."
_HEAD_ARRAYS = ("first", "first_bias", "second", "second_bias")
_Choice = tuple["list[mx.array] | None", "list[mx.array] | None"]
"""What `Tuned.choose` takes: ids and masks."""


@dataclass(frozen=True)
class Objective:
    """What a step minimises.

    Attributes:
        teacher: share of KL(dense base model || arm) in the loss; the rest is cross-entropy. 0 runs no teacher.
        epsilon: of the soft top-k whose gradient the head learns by, in the unit of the scores.
        margin: neurons beyond the k chosen ones that a learning head sees the gradient of, as a share of k.
    """

    teacher: float = 0.5
    epsilon: float = 0.1
    margin: float = 0.25

    def __post_init__(self) -> None:
        if not (0 <= self.teacher <= 1 and 1e-6 <= self.epsilon < math.inf and self.margin >= 0):
            raise DataError(
                f"teacher {self.teacher:g}, epsilon {self.epsilon:g}, margin {self.margin:g}: give a teacher from 0 "
                "to 1, an epsilon above 0 and a margin of 0 or more"
            )


@dataclass
class Arm:
    """One arm.

    Attributes:
        name: of `ARMS`.
        parameters: adapter weights (or the model's own, where those are trained), and those of the head under `head.`,
            for `learned`.
        optimizers: of the adapter and of the head.
    """

    name: str
    parameters: Parameters
    optimizers: tuple[optimizers.Optimizer, optimizers.Optimizer]
    gradients: Parameters = field(default_factory=dict)

    @property
    def adapter(self) -> Parameters:
        """The adapter's weights alone."""
        return {name: array for name, array in self.parameters.items() if not name.startswith(_HEAD)}

    def head(self, like: Head) -> Head:
        """The head as it is now."""
        return head_with(like, self.parameters)

    def accumulate(self, gradients: Parameters) -> None:
        """Add the gradients of one sequence."""
        for name, value in gradients.items():
            self.gradients[name] = self.gradients[name] + value if name in self.gradients else value
        mx.eval(self.gradients)

    def step(self, clip: float) -> float:
        """Apply what was accumulated, clipped to a global norm per optimizer.

        Returns:
            The adapter gradient's norm before clipping.

        Raises:
            IfpruneError: if a gradient is not a number; nothing is changed then.
        """
        parts = [
            {name: value for name, value in self.gradients.items() if name.startswith(_HEAD) == of_head}
            for of_head in (False, True)
        ]
        clipped = [
            (optimizer, *_clipped(part, clip)) for optimizer, part in zip(self.optimizers, parts, strict=True) if part
        ]
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
        mx.eval(self.parameters, [optimizer.state for optimizer in self.optimizers])
        return norms[0]

    def state(self) -> Parameters:
        """All there is to this arm, by name."""
        arrays = {f"parameters/{name}": array for name, array in self.parameters.items()}
        for index, optimizer in enumerate(self.optimizers):
            arrays |= {f"optimizer{index}/{name}": value for name, value in dict(tree_flatten(optimizer.state)).items()}
        return arrays

    def restore(self, arrays: Parameters) -> None:
        """Take what `state` gave."""
        for name in self.parameters:
            self.parameters[name] = arrays[f"parameters/{name}"]
        for index, optimizer in enumerate(self.optimizers):
            prefix = f"optimizer{index}/"
            found = [(name.removeprefix(prefix), value) for name, value in arrays.items() if name.startswith(prefix)]
            optimizer.state = _nested(found)


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
class Taught:
    """What the dense base model says to sequences.

    Attributes:
        probabilities: float32 `[a, vocabulary]`, of the tokens to be predicted of one sequence after the other.
        entropy: theirs, float32 `[a]`, nats.
    """

    probabilities: mx.array
    entropy: mx.array


@dataclass(frozen=True)
class Measured:
    """One sequence under one arm: sums over the tokens to be predicted, in nats."""

    cross_entropy: float
    divergence: float


class Stepper:
    """Computes losses and gradients of sequences under the arms.

    A sequence by itself runs on the rows of its own neurons, at the cost of a small model. Several together share the
    rows, so that all neurons are computed and those not chosen are masked: more work in fewer, larger steps, meant for
    a GPU. The results are the same up to rounding.

    Args:
        adapted: the model.
        predictor: of the learned arm; its head gives the first values. None if there is no such arm.
        prior: per FFN, float32 `[d_ffn]`, what the static arm keeps the best of.
        grad_checkpoint: compute activations again in the backward pass instead of keeping them.
    """

    def __init__(
        self,
        adapted: Tuned,
        predictor: SparsityPredictor | None,
        prior: Sequence[np.ndarray[Any, Any]],
        objective: Objective,
        *,
        grad_checkpoint: bool = False,
    ) -> None:
        self._adapted = adapted
        self._predictor = predictor
        self._ranked = [mx.array(np.argsort(-scores, kind="stable").astype(np.int32)) for scores in prior]
        self._prior = [mx.array(scores.astype(np.float32)) for scores in prior]
        self._objective = objective
        self._grad_checkpoint = grad_checkpoint

    def teach(self, examples: Sequence[Encoded]) -> Taught | None:
        """The dense base model's answers; None without a teacher."""
        if not self._objective.teacher:
            return None
        self._adapted.use(None)
        self._adapted.choose(None)
        tokens, rows, _ = answer_rows(examples)
        said = log_softmax(answer_logits(self._adapted.model.module, tokens, rows))
        # Kept, since every arm needs it and `exp` over a vocabulary is slow on a CPU.
        probabilities = mx.exp(said)
        taught = Taught(probabilities, -(probabilities * said).sum(axis=-1))
        mx.eval(taught.probabilities, taught.entropy)
        return taught

    def run(
        self,
        arm: Arm,
        examples: Sequence[Encoded],
        keep: Sequence[Sequence[int]],
        taught: Taught | None,
        targets: int,
        *,
        learn_head: bool,
    ) -> list[Measured]:
        """Add the gradients of sequences, computed together, to an arm's.

        Args:
            keep: per sequence and FFN, *k*.
            taught: what `teach` gave.
            targets: tokens to be predicted in the whole step; the gradients are divided by it.
            learn_head: whether the head's gradients are wanted too.

        Returns:
            Per sequence, its losses before the step.
        """
        joint = learn_head and arm.name == "learned"
        fixed = {} if joint else {name: value for name, value in arm.parameters.items() if name.startswith(_HEAD)}
        moving = {name: value for name, value in arm.parameters.items() if name not in fixed}
        read = self._read(arm, examples)
        choose = self._alone if len(examples) == 1 else self._together
        chosen = None if joint else choose(arm.name, arm.parameters, read, keep, joint=False)

        def loss(parameters: Parameters) -> tuple[mx.array, mx.array, mx.array]:
            self._adapted.use({name: value for name, value in parameters.items() if not name.startswith(_HEAD)})
            self._adapted.choose(*(choose(arm.name, parameters, read, keep, joint=True) if chosen is None else chosen))
            return self._loss(examples, taught)

        with recomputed(self._adapted.model.layers) if self._grad_checkpoint else nullcontext():
            (_, ce, kl), gradients = mx.value_and_grad(loss)(moving)
        # Divided here and not in the loss, where gradients a thousand times smaller would underflow in float16.
        gradients = {name: value.astype(mx.float32) / targets for name, value in gradients.items()}
        mx.eval(ce, kl, gradients)
        arm.accumulate(gradients)
        ends = np.cumsum([int(example.mask[1:].sum()) for example in examples])[:-1]
        sums = [[float(part.sum(dtype=np.float64)) for part in np.split(np.array(each), ends)] for each in (ce, kl)]
        return [Measured(*pair) for pair in zip(*sums, strict=True)]

    def _read(self, arm: Arm, examples: Sequence[Encoded]) -> mx.array | None:
        """What the head reads, `[n, 2 d]`: the instructions by the backbone as it is now, with no gradient."""
        if arm.name != "learned":
            return None
        predictor = self._predictor
        assert predictor is not None
        if predictor.head.layers is not None:
            self._adapted.use(arm.adapter)
            self._adapted.choose(None)
        texts = [predictor.tokens(example.instruction) for example in examples]
        read = mx.stop_gradient(features(predictor.backbone, texts, predictor.head.layers))
        mx.eval(read)
        return read

    def _scores(self, parameters: Parameters, read: mx.array | None) -> list[mx.array]:
        """Per FFN, float32 `[n, d_ffn]`."""
        assert self._predictor is not None
        assert read is not None
        head = head_with(self._predictor.head, parameters)
        return list(mx.split(head.scores(read), np.cumsum(head.widths)[:-1].tolist(), axis=1))

    def _alone(
        self, arm: str, parameters: Parameters, read: mx.array | None, keep: Sequence[Sequence[int]], *, joint: bool
    ) -> _Choice:
        """The neurons of one sequence. Where the head learns, ids of the k best and of those just behind, and a mask
        that is 1 and 0 for them, with the gradient of soft top-k. Neurons further behind get none: their lambda, and so
        its gradient, is next to nothing."""
        (counts,) = keep
        if arm == "none":
            return None, None
        if arm == "static":
            return [ids[:k] for ids, k in zip(self._ranked, counts, strict=True)], None
        chosen, masks = [], []
        for (scores,), k in zip(self._scores(parameters, read), counts, strict=True):
            ids = mx.argsort(-mx.stop_gradient(scores)).astype(mx.int32)[: self._near(k, len(scores)) if joint else k]
            chosen.append(ids)
            if joint:
                masks.append(_straight_through(mx.arange(len(ids)) < k, self._soft(scores, k)[ids]))
        if not joint:
            mx.eval(chosen)
        return chosen, masks or None

    def _together(
        self, arm: str, parameters: Parameters, read: mx.array | None, keep: Sequence[Sequence[int]], *, joint: bool
    ) -> _Choice:
        """All neurons, and for each sequence a mask of its own, `[n, 1, d_ffn]`; of the same values as `_alone`."""
        if arm == "none":
            return None, None
        self._adapted.choose(None)
        masks = []
        of_arm = self._prior if arm == "static" else self._scores(parameters, read)
        for found, chosen, counts in zip(of_arm, self._adapted.chosen, zip(*keep, strict=True), strict=True):
            k, width = mx.array(counts), found.shape[-1]
            scores = mx.broadcast_to(found, (len(counts), width))
            mask = hard_top_k(mx.stop_gradient(scores), k)
            if joint:
                near = hard_top_k(mx.stop_gradient(scores), mx.array([self._near(count, width) for count in counts]))
                mask = _straight_through(mask, near * self._soft(scores, k))
            order = chosen.neurons()
            masks.append((mask if order is None else mx.take(mask, order, axis=1))[:, None])
        if not joint:
            mx.eval(masks)
        return None, masks

    def _near(self, k: int, width: int) -> int:
        return min(width, k + max(int(self._objective.margin * k), 1))

    def _soft(self, scores: mx.array, k: int | mx.array) -> mx.array:
        return soft_top_k(scores, k, self._objective.epsilon)

    def _loss(self, examples: Sequence[Encoded], taught: Taught | None) -> tuple[mx.array, mx.array, mx.array]:
        """What is minimised, and cross-entropy and divergence of every token to be predicted, `[a]`."""
        tokens, rows, wanted = answer_rows(examples)
        said = log_softmax(answer_logits(self._adapted.model.module, tokens, rows))
        ce = -mx.take_along_axis(said, wanted[:, None], axis=-1)[:, 0]
        if taught is None:
            return ce.sum(), ce, mx.zeros_like(ce)
        kl = -(taught.probabilities * said).sum(axis=-1) - taught.entropy
        share = self._objective.teacher
        return (1 - share) * ce.sum() + share * kl.sum(), ce, kl


def _straight_through(hard: mx.array, soft: mx.array) -> mx.array:
    """Of the value of `hard` and the gradient of `soft`."""
    # In this order the soft part cancels to exactly 0.
    return hard.astype(mx.float32) + (soft - mx.stop_gradient(soft))


def _clipped(gradients: Parameters, largest: float) -> tuple[Parameters, mx.array]:
    """Gradients scaled down to a global norm, and their norm before."""
    norm = mx.sqrt(mx.stack([(value.astype(mx.float32) ** 2).sum() for value in gradients.values()]).sum())
    scale = mx.minimum(largest / (norm + 1e-6), 1.0)
    return {name: value * scale for name, value in gradients.items()}, norm


def _nested(pairs: list[tuple[str, mx.array]]) -> Any:
    """The tree of an optimizer's state. Parameter names hold dots, as the tree's own paths do, so that only the ends of
    a name tell what it is: `step`, `learning_rate`, or the moments `NAME.m` and `NAME.v`."""
    tree: dict[str, Any] = {}
    for name, value in pairs:
        parameter, _, moment = name.rpartition(".")
        if moment in ("m", "v") and parameter:
            tree.setdefault(parameter, {})[moment] = value
        else:
            tree[name] = value
    return tree
