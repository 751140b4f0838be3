"""A trained predictor on its own: without the weights of the model that it was trained for, which others have.

The folder, or repository of the hub, holds `predictor/`; `adapter/`, if the model was healed; and `prior.safetensors`,
whose norms of down rows tell that model's neurons: a predictor names neurons by their number, so it fits no other.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from ifprune_mlx.checkpoint.format import Checkpoint
from ifprune_mlx.checkpoint.hub import Progress, cached_folder, download, is_hub_id, list_repository
from ifprune_mlx.checkpoint.regular_file import read_json_object
from ifprune_mlx.checkpoint.safetensors_io import load_arrays, read_safetensors_header
from ifprune_mlx.errors import PredictorError
from ifprune_mlx.selection.selection import Scores

from .card import CARD, predictor_card
from .upload import upload_files

_PREDICTOR, _ADAPTER, _PRIOR = "predictor", "adapter", "prior.safetensors"
_PARTS = (f"{_PREDICTOR}/", f"{_ADAPTER}/", _PRIOR)
_PATHS = ("model", "data", "adapter_path", "resume_adapter_file", "config", "base_model_name_or_path")
# Norms of the same neurons are alike whatever the bits per weight, and so are those of a model that was fine-tuned:
# both correlate above 0.9. Those of other models do not correlate.
_LEAST_CORRELATION = 0.5

CheckNeurons = Callable[[int, Scores], None]
"""Called with an FFN's index and the norms of its down rows, float32 `[d_ffn]`; raises PredictorError."""


@dataclass(frozen=True)
class SharedPredictor:
    """Where the parts of a predictor lie.

    Attributes:
        predictor: its folder; None for no predictor.
        adapter: that of the adapter that it was trained with, if there is one.
        prior: the file with prior and norms of the model it was trained for; None for a predictor's folder alone.
    """

    predictor: Path | None = None
    adapter: Path | None = None
    prior: Path | None = None

    def check_neurons(self) -> CheckNeurons:
        """What checks that a model is the one that the predictor was trained for; it passes all if there is no prior.

        Raises:
            PredictorError: if the prior's file cannot be read.
        """
        if self.prior is None:
            return lambda index, norms: None
        names = read_safetensors_header(self.prior, PredictorError).tensors
        arrays = load_arrays(self.prior, PredictorError)
        known = {name: np.array(arrays[name].astype(mx.float32)) for name in names if name.startswith("down_norm.")}
        return partial(_check_neurons, self.prior.parent, known)


def _check_neurons(folder: Path, known: dict[str, Scores], index: int, norms: Scores) -> None:
    theirs = known.get(f"down_norm.{index}", norms)
    spread = float(np.std(theirs) * np.std(norms)) if theirs.shape == norms.shape else 0.0
    alike = np.array_equal(theirs, norms) or (
        spread > 0 and float(np.mean((theirs - theirs.mean()) * (norms - norms.mean()))) / spread > _LEAST_CORRELATION
    )
    if not alike:
        raise PredictorError(
            f"{folder}: the predictor was trained for a model with other neurons (FFN {index} differs); give --model "
            "the one that its page names"
        )


def locate_predictor(given: str, progress: Progress | None = None) -> SharedPredictor:
    """The parts of a predictor: of a folder of such parts, of a predictor's folder alone, or of a repository of the
    hub with either, which is downloaded first.

    Raises:
        PredictorError: if the hub has no such repository, it holds no predictor, or it cannot be downloaded.
    """
    folder = Path(given).expanduser()
    if not folder.exists() and is_hub_id(given):
        folder = _downloaded(given, progress)
    if not (folder / _PREDICTOR).is_dir():
        return SharedPredictor(folder)
    adapter, prior = folder / _ADAPTER, folder / _PRIOR
    return SharedPredictor(
        folder / _PREDICTOR, adapter if adapter.is_dir() else None, prior if prior.is_file() else None
    )


def _downloaded(name: str, progress: Progress | None) -> Path:
    head = f"{_PREDICTOR}/head.safetensors"
    try:
        repository = list_repository(name, None, PredictorError)
    except PredictorError:
        if (folder := cached_folder(name, head)) is None:
            raise
        return folder
    alone = head not in repository.files
    head = Path(head).name if alone else head
    wanted = [file for file in repository.files if ("/" not in file if alone else file.startswith(_PARTS))]
    files = [file for file in wanted if _is_part(file)]
    if head not in files:
        raise PredictorError(
            f"{name}: holds no sparsity predictor (no {_PREDICTOR}/head.safetensors); `ifprune convert "
            "--upload-predictor` makes such repositories"
        )
    return download(repository, files, error=PredictorError, progress=progress)


def _is_part(file: str) -> bool:
    return Path(file).suffix in {".safetensors", ".json", ".jinja", ".txt", ".model"}


def upload_predictor(checkpoint: Checkpoint, adapter: Path | None, name: str) -> str:
    """Upload a checkpoint's predictor, with the adapter that is fused into its weights, without these weights.

    Args:
        name: a new or empty repository of the hub, `OWNER/NAME`; ask `check_upload` first.

    Returns:
        The repository's page.

    Raises:
        SourceError: if it fails.
        PredictorError: if there is no predictor.
    """
    if not checkpoint.has_predictor:
        raise PredictorError(f"{checkpoint.path}: has no predictor to upload; train one with `ifprune train`")
    with tempfile.TemporaryDirectory(prefix="ifprune-share-") as temporary:
        folder = Path(temporary)
        shutil.copytree(checkpoint.path / "predictor", folder / _PREDICTOR)
        if adapter is not None:
            shutil.copytree(adapter, folder / _ADAPTER, ignore=_no_part)
            _hide_paths(folder / _ADAPTER / "adapter_config.json")
        shutil.copyfile(checkpoint.priors_file, folder / _PRIOR)
        (folder / CARD).write_text(predictor_card(checkpoint, name), encoding="utf-8")
        return upload_files(folder, name, ["*"], "Sparsity predictor")


def _hide_paths(file: Path) -> None:
    """Take from an adapter's config what names folders of this machine; nothing that fuses it reads that."""
    config = read_json_object(file, PredictorError)
    kept = {key: value for key, value in config.items() if key not in _PATHS}
    file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def _no_part(folder: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if not _is_part(name)]
