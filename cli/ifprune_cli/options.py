"""Options that several commands share, once; named as in mlx-lm where they mean the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from .completion import task_names

if TYPE_CHECKING:
    from ifprune_mlx import Model


class SelectorName(str, Enum):
    """The selectors that can be asked for by name."""

    learned = "learned"
    activation = "activation"
    static = "static"
    random = "random"


class DtypeName(str, Enum):
    """Float types, in mlx-lm's names."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class ResidencyName(str, Enum):
    """Where neurons are that are not active."""

    ram = "ram"
    ssd = "ssd"


class PolicyName(str, Enum):
    """When a conversation selects anew."""

    first = "first"
    turn = "turn"
    auto = "auto"


class OnSwitchName(str, Enum):
    """What becomes of the history when the selection changes."""

    reprefill = "reprefill"
    keep = "keep"


# typer reads these at run time, so they are spelled for Python 3.10.
ModelOption = Annotated[
    Optional[str],
    typer.Option(
        "--model",
        metavar="FOLDER|HUB_ID",
        help="An IFP checkpoint; left out, the embedded SmolLM2-135M-Instruct (fetched and converted at first use).",
    ),
]
DtypeOption = Annotated[
    Optional[DtypeName], typer.Option("--dtype", help="Float type to cast the weights to.  [default: the checkpoint's]")
]
SelectorOption = Annotated[
    Optional[SelectorName],
    typer.Option("--selector", help="What chooses the neurons.  [default: the checkpoint's]"),
]
SelectionOption = Annotated[
    Optional[Path], typer.Option("--selection", metavar="FILE", help="Use a saved selection; no selector runs.")
]
TaskOption = Annotated[
    Optional[str],
    typer.Option(
        "--task",
        metavar="NAME",
        help="Use a saved task (`ifprune tasks` lists them); no selector runs.",
        autocompletion=task_names,
    ),
]
DenseOption = Annotated[bool, typer.Option("--dense", help="Use all neurons.")]
DensityOption = Annotated[
    Optional[float],
    typer.Option(
        "--density",
        metavar="X",
        help="Share of each FFN's neurons to keep, above 0 and at most 1; rounded to whole blocks of neurons.  "
        "[default: the checkpoint's]",
    ),
]
ActiveParamsOption = Annotated[
    Optional[str],
    typer.Option("--active-params", metavar="N", help="Largest number of active parameters, such as 3B or 110M."),
]
MemoryOption = Annotated[
    Optional[str],
    typer.Option(
        "--memory",
        metavar="BYTES",
        help="Memory that the weights may take, such as 6GB. Where not all fit, only active neurons are kept in it.",
    ),
]
ResidencyOption = Annotated[
    Optional[ResidencyName],
    typer.Option(
        "--residency",
        help="ram keeps every neuron in memory; ssd only the active ones, and reads others from the checkpoint when "
        "the selection changes.  [default: ram, or ssd where --memory asks for it]",
    ),
]
SystemPromptOption = Annotated[
    Optional[str], typer.Option("--system-prompt", help="System prompt, put before the first message.")
]
TempOption = Annotated[float, typer.Option("--temp", help="Sampling temperature; 0 takes the likeliest token.")]
TopPOption = Annotated[float, typer.Option("--top-p", help="Nucleus sampling: probability mass; 1 is off.")]
MinPOption = Annotated[float, typer.Option("--min-p", help="Min-p sampling threshold; 0 is off.")]
TopKOption = Annotated[int, typer.Option("--top-k", help="Sample among this many tokens; 0 is off.")]
SeedOption = Annotated[
    int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of sampling and of the random selector.")
]
MaxKvSizeOption = Annotated[
    Optional[int], typer.Option("--max-kv-size", min=1, help="Limit of the KV cache, for models that allow one.")
]
KvBitsOption = Annotated[
    Optional[int], typer.Option("--kv-bits", help="Quantize the KV cache to 2, 3, 4, 6 or 8 bits.")
]
KvGroupSizeOption = Annotated[int, typer.Option("--kv-group-size", help="Group size of KV cache quantization.")]
PrefillStepOption = Annotated[int, typer.Option("--prefill-step-size", min=1, help="Prompt tokens read at a time.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the tokenizer run code that comes with the checkpoint.")
]

DataOption = Annotated[
    Optional[list[str]],
    typer.Option(
        "--data",
        metavar="NAME=FILE",
        help="A domain's chats, JSON lines with messages or with prompt and completion; repeatable.",
    ),
]


