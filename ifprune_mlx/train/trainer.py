"""Trains arms on the same batches, so that they can be compared whenever the run stops.

A run lives in a folder: `state.safetensors` (weights, moments and position; one file, replaced at once, so that a run
killed at any moment goes on from a whole state), `metrics.jsonl` (a line a step, cut back to the state when resuming),
and what other commands take: `adapters/ARM/`, `predictor/`, `prior.safetensors`.

The seed, the data and the step fix every random choice. A resumed run, and one that several processes share, repeat the
undisturbed one up to the order in which floats are summed.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.optimizers import AdamW, cosine_decay, join_schedules, linear_schedule

from ifprune_mlx.data.dataloader import DataMixture, batches
from ifprune_mlx.data.tokenize import Example
from ifprune_mlx.errors import DataError
from ifprune_mlx.model import Progress
from ifprune_mlx.selection.predictor import SparsityPredictor
from ifprune_mlx.selection.selection import Scores
from ifprune_mlx.train.checkpointing import (
    METRICS,
    cut_metrics,
    hash_of_adapters,
    hash_of_arrays,
    load_state,
    save_state,
    sweep,
)
from ifprune_mlx.train.config import TrainConfig
from ifprune_mlx.train.gradients import differentiable
from ifprune_mlx.train.static_prior import load_prior, positive, save_prior
from ifprune_mlx.train.step import GAINS, SCORES, Arm, TrainStep, head_parameters
from ifprune_mlx.train.trainable import TrainableModel

LEARNED_PRIOR = "prior-static-learned.safetensors"
_LEAST = 1e-30  # of a prior whose logarithm is taken
_SAVE_SECONDS = 300.0  # between states on disk, where `save_every` steps take longer


class Trainer:
    """A run of several arms. A folder with a state of the same run goes on from it.

    Args:
        trainable: the model.
        predictor: of the learned arm; None without one.
        prior: per FFN, float32 `[d_ffn]`; of the static arm.
        mixture: the training data.
        config: the settings; `config.output` is the run's folder.

    Attributes:
        step: steps done.
        saved_step: steps of the state on disk; 0 without one.
        tokens: tokens predicted so far.
        arms: as they are now.

    Raises:
        DataError: if the folder holds another run, or cannot be read.
    """

    def __init__(
        self,
        trainable: TrainableModel,
        predictor: SparsityPredictor | None,
        prior: Sequence[Scores],
        mixture: DataMixture[Example],
        config: TrainConfig,
    ) -> None:
        self.trainable, self.predictor, self.prior, self.config = trainable, predictor, prior, config
        self.step = self.tokens = 0
        self._widths = [len(scores) for scores in prior]
        self._group = mx.distributed.init()
        self._train_step = TrainStep(trainable, predictor, prior, config)
        self._domains = list(mixture.items)
        self.arms = [self._arm(name) for name in config.selector]
        self._keep = cache(trainable.model.keep)
        examples = [example for items in mixture.items.values() for example in items]
        identity = {
            "checkpoint": trainable.model.checkpoint.id,
            "float type": str(trainable.model.dtype),
            "start": None if config.start is None else hash_of_adapters(config.start),
            **config.identity,
            **trainable.identity,
            "data": mixture.fingerprint,
            "tokens": hash_of_arrays(part for example in examples for part in (example.tokens, example.mask)),
            "prior": hash_of_arrays(prior),
            "predictor": None if predictor is None else _hash_of_predictor(predictor),
        }
        self._identity = json.dumps(identity, sort_keys=True)
        self._position = self._restore()
        self.saved_step, self._between_steps = self.step, True
        self._check_agreement()
        self._batches = batches(
            mixture, config.batch_size, rank=self._group.rank(), world=self._group.size(), state=self._position
        )

    @property
    def leader(self) -> bool:
        """Whether this process is the one that writes."""
        return int(self._group.rank()) == 0

    def fit(
        self,
        evaluate: Callable[[], bool],
        report: Callable[[str], object],
        progress: Progress = lambda done, total: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Train to the end of the run, with reports, evaluations and states on disk in between.

        KeyboardInterrupt saves the steps that are whole, and passes on.

        Args:
            evaluate: measures the arms, and says whether the learned one has collapsed.
            report: receives the lines for a person.
            progress: called with (steps done by this call, steps that it has to do).
            stop: asked after every step; True, of the process that writes, ends training as it is.

        Returns:
            Whether the learned arm has collapsed.
        """
        try:
            return self._fit(evaluate, report, progress, stop)
        except KeyboardInterrupt:
            if self._between_steps and self.step > self.saved_step:
                self.save()
            if self.leader:
                done = f"stopped at step {self.step} of {self.config.iters}"
                report(f"{done}; the state of step {self.saved_step} is saved")
            raise

    def _fit(
        self,
        evaluate: Callable[[], bool],
        report: Callable[[str], object],
        progress: Progress,
        stop: Callable[[], bool],
    ) -> bool:
        config, total = self.config, self.config.iters
        collapsed = evaluate() if self.step == 0 else False
        began, first_step, lines = time.monotonic(), self.step, list[dict[str, Any]]()
        saved = began
        while self.step < total and not (collapsed and config.stop_on_collapse):
            lines.append(self.advance())
            self.record(lines[-1])
            progress(self.step - first_step, total - first_step)
            last = self.step == total
            if self.step % config.steps_per_report == 0 or last or self.step == first_step + 1:
                if self.leader:
                    left = (time.monotonic() - began) / (self.step - first_step) * (total - self.step)
                    report(f"step {self.step}/{total}: {_losses(lines)}, {_duration(left)} left")
                lines = []
            if self.step % config.steps_per_eval == 0 or last:
                self._between_steps = False  # a state of this step says that it was evaluated
                collapsed = evaluate()
                self._between_steps = True
            # After the evaluation, so that a resumed run repeats it if the kill came before its line was written.
            if self.step % config.save_every == 0 or last or time.monotonic() - saved >= _SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
            if self.agreed(stop()):
                break
        if self.step < total:
            self.save()
        return collapsed

    def advance(self) -> dict[str, Any]:
        """One step of every arm on one batch.

        Returns:
            The step's line of the metrics file: per arm and domain the mean cross-entropy and KL divergence (nats per
            token) before the step, tokens, learning rate, seconds. The same on every process.
        """
        start = time.perf_counter()
        batch, config = next(self._batches), self.config
        started = self.step >= config.settled * config.iters
        learns = {
            "learned": started and config.head_learning_rate > 0,
            "static-learned": started and config.scores_learning_rate > 0,
        }
        sums = np.zeros((len(self.arms), len(self._domains), 3))
        for first in range(0, len(batch.examples), config.micro_batch_size):
            # Neighbours have about the same length, since a batch comes in order of length.
            examples = batch.examples[first : first + config.micro_batch_size]
            rows = [self._group.rank() + self._group.size() * (first + index) for index in range(len(examples))]
            keep = [self._keep(self._density(row)) for row in rows]
            teacher = self._train_step.teacher_output(examples)
            for number, arm in enumerate(self.arms):
                with differentiable(self.trainable.model.module):
                    losses = self._train_step.accumulate(
                        arm, examples, keep, teacher, batch.targets, learn_head=learns.get(arm.name, False)
                    )
                for loss, example in zip(losses, examples, strict=True):
                    added = (loss.cross_entropy, loss.divergence, int(example.mask.sum()))
                    sums[number, self._domains.index(example.domain)] += added
            if config.micro_batch_size == 1:  # buffers of a length that the next one does not have
                mx.clear_cache()
        self._between_steps, norms = False, {}  # until all arms have made it
        for arm in self.arms:
            if self._group.size() > 1:
                arm.gradients = _summed(arm.gradients, self._group)
            norms[arm.name] = arm.step(config.clip)
        if self._group.size() > 1:
            sums = np.array(mx.distributed.all_sum(mx.array(sums.astype(np.float32)), group=self._group))
        self.step += 1
        self.tokens += batch.targets
        self._position = batch.state
        self._between_steps = True
        return {
            "step": self.step,
            "tokens": self.tokens,
            "arms": {arm.name: self._means(sums[number]) for number, arm in enumerate(self.arms)},
            "gradient_norm": norms,
            "learning_rate": float(self.arms[0].optimizers["adapter"].learning_rate),
            "head_learns": learns["learned"],
            "seconds": time.perf_counter() - start,
        }

    def record(self, line: Mapping[str, Any]) -> None:
        """Append a line to the metrics."""
        if self.leader:
            with (self.config.output / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def save(self) -> None:
        """Write the state, and the folders that other commands take. A run killed before or after loses nothing."""
        if not self.leader:
            return
        folder = self.config.output
        for arm in self.arms:
            self.trainable.save(folder / "adapters" / arm.name, arm.adapter)
            if GAINS in arm.parameters:
                self.trainable.save_gains(folder / "adapters" / arm.name, self.gains(arm) or ())
            if arm.name == "learned":
                assert self.predictor is not None
                (folder / "predictor").mkdir(exist_ok=True)
                arm.head(self.predictor.head).save(folder / "predictor" / "head.safetensors")
            if SCORES in arm.parameters:
                save_prior(folder / LEARNED_PRIOR, self.learned_prior(arm))
        save_prior(folder / "prior.safetensors", self.prior)
        # Last, so that a run killed in between writes the others again.
        arrays = {f"{arm.name}/{name}": array for arm in self.arms for name, array in arm.state().items()}
        save_state(folder, self._identity, arrays, step=self.step, tokens=self.tokens, position=self._position)
        self.saved_step = self.step

    def learned_prior(self, arm: Arm) -> list[Scores]:
        """The scores of `static-learned` as a prior, per FFN float32 `[d_ffn]`."""
        return list(np.split(positive(np.array(arm.parameters[SCORES])), np.cumsum(self._widths)[:-1]))

    def gains(self, arm: Arm) -> list[mx.array] | None:
        """The gains of an arm's neurons, per FFN float32 `[d_ffn]`; None if it has none."""
        found = arm.parameters.get(GAINS)
        return None if found is None else list(mx.split(found, np.cumsum(self._widths)[:-1].tolist()))

    def agreed(self, verdict: bool) -> bool:
        """The verdict of the process that writes, on every process."""
        if self._group.size() == 1:
            return verdict
        return bool(mx.distributed.all_sum(mx.array(int(verdict and self.leader)), group=self._group).item())

    def _check_agreement(self) -> None:
        """Raise DataError unless all processes are about to do the same; they may not share a disk."""
        if self._group.size() == 1:
            return
        digest = hashlib.sha256(f"{self.step}/{self._identity}".encode()).digest()
        mine = mx.array(list(digest[:8]), mx.int32)
        most = mx.distributed.all_max(mine, group=self._group)
        least = mx.distributed.all_min(mine, group=self._group)
        if not mx.array_equal(most, least):
            raise DataError(
                f"{self.config.output}: the processes of this run begin with other data, settings or states (this one "
                f"at step {self.step}); give all of them the same, and the same --output on every machine"
            )

    def _arm(self, name: str) -> Arm:
        config, start = self.config, self.config.start
        parameters = dict(self.trainable.initial if start is None else self.trainable.begin(start / "adapters" / name))
        if name == "learned":
            assert self.predictor is not None
            parameters |= head_parameters(self.predictor.head)
        if name == "static-learned":
            earlier = config.scores or (None if start is None else start / LEARNED_PRIOR)
            prior = self.prior if earlier is None else load_prior(earlier, self._widths)
            parameters[SCORES] = mx.array(np.log(np.maximum(np.concatenate(prior), _LEAST)).astype(np.float32))
        if config.gain_learning_rate and name != "none":
            folder = None if start is None else start / "adapters" / name
            parameters[GAINS] = mx.concatenate(self.trainable.read_gains(folder))
        # An optimizer counts its own steps, and those of head and scores begin late.
        late = max(config.iters - math.ceil(config.settled * config.iters), 1)
        rates = {
            "adapter": (config.peak_learning_rate, config.iters),
            "head": (config.head_learning_rate, late),
        }
        if config.scores_learning_rate or name == "static-learned":
            rates["scores"] = (config.scores_learning_rate, late)
        if config.gain_learning_rate:
            rates["gains"] = (config.gain_learning_rate, config.iters)
        optimizers = {
            group: AdamW(
                _schedule(rate, steps, config.warmup), betas=[0.9, 0.98], weight_decay=0.0, bias_correction=True
            )
            for group, (rate, steps) in rates.items()
        }
        return Arm(name, parameters, optimizers)

    def _restore(self) -> dict[str, Any] | None:
        """Take over the state in the folder; the position in the data, None without a state."""
        folder = self.config.output
        folder.mkdir(parents=True, exist_ok=True)
        if self.leader:
            sweep(folder)
        state = load_state(folder, self._identity)
        position: dict[str, Any] | None = None
        if state is not None:
            arrays, saved = state
            for arm in self.arms:
                prefix = f"{arm.name}/"
                arm.restore({name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)})
            self.step, self.tokens, position = saved["step"], saved["tokens"], saved["position"]
        if self.leader:
            # Without a state, the lines of a run that was killed before its first one go.
            cut_metrics(folder, self.step or -1)
        return position

    def _density(self, row: int) -> float:
        """A sequence's density; seed, step and row fix it."""
        digest = hashlib.sha256(f"{self.config.seed}/density/{self.step}/{row}".encode()).digest()
        ranges = self.config.density_ranges
        low, high = ranges[int.from_bytes(digest[:8], "big") % len(ranges)]
        return low + (high - low) * int.from_bytes(digest[8:12], "big") / 2**32

    def _means(self, sums: np.ndarray[Any, Any]) -> dict[str, Any]:
        """Per domain that the batch held, mean losses and tokens."""
        return {
            domain: {"ce": float(ce / count), "kl": float(kl / count), "tokens": int(count)}
            for domain, (ce, kl, count) in zip(self._domains, sums, strict=True)
            if count
        }


