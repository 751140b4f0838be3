"""`ifprune evaluate`: what do selections cost, by domain and task, beside their controls?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from .console import note, progress, result_json
from .evaluate_report import notes, tables
from .loading import load_model, open_checkpoint
from .options import DataOption, DensityOption, DtypeOption, ModelOption, TrustOption, named_files

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ifprune_mlx import Model
    from ifprune_mlx.data.dataset import Record
    from ifprune_mlx.data.tokenize import Example
    from ifprune_mlx.eval.exact_match import ExactQuestion
    from ifprune_mlx.eval.lm_eval import HarnessTask
    from ifprune_mlx.eval.losses import Evaluation
    from ifprune_mlx.eval.metrics import TaskRow
    from ifprune_mlx.eval.multiple_choice import ChoiceQuestion

Records = dict[str, list["Record"]]
Examples = dict[str, list["Example"]]

MaxLengthOption = Annotated[
    int, typer.Option("--max-length", min=2, help="Tokens of a chat that are read; the rest is cut off.")
]


@dataclass(frozen=True)
class _Wanted:
    """What is to be measured, as read from files, and how much of it."""

    records: Records
    choices: dict[str, list[ChoiceQuestion]]
    exact: dict[str, list[ExactQuestion]]
    harness: list[HarnessTask]
    limit: int | None
    max_length: int
    max_tokens: int
    seed: int

    @property
    def has_tasks(self) -> bool:
        """Whether there is anything beside losses."""
        return bool(self.choices or self.exact or self.harness)


def evaluate(
    data: DataOption = None,
    choices: Annotated[
        Optional[list[str]],
        typer.Option(
            "--choices",
            metavar="NAME=FILE",
            help="A multiple choice task, JSON lines with query, choices and gold (the right one's index, from 0); "
            "repeatable.",
        ),
    ] = None,
    exact: Annotated[
        Optional[list[str]],
        typer.Option(
            "--exact",
            metavar="NAME=FILE",
            help="A task with one right answer, which is generated: JSON lines with prompt or question, and answer; "
            "repeatable.",
        ),
    ] = None,
    lm_eval: Annotated[
        Optional[list[str]],
        typer.Option(
            "--lm-eval",
            metavar="TASK",
            help="A task or group of lm-evaluation-harness, several with commas between; repeatable. Of each task "
            "--limit takes the first questions, as lm-eval does. Needs ifprune-mlx[evaluate].",
        ),
    ] = None,
    lm_eval_tasks: Annotated[
        Optional[list[Path]],
        typer.Option(
            "--lm-eval-tasks",
            metavar="FOLDER",
            help="Of your own lm-evaluation-harness tasks: YAML files, and the Python functions that they name, which "
            "run; repeatable.",
        ),
    ] = None,
    model: ModelOption = None,
    selectors: Annotated[
        Optional[str],
        typer.Option(
            "--selectors",
            metavar="LIST",
            help="Rows, separated by commas: dense, learned, static, static-own, activation, activation-sliced, "
            "random, mismatched, cross-domain, oracle.  [default: all that the checkpoint and the data allow]",
        ),
    ] = None,
    density: DensityOption = None,
    densities: Annotated[
        Optional[str],
        typer.Option("--densities", metavar="LIST", help="Several densities in turn, such as 0.27,0.4,0.5,0.7."),
    ] = None,
    healed_static: Annotated[
        Optional[str],
        typer.Option(
            "--healed-static", metavar="FOLDER", help="A checkpoint tuned on its static selection: one row more."
        ),
    ] = None,
    healed_dense: Annotated[
        Optional[str],
        typer.Option("--healed-dense", metavar="FOLDER", help="A checkpoint tuned with all neurons: one row more."),
    ] = None,
    limit: Annotated[
        Optional[int],
        typer.Option(
            "--limit", metavar="N", min=1, help="Prompts per domain and task, picked by the seed.  [default: all]"
        ),
    ] = None,
    max_length: MaxLengthOption = 512,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", min=1, help="Most tokens to generate for a question of --exact.")
    ] = 256,
    seed: Annotated[
        int, typer.Option("--seed", help="Seed of the pick, the random rows, the other prompts and the bootstrap.")
    ] = 0,
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
    plot: Annotated[
        Optional[Path],
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Draw the losses against the active parameters (.png or .svg). Needs ifprune-mlx[plots].",
        ),
    ] = None,
    json: Annotated[
        Optional[Path], typer.Option("--json", metavar="FILE", help="Write one JSON line to FILE; - is stdout.")
    ] = None,
) -> None:
    """Measure every kind of selection by the loss of given answers and by tasks, with paired intervals."""
    from ifprune_mlx import DataError, IfpruneError
    from ifprune_mlx.eval.losses import available_rows

    # Whatever can be wrong is better found before hours of measuring than after them.
    if not (data or choices or exact or lm_eval):
        raise DataError(
            "evaluate needs data; give --data, --choices or --exact NAME=FILE.jsonl, once for every domain, "
            "or --lm-eval TASK"
        )
    if density is not None and densities is not None:
        raise IfpruneError("--density and --densities contradict each other; give one of them")
    _check_outputs(json, plot, bool(data))
    shares = [density] if densities is None else _densities(densities)
    wanted = _read(
        data or [], choices or [], exact or [], _harness(lm_eval, lm_eval_tasks), limit, max_length, max_tokens, seed
    )
    names = None if selectors is None else _names(selectors, wanted)
    arms = {"healed-static": (healed_static, "static"), "healed-dense": (healed_dense, "dense")}
    for given in filter(None, (healed_static, healed_dense)):
        open_checkpoint(given)
    loaded, tokenizer = load_model(model, dtype, trust_remote_code)
    if names is None:
        names = available_rows(loaded, len(wanted.records))
    if plot is not None and healed_static is None and set(names) == {"dense"}:
        raise IfpruneError("--plot draws what depends on the density; add rows to --selectors, or leave it out")
    keeps = _keeps(loaded, shares, densities)
    measured = _Measured(loaded, tokenizer, wanted, note)
    results = [measured.at(keep, names, "evaluate") for keep in keeps]
    active, total = [loaded.checkpoint.active_parameters(keep) for keep in keeps], loaded.total_parameters
    name = loaded.checkpoint.path.name if model is None else Path(model).name
    loaded.close()
    for arm, (folder, row) in arms.items():
        if folder is None:
            continue
        healed, healed_tokenizer = load_model(folder, dtype, trust_remote_code)
        other = _Measured(healed, healed_tokenizer, wanted, lambda line: None)
        _check_same(folder, measured.tokens, other.tokens)
        found = [other.at(keep, [row], f"evaluate {arm}") for keep in keeps]
        healed.close()
        results = [result.with_rows(joined, {arm: row}) for result, joined in zip(results, found, strict=True)]
    if str(json) != "-":
        print("\n\n".join("\n".join(tables(result)) for result in results), flush=True)
    notes(results)
    points = [{"active_parameters": count, **found.to_dict()} for count, found in zip(active, results, strict=True)]
    curve = {"total_parameters": total, "curve": points}
    if json is not None:
        _write_json(json, results[0].to_dict() if densities is None else curve)
    if plot is not None:
        from ifprune_mlx.eval.analysis import Quality, quality_chart
        from ifprune_mlx.eval.plots import write_figure

        write_figure(quality_chart(name, Quality.of(curve, "--plot")), plot)


class _Measured:
    """One model's view of what is wanted: everything encoded once, measured at every density."""

    def __init__(
        self, model: Model, tokenizer: TokenizerWrapper, wanted: _Wanted, report: Callable[[str], object]
    ) -> None:
        from ifprune_mlx.eval.exact_match import encode_exact
        from ifprune_mlx.eval.multiple_choice import encode_choices
        from ifprune_mlx.eval.task_rows import pick

        self._model, self._tokenizer, self._wanted, self._report = model, tokenizer, wanted, report
        limit, seed, context = wanted.limit, wanted.seed, model.context_length
        self._examples = sample(model, tokenizer, wanted.records, limit, wanted.max_length, seed, report)
        take = partial(pick, context=context, limit=limit, seed=seed, report=report)
        self._choices = {name: take(name, q, partial(encode_choices, tokenizer)) for name, q in wanted.choices.items()}
        self._exact = {name: take(name, q, partial(encode_exact, tokenizer)) for name, q in wanted.exact.items()}
        self._instructions = {name: [asked.instruction for asked in given] for name, given in self._choices.items()}
        self._instructions |= {name: [asked.instruction for asked in given] for name, given in self._exact.items()}

    @property
    def tokens(self) -> list[list[int]]:
        """Everything that is read, as token ids; of lm-eval's tasks samples."""
        from ifprune_mlx.chat_template import render_messages

        options = [option for choices in self._choices.values() for choice in choices for option in choice.options]
        return [
            *(example.tokens.tolist() for examples in self._examples.values() for example in examples),
            *(list(instruction.tokens) for given in self._instructions.values() for instruction in given),
            *(list(option.tokens) for option in options),
            *(
                render_messages(self._tokenizer, [{"role": "user", "content": text}])
                for task in self._wanted.harness
                for text in task.texts
            ),
        ]

    def at(self, keep: tuple[int, ...], names: Sequence[str], label: str) -> Evaluation:
        """Losses and tasks under *k* per FFN.

        Args:
            names: rows; those that make no sense for a task are measured by loss alone.
            label: of the progress display.
        """
        from ifprune_mlx.eval.losses import Evaluation, compare
        from ifprune_mlx.eval.task_rows import check_rows

        # The losses come first and may take hours.
        for name, instructions in self._instructions.items():
            check_rows(name, instructions, names)
        if self._examples:
            with progress(label, "tokens") as update:
                result = compare(self._model, self._examples, names, keep, seed=self._wanted.seed, progress=update)
        else:
            share = sum(keep) / sum(spec.d_ffn for spec in self._model.checkpoint.layout.ffns)
            matched = "learned" if self._model.checkpoint.has_predictor else "activation"
            result = Evaluation(share, matched, (), {}, {}, self._wanted.seed)
        return replace(result, tasks=tuple(self._tasks(keep, names, label)))

    def _tasks(self, keep: tuple[int, ...], names: Sequence[str], label: str) -> list[TaskRow]:
        from ifprune_mlx.eval.exact_match import score_exact
        from ifprune_mlx.eval.multiple_choice import score_choices
        from ifprune_mlx.eval.task_rows import TASK_ROWS

        rows = [name for name in dict.fromkeys(names) if name in TASK_ROWS]
        seed, result = self._wanted.seed, []
        for name, choices in self._choices.items():
            with progress(f"{label} {name}", "questions") as update:
                result += score_choices(self._model, name, choices, rows, keep, seed=seed, progress=update)
        for name, exact in self._exact.items():
            with progress(f"{label} {name}", "questions") as update:
                result += score_exact(
                    self._model,
                    self._tokenizer,
                    name,
                    exact,
                    rows,
                    keep,
                    max_tokens=self._wanted.max_tokens,
                    seed=seed,
                    progress=update,
                )
        for task in self._wanted.harness:
            from ifprune_mlx.eval.lm_eval import score_harness

            with progress(f"{label} {task.name}", "requests") as update:
                result += score_harness(
                    self._model,
                    self._tokenizer,
                    task,
                    rows,
                    keep,
                    limit=self._wanted.limit,
                    seed=seed,
                    progress=update,
                    report=self._report,
                )
        return result


