"""Trains a predictor from scratch: a small model that begins with random weights, and its head, together, by gradient.

What it learns is what `ifprune_mlx.train.distill` regresses in closed form, the log importance of every neuron in the
answer, and the loss is that module's measure: the squared error as a share of the variance about the mean of the chats
trained on, so that 1 is what the prior alone reaches (and where training begins), and 1 - loss is explained.

A run lives in a folder: `state.safetensors` (weights, moments, step; one file, replaced at once), lines in
`metrics.jsonl`, and `predictor/`, the best so far by the chats that `distill` holds out, too. No number is drawn but by
seed and step: a run that was killed goes on as if nothing had happened.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.optimizers import AdamW, clip_grad_norm
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import _get_classes

from ifprune_mlx.checkpoint.atomic_write import write_atomic
from ifprune_mlx.checkpoint.format import read_json_object, refuse_custom_code
from ifprune_mlx.checkpoint.safetensors_io import read_safetensors_header
from ifprune_mlx.data.dataloader import shuffled
from ifprune_mlx.errors import DataError, IfpruneError
from ifprune_mlx.selection.predictor import Head, hidden_states, instruction_tokens
from ifprune_mlx.train.attribution import Floats, Targets, log_importance
from ifprune_mlx.train.checkpointing import METRICS, STATE, cut_metrics, differences, hash_of_arrays, schedule, sweep
from ifprune_mlx.train.distill import Rows

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
"""`--backbone-config small`, but for the vocabulary."""


@dataclass(frozen=True)
class Settings:
    """What a run does. A resumed run must have the same.

    Attributes:
        iterations: steps, of `batch_size` chats each.
        learning_rate: after `warmup` steps; falls by a cosine to a tenth.
        clip: largest global norm of the gradient.
        rank: width of the head's inner layer.
        pooling: of `ifprune_mlx.selection.predictor.POOLINGS`, what the head reads.
        held_out: share of the chats that choose the best weights.
        seed: of first weights, the order of the chats, and which are held out.
    """

    iterations: int = 1000
    batch_size: int = 8
    learning_rate: float = 1e-3
    warmup: int = 20
    clip: float = 1.0
    rank: int = 128
    pooling: str = "both"
    held_out: float = 0.15
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        explained: share of the held-out variance of log importance that the best weights predict.
        step: of these weights.
        parameters: of backbone and head.
    """

    explained: float
    step: int
    parameters: int


def backbone_config(given: str, tokenizer: TokenizerWrapper) -> dict[str, Any]:
    """A backbone's config for the LLM's own tokenizer.

    Args:
        given: `small`, or the path of an mlx-lm model's `config.json`.

    Raises:
        DataError: if there is no such file, or no model can be made of it.
    """
    words = 1 + max(tokenizer.get_vocab().values())
    if given == "small":
        return SMALL | {"vocab_size": words}
    path = Path(given)
    if not path.is_file():
        raise DataError(f"--backbone-config {given}: no such file; give a model's config.json, or small")
    config = read_json_object(path, DataError)
    refuse_custom_code(config, path, DataError)
    config.pop("quantization", None)
    size = config.setdefault("vocab_size", words)
    if not isinstance(size, int) or size < words:
        raise DataError(
            f"{path}: vocab_size is {size}, the model's tokenizer needs {words}; write that, or leave it out"
        )
    return config