def _schedule(rate: float, steps: int, warmup: int) -> Any:
    """A learning rate for mlx's optimizers: up to `rate` within `warmup` steps, then by a cosine to a tenth."""
    warmup = min(warmup, steps - 1)
    cosine = cosine_decay(rate, max(steps - warmup, 1), rate / 10)
    if warmup < 1:
        return cosine
    return join_schedules([linear_schedule(rate / (warmup + 1), rate, warmup), cosine], [warmup])


def _summed(gradients: dict[str, mx.array], group: Any) -> dict[str, mx.array]:
    """Sums over processes: each divided its loss by the tokens of all."""
    # A list, since MLX would take the dots in names for those of a tree.
    means = nn.utils.average_gradients(list(gradients.values()), group)
    return {name: value * group.size() for name, value in zip(gradients, means, strict=True)}


def _hash_of_predictor(predictor: SparsityPredictor) -> str:
    head = predictor.head
    digest = hash_of_arrays(np.array(array) for array in head_parameters(head).values())
    return f"{digest} {head.pooling} {head.activation} {head.layers}"


def _losses(lines: Sequence[dict[str, Any]]) -> str:
    """Mean losses of the arms over some steps, and tokens per second, for a person."""
    parts = []
    for arm in lines[0]["arms"]:
        domains = [domain for line in lines for domain in line["arms"][arm].values()]
        tokens = sum(domain["tokens"] for domain in domains)
        ce, kl = (sum(domain[kind] * domain["tokens"] for domain in domains) / tokens for kind in ("ce", "kl"))
        parts.append(f"{arm} {ce:.3f} (kl {kl:.3f})")
    rate = tokens / max(sum(line["seconds"] for line in lines), 1e-9)
    return f"{', '.join(parts)} nats per token before the step; {rate:.0f} answer tokens/s"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
