"""`ifprune train`: trains a sparsity predictor and the model that it prunes, stage by stage."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ifprune_mlx.train.config import TrainConfig

from . import train_options as options
from .console import interrupt_seen, note, parameters, progress, result_json, show
from .loading import checkpoint_path
from .options import DtypeOption, ModelOption, named_files

if TYPE_CHECKING:
    from ifprune_mlx.train import TrainResult


def train(
    output: options.Output,
    data: options.Data = None,
    model: ModelOption = None,
    stage: options.StageName = TrainConfig.stage,
    config: options.Config = None,
    weight: options.Weight = None,
    layers: options.Layers = TrainConfig.layers,
    backbone: options.Backbone = None,
    pooling: options.PoolingName = TrainConfig.pooling,
    rank: options.Rank = TrainConfig.rank,
    limit: options.Limit = None,
    chats: options.Chats = None,
    predictor: options.Predictor = None,
    scores: options.Scores = None,
    start: options.Start = None,
    selector: options.Selector = None,
    densities: options.Densities = TrainConfig.densities,
    iters: options.Iters = TrainConfig.iters,
    batch_size: options.BatchSize = TrainConfig.batch_size,
    micro_batch_size: options.MicroBatchSize = TrainConfig.micro_batch_size,
    fine_tune_type: options.FineTuneTypeName = TrainConfig.fine_tune_type,
    learning_rate: options.LearningRate = None,
    head_learning_rate: options.HeadLearningRate = TrainConfig.head_learning_rate,
    scores_learning_rate: options.ScoresLearningRate = TrainConfig.scores_learning_rate,
    gain_learning_rate: options.GainLearningRate = TrainConfig.gain_learning_rate,
    warmup: options.Warmup = TrainConfig.warmup,
    lora_rank: options.LoraRank = TrainConfig.lora_rank,
    lora_scale: options.LoraScale = TrainConfig.lora_scale,
    num_layers: options.NumLayers = None,
    grad_checkpoint: options.GradCheckpoint = False,
    teacher: options.Teacher = TrainConfig.teacher,
    epsilon: options.Epsilon = TrainConfig.epsilon,
    max_seq_length: options.MaxSeqLength = TrainConfig.max_seq_length,
    held_out: options.HeldOut = TrainConfig.held_out,
    steps_per_report: options.StepsPerReport = TrainConfig.steps_per_report,
    steps_per_eval: options.StepsPerEval = TrainConfig.steps_per_eval,
    eval_data: options.EvalData = None,
    eval_density: options.EvalDensity = None,
    eval_prompts: options.EvalPrompts = TrainConfig.eval_prompts,
    save_every: options.SaveEvery = TrainConfig.save_every,
    stop_on_collapse: options.StopOnCollapse = False,
    strict: options.Strict = False,
    ignore_chat_template: options.IgnoreChatTemplate = False,
    seed: options.Seed = TrainConfig.seed,
    dtype: DtypeOption = None,
    json: options.Json = False,
) -> None:
    """Train a predictor, and the model that it prunes.

    calibrate: measure how much answers need each neuron. distill: learn to tell that from the instruction. pretrain:
    heal the pruned model on plain text (the paper's stage 1). sft: heal it on chats (stage 2). The last two train the
    arms (learned, static, none) on the same batches. All resume where they were stopped.
    """
    settings = _config(**locals())
    with progress("loading", ""):
        result = _run(settings)
    if result is None:
        return
    if json:
        result_json(result.to_dict())
        return
    show(result.path)
    note(_summary(result, settings))


def _config(**given: Any) -> TrainConfig:
    """The settings that the options give; what is not given has `TrainConfig`'s default."""
    settings = {name: value for name, value in given.items() if value is not None and name not in ("config", "json")}
    for name in ("data", "eval_data"):
        settings[name] = named_files(settings.get(name, ()))
    weights = (value.partition("=") for value in settings.get("weight", ()))
    settings["weight"] = {name: share for name, _, share in weights}
    if "selector" in settings:
        settings["selector"] = [arm.value for arm in settings["selector"]]
    if "dtype" in settings:
        settings["dtype"] = settings["dtype"].value
    return TrainConfig(**settings)


def _run(config: TrainConfig) -> TrainResult | None:
    """Train; None on the processes of a shared run that print nothing."""
    model = checkpoint_path(None if config.model is None else str(config.model), trained=False)
    import mlx.core as mx

    from ifprune_mlx.train import train

    leads = mx.distributed.init().rank() == 0
    try:
        with interrupt_seen("stopping ..." if leads else None):
            result = train(replace(config, model=model), progress=progress, report=note)
    except KeyboardInterrupt:
        if leads:
            note(f"the same command goes on from what is in {config.output}")
        raise
    return result if leads else None


def _summary(result: TrainResult, config: TrainConfig) -> str:
    """A sentence for people: what was done, and what to do with it."""
    figures, path = result.figures, result.path
    if result.stage == "calibrate":
        return f"{figures['chats']} chats; put it into a checkpoint with: ifprune convert --prior FILE"
    if result.stage == "distill":
        return (
            f"{figures['chats']} chats, {parameters(figures['parameters'])} parameters; of what differs between "
            f"held-out answers it predicts {100 * figures['explained']:.1f} %"
        )
    summary = f"{figures['steps']} steps, {figures['tokens']} tokens an arm"
    if "learned" not in config.selector:
        return summary
    return (
        f"{summary}; convert with --predictor {path}/predictor --adapter {path}/adapters/learned --prior "
        f"{path}/prior.safetensors"
    )
