"""`ifprune train`: trains a sparsity predictor and the model that it prunes, stage by stage."""

from __future__ import annotations

import json as encoder
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from .console import note, parameters, progress, result_json
from .loading import load_model
from .options import DtypeOption, ModelOption, named_files
from .train_config import read_config
from .train_paired import Paired, run_paired

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ifprune_mlx import Model
    from ifprune_mlx.data.dataset import Record
    from ifprune_mlx.data.tokenize import Encoded
    from ifprune_mlx.train.attribution import Targets
    from ifprune_mlx.train.backbone import Backbone

Encode = Callable[["TokenizerWrapper", "list[Record]", int], "list[Encoded]"]


class StageName(str, Enum):
    """The stages of training."""

    calibrate = "calibrate"
    distill = "distill"
    pretrain = "pretrain"
    sft = "sft"


class ArmName(str, Enum):
    """What chooses the neurons in an arm of a paired run."""

    learned = "learned"
    static = "static"
    none = "none"


class PoolingName(str, Enum):
    """Whose hidden state the head reads."""

    last = "last"
    mean = "mean"
    both = "both"


class FineTuneType(str, Enum):
    """What of the model is trained."""

    lora = "lora"
    full = "full"


_JOINT = "pretrain and sft"
# More chats a domain than this tell a predictor little (docs/log.md).
_MEASURED = 2000
_LEARNING_RATES = {FineTuneType.lora: 5e-4, FineTuneType.full: 1e-4}


