"""Converts a dense checkpoint into an IFP checkpoint, one FFN at a time, atomically.

Everything is written to a hidden folder beside the output and renamed at the end, after the result has been opened as a
user would open it. Peak memory is that of the largest single tensor or FFN, not of the model.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.utils import load_tokenizer

from ifprune_mlx.checkpoint.atomic_write import check_free, new_folder
from ifprune_mlx.checkpoint.budget import keep_count
from ifprune_mlx.checkpoint.ffn_spec import FFNSpec, split_fused
from ifprune_mlx.checkpoint.format import (
    MANIFEST,
    SECTION,
    Checkpoint,
    Layout,
    Quantization,
    neurons_file,
    write_manifest,
)
from ifprune_mlx.checkpoint.hub import hub_name
from ifprune_mlx.data.dataset import Record
from ifprune_mlx.errors import IfpruneError, SourceError
from ifprune_mlx.model import load_checkpoint
from ifprune_mlx.selection.selection import Scores
from ifprune_mlx.sparse.ffn_detection import find_ffns

from . import layout
from .adapter import Adapter, open_adapter
from .calibrate import calibrate
from .card import write_card
from .frequency import order_by_frequency
from .neurons import write_neurons
from .packing import Packing, plan
from .predictor import open_predictor
from .prior import read_prior
from .shards import Shards
from .skeleton import build_skeleton
from .source import PackedSource, Source

Report = Callable[[str, int, int], None]
"""Called with (stage, done, total): stage `convert` counts bytes of the source, `calibrate` tokens, `order` chats."""

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
# The lowest of 0.7, 0.8, 0.85 and 0.9 at which the training-free selector stayed fluent on SmolLM2 (docs/log.md).
DEFAULT_DENSITY = 0.9
_FLOATS = (mx.float32, mx.float16, mx.bfloat16)


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes:
        quantization: for FFN rows and, as mlx-lm does it, for every other layer that can be; None keeps what the source
            has: floats or, of a quantized mlx-lm model, the packed bytes, but for down projections.
        float_down: keep the down projections of a quantized model as floats instead of packing them anew at 8 bits.
        dtype: float type to cast to; None keeps the source's, but quantized GGUF tensors become float16.
        density: the checkpoint's default density.
        adapter: folder of an adapter, of mlx-lm or PEFT, to fuse into the weights.
        predictor: folder of a trained sparsity predictor to put in, ours or one in the layout of the authors' code.
        predictor_bits: bits to pack its head's second layer with, 8 or 4; None leaves it as it is.
        calibration: chats to measure the prior on; None takes it from the weights, unless `prior` is given.
        prior: ready importance per FFN, float32 `[d_ffn]` each, or the safetensors file that holds it.
        order: chats by whose selections to put the neurons in order of frequency, for residency `ssd`; None keeps the
            source's order.
        overwrite: replace an existing output folder.
    """

    quantization: Quantization | None = None
    float_down: bool = False
    dtype: mx.Dtype | None = None
    density: float = DEFAULT_DENSITY
    adapter: Path | None = None
    predictor: Path | None = None
    predictor_bits: int | None = None
    calibration: list[Record] | None = None
    prior: list[Scores] | Path | None = None
    order: list[Record] | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Conversion:
    """What came out."""

    checkpoint: Checkpoint
    seconds: float


