"""`ifprune evaluate`: what do selections cost, by domain and task, compared with their controls?"""

from __future__ import annotations

import json as encoder
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from .console import note, progress, result_json, show
from .evaluate_report import notes, tables
from .loading import load_model, model_name, open_checkpoint
from .options import (
    DataOption,
    DensityOption,
    DtypeOption,
    IgnoreTemplateOption,
    JsonFileOption,
    ModelOption,
    TrustOption,
    named_files,
)
from .ranks import leads

if TYPE_CHECKING:
    from ifprune_mlx.eval import EvalResult
    from ifprune_mlx.eval.evaluation import Evaluation

# An option under a heading of `--help`.
_task, _row, _amount, _output = (
    partial(typer.Option, rich_help_panel=heading) for heading in ("Tasks", "Rows", "How much", "Output")
)

# typer reads these at run time, so they are spelled for Python 3.10.
ChoicesOption = Annotated[
    Optional[list[str]],
    _task(
        "--choices",
        metavar="NAME=FILE",
        help="A multiple choice task, JSON lines with query, choices and gold (the right one's index, from 0); "
        "repeatable.",
    ),
]
ExactOption = Annotated[
    Optional[list[str]],
    _task(
        "--exact",
        metavar="NAME=FILE",
        help="A task with one right answer, which is generated: JSON lines with prompt or question, and answer; "
        "repeatable.",
    ),
]
LmEvalOption = Annotated[
    Optional[list[str]],
    _task(
        "--lm-eval",
        metavar="TASK",
        help="A task or group of lm-evaluation-harness, several with commas between; repeatable. Of each task "
        "--limit takes the first questions, as lm-eval does. Needs ifprune-mlx[evaluate].",
    ),
]
LmEvalTasksOption = Annotated[
    Optional[list[Path]],
    _task(
        "--lm-eval-tasks",
        metavar="FOLDER",
        help="Of your own lm-evaluation-harness tasks: YAML files, and the Python functions that they name, which "
        "run; repeatable.",
    ),
]
SelectorsOption = Annotated[
    Optional[str],
    _row(
        "--selectors",
        metavar="LIST",
        help="Rows, separated by commas: dense, learned, static, static-own, activation, activation-sliced, "
        "random, mismatched, cross-domain, oracle.  [default: all that the checkpoint and the data allow]",
    ),
]
DensitiesOption = Annotated[
    Optional[str], _row("--densities", metavar="LIST", help="Several densities in turn, such as 0.27,0.4,0.5,0.7.")
]
HealedStaticOption = Annotated[
    Optional[str],
    _row("--healed-static", metavar="FOLDER", help="A checkpoint tuned on its static selection: one row more."),
]
HealedDenseOption = Annotated[
    Optional[str], _row("--healed-dense", metavar="FOLDER", help="A checkpoint tuned with all neurons: one row more.")
]
LimitOption = Annotated[
    Optional[int],
    _amount("--limit", metavar="N", min=1, help="Prompts per domain and task, picked by the seed.  [default: all]"),
]
MaxLengthOption = Annotated[
    int, _amount("--max-length", min=2, help="Tokens of a chat that are read; the rest is cut off.")
]
MaxTokensOption = Annotated[
    int, _amount("--max-tokens", "-m", min=1, help="Most tokens to generate for a question of --exact.")
]
EvalSeedOption = Annotated[
    int, _amount("--seed", help="Seed of the pick, the random rows, the other prompts and the bootstrap.")
]
PlotOption = Annotated[
    Optional[Path],
    _output(
        "--plot",
        metavar="FILE",
        help="Draw the losses, of several densities against the active parameters (.png or .svg). "
        "Needs ifprune-mlx[plots].",
    ),
]


