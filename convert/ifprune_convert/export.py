"""Writes one selection of an IFP checkpoint as a plain mlx-lm model, which needs no ifprune: the converter's inverse.

Works on one FFN at a time, in a hidden folder beside the output that is renamed once stock mlx-lm accepts it. Packed
weights keep their bytes, except down: mlx-lm's down is `[d_model, d_ffn]` with groups across neurons, so it is stored
as floats, or quantized again on request.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model, save_config

from ifprune_mlx.chat_template import check_prompt, render_messages
from ifprune_mlx.checkpoint.atomic_write import check_free, foreign_files, new_folder
from ifprune_mlx.checkpoint.ffn_spec import FFNSpec, join_fused
from ifprune_mlx.checkpoint.format import SECTION, Checkpoint, Quantization
from ifprune_mlx.checkpoint.neuron_reader import read_rows, unreadable
from ifprune_mlx.checkpoint.safetensors_io import load_arrays, read_safetensors_header
from ifprune_mlx.errors import CheckpointError, IfpruneError, SelectionError, reason_of
from ifprune_mlx.model import Model
from ifprune_mlx.selection.selection import Ids, Selection
from ifprune_mlx.selection.selectors import Instruction, make_selector

from . import layout
from .card import CARD, plain_card
from .readers.safetensors import TOKENIZER_FILES
from .readers.shards import INDEX, read_index
from .skeleton import build_skeleton, listing, parameter_shapes
from .weight_files import Shards

Report = Callable[[int, int], None]
"""Called with (bytes of the checkpoint read, bytes to read)."""

_FLOATS = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
# Metadata of the shards; it marks a folder as an export, which may be overwritten.
_MARK = "ifprune_selection"
_COPIED = {".json", ".jinja", ".model", ".txt"}
_OTHERS = {*TOKENIZER_FILES, "config.json", INDEX, CARD}
"""What is in an export beside the weights."""


@dataclass(frozen=True)
class Export:
    """An exported plain model."""

    path: Path
    selection: Selection  # its neurons
    bytes: int  # of all its files
    parameters: int
    quantization: dict[str, Any] | None  # as in mlx-lm's configs; None for floats
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON; `k` is the number of neurons of each FFN."""
        chosen, packing = self.selection, self.quantization
        return {
            "path": str(self.path),
            "bytes": self.bytes,
            "seconds": self.seconds,
            "selection": chosen.hash,
            "selector": chosen.selector,
            "density": chosen.density,
            "k": list(chosen.keep),
            "parameters": self.parameters,
            "quantization": packing and {key: packing[key] for key in ("group_size", "bits", "mode")},
        }


