"""Options that several commands share, named as in mlx-lm where they mean the same.

The dataclasses are option groups (see option_groups.py): a command takes them as parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer

from .completion import task_names

if TYPE_CHECKING:
    from ifprune_mlx import Checkpoint, Model

# An option under a heading of `--help`; `typer.Option` itself puts it under "Options".
_model, selection_option, _sampling, _cache, output_option = (
    partial(typer.Option, rich_help_panel=heading)
    for heading in ("Model", "Selection", "Sampling", "KV cache", "Output")
)


class SelectorName(str, Enum):
    """The selectors that `--selector` takes."""

    learned = "learned"
    activation = "activation"
    static = "static"
    random = "random"


class DtypeName(str, Enum):
    """Float types, in mlx-lm's names."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


Residency = Literal["ram", "ssd"]
_AUTO = "auto"


def _check_system_prompt(value: Optional[str]) -> Optional[str]:
    from ifprune_mlx import PromptError

    try:
        (value or "").encode()
    except UnicodeEncodeError as exc:  # bytes of the command line that were not UTF-8
        raise PromptError("--system-prompt is not UTF-8 text; convert it, for example with iconv") from exc
    return value


def _density(text: str) -> str:
    """What `--density` takes where `auto` may be given."""
    try:
        if text != _AUTO:
            float(text)
    except ValueError as exc:
        raise typer.BadParameter(f"{text!r} is not a valid number, nor auto") from exc
    return text


# typer reads these at run time, so they are spelled for Python 3.10.
ModelOption = Annotated[
    Optional[str],
    _model(
        "--model",
        metavar="FOLDER|HUB_ID",
        help="Load this IFP checkpoint. Without it, ifprune uses the embedded SmolLM2-135M-Instruct, which it fetches "
        "and converts at first use.",
    ),
]
AnyModelOption = Annotated[
    Optional[str],
    _model(
        "--model",
        metavar="FOLDER|FILE|HUB_ID",
        help="Load this IFP checkpoint, or any model of the hub, GGUF file or folder of safetensors, which is "
        "converted into the cache at first use. Without it, ifprune uses the embedded SmolLM2-135M-Instruct.",
    ),
]
NoConvertOption = Annotated[
    bool, _model("--no-convert", help="Refuse a model that is no IFP checkpoint and would have to be converted.")
]
DtypeOption = Annotated[
    Optional[DtypeName],
    _model(
        "--dtype",
        help="Cast the weights to this float type.  [default: the checkpoint's; on M1 and M2, float16 for bfloat16]",
    ),
]
MemoryOption = Annotated[
    Optional[str],
    _model(
        "--memory",
        metavar="BYTES",
        help="Let the weights take at most this much memory, such as 6GB, if need be with residency ssd.",
    ),
]
ResidencyOption = Annotated[
    Optional[Residency],
    _model(
        "--residency",
        help="ram keeps every neuron in memory. ssd keeps only the active ones, and reads others from the checkpoint "
        "when the selection changes.  [default: ram, or ssd where --memory asks for it]",
    ),
]
TrustOption = Annotated[
    bool, _model("--trust-remote-code", help="Let the tokenizer run code that comes with the checkpoint.")
]
SelectorOption = Annotated[
    Optional[SelectorName],
    selection_option("--selector", help="Let this selector choose the neurons.  [default: the checkpoint's]"),
]
SelectionOption = Annotated[
    Optional[Path], selection_option("--selection", metavar="FILE", help="Use a saved selection; no selector runs.")
]
TaskOption = Annotated[
    Optional[str],
    selection_option(
        "--task",
        metavar="NAME",
        help="Use a saved task (`ifprune tasks` lists them); no selector runs.",
        autocompletion=task_names,
    ),
]
DenseOption = Annotated[bool, selection_option("--dense", help="Use all neurons.")]
DensityOption = Annotated[
    Optional[float],
    selection_option(
        "--density",
        metavar="X",
        help="Keep this share of each FFN's neurons, above 0 and at most 1, rounded to whole blocks of neurons.  "
        "[default: the checkpoint's]",
    ),
]
DialOption = Annotated[
    Optional[str],
    selection_option(
        "--density",
        metavar="X|auto",
        parser=_density,
        help="Keep this share of each FFN's neurons, above 0 and at most 1, rounded to whole blocks of neurons. auto "
        "is the lowest that was measured to lose at most --tolerance, with its selector.  [default: the checkpoint's]",
    ),
]
ToleranceOption = Annotated[
    Optional[float],
    selection_option(
        "--tolerance",
        metavar="NATS",
        help="Take the lowest density that was measured to lose at most this much per answer token.  "
        "[default: 0.05 with --density auto]",
    ),
]
ActiveParamsOption = Annotated[
    Optional[str],
    selection_option(
        "--active-params", metavar="N", help="Keep at most this many parameters active, such as 3B or 110M."
    ),
]
SelectWindowOption = Annotated[
    Optional[int],
    selection_option(
        "--select-window",
        min=1,
        metavar="N",
        help="Let the predictor read at most this many of the instruction's first and last tokens.  [default: 256]",
    ),
]
SelectionCacheOption = Annotated[
    Optional[Path],
    selection_option(
        "--selection-cache",
        metavar="FOLDER",
        help="Keep selections in this folder, to select only once for an instruction. Processes may share it.",
    ),
]
TempOption = Annotated[float, _sampling("--temp", help="Sample at this temperature; 0 takes the likeliest token.")]
TopPOption = Annotated[
    float, _sampling("--top-p", help="Sample among the likeliest tokens that have this probability together; 1 is off.")
]
MinPOption = Annotated[
    float, _sampling("--min-p", help="Drop tokens less likely than this share of the likeliest one; 0 is off.")
]
TopKOption = Annotated[int, _sampling("--top-k", help="Sample among this many tokens; 0 is off.")]
SeedOption = Annotated[int, _sampling("--seed", min=0, max=2**32 - 1, help="Seed sampling and the random selector.")]


