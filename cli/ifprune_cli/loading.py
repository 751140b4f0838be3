"""Loads the model that a command was given, or the embedded default, with progress."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .console import note, progress
from .options import DtypeName, ResidencyName

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from ifprune_mlx import Checkpoint, Model, Selection


def checkpoint_path(
    model: str | None,
    *,
    trained: bool = True,
    loads: bool = True,
    residency: ResidencyName | None = None,
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
            kept = None if residency is None else residency.value
            return resolve(model, progress=update, loads=loads, residency=kept, memory=memory)
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
        raise SelectionError(f"{file}: {exc}; make one for this model with `ifprune select --save-to`") from None


def load_model(
    model: str | None,
    dtype: DtypeName | None,
    trust_remote_code: bool,
    *,
    trained: bool = True,
    residency: ResidencyName | None = None,
    memory: int | None = None,
) -> tuple[Model, TokenizerWrapper]:
    """Load the given checkpoint, or the embedded default; `trained` as in `checkpoint_path`, the rest as in `load`."""
    path = checkpoint_path(model, trained=trained, residency=residency, memory=memory)
    import mlx.core as mx

    from ifprune_mlx import load

    cast = None if dtype is None else getattr(mx, dtype.value)
    with progress("load", "FFNs") as update:
        return load(
            path,
            dtype=cast,
            residency=None if residency is None else residency.value,
            memory=memory,
            trust_remote_code=trust_remote_code,
            progress=update,
        )