def read_data(given: Sequence[str]) -> Records:
    """Chats by domain, each prompt once, from `NAME=FILE` options. Lines that cannot be used are reported.

    Raises:
        DataError: if an option is malformed, a name comes twice, or a file cannot be used.
    """
    from ifprune_mlx.data.dataset import read_records

    result: Records = {}
    for name, path in named_files(given).items():
        records = read_records(path, name, report=note)
        result[name] = list({record.key: record for record in reversed(records)}.values())[::-1]
        if len(result[name]) < len(records):
            note(f"{path}: {len(records) - len(result[name])} chats left out, which repeat the prompt of another")
    return result


def sample(
    model: Model,
    tokenizer: TokenizerWrapper,
    records: Mapping[str, Sequence[Record]],
    limit: int | None,
    max_length: int,
    seed: int,
    report: Callable[[str], object],
) -> Examples:
    """Encode up to `limit` chats a domain, in an order that only the seed and the prompts fix, whatever the file's.

    Args:
        report: is told how many chats were passed over, by reason.

    Raises:
        DataError: if a domain has no usable chat, or holds plain text.
    """
    from ifprune_mlx.data.tokenize import encode_all

    length = min(max_length, model.context_length or max_length)
    examples: Examples = {}
    for domain, given in records.items():
        ordered = sorted(given, key=lambda record: hashlib.sha256(f"{seed}/{record.key}".encode()).digest())
        examples[domain] = encode_all(tokenizer, ordered, length, report, limit=limit)
    return examples


