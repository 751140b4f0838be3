"""What a run computes together: chats of about one length, each under the number that its density hangs on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from ifprune_mlx import Model, load
from ifprune_mlx.data.dataloader import Mixture, batches
from ifprune_mlx.data.tokenize import Encoded
from ifprune_mlx.train.lora import Adapted
from ifprune_mlx.train.step import Arm, Measured, Objective, Stepper, Taught
from ifprune_mlx.train.trainer import Run, Settings
from tests.tiny import write_checkpoint

SIZE = 8
SETTINGS = Settings(arms=("static", "none"), batch_size=SIZE, iterations=4, densities=((0.2, 0.9),), warmup=0, seed=3)


def chats() -> list[Encoded]:
    """As many lengths as chats, from 5 to 99 tokens, in no order."""
    generator = np.random.default_rng(0)
    found = []
    for number, length in enumerate(generator.permutation(np.arange(5, 100))):
        tokens = generator.integers(4, 300, length).astype(np.int32)
        found.append(Encoded(tokens, np.arange(length) >= length // 2, int(length) // 2, "", "a", str(number)))
    return found


def padding(groups: Sequence[Sequence[Encoded]]) -> int:
    """Positions computed for nothing."""
    lengths = [[len(chat.tokens) - 1 for chat in group] for group in groups]
    return sum(max(group) * len(group) - sum(group) for group in lengths)


class _Watched(Stepper):
    """Notes what is computed together, at which densities, and the gradients."""

    groups: list[list[Encoded]]
    keep: dict[str, Sequence[int]]
    gradients: dict[str, dict[str, mx.array]]

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
        found = super().run(arm, examples, keep, taught, targets, learn_head=learn_head)
        if arm.name == "static":
            self.groups.append(list(examples))
        self.keep |= {example.key: k for example, k in zip(examples, keep, strict=True)}
        self.gradients[arm.name] = dict(arm.gradients)
        return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(write_checkpoint(tmp_path_factory.mktemp("micro") / "checkpoint"))[0]


def run_of(model: Model, folder: Path, together: int) -> tuple[Run, _Watched]:
    mixture = Mixture({"a": (chats(), 1.0)}, SETTINGS.seed)
    tuned, objective = Adapted(model, rank=4, scale=2.0), Objective()
    run = Run(tuned, None, model.prior, mixture, SETTINGS, objective, folder, micro_batch_size=together)
    watched = _Watched(tuned, None, model.prior, objective)
    watched.groups, watched.keep, watched.gradients = [], {}, {}
    run._stepper = watched
    return run, watched


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("together", [2, 3])
def test_every_batch_comes_in_order_of_length_so_that_a_cut_pads_least(world: int, together: int) -> None:
    padded = least = unordered = 0
    for rank in range(world):
        for pool in (8, 1):
            stream = batches(Mixture({"a": (chats(), 1.0)}, 3), SIZE, rank=rank, world=world, pool=pool)
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
    for arm in SETTINGS.arms:
        assert found["arms"][arm]["a"] == pytest.approx(wanted["arms"][arm]["a"], rel=1e-4)
        for name, gradient in alone.gradients[arm].items():
            far = mx.abs(together.gradients[arm][name] - gradient).max()
            assert float(far) <= 1e-4 * float(mx.abs(gradient).max()) + 1e-7, name
