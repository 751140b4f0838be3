"""Converts a dense checkpoint into an IFP checkpoint, one FFN at a time, atomically.

Everything is written to a hidden folder beside the output and renamed at the end, after the result has been opened as a
user would open it. Peak memory is that of the largest single tensor or FFN, not of the model.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.utils import load_tokenizer

from ifprune_mlx.checkpoint import MANIFEST, SECTION, Checkpoint, Layout, Quantization, neurons_file, write_manifest
from ifprune_mlx.errors import IfpruneError, PredictorError, SourceError
from ifprune_mlx.families import FFNSpec, find_ffns
from ifprune_mlx.files import new_folder, read_safetensors_header
from ifprune_mlx.model import load_checkpoint
from ifprune_mlx.predictor import Head, SparsityPredictor
from ifprune_mlx.selection import Scores, keep_count
from ifprune_mlx.train.records import Record

from . import layout
from .adapter import Adapter, open_adapter
from .calibrate import calibrate
from .prior import read_prior
from .shards import Shards
from .skeleton import build_skeleton
from .source import Source

Report = Callable[[str, int, int], None]
"""Called with (stage, done, total): stage `convert` counts bytes of the source, `calibrate` counts tokens."""

QUANTIZATION_MODES = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
# The lowest of 0.7, 0.8, 0.85 and 0.9 at which the training-free selector stayed fluent on SmolLM2 (docs/log.md).
DEFAULT_DENSITY = 0.9
_FLOATS = (mx.float32, mx.float16, mx.bfloat16)


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes:
        quantization: for FFN rows and, as mlx-lm does it, for every other layer that can be; None keeps floats.
        dtype: float type to cast to; None keeps the source's, but quantized GGUF tensors become float16.
        density: the checkpoint's default density.
        adapter: folder of an mlx-lm adapter to fuse into the weights.
        predictor: folder of a trained sparsity predictor to put in.
        calibration: chats to measure the prior on; None takes it from the weights, unless `prior` is given.
        prior: ready importance per FFN, float32 `[d_ffn]` each, or the safetensors file that holds it.
        overwrite: replace an existing output folder.
    """

    quantization: Quantization | None = None
    dtype: mx.Dtype | None = None
    density: float = DEFAULT_DENSITY
    adapter: Path | None = None
    predictor: Path | None = None
    calibration: list[Record] | None = None
    prior: list[Scores] | Path | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Conversion:
    """What came out."""

    checkpoint: Checkpoint
    seconds: float


def quantization_of(mode: str, group_size: int | None, bits: int | None) -> Quantization:
    """Parameters of a quantization mode, mlx-lm's defaults where None.

    Raises:
        SourceError: if the mode does not know this group size or number of bits.
    """
    if mode not in QUANTIZATION_MODES:
        raise SourceError(f"quantization mode {mode!r} is unknown; choose one of {', '.join(QUANTIZATION_MODES)}")
    default_group, default_bits = QUANTIZATION_MODES[mode]
    group_size = default_group if group_size is None else group_size
    bits = default_bits if bits is None else bits
    if mode == "affine":
        fits = group_size in (32, 64, 128) and bits in (2, 3, 4, 5, 6, 8)
        allowed = "groups of 32, 64 or 128 and 2, 3, 4, 5, 6 or 8 bits"
    else:
        fits = (group_size, bits) == (default_group, default_bits)
        allowed = f"groups of {default_group} and {default_bits} bits"
    if not fits:
        raise SourceError(f"{mode} quantization has {allowed}; got groups of {group_size} and {bits} bits")
    return Quantization(group_size, bits, mode)