def _read(
    data: Sequence[str],
    choices: Sequence[str],
    exact: Sequence[str],
    harness: list[HarnessTask],
    limit: int | None,
    max_length: int,
    max_tokens: int,
    seed: int,
) -> _Wanted:
    """Read all files.

    Raises:
        DataError: if an option is malformed, a name comes twice, or a file cannot be used.
    """
    from ifprune_mlx import DataError
    from ifprune_mlx.eval.exact_match import read_exact
    from ifprune_mlx.eval.multiple_choice import read_choices

    choice_files = named_files(choices, "--choices", "task")
    exact_files = named_files(exact, "--exact", "task")
    for name in exact_files:
        if name in choice_files:
            raise DataError(f"--exact {name}: task {name!r} is given with --choices, too; give one another name")
    for name in [name for task in harness for name in (task.name, *task.tasks)]:
        if name in choice_files or name in exact_files:
            raise DataError(f"--lm-eval {name}: another task is called {name!r}, too; give that another name")
    return _Wanted(
        read_data(data),
        {name: read_choices(path) for name, path in choice_files.items()},
        {name: read_exact(path) for name, path in exact_files.items()},
        harness,
        limit,
        max_length,
        max_tokens,
        seed,
    )


def _harness(names: Sequence[str] | None, folders: Sequence[Path] | None) -> list[HarnessTask]:
    """The tasks of `--lm-eval`, with their data.

    Raises:
        IfpruneError: if the package is missing, a folder comes without tasks, or a task cannot be loaded.
    """
    from ifprune_mlx import IfpruneError

    if not names:
        if folders:
            raise IfpruneError("--lm-eval-tasks only says where tasks are; name some of them with --lm-eval")
        return []
    try:
        from ifprune_mlx.eval.lm_eval import load_tasks
    except ModuleNotFoundError as exc:
        raise IfpruneError(
            f"--lm-eval needs the package {str(exc.name).split('.')[0]}; pip install 'ifprune-mlx[evaluate]'"
        ) from None
    split = [name.strip() for given in names for name in given.split(",") if name.strip()]
    if not split:
        raise IfpruneError("--lm-eval is empty; give names of tasks, which `lm-eval ls tasks` lists")
    return load_tasks(split, folders or [])


