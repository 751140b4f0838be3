"""Trains arms on the same batches, so that stopping at any time is fair; both stages of the paper run through here.

A run lives in a folder: `state.safetensors` (everything: weights, moments, position; one file, replaced at once, so
that a run killed at any moment goes on from a whole state), `metrics.jsonl` (a line a step, cut back to the state when
resuming), and what other commands take: `adapters/ARM/`, `predictor/`, `prior.safetensors`.

Nothing is drawn by chance that seed, data and step do not fix: a resumed run, and one that several processes share,
repeat the undisturbed one up to the order in which floats are summed.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.optimizers import AdamW

from ifprune_mlx.checkpoint.atomic_write import sha256_file, write_atomic
from ifprune_mlx.checkpoint.safetensors_io import read_safetensors_header
from ifprune_mlx.data.dataloader import Batch, Mixture, batches
from ifprune_mlx.data.tokenize import Encoded
from ifprune_mlx.errors import DataError
from ifprune_mlx.selection.predictor import SparsityPredictor
from ifprune_mlx.train.checkpointing import METRICS, STATE, cut_metrics, differences, hash_of_arrays, schedule, sweep
from ifprune_mlx.train.gradient_check import differentiable
from ifprune_mlx.train.priors import save_prior
from ifprune_mlx.train.step import ARMS, Arm, Measured, Objective, Stepper, head_parameters
from ifprune_mlx.train.trainable import Tuned

_WRITTEN = (
    STATE,
    METRICS,
    "prior.safetensors",
    "predictor/head.safetensors",
    "adapters/*/adapters.safetensors",
    "adapters/*/adapter_config.json",
)


@dataclass(frozen=True)
class Settings:
    """What a run does. A resumed run must have the same.

    Attributes:
        arms: of `ARMS`.
        iterations: steps, of `batch_size` sequences each (over all processes).
        learning_rate: of adapters or weights, after `warmup` steps; falls by a cosine to a tenth.
        head_learning_rate: of the predictor's head, likewise; 0 keeps the head as it is.
        head_start: share of the steps during which the head holds still, so that weights settle around selections.
        clip: largest global norm of a gradient.
        densities: a sequence's density is drawn from one of these ranges, each as likely.
        seed: of the order of data and of the densities.
    """

    arms: tuple[str, ...] = ("learned", "static")
    iterations: int = 1000
    batch_size: int = 8
    learning_rate: float = 5e-4
    head_learning_rate: float = 0.0
    head_start: float = 0.2
    warmup: int = 20
    clip: float = 1.0
    densities: tuple[tuple[float, float], ...] = ((0.5, 0.5),)
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.arms if name not in ARMS]
        if unknown or not self.arms or len(set(self.arms)) < len(self.arms):
            raise DataError(f"arms {', '.join(self.arms) or 'none'}: give each of {', '.join(ARMS)} at most once")
        for low, high in self.densities:
            if not 0 < low <= high <= 1:
                raise DataError(f"density {low:g} to {high:g}: give numbers above 0 and at most 1, the lower first")


class Run:
    """A paired run.

    Args:
        adapted: the model.
        predictor: of the learned arm; None without one.
        prior: per FFN, float32 `[d_ffn]`; of the static arm.
        mixture: what to learn from.
        folder: where the run lives; one that holds a state of the same run goes on from it.
        start: folder of an earlier run whose adapters the arms begin with.
        grad_checkpoint: less memory for more time; see `train.grad_checkpoint`. A resumed run may change it.
        micro_batch_size: sequences computed together, neighbours in length, since batches come in its order; see
            `ifprune_mlx.train.step.Stepper`. A resumed run may change it.

    A folder without a state keeps no metrics of steps: those of a run that was killed before its first one.

    Attributes:
        step: steps done.
        tokens: tokens predicted so far.
        arms: as they are now.

    Raises:
        DataError: if the folder holds another run, or cannot be read.
    """

    def __init__(
        self,
        adapted: Tuned,
        predictor: SparsityPredictor | None,
        prior: Sequence[np.ndarray[Any, Any]],
        mixture: Mixture[Encoded],
        settings: Settings,
        objective: Objective,
        folder: Path,
        *,
        start: Path | None = None,
        grad_checkpoint: bool = False,
        micro_batch_size: int = 1,
    ) -> None:
        self._micro_batch_size = micro_batch_size
        self.settings, self.objective, self.folder = settings, objective, folder
        self.adapted, self.predictor, self.prior = adapted, predictor, prior
        self.step = self.tokens = 0
        self._group = mx.distributed.init()
        self._stepper = Stepper(adapted, predictor, prior, objective, grad_checkpoint=grad_checkpoint)
        self._domains: list[str] = sorted(mixture.names)
        self.arms = [self._arm(name, start) for name in settings.arms]
        self._keep: dict[float, tuple[int, ...]] = {}
        self._identity = json.dumps(
            {
                "checkpoint": adapted.model.checkpoint.id,
                "float type": str(adapted.model.dtype),
                "start": None if start is None else _hash_of_start(start),
                "settings": asdict(settings),
                "objective": asdict(objective),
                **adapted.identity,
                "data": mixture.fingerprint,
                "tokens": _hash_of_tokens(mixture),
                "prior": hash_of_arrays(prior),
                "predictor": None if predictor is None else _hash_of_predictor(predictor),
            },
            sort_keys=True,
        )
        state = self._restore()
        self._agree()
        self._batches = batches(
            mixture, settings.batch_size, rank=self._group.rank(), world=self._group.size(), state=state
        )
        self._position: dict[str, Any] | None = state

    @property
    def leader(self) -> bool:
        """Whether this process is the one that writes."""
        return int(self._group.rank()) == 0

    def advance(self) -> dict[str, Any]:
        """One step of every arm on one batch.

        Returns:
            What the metrics file holds of it: per arm and domain the mean cross-entropy and KL divergence (nats per
            token) before the step, tokens, learning rate, seconds. The same on every process.
        """
        start = time.perf_counter()
        batch: Batch = next(self._batches)
        learn_head = (
            self.settings.head_learning_rate > 0 and self.step >= self.settings.head_start * self.settings.iterations
        )
        sums = np.zeros((len(self.arms), len(self._domains), 3))
        for first in range(0, len(batch.examples), self._micro_batch_size):
            examples = batch.examples[first : first + self._micro_batch_size]
            rows = [self._group.rank() + self._group.size() * (first + index) for index in range(len(examples))]
            keep = [self._keep_of(self._density(row)) for row in rows]
            taught = self._stepper.teach(examples)
            for number, arm in enumerate(self.arms):
                with differentiable(self.adapted.model.module):
                    found = self._stepper.run(arm, examples, keep, taught, batch.targets, learn_head=learn_head)
                for measured, example in zip(found, examples, strict=True):
                    sums[number, self._domains.index(example.domain)] += self._sums(measured, example)
            if self._micro_batch_size == 1:  # buffers of a length that the next one does not have
                mx.clear_cache()
        norms = {}
        for arm in self.arms:
            if self._group.size() > 1:
                arm.gradients = _summed(arm.gradients, self._group)
            norms[arm.name] = arm.step(self.settings.clip)
        if self._group.size() > 1:
            sums = np.array(mx.distributed.all_sum(mx.array(sums.astype(np.float32)), group=self._group))
        self.step += 1
        self.tokens += batch.targets
        self._position = batch.state
        return {
            "step": self.step,
            "tokens": self.tokens,
            "arms": {arm.name: self._told(sums[number]) for number, arm in enumerate(self.arms)},
            "gradient_norm": norms,
            "learning_rate": float(self.arms[0].optimizers[0].learning_rate),
            "head_learns": learn_head,
            "seconds": time.perf_counter() - start,
        }

    def record(self, line: Mapping[str, Any]) -> None:
        """Append a line to the metrics."""
        if not self.leader:
            return
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def save(self) -> None:
        """Write the state, and the folders that other commands take. A run killed before or after loses nothing."""
        if not self.leader:
            return
        arrays = {f"{arm.name}/{name}": array for arm in self.arms for name, array in arm.state().items()}
        metadata = {
            "run": self._identity,
            "step": str(self.step),
            "tokens": str(self.tokens),
            "position": json.dumps(self._position),
        }
        for arm in self.arms:
            self.adapted.save(self.folder / "adapters" / arm.name, arm.adapter)
            if arm.name == "learned":
                assert self.predictor is not None
                (self.folder / "predictor").mkdir(exist_ok=True)
                arm.head(self.predictor.head).save(self.folder / "predictor" / "head.safetensors")
        save_prior(self.folder / "prior.safetensors", self.prior)
        # Last, so that a run killed in between writes the others again.
        write_atomic(self.folder / STATE, lambda path: mx.save_safetensors(str(path), arrays, metadata), DataError)

    def agreed(self, verdict: bool) -> bool:
        """What the process that writes says, on every process."""
        if self._group.size() == 1:
            return verdict
        return bool(mx.distributed.all_sum(mx.array(int(verdict and self.leader)), group=self._group).item())

    def _agree(self) -> None:
        """See that all processes are about to do the same; they may not share a disk."""
        if self._group.size() == 1:
            return
        digest = hashlib.sha256(f"{self.step}/{self._identity}".encode()).digest()
        mine = mx.array(list(digest[:8]), mx.int32)
        most = mx.distributed.all_max(mine, group=self._group)
        least = mx.distributed.all_min(mine, group=self._group)
        if not mx.array_equal(most, least):
            raise DataError(
                f"{self.folder}: the processes of this run begin with other data, settings or states (this one at step "
                f"{self.step}); give all of them the same, and the same --output on every machine"
            )

    def _arm(self, name: str, start: Path | None) -> Arm:
        settings = self.settings
        parameters = dict(self.adapted.initial if start is None else self.adapted.read(start / "adapters" / name))
        if name == "learned":
            assert self.predictor is not None
            parameters |= head_parameters(self.predictor.head)
        # An optimizer counts its own steps, and that of the head begins late.
        late = settings.iterations - math.ceil(settings.head_start * settings.iterations)
        optimizers = tuple(
            AdamW(schedule(rate, steps, settings.warmup), betas=[0.9, 0.98], weight_decay=0.0, bias_correction=True)
            for rate, steps in (
                (settings.learning_rate, settings.iterations),
                (settings.head_learning_rate, max(late, 1)),
            )
        )
        return Arm(name, parameters, (optimizers[0], optimizers[1]))

    def _restore(self) -> dict[str, Any] | None:
        file = self.folder / STATE
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.leader:
            sweep(self.folder, _WRITTEN)
        if not file.is_file():
            if self.leader:
                cut_metrics(self.folder, -1)
            return None
        metadata = read_safetensors_header(file, DataError).metadata
        if metadata.get("run") != self._identity:
            raise DataError(
                f"{self.folder}: holds a run with {differences(metadata.get('run', ''), self._identity)}; "
                "give the same again to go on with it, or another --output"
            )
        arrays = mx.load(str(file))
        assert isinstance(arrays, dict)
        for arm in self.arms:
            prefix = f"{arm.name}/"
            arm.restore({name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)})
        self.step, self.tokens = int(metadata["step"]), int(metadata["tokens"])
        if self.leader:
            cut_metrics(self.folder, self.step or -1)
        position: dict[str, Any] = json.loads(metadata["position"])
        return position

    def _density(self, row: int) -> float:
        """A sequence's density; a function of seed, step and row alone."""
        digest = hashlib.sha256(f"{self.settings.seed}/density/{self.step}/{row}".encode()).digest()
        ranges = self.settings.densities
        low, high = ranges[int.from_bytes(digest[:8], "big") % len(ranges)]
        return low + (high - low) * int.from_bytes(digest[8:12], "big") / 2**32

    def _keep_of(self, density: float) -> tuple[int, ...]:
        if density not in self._keep:
            self._keep[density] = self.adapted.model.keep(density)
        return self._keep[density]

    @staticmethod
    def _sums(measured: Measured, example: Encoded) -> tuple[float, float, int]:
        return measured.cross_entropy, measured.divergence, int(example.mask.sum())

    def _told(self, sums: np.ndarray[Any, Any]) -> dict[str, Any]:
        """Per domain that the batch held, mean losses and tokens."""
        return {
            domain: {"ce": float(ce / count), "kl": float(kl / count), "tokens": int(count)}
            for domain, (ce, kl, count) in zip(self._domains, sums, strict=True)
            if count
        }


def _summed(gradients: dict[str, mx.array], group: Any) -> dict[str, mx.array]:
    """Sums over processes: each divided its loss by the tokens of all."""
    # A list, since MLX would take the dots in names for those of a tree.
    means = nn.utils.average_gradients(list(gradients.values()), group)
    return {name: value * group.size() for name, value in zip(gradients, means, strict=True)}


def _hash_of_start(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted((folder / "adapters").rglob("*.safetensors")):
        digest.update(f"{file.relative_to(folder)} {sha256_file(file)}\n".encode())
    return digest.hexdigest()[:16]


def _hash_of_predictor(predictor: SparsityPredictor) -> str:
    head = predictor.head
    digest = hash_of_arrays([np.array(array) for array in head_parameters(head).values()])
    return f"{digest} {head.pooling} {head.activation} {head.layers}"


def _hash_of_tokens(mixture: Mixture[Encoded]) -> str:
    examples = [example for items in mixture.items.values() for example in items]
    return hash_of_arrays([part for example in examples for part in (example.tokens, example.mask)])
