"""The options of `ifprune train`; their bounds and defaults are those of `TrainConfig`."""

from __future__ import annotations

import math
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ifprune_mlx.train.config import BOUNDS, FineTuneType, Pooling, Stage, read_yaml


class ArmChoice(str, Enum):
    """The arms of a run; typer takes no list of literals."""

    learned = "learned"
    static = "static"
    static_learned = "static-learned"
    none = "none"


HEALING = "pretrain and sft"
RUN, DATA, PREDICTOR = "Output and run", "Data", "Predictor"
ARMS, OPTIMIZER, REPORTS = "Healing", "Optimizer", "Reports and evaluation"


def _option(name: str, panel: str, help: str, **more: Any) -> Any:
    """The option of a setting, under a heading of `--help`."""
    kind, least, most = BOUNDS.get(name, (str, -math.inf, math.inf))
    bounds = {key: kind(bound) for key, bound in (("min", least), ("max", most)) if math.isfinite(bound)}
    flags = more.pop("flags", (f"--{name.replace('_', '-')}",))
    return typer.Option(*flags, rich_help_panel=panel, help=help, **{**bounds, **more})


def read_config(context: typer.Context, value: Optional[Path]) -> Optional[Path]:
    """Take the options' defaults from a YAML file.

    Raises:
        IfpruneError: if the file cannot be read, or names an option that does not exist.
    """
    if value is None:
        return None
    from ifprune_mlx import IfpruneError

    options = {parameter.name: parameter for parameter in context.command.params if parameter.name != "config"}
    defaults: dict[str, Any] = {}
    for name, given in read_yaml(value).items():
        if name not in options:
            flag = name.replace("_", "-")
            raise IfpruneError(f"{value}: {flag} is no option of ifprune train; see --help for those that are")
        defaults[name] = _as_given(given, multiple=options[name].multiple)
    context.default_map = {**(context.default_map or {}), **defaults}
    return value


def _as_given(value: Any, *, multiple: bool) -> Any:
    """A value of the file as the command line would give it. Mappings hold domains and weights."""
    if isinstance(value, dict):
        return [f"{key}={item}" for key, item in value.items()]
    if isinstance(value, list):
        return [str(item) for item in value] if multiple else ",".join(str(item) for item in value)
    if value is None or (isinstance(value, bool) and not multiple):
        return value
    return [str(value)] if multiple else str(value)


# typer reads these at run time, so they are spelled for Python 3.10.
Output = Annotated[Path, _option("output", RUN, "Write everything to this folder.", metavar="FOLDER")]
StageName = Annotated[Stage, _option("stage", RUN, "Run this stage of training.")]
Config = Annotated[
    Optional[Path],
    _option(
        "config",
        RUN,
        "Read these options, by name, from a YAML file; the command line overrides it.",
        flags=("--config", "-c"),
        metavar="FILE",
        is_eager=True,
        callback=read_config,
    ),
]
Seed = Annotated[int, _option("seed", RUN, "Seed which chats are used, their order, the densities, and first weights.")]
MicroBatchSize = Annotated[
    int,
    _option(
        "micro_batch_size",
        RUN,
        "Compute this many chats together: one, on its own neurons alone, or several, on all neurons with masks, which "
        "is meant for small models on a GPU. Changes speed and memory, and results by rounding alone.",
    ),
]
Json = Annotated[bool, _option("json", RUN, "Print one JSON object.")]

Data = Annotated[
    Optional[list[str]],
    _option(
        "data",
        DATA,
        "Read a domain's chats from JSON lines with messages, or with prompt and completion; for pretrain, texts with "
        "text; repeatable.",
        metavar="NAME=FILE",
    ),
]
Weight = Annotated[
    Optional[list[str]],
    _option("weight", DATA, f"Give a domain this share of the batches ({HEALING}).  [default: 1]", metavar="NAME=X"),
]
Limit = Annotated[
    Optional[int],
    _option("limit", DATA, f"Use at most this many chats of each domain.  [default: 2000 to measure; {HEALING}: all]"),
]
MaxSeqLength = Annotated[
    int, _option("max_seq_length", DATA, "Cut chats off after this many tokens; for pretrain, of two chunks.")
]
HeldOut = Annotated[float, _option("held_out", DATA, "Never train on this share of the prompts.")]
IgnoreChatTemplate = Annotated[
    bool, _option("ignore_chat_template", DATA, "Read chats as plain text that the model continues.")
]
Strict = Annotated[bool, _option("strict", DATA, "Stop at a bad line instead of leaving it out.")]