def evaluate(
    data: DataOption = None,
    choices: ChoicesOption = None,
    exact: ExactOption = None,
    lm_eval: LmEvalOption = None,
    lm_eval_tasks: LmEvalTasksOption = None,
    model: ModelOption = None,
    selectors: SelectorsOption = None,
    density: DensityOption = None,
    densities: DensitiesOption = None,
    healed_static: HealedStaticOption = None,
    healed_dense: HealedDenseOption = None,
    limit: LimitOption = None,
    max_length: MaxLengthOption = 512,
    max_tokens: MaxTokensOption = 256,
    seed: EvalSeedOption = 0,
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
    ignore_chat_template: IgnoreTemplateOption = False,
    plot: PlotOption = None,
    json: JsonFileOption = None,
) -> None:
    """Measure every kind of selection by the loss of given answers and by tasks, with paired intervals."""
    from ifprune_mlx.eval import EvalConfig
    from ifprune_mlx.eval import evaluate as run

    # Check everything first: measuring can take hours.
    config = EvalConfig(
        model=model,
        data=named_files(data or []),
        choices=named_files(choices or [], "--choices", "task"),
        exact=named_files(exact or [], "--exact", "task"),
        lm_eval=_harness_names(lm_eval),
        lm_eval_tasks=tuple(lm_eval_tasks or ()),
        selectors=None if selectors is None else _names(selectors),
        densities=_densities(density, densities),
        healed_static=healed_static,
        healed_dense=healed_dense,
        limit=limit,
        max_length=max_length,
        max_tokens=max_tokens,
        seed=seed,
    )
    only_dense = set(config.selectors or ()) == {"dense"} and healed_static is None
    _check_outputs(json, plot, draws=bool(data), only_dense=only_dense)
    for given in filter(None, (healed_static, healed_dense)):
        open_checkpoint(given)
    result = run(
        config,
        load=lambda folder: load_model(
            None if folder is None else str(folder),
            dtype,
            trust_remote_code,
            template=not ignore_chat_template,
            shared=True,
        ),
        progress=progress,
        report=note,
        on_evaluation=_print_tables if str(json) != "-" else lambda result: None,
    )
    notes(result.evaluations)
    if not leads():
        return
    if json is not None:
        _write_json(json, result.evaluations[0].to_dict() if densities is None else result.to_dict())
    if plot is not None:
        _draw(result, model_name(model), plot)


def _draw(result: EvalResult, name: str, plot: Path) -> None:
    from ifprune_mlx.eval.analysis import Quality, quality_chart
    from ifprune_mlx.eval.plots import write_figure

    write_figure(quality_chart(name, Quality.of(result.to_dict(), "--plot")), plot)


def _print_tables(result: Evaluation) -> None:
    """A density's tables and an empty line, as soon as they are measured."""
    show("\n".join(tables(result)), end="\n\n")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _harness_names(given: list[str] | None) -> tuple[str, ...]:
    from ifprune_mlx import IfpruneError

    names = _names(",".join(given or ()))
    if given and not names:
        raise IfpruneError("--lm-eval is empty; give names of tasks, which `lm-eval ls tasks` lists")
    return names


def _densities(density: float | None, several: str | None) -> tuple[float | None, ...]:
    """Raises IfpruneError if both are given, or one of several is no number."""
    from ifprune_mlx import IfpruneError

    if several is None:
        return (density,)
    if density is not None:
        raise IfpruneError("--density and --densities contradict each other; give one of them")
    try:
        return tuple(float(part) for part in several.split(","))
    except ValueError as exc:
        raise IfpruneError(f"--densities {several}: expected numbers with commas between, such as 0.27,0.5") from exc


def _check_outputs(json: Path | None, plot: Path | None, *, draws: bool, only_dense: bool) -> None:
    from ifprune_mlx import IfpruneError
    from ifprune_mlx.checkpoint.atomic_write import check_replaceable

    if json is not None:
        if not json.parent.is_dir():
            raise IfpruneError(f"--json {json}: no such folder; make it first")
        check_replaceable(json, f"--json {json}")
    if plot is None:
        return
    from ifprune_mlx.eval.plots import check_plot

    check_plot(plot, "--plot")
    if not draws:
        raise IfpruneError("--plot draws losses; give --data as well, or leave it out")
    if only_dense:
        raise IfpruneError("--plot draws what depends on the density; add rows to --selectors, or leave it out")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    from ifprune_mlx import IfpruneError
    from ifprune_mlx.checkpoint.atomic_write import write_atomic

    if str(path) == "-":
        result_json(value)
        return
    text = encoder.dumps(value) + "\n"
    write_atomic(path, lambda file: file.write_text(text, encoding="utf-8"), IfpruneError)