def convert(source: Source, out: Path, options: Options, report: Report | None = None) -> Conversion:
    """Write the IFP checkpoint `out`.

    Raises:
        IfpruneError: naming what cannot be used or written; `out` is then as it was.
    """
    start = time.perf_counter()
    report = report or (lambda *_: None)
    keep_count(options.density, 64)
    _check_output(out, options.overwrite)
    skeleton = build_skeleton(source.path, source.config, len(source.shapes))
    specs = find_ffns(skeleton, str(source.config["model_type"]))
    _check_quantization(specs, options.quantization)
    if options.predictor is not None:
        _check_predictor(options.predictor, specs)
    prior, method = _ready_prior(source, options, specs)
    adapter = None if options.adapter is None else open_adapter(options.adapter, skeleton, source.shapes)
    with new_folder(out, overwrite=options.overwrite, error=SourceError) as folder:
        # Quick, and can fail: before the long work.
        _write_config(folder, source, options, specs)
        _write_tokenizer(folder, source)
        writer = _Writer(source, adapter, folder, options, report)
        priors = [writer.write_ffn(index, spec, len(specs)) for index, spec in enumerate(specs)]
        writer.write_rest(skeleton)
        if options.predictor is not None:
            _copy_predictor(options.predictor, folder / "predictor")
        weights_prior = [importance for importance, _ in priors]
        down_norms = [norms for _, norms in priors]
        _write_priors(folder, prior or weights_prior, down_norms, method)
        described = source.path.name
        if options.adapter is not None:
            described += f" + adapter {options.adapter.absolute().name}"
        write_manifest(folder, source=described, licence=source.licence)
        if options.calibration is not None:
            model = load_checkpoint(Checkpoint.open(folder))
            measured = calibrate(
                model, folder, options.calibration, lambda done, total: report("calibrate", done, total)
            )
            model.close()
            _write_priors(folder, measured, down_norms, "calibrated")
            write_manifest(folder, source=described, licence=source.licence)
        Checkpoint.open(folder)
    return Conversion(Checkpoint.open(out), time.perf_counter() - start)


class _Writer:
    """Moves tensors from the source into the new folder and keeps count."""

    def __init__(self, source: Source, adapter: Adapter | None, folder: Path, options: Options, report: Report) -> None:
        self._source = source
        self._adapter = adapter
        self._folder = folder
        self._options = options
        self._report = report
        self._remaining = dict(source.shapes)
        self._total = sum(math.prod(shape) for shape in self._remaining.values())
        self._done = 0

    def write_ffn(self, index: int, spec: FFNSpec, count: int) -> tuple[Scores, Scores]:
        """Write one neurons file.

        Returns:
            The prior from the weights and the norms of the down rows, float32 `[d_ffn]` each.
        """
        quantization = self._options.quantization
        gate, up = (self._take(f"{spec.path}.{leaf}.weight") for leaf in (spec.gate, spec.up))
        tensors = layout.packed("gate_up", layout.gate_up_rows(gate, up), quantization)
        mx.eval(tensors)
        down = layout.down_rows(self._take(f"{spec.path}.{spec.down}.weight"))
        norms = layout.row_norms(down)
        prior = layout.weight_prior(gate, up, norms)
        del gate, up
        if not np.isfinite(prior).all():
            self._refuse_weights(spec)
        tensors |= layout.packed("down", down, quantization)
        del down
        if spec.bias:
            biases = [self._take(f"{spec.path}.{leaf}.bias") for leaf in (spec.gate, spec.up)]
            tensors["gate_up.bias"] = layout.gate_up_rows(*biases)
        if spec.down_bias:
            tensors["down.bias"] = self._take(f"{spec.path}.{spec.down}.bias")
        mx.save_safetensors(str(self._folder / neurons_file(index, count)), tensors, {"format": "mlx"})
        del tensors
        mx.clear_cache()
        return prior, norms

    def write_rest(self, skeleton: nn.Module) -> None:
        """Write everything but the sliced FFNs, in shards, quantized where mlx-lm would."""
        modules = dict(skeleton.named_modules())
        shards = Shards(self._folder)
        for name in list(self._remaining):
            array = self._take(name)
            stem, _, leaf = name.rpartition(".")
            quantization = self._options.quantization
            module = modules.get(stem)
            if (
                quantization is not None
                and leaf == "weight"
                and hasattr(module, "to_quantized")
                and array.shape[-1] % quantization.group_size == 0
            ):
                tensors = layout.packed(stem, array, quantization)
            else:
                tensors = {name: array}
            del array
            shards.add(tensors)
            del tensors
        shards.finish()

    def _refuse_weights(self, spec: FFNSpec) -> NoReturn:
        what = f"{self._source.path}: the weights of {spec.path} contain NaN or infinity"
        if self._options.dtype is not None:
            name = str(self._options.dtype).removeprefix("mlx.core.")
            raise SourceError(f"{what} as {name}; choose another --dtype, or get the weights again")
        raise SourceError(f"{what}; get them again")

    def _take(self, name: str) -> mx.array:
        array = self._source.take(name)
        shape = self._remaining.pop(name)
        dtype = self._options.dtype
        if dtype is None and self._source.path.suffix == ".gguf" and array.dtype == mx.float32:
            dtype = mx.float16
        if self._adapter is not None and name in self._adapter:
            array = self._adapter.fuse(name, array, dtype or array.dtype)
        elif dtype is not None and array.dtype in _FLOATS:
            array = array.astype(dtype)
        mx.eval(array)
        self._done += math.prod(shape)
        self._report("convert", self._done, self._total)
        return array


