"""What a run computes together: chats of about one length, each under the number that its density hangs on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from ifprune_mlx import Model, load
from ifprune_mlx.data.dataloader import DataMixture, batches
from ifprune_mlx.data.tokenize import Example
from ifprune_mlx.train.lora import LoRAModel
from ifprune_mlx.train.step import Arm, SequenceLoss, TeacherOutput, TrainStep
from ifprune_mlx.train.trainer import Trainer
from tests.ifprune_mlx.train.configs import config
from tests.tiny import write_checkpoint

SIZE = 8
ARMS = ("static", "none")
CONFIG = config(selector=ARMS, batch_size=SIZE, iters=4, densities="0.2-0.9", warmup=0, seed=3)


def chats() -> list[Example]:
    """As many lengths as chats, from 5 to 99 tokens, in no order."""
    generator = np.random.default_rng(0)
    found = []
    for number, length in enumerate(generator.permutation(np.arange(5, 100))):
        tokens = generator.integers(4, 300, length).astype(np.int32)
        found.append(Example(tokens, np.arange(length) >= length // 2, int(length) // 2, "", "a", str(number)))
    return found


def padding(groups: Sequence[Sequence[Example]]) -> int:
    """Positions computed for nothing."""
    lengths = [[len(chat.tokens) - 1 for chat in group] for group in groups]
    return sum(max(group) * len(group) - sum(group) for group in lengths)


class _Watched(TrainStep):
    """Notes what is computed together, at which densities, and the gradients."""

    groups: list[list[Example]]
    keep: dict[str, Sequence[int]]
    gradients: dict[str, dict[str, mx.array]]

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
        found = super().accumulate(arm, examples, keep, teacher, targets, learn_head=learn_head)
        if arm.name == "static":
            self.groups.append(list(examples))
        self.keep |= {example.key: k for example, k in zip(examples, keep, strict=True)}
        self.gradients[arm.name] = dict(arm.gradients)
        return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(write_checkpoint(tmp_path_factory.mktemp("micro") / "checkpoint"))[0]


def run_of(model: Model, folder: Path, together: int) -> tuple[Trainer, _Watched]:
    mixture = DataMixture({"a": (chats(), 1.0)}, CONFIG.seed)
    trainable = LoRAModel(model, rank=4, scale=2.0)
    settings = replace(CONFIG, output=folder, micro_batch_size=together)
    trainer = Trainer(trainable, None, model.prior, mixture, settings)
    watched = _Watched(trainable, None, model.prior, settings)
    watched.groups, watched.keep, watched.gradients = [], {}, {}
    trainer._train_step = watched
    return trainer, watched


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("together", [2, 3])
def test_every_batch_comes_in_order_of_length_so_that_a_cut_pads_least(world: int, together: int) -> None:
    padded = least = unordered = 0
    for rank in range(world):
        for pool in (8, 1):
            stream = batches(DataMixture({"a": (chats(), 1.0)}, 3), SIZE, rank=rank, world=world, pool=pool)
            for _ in range(16):
                given = next(stream).examples
                groups = [given[first : first + together] for first in range(0, len(given), together)]
                if pool == 1:
                    unordered += padding(groups)
                    continue
                ordered = sorted(given, key=lambda chat: len(chat.tokens))
                padded += padding(groups)
                least += padding([ordered[first : first + together] for first in range(0, len(given), together)])
    assert padded == least
    assert padded < unordered / 5


def test_micro_batches_of_neighbours_in_length_have_the_losses_and_gradients_of_single_chats(
    model: Model, tmp_path: Path
) -> None:
    """At densities that differ from row to row; up to rounding, and with no chat under another's number."""
    one, alone = run_of(model, tmp_path / "alone", 1)
    wanted = one.advance()
    two, together = run_of(model, tmp_path / "together", 3)
    found = two.advance()
    assert together.keep == alone.keep
    assert len(set(alone.keep.values())) > 3
    assert [len(group) for group in together.groups] == [3, 3, 2]
    lengths = [len(chat.tokens) for group in together.groups for chat in group]
    assert lengths == sorted(lengths)
    for arm in ARMS:
        assert found["arms"][arm]["a"] == pytest.approx(wanted["arms"][arm]["a"], rel=1e-4)
        for name, gradient in alone.gradients[arm].items():
            far = mx.abs(together.gradients[arm][name] - gradient).max()
            assert float(far) <= 1e-4 * float(mx.abs(gradient).max()) + 1e-7, name
