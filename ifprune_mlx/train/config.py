"""All settings of a training run, in one dataclass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from ifprune_mlx.checkpoint.regular_file import read_bounded
from ifprune_mlx.errors import DataError, IfpruneError, reason_of

Stage = Literal["calibrate", "distill", "pretrain", "sft"]
ArmName = Literal["learned", "static", "static-learned", "none"]
Pooling = Literal["last", "mean", "both"]
FineTuneType = Literal["lora", "full", "none"]
Dtype = Literal["float16", "bfloat16", "float32"]
ARMS: tuple[ArmName, ...] = get_args(ArmName)
_CHOICES = {"stage": Stage, "pooling": Pooling, "fine_tune_type": FineTuneType, "dtype": Dtype}
_COUNTS = (
    *("layers", "rank", "limit", "chats", "iters", "batch_size", "micro_batch_size", "lora_rank", "num_layers"),
    *("steps_per_report", "steps_per_eval", "save_every"),
)
BOUNDS: dict[str, tuple[type, float, float]] = {
    **dict.fromkeys(_COUNTS, (int, 1, math.inf)),
    **dict.fromkeys(("warmup", "eval_prompts"), (int, 0, math.inf)),
    **dict.fromkeys(("learning_rate", "head_learning_rate", "scores_learning_rate"), (float, 0, math.inf)),
    **dict.fromkeys(("gain_learning_rate", "clip", "margin"), (float, 0, math.inf)),
    **dict.fromkeys(("head_start", "teacher", "eval_density"), (float, 0, 1)),
    "held_out": (float, 0, 0.9),
    "lora_scale": (float, -math.inf, math.inf),
    "epsilon": (float, 1e-6, math.inf),
    "max_seq_length": (int, 16, math.inf),
    "seed": (int, 0, 2**32 - 1),
}
"""The type of every number, its least and its largest value."""
_OBJECTIVE = dict.fromkeys(
    ("teacher", "epsilon", "margin"), "give a teacher from 0 to 1, an epsilon above 0 and a margin of 0 or more"
)
_LARGEST_YAML, _MOST_ITEMS = 1 << 16, 100  # bytes of a file, items of one of its lists
_LEARNING_RATES = {"lora": 5e-4, "full": 1e-4, "none": 0.0}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of `ifprune_mlx.train.train`, named as the options of `ifprune train`; paths may be text.

    A resumed run must have the settings that `identity` holds, `lora_rank`, `lora_scale`, `num_layers`, and the same
    model, data and `start`. It may change all others, such as `micro_batch_size`, `grad_checkpoint`, `save_every` and
    the evaluation.

    Raises:
        DataError: if a setting is out of range, naming it.
    """

    output: Path  # folder that everything is written to
    data: Mapping[str, Path]  # JSON lines by domain: chats, or texts for pretrain
    model: str | Path | None = None  # IFP checkpoint, a folder or a hub id
    stage: Stage = "distill"
    dtype: Dtype | None = None  # float type to cast the model's weights to; None keeps the checkpoint's
    seed: int = 0  # of the records used, their order, the densities, and first weights
    micro_batch_size: int = 1  # sequences computed together

    weight: Mapping[str, float] = field(default_factory=dict)  # shares of the domains in the batches; 1 if not given
    limit: int | None = None  # most records of each domain; None: 2000 for calibrate and distill, else all
    held_out: float = 0.15  # share of the prompts that is never trained on
    max_seq_length: int = 256  # most tokens of a chat, or of the two chunks of a text
    strict: bool = False  # raise at a bad line of data instead of leaving it out
    ignore_chat_template: bool = False  # read chats as plain text that the model continues

    # calibrate and distill
    layers: int = 12  # first layers of the model that the predictor reads with
    backbone: Path | None = None  # small mlx-lm model for the predictor to read with, instead of the first layers
    pooling: Pooling = "both"  # the head reads the last token's hidden state, the mean over tokens, or both
    rank: int = 128  # width of the head's inner layer
    chats: int | None = None  # measure only so many chats for now; None: all

    # pretrain and sft
    selector: tuple[ArmName, ...] = ("learned", "static")  # the arms
    predictor: Path | None = None  # folder of the predictor to begin with; None: that of start, or the checkpoint's
    scores: Path | None = None  # file of scores that static-learned begins with; None: that of start, or the prior
    start: Path | None = None  # folder of an earlier run whose adapters, prior and predictor the arms begin with
    densities: str = "0.5"  # numbers and ranges, such as 0.27,0.2-0.8; a sequence draws from one, each as likely
    fine_tune_type: FineTuneType = "lora"  # train adapters, whole weights, or neither
    lora_rank: int = 16
    lora_scale: float = 2.0
    num_layers: int | None = None  # so many of the last layers get adapters; None: all
    teacher: float = 0.5  # share of KL(dense base model || arm) in the loss, the rest is cross-entropy; 0: no teacher
    epsilon: float = 0.1  # of the soft top-k whose gradient the head learns by, in the unit of the scores
    margin: float = 0.25  # neurons beyond the k chosen that a learning head sees the gradient of, as a share of k
    iters: int = 1000  # steps
    batch_size: int = 8  # sequences of a step, over all processes
    learning_rate: float | None = None  # at its peak, of adapters or weights; None: 5e-4, whole weights 1e-4
    head_learning_rate: float = 0.0  # at its peak, of the predictor's head; 0 keeps the head as it is
    scores_learning_rate: float = 0.0  # at its peak, of the scores of static-learned, and of the head's bias if above 0
    gain_learning_rate: float = 0.0  # at its peak, of a gain for every neuron of the arms that choose; 0: no gains
    head_start: float = 0.2  # share of the steps before head and scores begin to learn, so that weights settle
    warmup: int = 20  # steps until the peak; then the rate falls by a cosine to a tenth
    clip: float = 1.0  # largest global norm of a gradient
    grad_checkpoint: bool = False  # recompute activations in the backward pass: less memory, more time
    steps_per_report: int = 10
    steps_per_eval: int = 200
    eval_data: Mapping[str, Path] = field(default_factory=dict)  # held-out chats by domain; none: those of data
    eval_density: float | None = None  # None: the middle of the last of densities
    eval_prompts: int = 10  # held-out prompts of each domain to evaluate on, at least 2; 0 is off
    save_every: int = 50  # steps between states on disk
    stop_on_collapse: bool = False  # end the run when the learned arm has collapsed

    def __post_init__(self) -> None:
        if not self.data or not isinstance(self.data, Mapping):
            raise DataError("training needs data; give --data NAME=FILE.jsonl, once for every domain")
        self._convert()
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in get_args(choices) and not (name == "dtype" and value is None):
                raise DataError(f"{_flag(name)} {value}: give one of {', '.join(get_args(choices))}")
        unknown = [name for name in self.selector if name not in ARMS]
        if unknown or not self.selector or len(set(self.selector)) < len(self.selector):
            raise DataError(f"arms {', '.join(self.selector) or 'none'}: give each of {', '.join(ARMS)} at most once")
        for low, high in self.density_ranges:
            if not 0 < low <= high <= 1:
                raise DataError(f"density {low:g} to {high:g}: give numbers above 0 and at most 1, the lower first")
        for name in self.weight:
            if name not in self.data:
                raise DataError(f"--weight {name}: there is no --data {name}=FILE")
        if self.eval_prompts == 1:
            raise DataError("--eval-prompts 1: a prompt needs another one to be compared with; give 0, or 2 and more")

    def _convert(self) -> None:
        """Give every value its type: YAML and Python callers may give text for numbers and folders.

        Raises:
            DataError: if a value cannot be read, or a number is out of range.
        """
        self._convert_numbers()
        self._convert_files()
        for name in ("strict", "ignore_chat_template", "grad_checkpoint", "stop_on_collapse"):
            if not isinstance(getattr(self, name), bool):
                raise DataError(f"{_flag(name)} {getattr(self, name)}: give true or false")
        arms = self.selector if isinstance(self.selector, list | tuple) else (self.selector,)
        object.__setattr__(self, "selector", tuple(str(arm) for arm in arms))

    def _convert_numbers(self) -> None:
        for name, (kind, least, most) in BOUNDS.items():
            value = getattr(self, name)
            if value is None and type(self).__dataclass_fields__[name].default is None:
                continue
            try:
                number = kind(value)
                if kind is int and number != float(value):
                    raise ValueError
            except (OverflowError, TypeError, ValueError) as exc:
                raise DataError(f"{_flag(name)} {value}: give a {'whole ' * (kind is int)}number") from exc
            if not (least <= number <= most and math.isfinite(number)):
                bounds = f"give at least {least:g}" + ("" if most == math.inf else f" and at most {most:g}")
                raise DataError(f"{_flag(name)} {value}: {_OBJECTIVE.get(name, bounds)}")
            object.__setattr__(self, name, number)
        if not isinstance(self.weight, Mapping):
            raise DataError(f"--weight {self.weight}: expected NAME=X, such as code=2")
        shares = {}
        for name, share in self.weight.items():
            try:
                shares[name] = float(share)
            except (OverflowError, TypeError, ValueError) as exc:
                raise DataError(f"--weight {name}: expected NAME=X, such as {name}=2") from exc
        object.__setattr__(self, "weight", shares)

    def _convert_files(self) -> None:
        for name in ("output", "backbone", "predictor", "scores", "start"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _path(name, getattr(self, name)))
        if not isinstance(self.eval_data, Mapping):
            raise DataError(f"--eval-data {self.eval_data}: expected NAME=FILE, such as code=code.jsonl")
        for name in ("data", "eval_data"):
            files = {domain: _path(name, file) for domain, file in getattr(self, name).items()}
            object.__setattr__(self, name, files)

    @classmethod
    def from_yaml(cls, file: Path, **changes: Any) -> TrainConfig:
        """The settings of a YAML file, by name, with `-` or `_` in names.

        Args:
            changes: settings that replace the file's.

        Raises:
            IfpruneError: if the file cannot be read, or is no YAML mapping.
            DataError: if a name is unknown, `output` or `data` is missing, or a value is out of range.
        """
        given = {**read_yaml(file), **changes}
        for name in given.keys() - {each.name for each in fields(cls)}:
            raise DataError(f"{file}: {name} is no setting of training; ifprune_mlx.train.TrainConfig lists them")
        if isinstance(given.get("densities"), list):
            given["densities"] = ",".join(map(str, given["densities"]))
        try:
            return cls(**{name: value for name, value in given.items() if value is not None})
        except TypeError as exc:
            raise DataError(f"{file}: has no output or no data; both are needed") from exc

    @property
    def measures(self) -> bool:
        """Whether the stage measures chats, as `calibrate` and `distill` do; the others train arms."""
        return self.stage in ("calibrate", "distill")

    @property
    def density_ranges(self) -> tuple[tuple[float, float], ...]:
        """`densities` as (lowest, highest) of every range."""
        ranges = []
        for part in str(self.densities).split(","):
            low, dash, high = part.strip().partition("-")
            try:
                ranges.append((float(low), float(high if dash else low)))
            except ValueError as exc:
                raise DataError(
                    f"--densities {self.densities}: expected numbers or ranges, such as 0.27,0.5 or 0.2-0.8"
                ) from exc
        return tuple(ranges)

    @property
    def settled(self) -> float:
        """`head_start`; 0 where the weights are held still."""
        return 0.0 if self.fine_tune_type == "none" else self.head_start

    @property
    def peak_learning_rate(self) -> float:
        """`learning_rate`, or the default of the fine-tune type."""
        return _LEARNING_RATES[self.fine_tune_type] if self.learning_rate is None else self.learning_rate

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that a resumed run must repeat, as its state on disk holds them."""
        settings = {
            "arms": self.selector,
            "iterations": self.iters,
            "batch_size": self.batch_size,
            "learning_rate": self.peak_learning_rate,
            "head_learning_rate": self.head_learning_rate,
            "head_start": self.head_start,
            "warmup": self.warmup,
            "clip": self.clip,
            "densities": self.density_ranges,
            "seed": self.seed,
        }
        # Left out where they are off, so that runs of releases without them go on.
        for name in ("scores_learning_rate", "gain_learning_rate"):
            if getattr(self, name):
                settings[name] = getattr(self, name)
        objective = {"teacher": self.teacher, "epsilon": self.epsilon, "margin": self.margin}
        return {"settings": settings, "objective": objective}


def read_yaml(file: Path) -> dict[str, Any]:
    """The settings that a YAML file holds, by name; `-` in names becomes `_`.

    Settings are values, lists of values, or mappings of names to values; names are taken as they are written.

    Raises:
        IfpruneError: if the file cannot be read, is no YAML mapping, or holds anything else.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        loader = yaml.SafeLoader(read_bounded(file, _LARGEST_YAML).decode("utf-8-sig"))
        # Only single values are built by PyYAML: what repeats itself by anchors and merges would fill the memory.
        root = loader.get_single_node()
        if root is None or root.id != "mapping":
            raise ValueError("must hold options by name, such as learning_rate: 5e-4")
        settings: dict[str, Any] = {}
        for key, node in root.value:
            name = _yaml_text(key).replace("-", "_")
            if name in settings:
                raise ValueError(f"{name} is there twice")
            settings[name] = _yaml_value(node, loader)
    except OSError as exc:
        raise IfpruneError(f"{file}: cannot be read ({reason_of(exc)})") from exc
    except Exception as exc:  # PyYAML raises whatever reading a number or a date meets
        raise IfpruneError(f"{file}: is no YAML of options ({reason_of(exc)})") from exc
    return settings


def _yaml_value(node: Any, loader: Any, within: bool = False) -> Any:
    line = f"line {node.start_mark.line + 1}"
    if node.id == "scalar":
        _yaml_text(node)
        value = loader.construct_object(node)
        if isinstance(value, int) and value.bit_length() > 64:
            raise ValueError(f"{line}: a number that no option can have")
        return value
    if within or node.tag not in ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map") or len(node.value) > _MOST_ITEMS:
        raise ValueError(f"{line}: a list or mapping within another, of a type of its own, or too long")
    if node.id == "sequence":
        return [_yaml_value(item, loader, True) for item in node.value]
    return {_yaml_text(key): _yaml_value(item, loader, True) for key, item in node.value}


def _yaml_text(node: Any) -> str:
    """The text of a single value; ValueError for anything else, and for characters that no option can have."""
    text = node.value
    if not isinstance(text, str) or any(char < " " or "\ud800" <= char <= "\udfff" for char in text):
        raise ValueError(f"line {node.start_mark.line + 1}: a name or value that no option can have")
    return text


def _path(name: str, value: Any) -> Path:
    if not isinstance(value, str | Path):
        raise DataError(f"{_flag(name)} {value}: give a file or a folder by name")
    return Path(value)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