def _check_output(out: Path, overwrite: bool) -> None:
    """Refuse to replace what a conversion did not make: the source itself, or somebody's work."""
    if not overwrite or not out.exists():
        return
    made_here = (out / MANIFEST).is_file() or any(out.glob("neurons-*.safetensors"))
    if not out.is_dir() or (not made_here and any(out.iterdir())):
        raise SourceError(
            f"{out}: is not an IFP checkpoint, so --overwrite does not replace it; "
            "choose another folder, or remove this one first"
        )


def _check_quantization(specs: list[FFNSpec], quantization: Quantization | None) -> None:
    for spec in specs:
        if quantization is not None and spec.d_model % quantization.group_size:
            raise SourceError(
                f"{spec.path}: rows of {spec.d_model} weights do not divide into groups of {quantization.group_size}; "
                "choose another --q-group-size"
            )


def _ready_prior(source: Source, options: Options, specs: list[FFNSpec]) -> tuple[list[Scores] | None, str]:
    """The prior that was given, if one was, and where the checkpoint's comes from; calibration changes both later."""
    widths = [spec.d_ffn for spec in specs]
    if options.prior is None:
        return None, "weights"
    if isinstance(options.prior, Path):
        return read_prior(options.prior, widths)
    if [len(values) for values in options.prior] != widths:
        raise SourceError(f"{source.path}: the ready prior was measured on a model of another shape")
    return options.prior, "calibrated"


def _check_predictor(folder: Path, specs: list[FFNSpec]) -> None:
    if not folder.is_dir():
        raise PredictorError(f"{folder}: no such predictor folder; give the folder of a trained sparsity predictor")
    head = Head.load(folder / "head.safetensors")
    if head.layers is None:
        SparsityPredictor.load(folder)
    head.check_widths([spec.d_ffn for spec in specs], folder)


def _copy_predictor(folder: Path, target: Path) -> None:
    target.mkdir()
    kept = {".json", ".safetensors", ".jinja", ".model", ".txt"}
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in kept:
            shutil.copyfile(file, target / file.name)
            if file.suffix == ".safetensors":
                read_safetensors_header(target / file.name, PredictorError)
    Head.load(target / "head.safetensors")


def _write_config(folder: Path, source: Source, options: Options, specs: list[FFNSpec]) -> None:
    config: dict[str, Any] = dict(source.config)
    quantization = options.quantization
    if quantization is not None:
        config["quantization"] = quantization.to_dict()
    selector = "learned" if options.predictor is not None else "activation"
    section = Layout(tuple(specs), options.density, selector, quantization, quantization)
    config[SECTION] = section.to_dict()
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _write_tokenizer(folder: Path, source: Source) -> None:
    source.write_tokenizer(folder)
    try:
        load_tokenizer(folder, {"trust_remote_code": False})
    except Exception as exc:  # transformers raises whatever its parsers do
        reason = " ".join(str(exc).split())[:200]
        raise SourceError(
            f"{source.path}: its tokenizer cannot be loaded ({reason}); download the tokenizer files again"
        ) from None


def _write_priors(folder: Path, prior: list[Scores], down_norms: list[Scores], method: str) -> None:
    tensors = {f"prior.{index}": mx.array(values) for index, values in enumerate(prior)}
    tensors |= {f"down_norm.{index}": mx.array(values) for index, values in enumerate(down_norms)}
    for name, values in tensors.items():
        if not bool(mx.all(mx.isfinite(values))):
            raise IfpruneError(f"{name}: the measured prior contains NaN or infinity; the source may be damaged")
    mx.save_safetensors(str(folder / "priors.safetensors"), tensors, {"method": method})