def convert(source: Source, out: Path, options: Options, report: Report | None = None) -> Conversion:
    """Write the IFP checkpoint `out`.

    Raises:
        IfpruneError: naming what cannot be used or written; `out` is then as it was.
    """
    start = time.perf_counter()
    report = report or (lambda *_: None)
    keep_count(options.density, 64)
    check_output(out, options.overwrite)
    skeleton = build_skeleton(source.path, source.config, len(source.shapes))
    specs = find_ffns(skeleton, str(source.config["model_type"]))
    packing = plan(source, skeleton, specs, options.quantization, options.float_down)
    predictor = None
    if options.predictor is not None:
        predictor = open_predictor(options.predictor, [spec.d_ffn for spec in specs], options.predictor_bits)
    prior, method = _ready_prior(source, options, specs)
    adapter = None if options.adapter is None else open_adapter(options.adapter, skeleton, source.shapes)
    with new_folder(out, overwrite=options.overwrite, error=SourceError) as folder:
        # Quick, and can fail: before the long work.
        _write_config(folder, source, options, specs, packing)
        _write_tokenizer(folder, source)
        if predictor is not None:
            predictor.write(folder / "predictor")
            del predictor  # its head can be as large as an FFN, and would stay in memory
        writer = _Writer(source, skeleton, adapter, folder, options, packing, report)
        priors = [writer.write_ffn(index, spec, len(specs)) for index, spec in enumerate(specs)]
        writer.write_rest()
        weights_prior = [importance for importance, _ in priors]
        down_norms = [norms for _, norms in priors]
        _write_priors(folder, prior or weights_prior, down_norms, method)
        described = source.path.name
        if (repository := hub_name(source.path)) is not None:
            described = repository if source.path.is_dir() else f"{repository} {described}"
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
        if options.order is not None:
            order_by_frequency(folder, options.order, lambda done, total: report("order", done, total))
            write_manifest(folder, source=described, licence=source.licence)
        write_card(Checkpoint.open(folder), out.absolute().name)
    return Conversion(Checkpoint.open(out), time.perf_counter() - start)