Layers = Annotated[int, _option("layers", PREDICTOR, "Let the predictor read this many first layers (distill).")]
Backbone = Annotated[
    Optional[Path],
    _option(
        "backbone",
        PREDICTOR,
        "Let the predictor read with this small mlx-lm model instead of the first layers (distill).",
        metavar="FOLDER",
    ),
]
PoolingName = Annotated[
    Pooling,
    _option("pooling", PREDICTOR, "Let the head read the last token's hidden state, the mean, or both (distill)."),
]
Rank = Annotated[int, _option("rank", PREDICTOR, "Give the head's inner layer this width (distill).")]
Chats = Annotated[
    Optional[int],
    _option(
        "chats",
        PREDICTOR,
        "Measure this many chats now, in steps of 64 and of all domains alike (calibrate, distill); the same command "
        "with more, or without this, goes on from there.  [default: all]",
    ),
]

Predictor = Annotated[
    Optional[Path],
    _option(
        "predictor",
        ARMS,
        f"Begin with this predictor ({HEALING}).  [default: that of --start, else the checkpoint's]",
        metavar="FOLDER",
    ),
]
Scores = Annotated[
    Optional[Path],
    _option(
        "scores",
        ARMS,
        f"Begin the arm static-learned with these scores, a prior's file ({HEALING}).  [default: that of --start, else "
        "the static arm's]",
        metavar="FILE",
    ),
]
Start = Annotated[
    Optional[Path],
    _option(
        "start",
        ARMS,
        f"Begin with an earlier run's adapters, prior and predictor ({HEALING}).",
        metavar="FOLDER",
    ),
]
Selector = Annotated[
    Optional[list[ArmChoice]],
    _option("selector", ARMS, f"Train this arm; repeatable ({HEALING}).  [default: learned and static]"),
]
Densities = Annotated[
    str,
    _option("densities", ARMS, f"Draw densities from these, such as 0.27,0.5 or 0.2-0.8 ({HEALING}).", metavar="LIST"),
]
FineTuneTypeName = Annotated[
    FineTuneType,
    _option(
        "fine_tune_type",
        ARMS,
        f"Train adapters, whole weights of a float model, or hold the model still with none ({HEALING}).",
    ),
]
LoraRank = Annotated[int, _option("lora_rank", ARMS, "Give the adapters this rank.")]
LoraScale = Annotated[float, _option("lora_scale", ARMS, "Give the adapters this scale.")]
NumLayers = Annotated[
    Optional[int],
    _option(
        "num_layers",
        ARMS,
        "Give adapters to this many last layers. Where they are behind those that the predictor reads with, it goes on "
        "reading what it was trained on.  [default: all]",
    ),
]
Teacher = Annotated[
    float, _option("teacher", ARMS, "Weigh KL from the dense model in the loss by this share; 0 is off.")
]
Epsilon = Annotated[
    float, _option("epsilon", ARMS, "Let the head learn through soft top-k with this epsilon.", min=None)
]

Iters = Annotated[int, _option("iters", OPTIMIZER, f"Train for this many steps ({HEALING}).")]
BatchSize = Annotated[int, _option("batch_size", OPTIMIZER, "Take this many sequences a step, over all processes.")]
LearningRate = Annotated[
    Optional[float],
    _option(
        "learning_rate",
        OPTIMIZER,
        "Train adapters or weights at this rate.  [default: 5e-4; full weights: 1e-4]",
    ),
]
HeadLearningRate = Annotated[
    float, _option("head_learning_rate", OPTIMIZER, "Train the predictor's head at this rate; 0 holds it still.")
]
ScoresLearningRate = Annotated[
    float,
    _option("scores_learning_rate", OPTIMIZER, "Train the scores of static-learned at this rate; 0 holds them still."),
]
GainLearningRate = Annotated[
    float,
    _option("gain_learning_rate", OPTIMIZER, "Train a gain for every neuron at this rate; 0: no gains."),
]
Warmup = Annotated[int, _option("warmup", OPTIMIZER, "Reach the full learning rate after this many steps.")]
GradCheckpoint = Annotated[
    bool, _option("grad_checkpoint", OPTIMIZER, f"Keep no activations: less memory, more time ({HEALING}).")
]

StepsPerReport = Annotated[int, _option("steps_per_report", REPORTS, "Report after every so many steps.")]
StepsPerEval = Annotated[int, _option("steps_per_eval", REPORTS, "Evaluate after every so many steps.")]
EvalData = Annotated[
    Optional[list[str]],
    _option(
        "eval_data",
        REPORTS,
        "Evaluate on a domain's chats from this file instead, such as of sources that are not trained on; repeatable.",
        metavar="NAME=FILE",
    ),
]
EvalDensity = Annotated[
    Optional[float],
    _option("eval_density", REPORTS, "Evaluate at this density.  [default: the last of --densities]"),
]
EvalPrompts = Annotated[
    int,
    _option("eval_prompts", REPORTS, "Evaluate on this many held-out prompts a domain, at least 2; 0 is off."),
]
SaveEvery = Annotated[int, _option("save_every", REPORTS, "Save the state after every so many steps.")]
StopOnCollapse = Annotated[
    bool, _option("stop_on_collapse", REPORTS, "End the run when the learned arm has collapsed.")
]
