"""The four stages of training, from a config to what they write: calibrate, distill, pretrain and sft."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.chat_template import without_template
from ifprune_mlx.checkpoint.format import Checkpoint
from ifprune_mlx.checkpoint.hub import resolve
from ifprune_mlx.data.dataloader import DataMixture, shuffled
from ifprune_mlx.data.dataset import Record, read_records, split
from ifprune_mlx.data.tokenize import Example, chunked, encode_all
from ifprune_mlx.errors import DataError
from ifprune_mlx.model import Model, load, own_dtype
from ifprune_mlx.selection.predictor import SparsityPredictor, load_predictor
from ifprune_mlx.train.attribution import Backbone, Targets, copy_backbone, measure
from ifprune_mlx.train.checkpointing import METRICS, STATE
from ifprune_mlx.train.config import TrainConfig
from ifprune_mlx.train.distill import distill
from ifprune_mlx.train.evaluation import Evaluator, ProgressDisplay
from ifprune_mlx.train.full_finetune import FullModel
from ifprune_mlx.train.gradients import check_kernels
from ifprune_mlx.train.lora import LoRAModel
from ifprune_mlx.train.static_prior import priors, save_prior, static_prior
from ifprune_mlx.train.trainable import FrozenModel, TrainableModel
from ifprune_mlx.train.trainer import Trainer

# A predictor learns little from more chats of a domain than this (docs/log.md).
_MEASURED_CHATS = 2000


@dataclass(frozen=True)
class TrainResult:
    """What a stage wrote.

    Attributes:
        stage: of the config.
        path: the prior (`calibrate`), the predictor folder (`distill`), or the run's folder.
        figures: by name, JSON values. `chats` and `domains` (`calibrate`); `chats`, `parameters` of the head,
            `pooling`, `penalty` and `explained`, the share of the variance between held-out answers that the head
            predicts (`distill`); `steps`, `tokens` of every arm, and `collapsed` (`pretrain`, `sft`).
        seconds: that it took.
    """

    stage: str
    path: Path
    figures: Mapping[str, Any]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"stage": self.stage, "path": str(self.path), **self.figures, "seconds": self.seconds}


@contextmanager
def _silent(label: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    yield lambda done, total: None


def train(
    config: TrainConfig,
    *,
    progress: ProgressDisplay = _silent,
    report: Callable[[str], object] = print,
    stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train one stage, or go on with it where an earlier call with the same config was stopped.

    Args:
        progress: called as `with progress(label, unit) as update:`, and then `update(done, total)`.
        report: receives lines for a person: data left out, losses, evaluations.
        stop: asked after every step of the arms; True saves the run and ends it.

    Raises:
        IfpruneError: (or a subclass) if the model, the data or an earlier run in the folder cannot be used.
    """
    began = time.perf_counter()
    if config.model is None:
        raise DataError("training needs a model; give the folder or the hub id of an IFP checkpoint")
    if config.measures and mx.distributed.init().size() > 1:
        raise DataError(f"--stage {config.stage} runs in one process; start it without mlx.launch")
    with progress("load", "FFNs") as update:
        checkpoint = Checkpoint.open(resolve(config.model))
        # Gradients may leave float16's range, so that no chip's default replaces bfloat16 here.
        dtype = own_dtype(checkpoint) if config.dtype is None else getattr(mx, config.dtype)
        model, tokenizer = load(checkpoint, dtype=dtype, progress=update)
    try:
        if config.ignore_chat_template:
            tokenizer = without_template(tokenizer)
        check_kernels(model)
        stage = _Stage(config, model, tokenizer, progress, report, stop)
        run = {"calibrate": stage.calibrate, "distill": stage.distill}.get(config.stage, stage.train_arms)
        path, figures = run()
    finally:
        model.close()  # its parts refer to each other, and would stay in memory beside the next stage's model
    return TrainResult(config.stage, path, figures, time.perf_counter() - began)