def export_selection(
    checkpoint: Checkpoint,
    selection: Selection,
    out: Path,
    *,
    dtype: mx.Dtype | None = None,
    requantize_down: bool = False,
    overwrite: bool = False,
    report: Report | None = None,
) -> Export:
    """Write the plain mlx-lm model `out`, whose FFNs have the selection's neurons and no others, in ascending order.

    Args:
        dtype: float type to cast to, as loading does; None keeps the checkpoint's.
        requantize_down: pack the down projections of a quantized checkpoint too, in groups across neurons. This rounds
            them a second time.
        overwrite: replace an earlier export.

    Raises:
        IfpruneError: naming what cannot be used or written; `out` is then as it was.
    """
    start = time.perf_counter()
    checkpoint.check(selection)
    check_output(out, overwrite)
    packing = _down_packing(checkpoint, selection) if requantize_down else None
    config = _plain_config(checkpoint, selection, packing)
    with new_folder(out, overwrite=overwrite) as folder:
        for name in checkpoint.manifest["files"]:  # tokenizer, chat template, generation config
            if "/" not in name and name != "config.json" and Path(name).suffix in _COPIED:
                shutil.copyfile(checkpoint.path / name, folder / name)
        metadata = {_MARK: selection.hash, "ifprune_selector": selection.selector}
        shards = Shards(folder, metadata)
        done = 0
        for tensors, read in _tensors(checkpoint, selection, dtype, packing):
            shards.add(tensors)
            done += read
            if report is not None:
                report(done, checkpoint.weight_bytes)
        parameters = checkpoint.active_parameters(selection.keep)
        totals = {"total_size": shards.bytes, "total_parameters": parameters}
        index = {"metadata": totals, "weight_map": dict(sorted(shards.finish().items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        (folder / CARD).write_text(plain_card(checkpoint, selection, out.absolute().name), encoding="utf-8")
        save_config(config, folder / "config.json")  # last: without it no loader takes a folder for a model
        _check_loads(checkpoint, folder)
    size = sum(file.stat().st_size for file in out.iterdir())
    return Export(out, selection, size, parameters, config.get("quantization"), time.perf_counter() - start)


def select_for(
    model: Model,
    tokenizer: TokenizerWrapper,
    instruction: str,
    messages: list[dict[str, Any]],
    selector: str | None = None,
    seed: int = 0,
    **budget: Any,
) -> Selection:
    """The selection for an instruction in `messages`; other arguments as in `make_selector` and `Model.keep`."""
    tokens = render_messages(tokenizer, messages)
    check_prompt(model, tokens)
    chooser = make_selector(model, selector, seed=seed)
    return chooser.select(Instruction(instruction, tuple(tokens)), model.keep(**budget)).selection


def check_output(out: Path, overwrite: bool) -> None:
    """Raise IfpruneError unless `out` is free, or may be replaced: only an earlier export may."""
    check_free(out, overwrite)
    if not (out.exists() or out.is_symlink()):
        return
    if not out.is_dir() or (any(out.iterdir()) and not _is_export(out)):
        raise IfpruneError(
            f"{out}: was not written by `ifprune export`, so --overwrite does not replace it; "
            "choose another folder, or remove this one first"
        )


def _is_export(folder: Path) -> bool:
    """Whether a folder holds a whole export, and nothing beside it."""
    try:
        shards = set(read_index(folder / INDEX))
        return not foreign_files(folder, shards | _OTHERS) and all(
            _MARK in read_safetensors_header(folder / shard).metadata for shard in shards
        )
    except IfpruneError:
        return False


def _down_packing(checkpoint: Checkpoint, selection: Selection) -> Quantization:
    """How to quantize the down projections again."""
    packing = checkpoint.layout.down
    if packing is None:
        raise CheckpointError(f"{checkpoint.path}: its down projections are not quantized; leave out --requantize-down")
    for k in selection.keep:
        if k % packing.group_size:
            raise SelectionError(
                f"the selection keeps {k} neurons of an FFN, which do not divide into groups of {packing.group_size}; "
                "leave out --requantize-down, or choose another density"
            )
    return packing


def _plain_config(checkpoint: Checkpoint, selection: Selection, packing: Quantization | None) -> dict[str, Any]:
    """The checkpoint's config without its section, for FFNs of the selection's widths.

    Families name their widths differently, so candidates are tried: mlx-lm's model must have all the wanted shapes.

    Raises:
        SelectionError: if no candidate fits.
    """
    config = {name: value for name, value in checkpoint.config.items() if name != SECTION}
    specs = checkpoint.layout.ffns
    if "quantization" in config:
        section = config["quantization"] = dict(config["quantization"])
        # Only layers that differ from the section need an entry; older releases of mlx-lm leave the mode out.
        common = {"mode": "affine"} | section
        for spec in specs:
            for leaf in spec.leaves:
                packed = packing if leaf == spec.down else checkpoint.layout.gate_up
                if packed is None or any(common[name] != value for name, value in packed.to_dict().items()):
                    section[f"{spec.path}.{leaf}"] = False if packed is None else packed.to_dict()
    wanted = _shapes(checkpoint, config)
    for spec, k in zip(specs, selection.keep, strict=True):
        wanted[f"{spec.path}.{spec.down}.weight"] = (spec.d_model, k)
        for leaf in spec.leaves:
            if leaf != spec.down:
                rows = 2 * k if spec.fused else k
                wanted[f"{spec.path}.{leaf}.weight"] = (rows, spec.d_model)
                if spec.bias:
                    wanted[f"{spec.path}.{leaf}.bias"] = (rows,)
    widths = sorted(set(selection.keep))
    for candidate in _narrower(config, specs, selection.keep):
        if _shapes(checkpoint, candidate) == wanted:
            return candidate
    advice = "use one that keeps the same number in every FFN" if len(widths) > 1 else "it can be run by ifprune only"
    raise SelectionError(
        f"{checkpoint.path}: the selection keeps {listing([str(k) for k in widths])} neurons, layer by layer, which no "
        f"config of mlx-lm's {config['model_type']} can say; {advice}"
    )


def _narrower(config: dict[str, Any], specs: Sequence[FFNSpec], keep: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Copies of a config with a width replaced by *k*: one number at a time, then all of them.

    Some families store twice the width, and some nest the language model's config.
    """
    pairs = sorted({(spec.d_ffn, k) for spec, k in zip(specs, keep, strict=True)})
    together = copy.deepcopy(config)
    for width, k in pairs:
        for section in ("text_config", None):
            place = config if section is None else config.get(section)
            for name, value in place.items() if isinstance(place, dict) else ():
                if type(value) is int and value in (width, 2 * width):
                    candidate = copy.deepcopy(config)
                    for changed in (candidate, together):
                        (changed if section is None else changed[section])[name] = value // width * k
                    yield candidate
    yield together


def _shapes(checkpoint: Checkpoint, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of mlx-lm's model of a config, before any quantization."""
    return parameter_shapes(_skeleton(checkpoint, config))


def _skeleton(checkpoint: Checkpoint, config: dict[str, Any]) -> nn.Module:
    tensors = sum(len(header.tensors) for header in checkpoint.headers.values())
    return build_skeleton(checkpoint.path, config, tensors)


def _tensors(
    checkpoint: Checkpoint, selection: Selection, dtype: mx.Dtype | None, packing: Quantization | None
) -> Iterator[tuple[dict[str, mx.array], int]]:
    """The plain model's tensors by mlx-lm's names, a few at a time, each with the bytes that were read for them."""
    for index, ids in enumerate(selection.ids):
        yield _ffn(checkpoint, index, ids, dtype, packing), checkpoint.ffn_bytes(index)
    may_cast = getattr(_skeleton(checkpoint, checkpoint.config), "cast_predicate", lambda _: True)
    for file, header in checkpoint.headers.items():
        if not file.startswith("model-"):
            continue
        try:
            arrays = load_arrays(checkpoint.path / file)
            for name, info in header.tensors.items():
                array = arrays.pop(name)
                if dtype is not None and array.dtype in _FLOATS.values() and may_cast(name):
                    array = array.astype(dtype)
                mx.eval(array)
                yield {name: array}, info.end - info.start
            checkpoint.check_unchanged(checkpoint.path / file)
        except RuntimeError as exc:
            raise unreadable(checkpoint.path / file, exc) from exc


def _ffn(
    checkpoint: Checkpoint, index: int, ids: Ids, dtype: mx.Dtype | None, packing: Quantization | None
) -> dict[str, mx.array]:
    """The tensors of one plain FFN: gate and up `[k, ...]`, the rows of `ids`; down `[d_model, k]`."""
    spec = checkpoint.layout.ffns[index]
    gate, up, down = (f"{spec.path}.{leaf}" for leaf in (spec.gate, spec.up, spec.down))
    rows, down_bias = read_rows(checkpoint, index, dtype)
    chosen = mx.array(ids)
    kinds: dict[str, dict[str, mx.array]] = {"gate": {}, "up": {}, "down": {}}
    for name, array in rows.items():
        kind, _, part = name.partition(".")
        kinds[kind][part] = mx.take(array, chosen, axis=0)
    tensors: dict[str, mx.array] = {}
    for part, array in kinds["gate"].items():
        other = kinds["up"][part]
        if spec.fused is None:
            tensors |= {f"{gate}.{part}": array, f"{up}.{part}": other}
        else:
            tensors[f"{gate}.{part}"] = join_fused(array, other, spec.fused)
    tensors |= layout.packed(down, mx.contiguous(_floats(checkpoint, kinds["down"], dtype).T), packing)
    if down_bias is not None:
        tensors[f"{down}.bias"] = down_bias
    return tensors


def _floats(checkpoint: Checkpoint, down: dict[str, mx.array], dtype: mx.Dtype | None) -> mx.array:
    """Rows of down projections `[k, d_model]` as floats, of the type that the model computes in."""
    packed = checkpoint.layout.down
    if packed is None:
        return down["weight"]
    if not packed.has_biases and dtype is None:
        # Scales are bytes then: the type is that of what is not packed, such as norms.
        headers = (header for name, header in checkpoint.headers.items() if name.startswith("model-"))
        types = Counter(info.dtype for header in headers for info in header.tensors.values() if info.dtype in _FLOATS)
        dtype = _FLOATS[types.most_common(1)[0][0]] if types else None
    return layout.unpacked(down, packed, dtype)


def _check_loads(checkpoint: Checkpoint, folder: Path) -> None:
    """Let stock mlx-lm build the model and match every tensor, without reading one."""
    try:
        load_model(folder, lazy=True)
    except Exception as exc:  # as in `ifprune_mlx.model`
        raise CheckpointError(
            f"{checkpoint.path}: mlx-lm cannot load what it holds ({reason_of(exc)}); its files do not "
            "belong together, convert the source again"
        ) from exc