def named_files(values: Sequence[str], option: str = "--data", kind: str = "domain") -> dict[str, Path]:
    """The files of `--data NAME=FILE` options, or of others like it, by name.

    Args:
        kind: what has the names, for messages.

    Raises:
        DataError: if one is not of that form, or a name is given twice.
    """
    from ifprune_mlx.errors import DataError

    files: dict[str, Path] = {}
    for value in values:
        name, separator, file = value.partition("=")
        if not (name.strip() and separator and file):
            raise DataError(f"{option} {value}: expected NAME=FILE, such as code=code.jsonl")
        if name in files:
            raise DataError(f"{option} {value}: {kind} {name!r} is given twice; put all of it into one file")
        files[name] = Path(file)
    return files


@dataclass(frozen=True)
class Budget:
    """The three ways to say how much to keep, as given."""

    density: float | None
    active_params: str | None
    memory: str | None

    def arguments(self) -> dict[str, Any]:
        """As `ifprune_mlx` takes them.

        Raises:
            BudgetError: if a quantity cannot be read.
        """
        from ifprune_mlx.checkpoint.budget import parse_quantity

        active, memory = self.active_params, self.memory
        return {
            "density": self.density,
            "active_parameters": None if active is None else parse_quantity(active, "--active-params"),
            "memory": None if memory is None else parse_quantity(memory, "--memory"),
        }


@dataclass(frozen=True)
class Sampling:
    """mlx-lm's sampling options, as given."""

    temp: float
    top_p: float
    min_p: float
    top_k: int
    seed: int
    kv_bits: int | None
    kv_group_size: int
    prefill_step_size: int

    def check(self, model: Model) -> None:
        """Raise IfpruneError for an option that this model cannot have."""
        from ifprune_mlx.errors import IfpruneError

        vocabulary = int(model.config.get("vocab_size") or model.config["text_config"]["vocab_size"])
        if self.top_k >= vocabulary:
            raise IfpruneError(f"--top-k {self.top_k}: the model knows {vocabulary} tokens; give fewer, or 0 for all")

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for generation; seeds MLX's generator.

        Raises:
            IfpruneError: if an option is out of range.
        """
        import mlx.core as mx
        from mlx_lm.sample_utils import make_sampler

        from ifprune_mlx.errors import IfpruneError

        if not (self.temp >= 0 and 0 < self.top_p <= 1 and 0 <= self.min_p <= 1 and self.top_k >= 0):
            raise IfpruneError(
                "sampling options out of range: --temp >= 0, 0 < --top-p <= 1, 0 <= --min-p <= 1, --top-k >= 0"
            )
        if self.kv_bits not in (None, 2, 3, 4, 6, 8) or self.kv_group_size not in (32, 64, 128):
            raise IfpruneError(
                "KV cache quantization takes --kv-bits 2, 3, 4, 6 or 8 and --kv-group-size 32, 64 or 128"
            )
        mx.random.seed(self.seed)
        options: dict[str, Any] = {
            "sampler": make_sampler(self.temp, top_p=self.top_p, min_p=self.min_p, top_k=self.top_k),
            "prefill_step_size": self.prefill_step_size,
        }
        if self.kv_bits is not None:
            options |= {"kv_bits": self.kv_bits, "kv_group_size": self.kv_group_size, "quantized_kv_start": 0}
        return options


SelectWindowOption = Annotated[
    Optional[int],
    typer.Option(
        "--select-window",
        min=1,
        metavar="N",
        help="Most tokens that the learned selector's predictor reads, of the instruction's beginning and its end.  "
        "[default: 256]",
    ),
]
SelectionCacheOption = Annotated[
    Optional[Path],
    typer.Option(
        "--selection-cache",
        metavar="FOLDER",
        help="Keep selections there, and do not select for the same instruction twice. Processes may share it.",
    ),
]


@dataclass(frozen=True)
class Selecting:
    """How selecting is kept cheap, as given."""

    window: int | None
    cache: Path | None

    def apply(self, model: Model) -> None:
        """Have every selector that is made for the model do so.

        Raises:
            IfpruneError: if the model has no predictor to limit, or the folder cannot be used.
        """
        from ifprune_mlx.errors import IfpruneError
        from ifprune_mlx.selection.cache import SelectionCache
        from ifprune_mlx.selection.selectors import use_selection_cache

        if self.window is not None:
            predictor = model.predictor
            if predictor is None:
                raise IfpruneError(
                    f"--select-window {self.window}: {model.checkpoint.path} has no predictor; leave the option out"
                )
            predictor.window = self.window
        if self.cache is not None:
            use_selection_cache(model, SelectionCache(self.cache))