class _Stage:
    """A config with its model and data. Each stage returns the path that it wrote and its figures."""

    def __init__(
        self,
        config: TrainConfig,
        model: Model,
        tokenizer: TokenizerWrapper,
        progress: ProgressDisplay,
        report: Callable[[str], object],
        stop: Callable[[], bool],
    ) -> None:
        self._config, self._model, self._tokenizer = config, model, tokenizer
        self._progress, self._report, self._stop = progress, report, stop
        with progress("read data", ""):
            self._records = {
                name: read_records(file, name, strict=config.strict, report=report)
                for name, file in config.data.items()
            }

    def calibrate(self) -> tuple[Path, dict[str, Any]]:
        """Measure how much answers need each neuron, and write the priors."""
        targets, output = self._measure(), self._config.output
        for name, prior in priors(targets).items():
            save_prior(output / ("prior.safetensors" if name == "all" else f"prior-{name}.safetensors"), prior)
        figures = {"chats": len(targets.features), "domains": sorted(set(targets.domains))}
        return output / "prior.safetensors", figures

    def distill(self) -> tuple[Path, dict[str, Any]]:
        """Measure, and fit a predictor's head to what was measured."""
        config, targets = self._config, self._measure()
        fit = distill(targets, rank=config.rank, pooling=config.pooling, seed=config.seed)
        folder = config.output / "predictor"
        folder.mkdir(parents=True, exist_ok=True)
        if config.backbone is not None:
            copy_backbone(config.backbone, folder)
        fit.head.save(folder / "head.safetensors")
        figures = {
            "chats": len(targets.features),
            "parameters": fit.head.first.size + fit.head.second.size + sum(fit.head.widths),
            "pooling": config.pooling,
            "penalty": fit.penalty,
            "explained": fit.explained[fit.penalty],
        }
        with (config.output / METRICS).open("a", encoding="utf-8") as metrics:
            line = {"path": str(folder), **figures, "by_penalty": fit.explained}
            metrics.write(json.dumps(line) + "\n")
        return folder, figures

    def train_arms(self) -> tuple[Path, dict[str, Any]]:
        """Train the arms on the same batches, and evaluate them on held-out prompts."""
        config, model, progress = self._config, self._model, self._progress
        with progress("encode data", ""):
            train_data = {name: self._train_examples(name) for name in config.data}
            valid_data = self._valid_data() if config.eval_prompts else {}
        folder = self._predictor_folder()
        predictor = self._predictor(folder)
        earlier = [config.output] if (config.output / STATE).is_file() else []
        earlier += [] if config.start is None else [config.start]
        with progress("static selection", "instructions") as update:
            model.prior = static_prior(model, predictor, train_data, earlier, update)
        sources = {name: (examples, config.weight.get(name, 1.0)) for name, examples in train_data.items()}
        mixture = DataMixture(sources, config.seed)
        trainable: TrainableModel
        if config.fine_tune_type == "lora":
            trainable = LoRAModel(
                model, rank=config.lora_rank, scale=config.lora_scale, seed=config.seed, layers=config.num_layers
            )
        else:
            trainable = {"full": FullModel, "none": FrozenModel}[config.fine_tune_type](model)
        trainer = Trainer(trainable, predictor, model.prior, mixture, config)
        if trainer.leader:
            if predictor is not None and predictor.head.layers is None and "learned" in config.selector:
                copy_backbone(folder or model.checkpoint.path / "predictor", config.output / "predictor")
            if trainer.step:
                self._report(f"goes on after step {trainer.step} of {config.iters}")
        evaluate = Evaluator(trainer, valid_data, progress, self._report)
        with progress("train", "steps") as update:
            collapsed = trainer.fit(evaluate, self._report, update, self._stop)
        return config.output, {"steps": trainer.step, "tokens": trainer.tokens, "collapsed": collapsed}

    def _measure(self) -> Targets:
        """The importance of every neuron for the training chats."""
        config, depth = self._config, len(self._model.layers)
        if config.backbone is not None:
            backbone = Backbone.load(config.backbone)
        elif config.layers <= depth:
            backbone = Backbone.first_layers(self._model, config.layers)
        else:
            raise DataError(f"--layers {config.layers}: the model has {depth}; give at most that")
        domains = []
        for name in config.data:
            domains.append(self._train_examples(name))
            self._report(f"{name}: {len(domains[-1])} chats")
        # In turn, so that a run that is stopped early has measured every domain alike.
        chats = [chat for turn in zip_longest(*domains) for chat in turn if chat is not None]
        with self._progress("measure", "chats") as update:
            return measure(
                self._model,
                chats,
                config.output / "targets",
                backbone,
                update,
                count=config.chats,
                micro_batch_size=config.micro_batch_size,
            )

    def _chosen_records(self, name: str, part: str) -> list[Record]:
        """The records of one domain, to train on (`train`) or held out (`valid`), in an order that the seed fixes."""
        config = self._config
        records = [record for record in self._records[name] if split(record, config.held_out) == part]
        chosen = [records[index] for index in shuffled(len(records), f"{config.seed}-{name}")]
        return chosen[: config.limit or (_MEASURED_CHATS if config.measures else None)]

    def _train_examples(self, name: str) -> list[Example]:
        return self._encoded(self._chosen_records(name, "train"), self._report)

    def _valid_data(self) -> dict[str, list[Example]]:
        """The examples to evaluate on by domain: of files of their own, or held out of the training data."""
        config, found = self._config, dict[str, list[Example]]()
        for name in config.eval_data or config.data:
            if config.eval_data:
                records = read_records(config.eval_data[name], name, strict=config.strict, report=self._report)
            else:
                records = self._chosen_records(name, "valid")
            held_out = self._held_out_examples(records)
            if len(held_out) > 1:
                found[name] = held_out
            elif config.held_out:
                self._report(f"{name}: held out are {len(held_out)} prompts, too few to evaluate on; raise --held-out")
        return found

    def _held_out_examples(self, records: list[Record]) -> list[Example]:
        """Up to `eval_prompts` examples, one of each prompt or text: a second chunk of a text is no other prompt."""
        found: list[Example] = []
        by_key = {record.key: record for record in reversed(records)}
        for record in reversed(by_key.values()):
            if len(found) == self._config.eval_prompts:
                break
            try:
                found += self._encoded([record], lambda line: None)[:1]
            except DataError:  # its answer begins after the most tokens, or it is shorter than one chunk
                continue
        return found

    def _encoded(self, records: list[Record], report: Callable[[str], object]) -> list[Example]:
        length = self._config.max_seq_length
        if self._config.stage != "pretrain":
            return encode_all(self._tokenizer, records, length, report)
        pairs = [pair for record in records for pair in chunked(self._tokenizer, record, length // 2)]
        if not pairs:
            raise DataError(f"no text is longer than one chunk of {length // 2} tokens; give longer texts")
        return pairs

    def _predictor_folder(self) -> Path | None:
        """The predictor asked for, or the one that an earlier run trained along; None for the checkpoint's."""
        earlier = None if self._config.start is None else self._config.start / "predictor"
        return self._config.predictor or (earlier if earlier is not None and earlier.is_dir() else None)

    def _predictor(self, folder: Path | None) -> SparsityPredictor | None:
        """The predictor that the learned arm begins with. The static arm's prior is made of it, too.

        Raises:
            DataError: if the learned arm has none, or would overwrite it.
        """
        config, model = self._config, self._model
        if folder is None:
            if model.predictor is None and "learned" in config.selector:
                raise DataError(
                    "the learned arm begins with a predictor; give --predictor FOLDER, as --stage distill makes one, "
                    "or leave the arm out with --selector static"
                )
            return model.predictor
        if config.head_learning_rate and folder.resolve() == (config.output / "predictor").resolve():
            raise DataError(
                f"--predictor {folder}: is where this run writes the head that it learns; give another --output"
            )
        widths = [spec.d_ffn for spec in model.checkpoint.layout.ffns]
        return load_predictor(folder, model.module, self._tokenizer, model.context_length, widths)