def train(
    output: Annotated[Path, typer.Option("--output", metavar="FOLDER", help="Where everything is written.")],
    data: Annotated[
        Optional[list[str]],
        typer.Option(
            "--data",
            metavar="NAME=FILE",
            help="A domain's chats, JSON lines with messages or with prompt and completion; texts for pretrain, with "
            "text; repeatable.",
        ),
    ] = None,
    model: ModelOption = None,
    stage: Annotated[StageName, typer.Option("--stage", help="What to train.")] = StageName.distill,
    config: Annotated[
        Optional[Path],
        typer.Option(
            "--config",
            "-c",
            metavar="FILE",
            help="YAML file of these options, by name; the command line overrides it.",
            is_eager=True,
            callback=read_config,
        ),
    ] = None,
    weight: Annotated[
        Optional[list[str]],
        typer.Option("--weight", metavar="NAME=X", help=f"A domain's share of the batches ({_JOINT}).  [default: 1]"),
    ] = None,
    layers: Annotated[
        int, typer.Option("--layers", min=1, help="The predictor reads this many first layers (distill).")
    ] = 12,
    backbone: Annotated[
        Optional[Path],
        typer.Option(
            "--backbone",
            metavar="FOLDER",
            help="A small mlx-lm model that the predictor reads with, instead of the first layers (distill).",
        ),
    ] = None,
    backbone_config: Annotated[
        Optional[str],
        typer.Option(
            "--backbone-config",
            metavar="FILE|small",
            help="Train a small model from random weights for the predictor to read with, by --iters steps of "
            "--batch-size chats: a config.json of mlx-lm's, or small, a llama of 4 layers and width 256; with the "
            "model's tokenizer (distill).",
        ),
    ] = None,
    pooling: Annotated[
        PoolingName,
        typer.Option("--pooling", help="The head reads the last token's hidden state, the mean, or both (distill)."),
    ] = PoolingName.both,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Width of the head's inner layer (distill).")] = 128,
    limit: Annotated[
        Optional[int],
        typer.Option(
            "--limit", min=1, help=f"Most chats of each domain.  [default: {_MEASURED} to measure; {_JOINT}: all]"
        ),
    ] = None,
    chats: Annotated[
        Optional[int],
        typer.Option(
            "--chats",
            min=1,
            help="Measure so many chats now, in steps of 64 and of all domains alike (calibrate, distill); the same "
            "command with more, or without this, goes on from there.  [default: all]",
        ),
    ] = None,
    predictor: Annotated[
        Optional[Path],
        typer.Option(
            "--predictor",
            metavar="FOLDER",
            help=f"Predictor to begin with ({_JOINT}).  [default: that of --start, else the checkpoint's]",
        ),
    ] = None,
    start: Annotated[
        Optional[Path],
        typer.Option(
            "--start", metavar="FOLDER", help=f"Begin with an earlier run's adapters, prior and predictor ({_JOINT})."
        ),
    ] = None,
    selector: Annotated[
        Optional[list[ArmName]],
        typer.Option("--selector", help=f"An arm; repeatable ({_JOINT}).  [default: learned and static]"),
    ] = None,
    densities: Annotated[
        str,
        typer.Option(
            "--densities", metavar="LIST", help=f"Densities to draw from, such as 0.27,0.5 or 0.2-0.8 ({_JOINT})."
        ),
    ] = "0.5",
    iters: Annotated[int, typer.Option("--iters", min=1, help=f"Steps ({_JOINT}).")] = 1000,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences a step, over all processes.")] = 8,
    micro_batch_size: Annotated[
        int,
        typer.Option(
            "--micro-batch-size",
            min=1,
            help="Chats computed together: one, on its own neurons alone, or several, on all neurons with masks, which "
            "is meant for small models on a GPU. Changes speed and memory, and results by rounding alone.",
        ),
    ] = 1,
    fine_tune_type: Annotated[
        FineTuneType,
        typer.Option("--fine-tune-type", help=f"Train adapters, or whole weights of a float model ({_JOINT})."),
    ] = FineTuneType.lora,
    learning_rate: Annotated[
        Optional[float],
        typer.Option(
            "--learning-rate",
            min=0.0,
            help="Of the adapters or weights.  [default: 5e-4; full weights: 1e-4; --backbone-config: 1e-3]",
        ),
    ] = None,
    head_learning_rate: Annotated[
        float, typer.Option("--head-learning-rate", min=0.0, help="Of the predictor's head; 0 holds it still.")
    ] = 0.0,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Steps until the full learning rate.")] = 20,
    lora_rank: Annotated[int, typer.Option("--lora-rank", min=1, help="Rank of the adapters.")] = 16,
    lora_scale: Annotated[float, typer.Option("--lora-scale", help="Scale of the adapters.")] = 2.0,
    grad_checkpoint: Annotated[
        bool, typer.Option("--grad-checkpoint", help=f"Keep no activations: less memory, more time ({_JOINT}).")
    ] = False,
    teacher: Annotated[
        float,
        typer.Option("--teacher", min=0.0, max=1.0, help="Share of KL from the dense model in the loss; 0 is off."),
    ] = 0.5,
    epsilon: Annotated[float, typer.Option("--epsilon", help="Of soft top-k, where the head learns.")] = 0.1,
    max_seq_length: Annotated[
        int, typer.Option("--max-seq-length", min=16, help="Most tokens of a chat; pretrain: of two chunks.")
    ] = 256,
    held_out: Annotated[
        float, typer.Option("--held-out", min=0.0, max=0.9, help="Share of prompts that is never trained on.")
    ] = 0.15,
    steps_per_report: Annotated[int, typer.Option("--steps-per-report", min=1, help="Steps between reports.")] = 10,
    steps_per_eval: Annotated[int, typer.Option("--steps-per-eval", min=1, help="Steps between evaluations.")] = 200,
    eval_density: Annotated[
        Optional[float],
        typer.Option("--eval-density", min=0.0, max=1.0, help="Of evaluations.  [default: the last of --densities]"),
    ] = None,
    eval_prompts: Annotated[
        int,
        typer.Option("--eval-prompts", min=0, help="Held-out prompts a domain to evaluate on, at least 2; 0 is off."),
    ] = 10,
    save_every: Annotated[int, typer.Option("--save-every", min=1, help="Steps between states on disk.")] = 50,
    stop_on_collapse: Annotated[
        bool, typer.Option("--stop-on-collapse", help="End the run when the learned arm has collapsed.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at a bad line instead of leaving it out.")] = False,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            min=0,
            max=2**32 - 1,
            help="Of which chats are used, their order, the densities, and first weights.",
        ),
    ] = 0,
    dtype: DtypeOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train a predictor, and the model that it prunes.

    calibrate: measure how much answers need each neuron. distill: learn to tell that from the instruction. pretrain:
    heal the pruned model on plain text (the paper's stage 1). sft: heal it on chats (stage 2). The last two train the
    arms (learned, static, none) on the same batches. All resume where they were stopped.
    """
    import mlx.core as mx

    from ifprune_mlx import DataError
    from ifprune_mlx.train.gradient_check import check_kernels

    if eval_prompts == 1:
        raise DataError("--eval-prompts 1: a prompt needs another one to be compared with; give 0, or 2 and more")
    files = named_files(data or [])
    if not files:
        raise DataError("training needs data; give --data NAME=FILE.jsonl, once for every domain")
    loaded, tokenizer = load_model(model, dtype, trust_remote_code=False, trained=False)
    check_kernels(loaded)
    measuring = stage in (StageName.calibrate, StageName.distill)
    picked = _Picked(files, held_out, limit or (_MEASURED if measuring else None), seed, strict)
    began = time.perf_counter()
    group = mx.distributed.init()
    if measuring:
        _check_alone(group.size(), stage)
        reader = _backbone(loaded, layers, backbone, backbone_config)
        targets, instructions = _targets(
            loaded, tokenizer, picked, output, layers, reader, max_seq_length, chats, micro_batch_size
        )
        if stage is StageName.calibrate:
            result = _calibrate(targets, output)
        elif backbone_config is not None:
            result = _scratch(
                _Scratch(targets, instructions, backbone_config, output, steps_per_eval, save_every),
                tokenizer,
                iterations=iters,
                batch_size=batch_size,
                learning_rate=1e-3 if learning_rate is None else learning_rate,
                warmup=warmup,
                rank=rank,
                pooling=pooling.value,
                seed=seed,
            )
        else:
            result = _distill(targets, output, rank, pooling.value, backbone, seed)
    else:
        options = Paired(
            output=output,
            predictor=predictor,
            start=start,
            arms=tuple(arm.value for arm in selector or (ArmName.learned, ArmName.static)),
            densities=densities,
            iterations=iters,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            fine_tune_type=fine_tune_type.value,
            learning_rate=_LEARNING_RATES[fine_tune_type] if learning_rate is None else learning_rate,
            head_learning_rate=head_learning_rate,
            warmup=warmup,
            rank=lora_rank,
            scale=lora_scale,
            grad_checkpoint=grad_checkpoint,
            teacher=teacher,
            epsilon=epsilon,
            seed=seed,
            steps_per_report=steps_per_report,
            steps_per_eval=steps_per_eval,
            eval_density=eval_density,
            save_every=save_every,
            stop_on_collapse=stop_on_collapse,
        )
        encode = _chats if stage is StageName.sft else _chunks
        train_data = {name: encode(tokenizer, picked.records(name), max_seq_length) for name in files}
        valid_data = {}
        for name in files if eval_prompts else ():
            held = _held_out(tokenizer, picked.records(name, "valid"), max_seq_length, encode, eval_prompts)
            if len(held) > 1:
                valid_data[name] = held
            elif held_out:
                note(f"{name}: held out are {len(held)} prompts, too few to evaluate on; raise --held-out")
        result = run_paired(loaded, train_data, valid_data, named_weights(weight or [], set(files)), options)
    told = result.pop("told")
    if group.rank():
        return
    result = {"stage": stage.value, **result, "seconds": time.perf_counter() - began}
    if json:
        result_json(result)
        return
    print(result["path"])
    note(told)


class _Picked:
    """The records of every domain, in an order that the seed fixes."""

    def __init__(self, files: dict[str, Path], held_out: float, limit: int | None, seed: int, strict: bool) -> None:
        self.files, self._held_out, self._limit, self._seed, self._strict = files, held_out, limit, seed, strict
        self._read: dict[str, list[Record]] = {}

    def records(self, name: str, part: str = "train") -> list[Record]:
        """Up to the limit of one domain's records, of those to train on or of those held out."""
        from ifprune_mlx.data.dataloader import shuffled
        from ifprune_mlx.data.dataset import read_records, split

        if name not in self._read:
            self._read[name] = read_records(self.files[name], name, strict=self._strict, report=note)
        kept = [record for record in self._read[name] if split(record, self._held_out) == part]
        chosen = [kept[index] for index in shuffled(len(kept), f"{self._seed}-{name}")]
        return chosen if self._limit is None else chosen[: self._limit]


def _chats(tokenizer: TokenizerWrapper, records: list[Record], length: int) -> list[Encoded]:
    from ifprune_mlx.data.tokenize import encode_all

    return encode_all(tokenizer, records, length, note if len(records) > 1 else lambda line: None)


def _held_out(
    tokenizer: TokenizerWrapper, records: list[Record], length: int, encode: Encode, count: int
) -> list[Encoded]:
    """Up to `count` examples to evaluate on, of as many prompts or texts: a neighbouring chunk of the same text would
    be no mismatch."""
    from ifprune_mlx import DataError

    found: list[Encoded] = []
    once = {record.key: record for record in reversed(records)}
    for record in reversed(once.values()):
        if len(found) == count:
            break
        try:
            found += encode(tokenizer, [record], length)[:1]
        except DataError:  # nothing of it lies within the length
            continue
    return found


def _chunks(tokenizer: TokenizerWrapper, records: list[Record], length: int) -> list[Encoded]:
    """Pairs of neighbouring chunks of plain texts, each of half the length."""
    from ifprune_mlx import DataError
    from ifprune_mlx.data.tokenize import chunked

    pairs = [pair for record in records for pair in chunked(tokenizer, record, length // 2)]
    if not pairs:
        raise DataError(f"no text is longer than one chunk of {length // 2} tokens; give longer texts")
    return pairs


def named_weights(values: list[str], domains: set[str]) -> dict[str, float]:
    """The weights of `--weight NAME=X` options, by domain.

    Raises:
        DataError: if one is not of that form, or no such domain is trained on.
    """
    from ifprune_mlx import DataError

    weights: dict[str, float] = {}
    for value in values:
        name, _, number = value.partition("=")
        try:
            weights[name] = float(number)
        except ValueError:
            raise DataError(f"--weight {value}: expected NAME=X, such as code=2") from None
        if name not in domains:
            raise DataError(f"--weight {value}: there is no --data {name}=FILE")
    return weights


def _check_alone(processes: int, stage: StageName) -> None:
    from ifprune_mlx import DataError

    if processes > 1:
        raise DataError(f"--stage {stage.value} runs in one process; start it without mlx.launch")


def _backbone(loaded: Model, layers: int, folder: Path | None, config: str | None) -> Backbone | None:
    """A backbone of its own; None for the model's first layers, also where one is going to be trained."""
    from ifprune_mlx import DataError
    from ifprune_mlx.train.backbone import Backbone

    if folder is not None and config is not None:
        raise DataError("--backbone and --backbone-config contradict each other; give one of them")
    if folder is not None:
        return Backbone.load(folder)
    depth = len(loaded.layers)
    if layers > depth:
        raise DataError(f"--layers {layers}: the model has {depth}; give at most that")
    return None


def _targets(
    loaded: Model,
    tokenizer: TokenizerWrapper,
    picked: _Picked,
    output: Path,
    layers: int,
    backbone: Backbone | None,
    max_seq_length: int,
    count: int | None,
    together: int,
) -> tuple[Targets, list[str]]:
    """What was measured, and the instructions of the same chats."""
    from ifprune_mlx.train.attribution import measure

    domains = []
    for name in picked.files:
        domains.append(_chats(tokenizer, picked.records(name), max_seq_length))
        note(f"{name}: {len(domains[-1])} chats")
    # In turn, so that a run that is stopped early has measured every domain alike.
    longest = max(map(len, domains))
    ordered = [domain[index] for index in range(longest) for domain in domains if index < len(domain)]
    with progress("measure", "chats") as update:
        targets = measure(
            loaded, ordered, output / "targets", layers, update, count=count, backbone=backbone, at_once=together
        )
    return targets, [chat.instruction for chat in ordered[: len(targets.features)]]


def _calibrate(targets: Targets, output: Path) -> dict[str, Any]:
    from ifprune_mlx.train.priors import priors, save_prior

    measured = priors(targets)
    for name, prior in measured.items():
        save_prior(output / ("prior.safetensors" if name == "all" else f"prior-{name}.safetensors"), prior)
    return {
        "path": str(output / "prior.safetensors"),
        "chats": len(targets.features),
        "domains": sorted(set(targets.domains)),
        "told": f"{len(targets.features)} chats; put it into a checkpoint with: ifprune convert --prior FILE",
    }


def _distill(
    targets: Targets, output: Path, rank: int, pooling: str, backbone: Path | None, seed: int
) -> dict[str, Any]:
    from ifprune_mlx.train.backbone import copy_backbone
    from ifprune_mlx.train.distill import distill

    fit = distill(targets, rank=rank, pooling=pooling, seed=seed)
    folder = output / "predictor"
    folder.mkdir(parents=True, exist_ok=True)
    if backbone is not None:
        copy_backbone(backbone, folder)
    fit.head.save(folder / "head.safetensors")
    size = fit.head.first.size + fit.head.second.size + sum(fit.head.widths)
    explained = fit.explained[fit.penalty]
    result = {
        "path": str(folder),
        "chats": len(targets.features),
        "parameters": size,
        "pooling": pooling,
        "penalty": fit.penalty,
        "explained": explained,
    }
    with (output / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
        metrics.write(encoder.dumps(result | {"by_penalty": fit.explained}) + "\n")
    told = (
        f"{len(targets.features)} chats, {parameters(size)} parameters; of what differs between held-out answers it "
        f"predicts {100 * explained:.1f} %"
    )
    return result | {"told": told}


@dataclass(frozen=True)
class _Scratch:
    """What a backbone is trained on from scratch, and where."""

    targets: Targets
    instructions: list[str]
    config: str
    output: Path
    steps_per_eval: int
    save_every: int


def _scratch(given: _Scratch, tokenizer: TokenizerWrapper, **settings_of: Any) -> dict[str, Any]:
    from ifprune_mlx.train.distill import distill
    from ifprune_mlx.train.scratch import ScratchRun, Settings, backbone_config, train_scratch

    settings, targets, output = Settings(**settings_of), given.targets, given.output
    config = backbone_config(given.config, tokenizer)
    run = ScratchRun(targets, given.instructions, config, tokenizer, settings, output)
    fit = distill(targets, rank=settings.rank, pooling=settings.pooling, held_out=settings.held_out, seed=settings.seed)
    ridge = fit.explained[fit.penalty]
    note(f"a ridge on the first {targets.layers} layers explains {100 * ridge:.1f} % between answers held out")
    with progress("train", "steps") as update:
        found = train_scratch(
            run, steps_per_eval=given.steps_per_eval, save_every=given.save_every, progress=update, report=note
        )
    told = (
        f"{len(targets.features)} chats, {parameters(found.parameters)} parameters; of what differs between held-out "
        f"answers it predicts {100 * found.explained:.1f} % (after step {found.step}), a ridge on the first "
        f"{targets.layers} layers {100 * ridge:.1f} %"
    )
    return {
        "path": str(output / "predictor"),
        "chats": len(targets.features),
        "parameters": found.parameters,
        "pooling": settings.pooling,
        "explained": found.explained,
        "best_step": found.step,
        "ridge_explained": ridge,
        "told": told,
    }
