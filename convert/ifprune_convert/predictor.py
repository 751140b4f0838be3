"""Opens predictor folders of two layouts, and puts them into a checkpoint as it keeps them.

One is our own, copied as it is: an mlx-lm model folder with `head.safetensors`. The other is what the inference code of
the paper's authors saves from PyTorch, as safetensors: `feature_extractor.*` (a Hugging Face model, whose config.json
and tokenizer files lie in the folder), `prediction_head1.*` and `prediction_head2.*` (linear layers, nothing between
them, on the last token's state). The backbone's names are those of mlx-lm's own `sanitize`. Pickles are never read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from ifprune_mlx.checkpoint.config_check import refuse_custom_code
from ifprune_mlx.checkpoint.hub import PICKLES
from ifprune_mlx.checkpoint.neuron_layout import FLOATS
from ifprune_mlx.checkpoint.regular_file import check_ordinary, read_json_object
from ifprune_mlx.checkpoint.safetensors_io import read_safetensors_header
from ifprune_mlx.errors import PredictorError, SourceError, reason_of
from ifprune_mlx.selection.predictor import Head, SparsityPredictor

from .fusing import all_finite
from .readers.left_out import check_nothing_left_out
from .readers.shards import Placed, equal_tensors
from .skeleton import build_skeleton, check_shapes, listing, parameter_shapes, sanitized, typed_reason, with_flat_rope
from .tokenizer_trial import try_tokenizer
from .weight_files import Shards, load_lazily

Writer = Callable[[Path], None]
_HEAD = "head.safetensors"
_BACKBONE = "feature_extractor."
_HEADS = ("prediction_head1.weight", "prediction_head1.bias", "prediction_head2.weight", "prediction_head2.bias")
_OUTPUT = "lm_head.weight"
_TEXTS = {".json", ".jinja", ".model", ".txt"}
_SAVE = "save it again with safetensors.torch.save_file"


def open_predictor(folder: Path, widths: Sequence[int], bits: int | None = None) -> Writer:
    """Open a predictor folder of either layout, checked as a whole.

    Args:
        widths: `d_ffn` of every FFN of the model that it is to select for.
        bits: pack the head's second layer with 8 or 4; None leaves it as it is. Fewer bits change which
            neurons are selected at the border of the best *k*.

    Returns:
        What writes it in our own layout to a folder, which it makes. It is to be called once, and raises PredictorError
        for numbers that are none and a tokenizer that cannot be used.

    Raises:
        PredictorError: naming the file, if something is missing, damaged, or belongs to another model.
    """
    if not folder.is_dir():
        raise PredictorError(f"{folder}: no such predictor folder; give the folder of a trained sparsity predictor")
    check_ordinary(folder, PredictorError)
    if (reason := try_tokenizer(folder)) is not None:
        raise PredictorError(
            f"{folder}: its tokenizer cannot be loaded ({reason}); download or export the folder again"
        )
    if (folder / _HEAD).is_file():
        head = Head.load(folder / _HEAD)
        if head.layers is None:
            _check_reads(SparsityPredictor.load(folder), folder)
        head.check_widths(widths, folder)
        _check_bits(head, bits, folder)
        return partial(_write_ready, folder, bits)
    names = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    files = [folder / name for name in names if name.endswith(".safetensors")]
    if not files:
        if pickles := [name for name in names if Path(name).suffix in PICKLES]:
            raise PredictorError(
                f"{folder / pickles[0]}: is a Python pickle, which can run code when read and is never opened; {_SAVE}"
            )
        raise PredictorError(
            f"{folder}: has neither {_HEAD} nor PyTorch's tensors as *.safetensors; "
            "give the folder of a trained sparsity predictor"
        )
    return _open_torch(folder, files, widths, bits)


def _write_ready(folder: Path, bits: int | None, target: Path) -> None:
    """Copy a folder of our own layout, and pack its head there."""
    target.mkdir()
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in _TEXTS | {".safetensors"}:
            shutil.copyfile(file, target / file.name)
            if file.suffix == ".safetensors":
                read_safetensors_header(target / file.name, PredictorError)
    head = Head.load(target / _HEAD)
    if bits is not None:
        head.quantized(bits).save(target / _HEAD)


def _write_torch(
    folder: Path, config: dict[str, Any], backbone: dict[str, mx.array], head: Head, bits: int | None, target: Path
) -> None:
    """Write a folder of the authors' layout in our own.

    Args:
        config: the backbone's, as it is to be written.
        backbone: its tensors by mlx-lm's names, not evaluated; is empty afterwards.
    """
    target.mkdir()
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in _TEXTS and not file.name.endswith(".safetensors.index.json"):
            shutil.copyfile(file, target / file.name)
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    shards = Shards(target)
    for name in list(backbone):
        # A view into a larger tensor (a fused matrix that `sanitize` split) would keep all of it in memory.
        array = mx.contiguous(backbone.pop(name))
        _check_numbers(folder, name, array)
        shards.add({name: array})
        del array
    shards.finish()
    for name, given in zip(_HEADS, (head.first, head.first_bias, head.second, head.second_bias), strict=True):
        if given is not None:
            _check_numbers(folder, name, given)
    (head if bits is None else head.quantized(bits)).save(target / _HEAD)
    try:
        _check_reads(SparsityPredictor.load(target), target)
    except PredictorError as exc:
        # What cannot be loaded there is what was given here.
        raise PredictorError(str(exc).replace(str(target), str(folder))) from exc


def _check_reads(predictor: SparsityPredictor, folder: Path) -> None:
    """Raise PredictorError if it cannot read an instruction."""
    try:
        predictor.tokens("What is 12 + 34?")
    except PredictorError as exc:
        raise PredictorError(f"{folder}: {str(exc).removeprefix(f'{folder}: ')}") from exc


def _check_numbers(folder: Path, name: str, array: mx.array) -> None:
    try:
        finite = all_finite(array)
    except RuntimeError as exc:
        raise PredictorError(f"{folder}: tensor {name} cannot be read ({reason_of(exc)})") from exc
    if not finite:
        raise PredictorError(f"{folder}: tensor {name} contains NaN or infinity; train or save it again")


def _check_bits(head: Head, bits: int | None, folder: Path) -> None:
    """Raise PredictorError if the head cannot be packed so, before the long work of a conversion."""
    try:
        if bits is not None:
            head.quantized(bits)  # not computed
    except PredictorError as exc:
        raise PredictorError(f"{folder}: {exc}; give --predictor-bits none") from exc


def _open_torch(folder: Path, files: list[Path], widths: Sequence[int], bits: int | None) -> Writer:
    tensors = _load_lazily(folder, files)
    backbone = {name.removeprefix(_BACKBONE): tensors.pop(name) for name in list(tensors) if name.startswith(_BACKBONE)}
    if missing := [name for name in (_HEADS[0], _HEADS[2]) if name not in tensors]:
        raise PredictorError(
            f"{folder}: has neither {_HEAD} nor the tensors {listing(missing)}; "
            "give the folder of a trained sparsity predictor"
        )
    if unknown := sorted(tensors.keys() - set(_HEADS)):
        raise PredictorError(
            f"{folder}: holds {listing(unknown)}; a predictor of PyTorch has {_BACKBONE}*, and weight and bias of "
            "prediction_head1 and prediction_head2, only"
        )
    first, first_bias, second, second_bias = (tensors.get(name) for name in _HEADS)
    assert first is not None
    assert second is not None
    if second.ndim != 2 or second.shape[0] != sum(widths):
        raise PredictorError(
            f"{folder}: {_HEADS[2]} has shape {list(second.shape)}, and the model has {len(widths)} FFNs with "
            f"{sum(widths)} neurons in all; the predictor was trained for another model, "
            "convert with --predictor DIR of this one's"
        )
    try:
        head = Head(first, first_bias, second, second_bias, tuple(widths))
    except PredictorError as exc:
        raise PredictorError(f"{folder}: {exc}; the predictor's tensors do not belong together") from exc
    if not (folder / "config.json").is_file():
        raise PredictorError(f"{folder}: has no config.json; copy the backbone's there, and its tokenizer files")
    config = read_json_object(folder / "config.json", PredictorError)
    refuse_custom_code(config, folder, PredictorError)
    if any(config.get(key) for key in ("quantization", "quantization_config")):
        raise PredictorError(f"{folder}: its backbone is quantized; save the unquantized one")
    try:
        # Only hidden states are used, and an output layer of its own, where the family can do without, is dead weight.
        config = with_flat_rope(folder, config) | {"tie_word_embeddings": True}
        arranged = _arrange(folder, config, backbone)
    except SourceError as exc:
        raise PredictorError(str(exc)) from exc
    _check_bits(head, bits, folder)
    return partial(_write_torch, folder, config, arranged, head, bits)


def _load_lazily(folder: Path, files: list[Path]) -> dict[str, mx.array]:
    tensors: dict[str, mx.array] = {}
    places: dict[str, Placed] = {}
    for file in files:
        infos = read_safetensors_header(file, PredictorError).tensors
        for name, info in infos.items():
            if not equal_tensors(places.setdefault(name, Placed(file, info)), Placed(file, info)):
                raise PredictorError(f"{folder}: tensor {name} is in two files, and they differ; remove the stale one")
            if info.dtype not in FLOATS:
                raise PredictorError(
                    f"{file}: tensor {name} has type {info.dtype}; save it in float32, float16 or bfloat16"
                )
        tensors |= load_lazily(file, PredictorError, _SAVE)
    return tensors


def _arrange(folder: Path, config: dict[str, Any], tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """The backbone's tensors under the names that mlx-lm's class wants.

    They may be those of a whole language model or of its inner model, and come with an output layer or without. All are
    tried, and that with the most tensors in place is it; at equal numbers, the one without an output layer.

    Raises:
        SourceError: if mlx-lm does not know the family, or the tensors are not just those that it wants.
    """
    best: tuple[int, dict[str, tuple[int, ...]], dict[str, mx.array], dict[str, mx.array]] | None = None
    failure = ""
    for prefix in ("", "model."):
        for dropped in (_OUTPUT, ""):
            model = build_skeleton(folder, config, len(tensors))
            # New arrays each time: some families multiply theirs in place.
            kept = {name: mx.contiguous(array) for name, array in tensors.items() if name != dropped}
            given = {name if name == _OUTPUT else prefix + name: array for name, array in kept.items()}
            try:
                arranged = sanitized(model, dict(given))
            except Exception as exc:  # it indexes and reshapes what a complete model would have
                failure = failure or typed_reason(exc)
                continue
            expected = parameter_shapes(model)
            fits = len(expected.keys() & arranged.keys())
            if best is None or fits > best[0]:
                best = fits, expected, arranged, given
    if best is None:
        raise SourceError(f"{folder}: mlx-lm cannot arrange the backbone's tensors ({failure}); save it again")
    _, expected, arranged, given = best
    without = {name: array for name, array in given.items() if name != _OUTPUT}
    check_nothing_left_out(folder, config, partial(build_skeleton, folder, config, len(tensors)), without, arranged)
    check_shapes(folder, expected, {name: tuple(array.shape) for name, array in arranged.items()})
    return arranged