def repetition_penalty_option(default: str) -> Any:
    """`--repetition-penalty`; `default` says in words what holds where it is not given."""
    return _sampling(
        "--repetition-penalty",
        metavar="X",
        help="Make the last 64 tokens this much less likely to come again, such as 1.1; 1 is off.  "
        f"[default: {default}]",
    )


PrefillStepOption = Annotated[int, _cache("--prefill-step-size", min=1, help="Read this many prompt tokens at a time.")]
SystemPromptOption = Annotated[
    Optional[str],
    typer.Option(
        "--system-prompt", help="Put this system prompt before the first message.", callback=_check_system_prompt
    ),
]
DataOption = Annotated[
    Optional[list[str]],
    typer.Option(
        "--data",
        metavar="NAME=FILE",
        help="Read a domain's chats from JSON lines with messages, or with prompt and completion; repeatable.",
    ),
]
JsonOption = Annotated[bool, output_option("--json", help="Print one JSON object.")]
JsonFileOption = Annotated[
    Optional[Path], output_option("--json", metavar="FILE", help="Write one JSON line to FILE; - is stdout.")
]
FolderOption = Annotated[Path, output_option("--mlx-path", metavar="FOLDER", help="Where to write.")]


PromptArgument = Annotated[
    Optional[str], typer.Argument(metavar="PROMPT", help="The instruction. With -, it is read from stdin.")
]
PromptOption = Annotated[Optional[str], typer.Option("--prompt", "-p", help="The instruction, as an option.")]


def check_exclusive(*groups: dict[str, Any]) -> None:
    """Raise IfpruneError if two options of a group are given, one of which would be ignored."""
    from ifprune_mlx import IfpruneError

    for group in groups:
        given = [name for name, value in group.items() if value not in (None, False)]
        if len(given) > 1:
            raise IfpruneError(f"{' and '.join(given)} exclude each other; give one of them")


def given_prompt(argument: str | None, option: str | None) -> str:
    """The instruction of the command line.

    Raises:
        click's UsageError: if there is none.
        IfpruneError: if there are two.
    """
    check_exclusive({"PROMPT": argument, "--prompt": option})
    prompt = argument if option is None else option
    if prompt is None:
        raise typer.BadParameter("give it in quotes, or - for stdin", param_hint="PROMPT")
    return prompt


@dataclass(frozen=True)
class ModelOptions:
    """Which model to load, and how."""

    model: AnyModelOption = None
    dtype: DtypeOption = None
    residency: ResidencyOption = None
    trust_remote_code: TrustOption = False
    no_convert: NoConvertOption = False