def _names(selectors: str, wanted: _Wanted) -> list[str]:
    """The rows asked for.

    Raises:
        IfpruneError: for a name that is none, and where none can be measured on what is wanted.
    """
    from ifprune_mlx import IfpruneError
    from ifprune_mlx.eval.losses import ROWS
    from ifprune_mlx.eval.task_rows import TASK_ROWS

    known = [name for name in ROWS if name != "matched"]
    names = [name.strip() for name in selectors.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise IfpruneError(f"--selectors: unknown selector {name!r}; choose from {', '.join(known)}")
    if not names:
        raise IfpruneError(f"--selectors is empty; choose from {', '.join(known)}")
    if wanted.has_tasks and not set(names) & set(TASK_ROWS):
        raise IfpruneError(f"--selectors has none that tasks can be measured with: {', '.join(TASK_ROWS)}")
    return names


def _densities(text: str) -> list[float]:
    """The numbers of `--densities`.

    Raises:
        IfpruneError: if one is none.
    """
    from ifprune_mlx import IfpruneError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise IfpruneError(f"--densities {text}: expected numbers with commas between, such as 0.27,0.5") from None


def _keeps(model: Model, shares: Sequence[float | None], given: str | None) -> list[tuple[int, ...]]:
    """*k* per FFN at every density; None is the checkpoint's own.

    Raises:
        BudgetError: for a density out of range.
        IfpruneError: if two densities keep the same number of neurons.
    """
    from ifprune_mlx import IfpruneError

    keeps = [model.keep(share) for share in shares]
    if len(set(keeps)) < len(keeps):
        raise IfpruneError(
            f"--densities {given}: two of them keep the same number of neurons, rounded to whole blocks; leave one out"
        )
    return keeps


def _check_same(folder: str, ours: list[list[int]], theirs: list[list[int]]) -> None:
    from ifprune_mlx import CheckpointError

    if ours != theirs:
        raise CheckpointError(
            f"{folder}: reads the same data as other tokens, so that figures do not compare; "
            "give a checkpoint of the same base model"
        )


def _check_outputs(json: Path | None, plot: Path | None, has_losses: bool) -> None:
    from ifprune_mlx import IfpruneError

    if json is not None and not json.parent.is_dir():
        raise IfpruneError(f"--json {json}: no such folder; make it first")
    if plot is None:
        return
    from ifprune_mlx.eval.plots import check_plot

    check_plot(plot, "--plot")
    if not has_losses:
        raise IfpruneError("--plot draws losses; give --data as well, or leave it out")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    import json

    from ifprune_mlx import IfpruneError
    from ifprune_mlx.checkpoint.atomic_write import write_atomic

    if str(path) == "-":
        result_json(value)
        return
    text = json.dumps(value) + "\n"
    write_atomic(path, lambda file: file.write_text(text, encoding="utf-8"), IfpruneError)
