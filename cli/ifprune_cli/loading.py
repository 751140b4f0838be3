"""Loads the model that a command was given, or the embedded default, with progress."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import ranks
from .console import note, progress, stages
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
_FAR = 0.75  # of a checkpoint's own density; below, it is said what that costs


def checkpoint_path(
    model: str | None,
    *,
    trained: bool = True,
    loads: bool = True,
    residency: Residency | None = None,
    memory: int | None = None,
    converts: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """The folder of the given model, downloaded if it is one of the hub and converted into the cache if it is no IFP
    checkpoint; or of the embedded default, which is fetched and converted if this is its first use.

    Args:
        trained: of the embedded model, the one with the trained predictor; else the one that training begins with.
        loads, residency, memory: as `ifprune_mlx.checkpoint.hub.resolve` takes them.
        converts: False takes of models that are no IFP checkpoints only those converted before.
    """
    if model is not None:
        from ifprune_convert.model_cache import ensure_converted, names_dense_model
        from ifprune_mlx.checkpoint.hub import resolve
        from ifprune_mlx.errors import DenseModelError

        with stages() as report:
            if not names_dense_model(model):
                try:
                    shown = partial(report, "download")
                    size = ranks.size() if loads else 1
                    return resolve(model, progress=shown, loads=loads, residency=residency, memory=memory, ranks=size)
                except DenseModelError:
                    if not converts:
                        raise
            return ensure_converted(
                model,
                trust_remote_code=trust_remote_code,
                convert_it=converts,
                residency=residency,
                memory=memory,
                report=report,
                note=note,
            )
    from ifprune_convert.embedded import ensure_embedded

    with progress("convert", "weights") as update:
        return ensure_embedded(note, lambda stage, done, total: update(done, total), trained=trained)


def model_path(options: ModelOptions, memory: int | None) -> Path:
    """`checkpoint_path` as the options of a command say."""
    return checkpoint_path(
        options.model,
        residency=options.residency,
        memory=memory,
        converts=not options.no_convert,
        trust_remote_code=options.trust_remote_code,
    )


def open_checkpoint(model: str | None, *, converts: bool = False) -> Checkpoint:
    """Open the given checkpoint, or the embedded default, without loading weights; `converts` as above."""
    from ifprune_mlx import Checkpoint

    return Checkpoint.open(checkpoint_path(model, loads=False, converts=converts))


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
    template: bool = True,
    shared: bool = False,
) -> tuple[Model, TokenizerWrapper]:
    """Load the given checkpoint, or the embedded default.

    Args:
        trained: as in `checkpoint_path`; the rest but the next two as in `load`.
        template: False reads messages as plain text, whatever chat template the model has.
        shared: the ranks of this run share the model, if there are any.
    """
    from ifprune_mlx import Checkpoint

    joined = ranks.join() if shared else None
    with nullcontext() if joined is None else joined.together():
        checkpoint = Checkpoint.open(checkpoint_path(model, trained=trained, residency=residency, memory=memory))
        options = ModelOptions(model, dtype, residency, trust_remote_code)
        loaded, tokenizer = _load(checkpoint, options, memory, joined)
    if not template:
        from ifprune_mlx.chat_template import without_template

        tokenizer = without_template(tokenizer)
    return loaded, tokenizer


def _check_memory(
    checkpoint: Checkpoint,
    residency: str,
    float_bytes: int | None,
    limits: dict[str, Any],
    selection: Selection | None,
    dense: bool,
) -> None:
    """Raise BudgetError unless what the options ask for fits into memory; `limits` as in `Runtime.budget`."""
    from ifprune_mlx.checkpoint.budget import SSD, check_fits, resolve_keep

    if selection is not None and residency == SSD:
        check_fits(checkpoint, SSD, selection.keep, memory=limits["memory"], float_bytes=float_bytes, asked=True)
    elif selection is None and not dense:
        resolve_keep(checkpoint, **limits, residency=residency, float_bytes=float_bytes)


def _warn_far_below(
    checkpoint: Checkpoint,
    selector: str | None,
    limits: dict[str, Any],
    residency: str,
    float_bytes: int | None,
) -> None:
    """Say in one line what a density far below the checkpoint's own was measured to lose, and that a budget of memory
    asks for such a density."""
    from ifprune_mlx.checkpoint.budget import resolve_keep

    curve, asked = checkpoint.curve, limits["density"] or limits["active_parameters"]
    if limits["memory"] is None and not (asked and curve):
        return
    keep = resolve_keep(checkpoint, **limits, residency=residency, float_bytes=float_bytes)
    density, own = (sum(each) / sum(checkpoint.widths) for each in (keep, resolve_keep(checkpoint)))
    if density >= _FAR * own:
        return
    room = "" if asked else ", which is what --memory leaves room for,"
    far = f"density {density:.2f}{room} is far below this checkpoint's own, {own:.2f}"
    if curve is None:
        note(f"{far}: answers may fall apart")
        return
    name = selector or checkpoint.layout.selector
    point = curve.best(density, [name] if name in curve.selectors else None)
    note(
        f"{far}: with selector {point.selector}, density {point.density:g} lost {point.lost:.2f} nats per answer token "
        f"(95 %: {point.low:.2f} to {point.high:.2f})"
    )


def _load(
    checkpoint: Checkpoint, options: ModelOptions, memory: int | None, joined: Ranks | None
) -> tuple[Model, TokenizerWrapper]:
    import mlx.core as mx

    from ifprune_mlx import load

    float_bytes = None if options.dtype is None else int(getattr(mx, options.dtype.value).size)
    sizes = (checkpoint.ffn_bytes(index, float_bytes) for index in range(len(checkpoint.layout.ffns)))
    read, whole = [0, *accumulate(sizes)], checkpoint.loaded_bytes(float_bytes)
    with progress("load", "B") as update:
        return load(
            checkpoint,
            dtype=None if options.dtype is None else getattr(mx, options.dtype.value),
            residency=options.residency,
            memory=memory,
            trust_remote_code=options.trust_remote_code,
            # What is no FFN is read last, so the end comes after the last FFN.
            progress=lambda done, total: update(read[done], whole),
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
    import mlx.core as mx

    from ifprune_mlx import Checkpoint, Selection, TaskStore
    from ifprune_mlx.checkpoint.budget import choose_residency
    from ifprune_mlx.selection.presets import check_task_name

    selection = None if choice.selection is None else Selection.load(choice.selection)
    if choice.task is not None:
        check_task_name(choice.task)
    limits, given = budget.arguments(), template_variables(variables)
    generation: dict[str, Any] = {} if sampling is None else sampling.arguments()
    checkpoint = Checkpoint.open(model_path(model, limits["memory"]))
    if (joined := ranks.join()) is not None:
        checkpoint = replace(checkpoint, ranks=joined.size)
    if sampling is not None:
        sampling.check(checkpoint)
    if choice.selection is not None and selection is not None:
        check_selection(checkpoint, selection, choice.selection)
    if choice.task is not None:
        selection = TaskStore(checkpoint).load(choice.task)
    float_bytes = None if model.dtype is None else int(getattr(mx, model.dtype.value).size)
    residency = choose_residency(checkpoint, model.residency, limits["memory"], float_bytes)
    selector = None if choice.selector is None else choice.selector.value
    kept, selector = budget.on(checkpoint, selector, residency)
    _check_memory(checkpoint, residency, float_bytes, kept, selection, choice.dense)
    if selection is None and not choice.dense:  # and not of what the curve chose by a given tolerance
        _warn_far_below(checkpoint, selector, limits, residency, float_bytes)
    loaded, tokenizer = _load(checkpoint, model, limits["memory"], joined)
    if ranks.leads():  # which has the selector
        selecting.apply(loaded)
    if not template:
        from ifprune_mlx.chat_template import without_template

        tokenizer = without_template(tokenizer)
    if given:
        from ifprune_mlx.chat_template import with_variables

        tokenizer = with_variables(tokenizer, given)
    return Runtime(loaded, tokenizer, model_name(model.model), selector, selection, choice.dense, kept, generation)


def model_name(model: str | None) -> str:
    """What to call the given model, or the embedded default."""
    return EMBEDDED if model is None else Path(model).name or Path(model).resolve().name