IgnoreTemplateOption = Annotated[
    bool, typer.Option("--ignore-chat-template", help="Read messages as plain text that the model continues.")
]


TemplateVariablesOption = Annotated[
    Optional[str],
    typer.Option(
        "--chat-template-config",
        "--chat-template-args",
        metavar="JSON",
        help="Give the chat template these variables, such as '{\"enable_thinking\": false}'.",
    ),
]


def template_variables(text: str | None) -> dict[str, Any]:
    """The variables of `--chat-template-config`.

    Raises:
        IfpruneError: if it is not a JSON object.
    """
    import json

    from ifprune_mlx.errors import IfpruneError

    try:
        variables = json.loads(text or "{}")
    except (ValueError, RecursionError):
        variables = None
    if not isinstance(variables, dict):
        example = "'{\"enable_thinking\": false}'"
        raise IfpruneError(f"--chat-template-config is no JSON object; give one such as {example}")
    if "tokenize" in variables or "add_generation_prompt" in variables:
        raise IfpruneError("--chat-template-config: tokenize and add_generation_prompt are no variables to give")
    return variables


@dataclass(frozen=True)
class Budget:
    """The ways to say how much to keep."""

    density: DialOption = None
    tolerance: ToleranceOption = None
    active_params: ActiveParamsOption = None
    memory: MemoryOption = None

    def arguments(self) -> dict[str, Any]:
        """The budget as `ifprune_mlx` takes it, without what a checkpoint's curve decides.

        Raises:
            BudgetError: if a quantity cannot be read, or the tolerance is out of range.
            IfpruneError: if an option would be ignored.
        """
        from ifprune_mlx.checkpoint.budget import parse_quantity
        from ifprune_mlx.checkpoint.density_curve import check_tolerance

        active, memory = self.active_params, self.memory
        fixed = None if self.density == _AUTO else self.density
        if self.tolerance is not None:
            check_tolerance(self.tolerance)
            check_exclusive(
                *({"--tolerance": True, **one} for one in ({"--density": fixed}, {"--active-params": active}))
            )
        elif self.density == _AUTO:
            check_exclusive({"--density auto": True, "--active-params": active})
        return {
            "density": None if fixed is None else float(fixed),
            "active_parameters": None if active is None else parse_quantity(active, "--active-params"),
            "memory": None if memory is None else parse_quantity(memory, "--memory"),
        }

    def on(
        self, checkpoint: Checkpoint, selector: str | None, residency: str | None = None
    ) -> tuple[dict[str, Any], str | None]:
        """The budget on a checkpoint, and the selector to use: the given one, or the curve's where that was asked for.

        Args:
            residency: `ssd` leaves out the selector that reads with all neurons.

        Raises:
            BudgetError: if the checkpoint has no curve, or the selector is not on it.
        """
        from ifprune_mlx.checkpoint.density_curve import TOLERANCE
        from ifprune_mlx.errors import BudgetError

        arguments = self.arguments()
        if self.density != _AUTO and self.tolerance is None:
            return arguments, selector
        if checkpoint.curve is None:
            raise BudgetError(
                f"{checkpoint.path}: what its densities lose was not measured; give --density as a number, or convert "
                "the source again with --calibrate"
            )
        names = checkpoint.curve.selectors if selector is None else (selector,)
        if residency == "ssd":
            names = tuple(name for name in names if name != "activation")
        density, chosen = checkpoint.curve.choose(TOLERANCE if self.tolerance is None else self.tolerance, names)
        return arguments | {"density": density}, chosen


@dataclass(frozen=True)
class SelectionOptions:
    """A selector, or a fixed selection in its place."""

    selector: SelectorOption = None
    selection: SelectionOption = None
    task: TaskOption = None
    dense: DenseOption = False

    def check_exclusive(self, budget: Budget) -> None:
        """Raise IfpruneError if two options are given, one of which would be ignored."""
        fixed = {"--dense": self.dense, "--selection": self.selection, "--task": self.task}
        check_exclusive(
            {**fixed, "--selector": self.selector},
            {**fixed, "--density": budget.density, "--active-params": budget.active_params},
            {**fixed, "--tolerance": budget.tolerance},
        )


