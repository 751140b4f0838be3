"""What `ifprune evaluate` does: losses and tasks of all rows, at one density or several, with their controls."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.chat_template import render_messages
from ifprune_mlx.data.dataset import Record, read_records
from ifprune_mlx.data.tokenize import Example, encode_all
from ifprune_mlx.errors import CheckpointError, DataError, IfpruneError
from ifprune_mlx.eval.evaluation import Evaluation
from ifprune_mlx.eval.exact_match import read_exact, score_exact
from ifprune_mlx.eval.losses import ROWS, available_rows, compare, density_of
from ifprune_mlx.eval.metrics import TaskRow
from ifprune_mlx.eval.multiple_choice import ChoiceQuestion, encode_choices, read_choices, score_choices
from ifprune_mlx.eval.tasks import TASK_ROWS, EncodedQuestion, Question, check_rows, encode_question, pick_questions
from ifprune_mlx.model import Model, Progress
from ifprune_mlx.model import load as load_checkpoint

if TYPE_CHECKING:
    from ifprune_mlx.eval.lm_eval import HarnessTask

Files = Mapping[str, "str | Path"]
Report = Callable[[str], object]
Loader = Callable[["str | Path | None"], tuple[Model, TokenizerWrapper]]
ProgressDisplay = Callable[[str, str], AbstractContextManager[Progress]]
"""Opens a display, given what is being done and the unit that it is counted in."""


def no_progress(label: str, unit: str) -> AbstractContextManager[Progress]:
    """Shows nothing."""
    return nullcontext(lambda done, total: None)


@dataclass(frozen=True)
class EvalConfig:
    """What is measured, and on what. Messages about it name the options of `ifprune evaluate`.

    Attributes:
        model: a checkpoint's folder or hub id; None where the loader has a default.
        data: files of chats, by domain: JSON lines with messages, or with prompt and completion.
        choices, exact: files of tasks, by name; see `eval.multiple_choice` and `eval.exact_match`.
        lm_eval: tasks and groups of lm-evaluation-harness.
        lm_eval_tasks: folders with harness tasks of one's own.
        selectors: rows, of `eval.losses.ROWS` without `matched`; None takes all that the checkpoint and the data allow.
        densities: None is the checkpoint's own.
        healed_static, healed_dense: checkpoints that were tuned on their static selection, or with all neurons: one
            row more each.
        limit: prompts per domain and task, picked by the seed; None takes all.
        max_length: tokens of a chat that are read.
        max_tokens: the most to generate for a question of `exact`.
        seed: of the pick, the random rows, the other prompts and the bootstrap.

    Raises:
        DataError: if nothing is to be measured.
        IfpruneError: for a row that there is not, or that none of the data can be measured with.
    """

    model: str | Path | None = None
    data: Files = field(default_factory=dict)
    choices: Files = field(default_factory=dict)
    exact: Files = field(default_factory=dict)
    lm_eval: tuple[str, ...] = ()
    lm_eval_tasks: tuple[Path, ...] = ()
    selectors: tuple[str, ...] | None = None
    densities: tuple[float | None, ...] = (None,)
    healed_static: str | Path | None = None
    healed_dense: str | Path | None = None
    limit: int | None = None
    max_length: int = 512
    max_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.lm_eval_tasks and not self.lm_eval:
            raise IfpruneError("--lm-eval-tasks only says where tasks are; name some of them with --lm-eval")
        if not (self.data or self.choices or self.exact or self.lm_eval):
            raise DataError(
                "evaluate needs data; give --data, --choices or --exact NAME=FILE.jsonl, once for every domain, "
                "or --lm-eval TASK"
            )
        for name in self.exact:
            if name in self.choices:
                raise DataError(f"--exact {name}: task {name!r} is given with --choices, too; give one another name")
        if self.selectors is None:
            return
        known = [name for name in ROWS if name != "matched"]
        for name in self.selectors:
            if name not in known:
                raise IfpruneError(f"--selectors: unknown selector {name!r}; choose from {', '.join(known)}")
        if not self.selectors:
            raise IfpruneError(f"--selectors is empty; choose from {', '.join(known)}")
        if (self.choices or self.exact or self.lm_eval) and not set(self.selectors) & set(TASK_ROWS):
            raise IfpruneError(f"--selectors has none that tasks can be measured with: {', '.join(TASK_ROWS)}")


@dataclass(frozen=True)
class EvalResult:
    """What `evaluate` measured.

    Attributes:
        model: its name.
        total_parameters: of the dense model.
        active_parameters: at every density.
        evaluations: at every density.
    """

    model: str
    total_parameters: int
    active_parameters: tuple[int, ...]
    evaluations: tuple[Evaluation, ...]

    def to_dict(self) -> dict[str, Any]:
        """What `ifprune evaluate --densities --json` writes."""
        points = zip(self.active_parameters, self.evaluations, strict=True)
        curve = [{"active_parameters": active, **evaluation.to_dict()} for active, evaluation in points]
        return {"total_parameters": self.total_parameters, "curve": curve}


def evaluate(
    config: EvalConfig,
    *,
    load: Loader = load_checkpoint,
    progress: ProgressDisplay = no_progress,
    report: Report = lambda line: None,
    on_evaluation: Callable[[Evaluation], object] = lambda evaluation: None,
) -> EvalResult:
    """Measure all rows on all data, density by density. One model at a time is loaded; the last is closed at the end.

    Args:
        load: loads a checkpoint.
        report: is told what was left out of the data.
        on_evaluation: is given the result of a density as soon as it is complete.

    Raises:
        DataError: for data that cannot be used.
        CheckpointError: for a healed checkpoint that reads the data as other tokens.
        BudgetError: for a density out of range.
        IfpruneError: if two densities keep the same number of neurons, or a loss is not a number.
    """
    if config.model is None and load is load_checkpoint:
        raise IfpruneError("evaluate needs a model; give EvalConfig the folder or hub id of a checkpoint")
    inputs = _Inputs.read(config, report)
    models = _Models(config, inputs, load, progress, report)
    measured = models.load(config.model)
    model, tokens = measured.model, measured.tokens
    keeps = [model.keep(density) for density in config.densities]
    if len(set(keeps)) < len(keeps):
        raise IfpruneError(
            f"--densities {','.join(map(str, config.densities))}: two of them keep the same number of neurons, "
            "rounded to whole blocks; leave one out"
        )
    names = config.selectors or available_rows(model, len(inputs.records))
    healed = {"healed-static": (config.healed_static, "static"), "healed-dense": (config.healed_dense, "dense")}
    active = tuple(model.checkpoint.active_parameters(keep) for keep in keeps)
    name, total = Path(config.model or model.checkpoint.path).name, model.total_parameters
    evaluations = []
    for keep in keeps:
        found = models.load(config.model).at(keep, names, "evaluate")
        for arm, (folder, row) in healed.items():
            if folder is None:
                continue
            other = models.load(folder)
            if other.tokens != tokens:
                raise CheckpointError(
                    f"{folder}: reads the same data as other tokens, so that figures do not compare; "
                    "give a checkpoint of the same base model"
                )
            arm_found = other.at(keep, [row], f"evaluate {arm}", accepted="dense" in names)
            found = found.with_rows(arm_found, {arm: row})
        evaluations.append(found)
        on_evaluation(found)
    models.close()
    return EvalResult(name, total, active, tuple(evaluations))


def read_domains(files: Files, report: Report) -> dict[str, list[Record]]:
    """Chats by domain, each prompt once.

    Args:
        report: is told of every line that cannot be used.

    Raises:
        DataError: if a file cannot be used.
    """
    result: dict[str, list[Record]] = {}
    for domain, path in files.items():
        records = read_records(path, domain, report=report)
        result[domain] = list({record.key: record for record in reversed(records)}.values())[::-1]
        if len(result[domain]) < len(records):
            report(f"{path}: {len(records) - len(result[domain])} chats left out, which repeat the prompt of another")
    return result


def encode_domains(
    model: Model,
    tokenizer: TokenizerWrapper,
    records: Mapping[str, Sequence[Record]],
    *,
    limit: int | None,
    max_length: int,
    seed: int,
    report: Report,
) -> dict[str, list[Example]]:
    """Encode up to `limit` chats a domain, in an order that only the seed and the prompts fix, whatever the file's.

    Args:
        report: is told how many chats were passed over, by reason.

    Raises:
        DataError: if a domain has no usable chat, or holds plain text.
    """
    length = min(max_length, model.context_length or max_length)
    examples: dict[str, list[Example]] = {}
    for domain, given in records.items():
        ordered = sorted(given, key=lambda record: hashlib.sha256(f"{seed}/{record.key}".encode()).digest())
        examples[domain] = encode_all(tokenizer, ordered, length, report, limit=limit)
    return examples


@dataclass(frozen=True)
class _Inputs:
    """What was read from files."""

    records: dict[str, list[Record]]
    choices: dict[str, list[ChoiceQuestion]]
    exact: dict[str, list[Question[str]]]
    harness: list[HarnessTask]

    @classmethod
    def read(cls, config: EvalConfig, report: Report) -> _Inputs:
        """Read all files; raises DataError for one that cannot be used, and for two tasks of one name."""
        harness = _load_harness(config)
        for name in [name for task in harness for name in (task.name, *task.tasks)]:
            if name in config.choices or name in config.exact:
                raise DataError(f"--lm-eval {name}: another task is called {name!r}, too; give that another name")
        return cls(
            read_domains(config.data, report),
            {name: read_choices(path) for name, path in config.choices.items()},
            {name: read_exact(path) for name, path in config.exact.items()},
            harness,
        )


def _load_harness(config: EvalConfig) -> list[HarnessTask]:
    """The tasks of lm-evaluation-harness, with their data; IfpruneError if the package is missing."""
    if not config.lm_eval:
        return []
    try:
        from ifprune_mlx.eval.lm_eval import load_tasks
    except ModuleNotFoundError as exc:
        raise IfpruneError(
            f"--lm-eval needs the package {str(exc.name).split('.')[0]}; pip install 'ifprune-mlx[evaluate]'"
        ) from exc
    return load_tasks(config.lm_eval, config.lm_eval_tasks)


class _Models:
    """Loads checkpoints, one at a time."""

    def __init__(
        self, config: EvalConfig, inputs: _Inputs, load: Loader, progress: ProgressDisplay, report: Report
    ) -> None:
        self._config, self._inputs, self._load, self._progress, self._report = config, inputs, load, progress, report
        self._loaded: tuple[str | Path | None, _Measurement] | None = None

    def load(self, folder: str | Path | None) -> _Measurement:
        """The checkpoint, on all the data; the one before is closed unless it is the same."""
        if self._loaded is None or self._loaded[0] != folder:
            self.close()
            found = _Measurement(self._load(folder), self._config, self._inputs, self._progress, self._report)
            self._loaded = (folder, found)
            self._report = lambda line: None  # what is left out of the data is said once
        return self._loaded[1]

    def close(self) -> None:
        """Close the model that is loaded, if any."""
        if self._loaded is not None:
            self._loaded[1].model.close()
            self._loaded = None


class _Measurement:
    """One model on all the data: everything encoded once, measured at every density."""

    def __init__(
        self,
        loaded: tuple[Model, TokenizerWrapper],
        config: EvalConfig,
        inputs: _Inputs,
        progress: ProgressDisplay,
        report: Report,
    ) -> None:
        self.model, self._tokenizer = model, tokenizer = loaded
        self._config, self._harness, self._progress, self._report = config, inputs.harness, progress, report
        limit, seed = config.limit, config.seed
        self._examples = encode_domains(
            model, tokenizer, inputs.records, limit=limit, max_length=config.max_length, seed=seed, report=report
        )
        pick = partial(pick_questions, context=model.context_length, limit=limit, seed=seed, report=report)
        self._tasks: list[tuple[str, list[EncodedQuestion], Callable[..., list[TaskRow]]]] = []
        for name, choices in inputs.choices.items():
            encoded = pick(name, choices, partial(encode_choices, tokenizer))
            self._tasks.append((name, encoded, partial(score_choices, model)))
        for name, exact in inputs.exact.items():
            encoded = pick(name, exact, partial(encode_question, tokenizer))
            score = partial(score_exact, model, tokenizer, max_tokens=config.max_tokens)
            self._tasks.append((name, encoded, score))

    @property
    def tokens(self) -> list[list[int]]:
        """Everything that is read, as token ids; of lm-eval's tasks samples."""
        questions = [question for _, given, _ in self._tasks for question in given]
        texts = [text for task in self._harness for text in task.texts]
        return [
            *(example.tokens.tolist() for examples in self._examples.values() for example in examples),
            *(list(question.instruction.tokens) for question in questions),
            *(list(option.tokens) for question in questions for option in question.options),
            *(render_messages(self._tokenizer, [{"role": "user", "content": text}]) for text in texts),
        ]

    def at(self, keep: tuple[int, ...], names: Sequence[str], label: str, *, accepted: bool = False) -> Evaluation:
        """Losses and tasks under *k* per FFN.

        Args:
            names: rows; those that make no sense for a task are measured by loss alone.
            label: of the progress display.
            accepted: measure the rows' acceptance even if `dense` is none of them, by this model with all neurons.
        """
        losses = [*names, "dense"] if accepted else names
        # The losses come first and may take hours.
        for name, questions, _ in self._tasks:
            check_rows(name, [question.instruction for question in questions], names)
        if self._examples:
            with self._progress(label, "tokens") as update:
                result = compare(self.model, self._examples, losses, keep, seed=self._config.seed, progress=update)
        else:
            matched = "learned" if self.model.checkpoint.has_predictor else "activation"
            result = Evaluation(density_of(self.model, keep), matched, (), {}, {}, self._config.seed)
        rows = [name for name in dict.fromkeys(names) if name in TASK_ROWS]
        return replace(result, tasks=tuple(self._score_tasks(keep, rows, label)))

    def _score_tasks(self, keep: tuple[int, ...], rows: list[str], label: str) -> list[TaskRow]:
        jobs: list[tuple[str, str, Callable[..., list[TaskRow]]]] = [
            (name, "questions", partial(score, name, questions, rows, keep)) for name, questions, score in self._tasks
        ]
        for task in self._harness:
            from ifprune_mlx.eval.lm_eval import score_harness

            given = partial(score_harness, self.model, self._tokenizer, task, rows, keep)
            jobs.append((task.name, "requests", partial(given, limit=self._config.limit, report=self._report)))
        result: list[TaskRow] = []
        for name, unit, score in jobs:
            with self._progress(f"{label} {name}", unit) as update:
                result += score(seed=self._config.seed, progress=update)
        return result