class _Writer:
    """Moves tensors from the source into the new folder and keeps count."""

    def __init__(
        self,
        source: Source,
        skeleton: nn.Module,
        adapter: Adapter | None,
        folder: Path,
        options: Options,
        packing: Packing,
        report: Report,
    ) -> None:
        self._source = source
        self._adapter = adapter
        self._folder = folder
        self._options = options
        self._packing = packing
        self._report = report
        # Some of a model's own arrays, such as the bias of a router, are to keep their type.
        self._may_cast: Callable[[str], bool] = getattr(skeleton, "cast_predicate", lambda _: True)
        self._remaining = dict(source.shapes)
        self._total = sum(math.prod(shape) for shape in self._remaining.values())
        self._done = 0

    def write_ffn(self, index: int, spec: FFNSpec, count: int) -> tuple[Scores, Scores]:
        """Write one neurons file.

        Returns:
            The prior from the weights and the norms of the down rows, float32 `[d_ffn]` each.
        """
        gate, up, tensors = self._gate_up(spec)
        mx.eval(tensors)
        down = layout.down_rows(self._take(f"{spec.path}.{spec.down}.weight"))
        norms = layout.row_norms(down)
        prior = layout.weight_prior(gate, up, norms)
        del gate, up
        if not np.isfinite(prior).all():
            self._refuse_weights(spec)
        tensors |= layout.packed("down", down, self._packing.down)
        del down
        if spec.bias:
            names = [f"{spec.path}.{leaf}.bias" for leaf in spec.leaves if leaf != spec.down]
            tensors["gate_up.bias"] = layout.gate_up_rows(*_apart(spec, [self._take(name) for name in names]))
        if spec.down_bias:
            tensors["down.bias"] = self._take(f"{spec.path}.{spec.down}.bias")
        write_neurons(self._folder / neurons_file(index, count), tensors)
        del tensors
        mx.clear_cache()
        return prior, norms

    def write_rest(self) -> None:
        """Write everything but the sliced FFNs, in shards."""
        shards = Shards(self._folder)
        for name in list(self._remaining):
            stem, _, leaf = name.rpartition(".")
            if leaf == "weight" and self._kept_packed(stem):
                arrays = self._take_packed(stem)
                tensors = {f"{stem}.{part}": array for part, array in arrays.items()}
                del arrays
            elif leaf == "weight":
                tensors = layout.packed(stem, self._take(name), self._packing.other(stem))
            else:
                tensors = {name: self._take(name)}
            shards.add(tensors)
            del tensors
        shards.finish()

    def _gate_up(self, spec: FFNSpec) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        """Rows of gate and up as floats, and the tensors that hold them in the file."""
        quantization = self._packing.gate_up
        stems = [f"{spec.path}.{leaf}" for leaf in spec.leaves if leaf != spec.down]
        if quantization is not None and all(self._kept_packed(stem) for stem in stems):
            both = [self._take_packed(stem) for stem in stems]
            gate, up = _apart(spec, [layout.unpacked(arrays, quantization, mx.float32) for arrays in both])
            parts = {part: _apart(spec, [arrays[part] for arrays in both]) for part in both[0]}
            return gate, up, {f"gate_up.{part}": layout.gate_up_rows(*rows) for part, rows in parts.items()}
        gate, up = _apart(spec, [self._take(f"{stem}.weight") for stem in stems])
        return gate, up, layout.packed("gate_up", layout.gate_up_rows(gate, up), quantization)

    def _kept_packed(self, path: str) -> bool:
        """Whether the bytes of a module's weight stay as they are."""
        source = self._source
        changed = self._adapter is not None and f"{path}.weight" in self._adapter
        return isinstance(source, PackedSource) and path in source.packed and not changed

    def _take_packed(self, path: str) -> dict[str, mx.array]:
        assert isinstance(self._source, PackedSource)
        arrays = self._source.take_packed(path)
        dtype = self._options.dtype
        if dtype is not None:
            arrays = {part: array.astype(dtype) if array.dtype in _FLOATS else array for part, array in arrays.items()}
            mx.eval(arrays)
        self._count(f"{path}.weight")
        return arrays

    def _refuse_weights(self, spec: FFNSpec) -> NoReturn:
        what = f"{self._source.path}: the weights of {spec.path} contain NaN or infinity"
        if self._options.dtype is not None:
            name = str(self._options.dtype).removeprefix("mlx.core.")
            raise SourceError(f"{what} as {name}; choose another --dtype, or get the weights again")
        raise SourceError(f"{what}; get them again")

    def _take(self, name: str) -> mx.array:
        array = self._source.take(name)
        dtype = self._options.dtype if self._may_cast(name) else None
        if dtype is None and self._source.dequantizes and array.dtype == mx.float32:
            dtype = mx.float16
        if self._adapter is not None and name in self._adapter:
            array = self._adapter.fuse(name, array, dtype or array.dtype)
        elif dtype is not None and array.dtype in _FLOATS:
            array = array.astype(dtype)
        mx.eval(array)
        self._count(name)
        return array

    def _count(self, name: str) -> None:
        self._done += math.prod(self._remaining.pop(name))
        self._report("convert", self._done, self._total)


def _apart(spec: FFNSpec, arrays: list[mx.array]) -> tuple[mx.array, mx.array]:
    """Gate's and up's rows, of two leaves or of a common one."""
    if spec.fused is not None:
        return split_fused(arrays[0], spec.fused)
    return arrays[0], arrays[1]


def check_output(out: Path, overwrite: bool) -> None:
    """Raise SourceError if `out` must not be replaced: what a conversion did not make never is."""
    check_free(out, overwrite, SourceError)
    if not out.exists():
        return
    made_here = (out / MANIFEST).is_file() or any(out.glob("neurons-*.safetensors"))
    if not out.is_dir() or (not made_here and any(out.iterdir())):
        raise SourceError(
            f"{out}: is not an IFP checkpoint, so --overwrite does not replace it; "
            "choose another folder, or remove this one first"
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


def _write_config(folder: Path, source: Source, options: Options, specs: list[FFNSpec], packing: Packing) -> None:
    config = {name: value for name, value in source.config.items() if not name.startswith("quantization")}
    if packing.section is not None:
        config["quantization"] = packing.section
    selector = "learned" if options.predictor is not None else "activation"
    section = Layout(tuple(specs), options.density, selector, packing.gate_up, packing.down)
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