@dataclass(frozen=True)
class Selecting:
    """Options that make selecting cheaper."""

    select_window: SelectWindowOption = None
    selection_cache: SelectionCacheOption = None

    def apply(self, model: Model) -> None:
        """Set up all later selectors of the model.

        Raises:
            IfpruneError: if the model has no predictor to limit, or the folder cannot be used.
        """
        from ifprune_mlx.errors import IfpruneError
        from ifprune_mlx.selection.cache import SelectionCache

        if self.select_window is not None:
            if model.predictor is None:
                raise IfpruneError(
                    f"--select-window {self.select_window}: {model.checkpoint.path} has no predictor; "
                    "leave the option out"
                )
            model.predictor.window = self.select_window
        if self.selection_cache is not None:
            model.selection_cache = SelectionCache(self.selection_cache)


@dataclass(frozen=True)
class Sampling:
    """mlx-lm's options for generation."""

    temp: TempOption = 0.0
    top_p: TopPOption = 1.0
    min_p: MinPOption = 0.0
    top_k: TopKOption = 0
    seed: SeedOption = 0
    repetition_penalty: Annotated[Optional[float], repetition_penalty_option("1")] = None
    max_kv_size: Annotated[
        Optional[int],
        _cache(
            "--max-kv-size", min=1, help="Keep at most this many tokens in the KV cache: the first four and the latest."
        ),
    ] = None
    kv_bits: Annotated[Optional[int], _cache("--kv-bits", help="Quantize the KV cache to 2, 3, 4, 6 or 8 bits.")] = None
    kv_group_size: Annotated[int, _cache("--kv-group-size", help="Quantize the KV cache in groups of this size.")] = 64
    prefill_step_size: PrefillStepOption = 2048

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise IfpruneError for an option that does not fit this model."""
        from ifprune_mlx.errors import IfpruneError

        config = checkpoint.config
        vocabulary = int(config.get("vocab_size") or config["text_config"]["vocab_size"])
        if self.top_k >= vocabulary:
            raise IfpruneError(f"--top-k {self.top_k}: the model knows {vocabulary} tokens; give fewer, or 0 for all")

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `Session` and `stream_generate`; seeds MLX's generator.

        Raises:
            IfpruneError: if an option is out of range.
        """
        import mlx.core as mx

        from ifprune_mlx.errors import IfpruneError
        from ifprune_mlx.generation import make_sampler

        from .repetition import penalizing

        sampler = make_sampler(self.temp, top_p=self.top_p, min_p=self.min_p, top_k=self.top_k)
        if self.kv_bits not in (None, 2, 3, 4, 6, 8) or self.kv_group_size not in (32, 64, 128):
            raise IfpruneError(
                "KV cache quantization takes --kv-bits 2, 3, 4, 6 or 8 and --kv-group-size 32, 64 or 128"
            )
        if self.kv_bits is not None and self.max_kv_size is not None:
            raise IfpruneError("--kv-bits and --max-kv-size exclude each other: mlx-lm cannot quantize a bounded cache")
        penalty = self.repetition_penalty
        if penalty is not None and not 0.01 <= penalty <= 100:
            raise IfpruneError(f"--repetition-penalty {penalty}: give a number from 0.01 to 100, such as 1.1")
        mx.random.seed(self.seed)
        options: dict[str, Any] = {
            "sampler": sampler,
            "seed": self.seed,
            "max_kv_size": self.max_kv_size,
            "prefill_step_size": self.prefill_step_size,
        }
        if penalty is not None:
            options["logits_processors"] = penalizing(penalty)
        if self.kv_bits is not None:
            options |= {"kv_bits": self.kv_bits, "kv_group_size": self.kv_group_size, "quantized_kv_start": 0}
        return options


def named_files(values: Sequence[str], option: str = "--data", kind: str = "domain") -> dict[str, Path]:
    """Parse `--data NAME=FILE` options or similar ones; `kind` is the kind of the names, for messages.

    Raises:
        DataError: if one has another form, or a name is given twice.
    """
    from ifprune_mlx.errors import DataError

    files: dict[str, Path] = {}
    for value in values:
        name, separator, file = value.partition("=")
        if not (name.strip() and name.isprintable() and separator and file):
            raise DataError(f"{option} {value}: expected NAME=FILE, such as code=code.jsonl")
        if name in files:
            raise DataError(f"{option} {value}: {kind} {name!r} is given twice; put all of it into one file")
        files[name] = Path(file)
    return files
