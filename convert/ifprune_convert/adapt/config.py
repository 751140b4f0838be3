"""The settings of `ifprune adapt`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import mlx.core as mx

from ifprune_mlx.checkpoint.density_curve import TOLERANCE, check_tolerance
from ifprune_mlx.checkpoint.format import Quantization
from ifprune_mlx.errors import DataError, IfpruneError
from ifprune_mlx.eval.metrics import POOLED

Stage = Literal["convert", "answers", "calibrate", "distill", "select", "heal", "evaluate"]
STAGES: tuple[Stage, ...] = get_args(Stage)
_MOST_HOURS = 24 * 365


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """What `adapt` makes of which model, in which time.

    Attributes:
        model: a GGUF file, a folder of safetensors, or a model of the hub, as `ifprune convert` takes them.
        output: folder of the checkpoint. The stages lie in `OUTPUT.adapt` beside it.
        data: files of prompts by domain: chats whose answers are not looked at, or plain texts; none: those that ship.
        hours: working time for all stages together, kills and pauses not counted.
        memory: the most bytes that the weights may take; None is what this machine has for them.
        until: the last stage to do; the checkpoint is usable from `calibrate` on.
        tolerance: nats per answer token that the default density may lose.
        quantization, dtype, revision, trust_remote_code: as in `ifprune_convert.pipeline.Options`.
        overwrite: replace an earlier checkpoint.
        upload_repo: new or empty repository of the hub for the result, `OWNER/NAME`.
        max_seq_length: most tokens of a chat; None: as the time allows.
        seed: of every random choice.

    Raises:
        IfpruneError: for a value out of range, naming its option.
    """

    model: str | Path
    output: Path
    data: Mapping[str, Path] = field(default_factory=dict)
    hours: float = 8.0
    memory: int | None = None
    until: Stage = "evaluate"
    tolerance: float = TOLERANCE
    quantization: Quantization | None = None
    dtype: mx.Dtype | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    overwrite: bool = False
    upload_repo: str | None = None
    max_seq_length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.hours) and 0 < self.hours <= _MOST_HOURS):
            raise IfpruneError(f"--hours {self.hours:g}: give a number above 0, such as 0.5 or 8")
        check_tolerance(self.tolerance)
        if not self.output.name:
            raise IfpruneError(f"--mlx-path {self.output}: give the name of a folder, such as my-model")
        if self.until not in STAGES:
            raise IfpruneError(f"--stages {self.until}: choose from {', '.join(STAGES)}")
        for name, file in self.data.items():
            if re.fullmatch(r"\w[\w-]*", name) is None:
                raise DataError(f"--data {name}={file}: name the domain with letters, digits and -")
            if name == POOLED:
                raise DataError(f"--data {name}={file}: reports call all domains together so; choose another name")
            if not Path(file).is_file():
                raise DataError(f"--data {name}={file}: no such file; give JSON lines of prompts")

    @property
    def work(self) -> Path:
        """The folder of the stages."""
        return self.output.with_name(f"{self.output.name}.adapt")

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Those to do, in order."""
        return STAGES[: STAGES.index(self.until) + 1]

    @property
    def identity(self) -> dict[str, Any]:
        """What may not change when the same command goes on; hours, memory, tolerance and the last stage may. Which
        revision of the model it is, the job's record of its source says."""
        return {
            "model": str(self.model),
            "data": {name: str(file) for name, file in self.data.items()},
            "quantization": None if self.quantization is None else self.quantization.to_dict(),
            "dtype": None if self.dtype is None else str(self.dtype),
            "max_seq_length": self.max_seq_length,
            "seed": self.seed,
        }


def last_stage(named: str | None) -> Stage:
    """The last of the stages in a list with commas, as `--stages` takes them; those before it are done as well.

    Raises:
        IfpruneError: if one is unknown.
    """
    if named is None:
        return STAGES[-1]
    names = [name.strip() for name in named.split(",")]
    for name in names:
        if name not in STAGES:
            raise IfpruneError(f"--stages {named}: {name or 'nothing'} is no stage; choose from {', '.join(STAGES)}")
    return max((stage for stage in STAGES if stage in names), key=STAGES.index)


def read_layers(layers: int) -> int:
    """How many first layers the predictor reads with; those behind them are healed."""
    return max(1, layers * 2 // 5)