class ScratchRun:
    """A predictor under way.

    Args:
        targets: measured chats, at least 20.
        instructions: of the same chats in the same order, as text.
        config: of the backbone, see `backbone_config`.
        tokenizer: the LLM's, which the backbone reads with.
        folder: where the run lives; one that holds a state of the same run goes on from it.

    Attributes:
        step: steps done.
        best: what was explained at best, and after which step; None before the first evaluation.

    Raises:
        DataError: if there are too few chats, the config makes no model that exposes its hidden states, or the folder
            holds another run.
    """

    def __init__(
        self,
        targets: Targets,
        instructions: Sequence[str],
        config: dict[str, Any],
        tokenizer: TokenizerWrapper,
        settings: Settings,
        folder: Path,
    ) -> None:
        count = len(targets.importance)
        if count < 20:
            raise DataError(f"{count} chats are too few to train on; measure at least 20, better thousands")
        self.settings, self.folder, self._targets, self._config = settings, folder, targets, config
        self._tokenizer = tokenizer
        context = config.get("max_position_embeddings")
        self._tokens = [
            np.array(instruction_tokens(tokenizer, text, int(context) if context else None), np.int32)
            for text in instructions[:count]
        ]
        # The chats that `distill` holds out with the same seed and share.
        order = np.random.default_rng(settings.seed).permutation(count)
        self.valid, self.train = np.split(order, [max(int(settings.held_out * count), 1)])
        self._mean, self._variance = self._moments()
        self._scorer = self._begin()
        self._optimizer = AdamW(
            schedule(settings.learning_rate, settings.iterations, settings.warmup),
            betas=[0.9, 0.98],
            weight_decay=0.0,
            bias_correction=True,
        )
        self._optimizer.init(self._scorer.trainable_parameters())
        self._gradient = nn.value_and_grad(self._scorer, self._loss)
        self.step = 0
        self.best: tuple[float, int] | None = None
        self._identity = json.dumps(
            {
                "backbone": json.dumps(config, sort_keys=True),
                "settings": asdict(settings),
                "widths": list(targets.widths),
                "importance": hash_of_arrays([targets.importance]),
                "tokens": hash_of_arrays(self._tokens),
            },
            sort_keys=True,
        )
        self._restore()

    @property
    def parameters(self) -> int:
        """Of backbone and head."""
        return sum(array.size for array in self._weights.values())

    @property
    def _weights(self) -> dict[str, mx.array]:
        return dict(tree_flatten(self._scorer.parameters()))

    def advance(self) -> dict[str, Any]:
        """One step on one batch.

        Returns:
            Step, loss before it (share of the variance), gradient norm, learning rate, seconds.

        Raises:
            IfpruneError: if the gradient is not a number; nothing is changed then.
        """
        start = time.perf_counter()
        loss, gradients = self._gradient(*self._batch(self._drawn()))
        clipped, norm = clip_grad_norm(gradients, self.settings.clip)  # type: ignore[no-untyped-call]
        if not math.isfinite(norm.item()):
            raise IfpruneError("the gradient is not a number; lower --learning-rate")
        self._optimizer.update(self._scorer, clipped)
        mx.eval(self._scorer.parameters(), self._optimizer.state)
        self.step += 1
        return {
            "step": self.step,
            "loss": float(loss),
            "gradient_norm": float(norm),
            "learning_rate": float(self._optimizer.learning_rate),
            "seconds": time.perf_counter() - start,
        }

    def evaluate(self) -> float:
        """Share of the held-out variance that is explained; the predictor folder is written where it is the best."""
        left = total = 0.0
        for start in range(0, len(self.valid), self.settings.batch_size):
            tokens, lengths, wanted = self._batch(self.valid[start : start + self.settings.batch_size])
            left += float(mx.square(self._scorer(tokens, lengths) - wanted).sum())
            total += float(mx.square(wanted - self._mean).sum())
        explained = 1 - left / max(total, 1e-12)
        if math.isfinite(explained) and (self.best is None or explained > self.best[0]):
            self.best = explained, self.step
            self._write_predictor()
        return explained

    def record(self, line: dict[str, Any]) -> None:
        """Append a line to the metrics."""
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def save(self) -> None:
        """Write the state."""
        moments: dict[str, mx.array] = dict(tree_flatten(self._optimizer.state))
        arrays = {f"weights/{name}": array for name, array in self._weights.items()}
        arrays |= {f"optimizer/{name}": array for name, array in moments.items()}
        metadata = {"run": self._identity, "step": str(self.step), "best": json.dumps(self.best)}
        write_atomic(self.folder / STATE, lambda path: mx.save_safetensors(str(path), arrays, metadata), DataError)

    def _begin(self) -> _Scorer:
        """First weights; the last layer's are zero but for its bias, so that training begins at the prior."""
        settings = self.settings
        mx.random.seed(settings.seed)
        try:
            kind, arguments = _get_classes(self._config)
            backbone = kind(arguments.from_dict(self._config))
            width = hidden_states(backbone, mx.array([[0]])).shape[-1]
        except Exception as exc:  # mlx-lm's classes raise whatever a config leads them to
            reason = " ".join(str(exc).split())[:200]
            raise DataError(
                f"--backbone-config: no model can be made of it ({reason}); take a llama's as a model"
            ) from None
        return _Scorer(backbone, width, settings.rank, settings.pooling, self._mean)

    def _moments(self) -> tuple[mx.array, float]:
        """Mean of the log importance of the chats trained on, `[neurons]`, and the mean variance about it."""
        total = np.zeros(self._targets.importance.shape[1])
        squares = total.copy()
        for wanted in self._wanted_of(self.train):
            total += wanted.sum(axis=0, dtype=np.float64)
            squares += np.square(wanted, dtype=np.float64).sum(axis=0)
        mean = total / len(self.train)
        variance = float((squares / len(self.train) - mean**2).mean())
        return mx.array(mean.astype(np.float32)), max(variance, 1e-12)

    def _wanted_of(self, rows: Rows) -> Iterator[Floats]:
        for start in range(0, len(rows), 64):
            part = np.sort(rows[start : start + 64])
            yield log_importance(self._targets.importance[part], self._targets.widths)

    def _drawn(self) -> Rows:
        """The chats of the next step: every epoch all of them once, in an order of its own."""
        count, size = len(self.train), self.settings.batch_size
        places = range(self.step * size, (self.step + 1) * size)
        epochs = {place // count for place in places}
        orders = {epoch: shuffled(count, f"{self.settings.seed}/scratch/{epoch}") for epoch in epochs}
        return self.train[[orders[place // count][place % count] for place in places]]

    def _batch(self, rows: Rows) -> tuple[mx.array, mx.array, mx.array]:
        """Token ids `[B, L]`, filled up behind, their lengths `[B]`, and log importance `[B, neurons]`."""
        chosen = [self._tokens[row] for row in rows]
        # A multiple, so that there are few shapes.
        length = -(-max(map(len, chosen)) // 16) * 16
        tokens = np.zeros((len(rows), length), np.int32)
        for place, ids in enumerate(chosen):
            tokens[place, : len(ids)] = ids
        wanted = log_importance(self._targets.importance[rows], self._targets.widths)
        return mx.array(tokens), mx.array([len(ids) for ids in chosen]), mx.array(wanted)

    def _loss(self, tokens: mx.array, lengths: mx.array, wanted: mx.array) -> mx.array:
        return mx.square(self._scorer(tokens, lengths) - wanted).mean() / self._variance

    def _write_predictor(self) -> None:
        folder = self.folder / "predictor"
        folder.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save_pretrained(str(folder))
        text = json.dumps(self._config, indent=2)
        write_atomic(folder / "config.json", lambda path: path.write_text(text, encoding="utf-8"), DataError)
        weights: dict[str, mx.array] = dict(tree_flatten(self._scorer.backbone.parameters()))
        write_atomic(
            folder / "model.safetensors",
            lambda path: mx.save_safetensors(str(path), weights, {"format": "mlx"}),
            DataError,
        )
        self._scorer.head(self._targets.widths).save(folder / "head.safetensors")

    def _restore(self) -> None:
        file = self.folder / STATE
        self.folder.mkdir(parents=True, exist_ok=True)
        predictor = (f"predictor/{name}" for name in ("config.json", "model.safetensors", "head.safetensors"))
        sweep(self.folder, (STATE, METRICS, *predictor))
        if not file.is_file():
            cut_metrics(self.folder, -1)
            return
        metadata = read_safetensors_header(file, DataError).metadata
        if metadata.get("run") != self._identity:
            what = differences(metadata.get("run", ""), self._identity)
            raise DataError(
                f"{self.folder}: holds a run with {what}; give the same again to go on, or another --output"
            )
        arrays = mx.load(str(file))
        assert isinstance(arrays, dict)
        for prefix in ("weights/", "optimizer/"):
            named = [(name.removeprefix(prefix), a) for name, a in arrays.items() if name.startswith(prefix)]
            if prefix == "weights/":
                self._scorer.load_weights(named)
            else:
                self._optimizer.state = tree_unflatten(named)
        mx.eval(self._scorer.parameters(), self._optimizer.state)
        self.step = int(metadata["step"])
        found = json.loads(metadata["best"])
        self.best = None if found is None else (float(found[0]), int(found[1]))
        cut_metrics(self.folder, self.step or -1)


def train_scratch(
    run: ScratchRun,
    *,
    steps_per_eval: int = 200,
    save_every: int = 50,
    progress: Callable[[int, int], None] | None = None,
    report: Callable[[str], object] = lambda line: None,
) -> Result:
    """Train to the end.

    Args:
        progress: called with (steps done, steps).
        report: is told every evaluation, in a line.

    Raises:
        DataError, IfpruneError: as the run raises them.
    """
    total = run.settings.iterations
    if run.step:
        report(f"goes on after step {run.step} of {total}")
    losses: list[float] = []
    while run.step < total:
        line = run.advance()
        run.record(line)
        losses.append(line["loss"])
        last = run.step == total
        if run.step % steps_per_eval == 0 or last:
            explained = run.evaluate()
            run.record({"step": run.step, "explained": explained})
            report(
                f"step {run.step}/{total}: explains {100 * (1 - float(np.mean(losses))):.1f} % of what differs between "
                f"answers it trains on, {100 * explained:.1f} % between those held out"
            )
            losses = []
        # After the evaluation, so that a resumed run repeats it if the kill came before its line was written.
        if run.step % save_every == 0 or last:
            run.save()
        if progress is not None:
            progress(run.step, total)
    if run.best is None:
        raise DataError(f"{run.folder}: no evaluation gave a number; lower --learning-rate, in another --output")
    return Result(run.best[0], run.best[1], run.parameters)


class _Scorer(nn.Module):
    """Backbone and head, in batches; one row of it is `selection.predictor.Head` on that row's hidden states."""

    def __init__(self, backbone: nn.Module, width: int, rank: int, pooling: str, mean: mx.array) -> None:
        super().__init__()
        self.backbone = backbone
        self.first = nn.Linear(width * (2 if pooling == "both" else 1), rank)
        self.second = nn.Linear(rank, len(mean))
        self.second.weight = mx.zeros_like(self.second.weight)
        self.second.bias = mean
        self._pooling = pooling

    def __call__(self, tokens: mx.array, lengths: mx.array) -> mx.array:
        """Scores `[B, neurons]` of token ids `[B, L]`, of which each row's first `lengths` count."""
        hidden = hidden_states(self.backbone, tokens)
        last = mx.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        inside = (mx.arange(tokens.shape[1])[None] < lengths[:, None])[..., None]
        mean = mx.where(inside, hidden, 0).sum(axis=1) / lengths[:, None]
        pooled = {"last": last, "mean": mean, "both": mx.concatenate([last, mean], axis=-1)}[self._pooling]
        scores: mx.array = self.second(self.first(pooled))
        return scores

    def head(self, widths: tuple[int, ...]) -> Head:
        """As a predictor folder has it."""
        first, second = self.first, self.second
        return Head(first.weight, first.bias, second.weight, second.bias, widths, self._pooling)
