"""The IFP checkpoint on disk, format 1: schema, opening with checks, the manifest.

The neurons of FFN `i` are in `neurons-<i>-of-<n>.safetensors`: `gate_up.*` as `[d_ffn, 2, row]` and `down.*` as
`[d_ffn, row]`, one row per neuron; or a record of all rows per neuron.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ifprune_mlx.checkpoint.atomic_write import restore_folder, sha256_file
from ifprune_mlx.checkpoint.budget import keep_count
from ifprune_mlx.checkpoint.config_check import check_names, refuse_custom_code
from ifprune_mlx.checkpoint.density_curve import DensityCurve
from ifprune_mlx.checkpoint.ffn_spec import FFNSpec
from ifprune_mlx.checkpoint.neuron_layout import FLOATS, READABLE, RECORDS, Strip, strips_of
from ifprune_mlx.checkpoint.regular_file import check_ordinary, read_json_object
from ifprune_mlx.checkpoint.safetensors_io import DTYPE_BYTES, SafetensorsHeader, read_safetensors_header, stamp_of
from ifprune_mlx.errors import BudgetError, CheckpointError, SelectionError, not_converted, reason_of

if TYPE_CHECKING:
    from ifprune_mlx.selection.selection import Selection

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PREDICTOR_SETTINGS = "ifprune_predictor"
"""The key of a predictor's settings in the metadata of its head."""
SECTION = "ifpruning"
_SHARED = re.compile(r"(^|\.)(self_attn|embed_tokens|lm_head)\.")  # weights that `parallel.sharding` deals out
_GIVE_A_MODEL = "give a model: its folder, a GGUF file or a hub id such as mlx-community/Qwen3-4B-4bit"
_MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
ORDERS = ("frequency",)
SELECTOR_NAMES = ("learned", "activation", "static", "random")


@dataclass(frozen=True)
class Quantization:
    """Parameters of `mx.quantize` for one kind of rows."""

    group_size: int
    bits: int
    mode: str

    def __post_init__(self) -> None:
        numbers = (self.group_size, self.bits)
        if not all(isinstance(n, int) and n > 0 for n in numbers) or self.mode not in _MODES:
            raise ValueError(f"quantization {self.to_dict()} is unknown")

    def to_dict(self) -> dict[str, Any]:
        """As `config.json` has it, with mlx-lm's keys."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    @property
    def has_biases(self) -> bool:
        """Whether groups carry a bias beside their scale."""
        return self.mode == "affine"

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of a packed weight's arrays."""
        return ("weight", "scales", "biases") if self.has_biases else ("weight", "scales")


@dataclass(frozen=True)
class Layout:
    """The `ifpruning` section of `config.json`."""

    ffns: tuple[FFNSpec, ...]  # the sliced FFNs, in layer order
    density: float  # the default density of selections
    selector: str  # the default selector's name
    gate_up: Quantization | None = None  # None for float rows, here and below
    down: Quantization | None = None
    # Order of the neurons in their files: None is the source's; `frequency` puts those selected most often first, and a
    # tensor `order`, int32 `[d_ffn]`, names the neuron in each row. Everything else keeps the source's numbering.
    order: str | None = None
    curve: DensityCurve | None = None  # what each density loses; None if that was not measured

    def to_dict(self) -> dict[str, Any]:
        """The section as JSON."""
        kinds = {"gate_up": self.gate_up, "down": self.down}
        quantization = {kind: None if packed is None else packed.to_dict() for kind, packed in kinds.items()}
        section = {
            "format_version": FORMAT_VERSION,
            "ffns": [spec.to_dict() for spec in self.ffns],
            "density": self.density,
            "selector": self.selector,
            "quantization": quantization if any(quantization.values()) else None,
        }
        optional = {"order": self.order, "curve": None if self.curve is None else self.curve.to_dict()}
        return section | {key: value for key, value in optional.items() if value is not None}

    @classmethod
    def from_dict(cls, section: Any, where: Path) -> Layout:
        """Parse and check the section.

        Raises:
            CheckpointError: on another format version, unknown or missing keys, or values of the wrong kind.
        """
        if not isinstance(section, dict):
            raise CheckpointError(f"{where}: has no {SECTION} section; convert the model with `ifprune convert`")
        if section.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{where}: format version {section.get('format_version')!r}, this release reads {FORMAT_VERSION}; "
                "update ifprune-mlx, or convert the source again"
            )
        known = {"format_version", "ffns", "density", "selector", "quantization"}
        _exact_keys(section, known, f"{where}, section {SECTION}", {"order", "curve"})
        ffn_keys = {field.name for field in fields(FFNSpec) if field.default is MISSING}
        specs = []
        try:
            for entry in section["ffns"]:
                _exact_keys(entry, ffn_keys, f"{where}, section {SECTION}, ffns", {"fused"})
                specs.append(FFNSpec(**entry))
            if not specs or any(min(spec.d_ffn, spec.d_model) < 1 for spec in specs):
                raise CheckpointError(f"{where}: section {SECTION} lists no usable FFN; convert the source again")
            density = float(section["density"])
            keep_count(density, 64)
            if section["selector"] not in SELECTOR_NAMES:
                raise CheckpointError(f"{where}: unknown default selector {section['selector']!r}; update ifprune-mlx")
            curve = None if section.get("curve") is None else DensityCurve.from_dict(section["curve"])
            if unknown := set(curve.selectors if curve else ()) - set(SELECTOR_NAMES):
                raise CheckpointError(f"{where}: unknown selector {unknown.pop()!r} in its curve; update ifprune-mlx")
            if section.get("order") not in (None, *ORDERS):
                raise CheckpointError(f"{where}: unknown order of neurons {section['order']!r}; update ifprune-mlx")
            quantization = section["quantization"]
            gate_up = down = None
            if quantization is not None:
                _exact_keys(quantization, {"gate_up", "down"}, f"{where}, section {SECTION}, quantization")
                gate_up, down = (
                    None if quantization[kind] is None else Quantization(**quantization[kind])
                    for kind in ("gate_up", "down")
                )
        except BudgetError as exc:
            raise CheckpointError(f"{where}: {exc}") from exc
        except (AttributeError, OverflowError, TypeError, ValueError) as exc:
            raise CheckpointError(f"{where}: section {SECTION} is malformed ({exc}); convert the source again") from exc
        return cls(tuple(specs), density, section["selector"], gate_up, down, section.get("order"), curve)


def _exact_keys(
    section: Mapping[str, Any], known: set[str], where: str, optional: frozenset[str] | set[str] = frozenset()
) -> None:
    unknown, missing = sorted(set(section) - known - optional), sorted(known - set(section))
    if unknown:
        raise CheckpointError(
            f"{where}: unknown key {unknown[0]!r}; it was made by another release, update ifprune-mlx"
        )
    if missing:
        raise CheckpointError(f"{where}: key {missing[0]!r} is missing; convert the source again")


def is_gguf(path: Path) -> bool:
    """Whether this is a GGUF file, by its first bytes or its name."""
    if not path.is_file():
        return False
    with suppress(OSError), path.open("rb") as file:
        return file.read(4) == b"GGUF" or path.suffix.lower() == ".gguf"
    return False


def neurons_file(index: int, count: int) -> str:
    """The name of the file with the neurons of FFN `index`, one of `count`."""
    return f"neurons-{index + 1:05d}-of-{count:05d}.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """An opened IFP checkpoint: every file is there, has the manifest's size and a sound header."""

    path: Path  # its folder
    config: dict[str, Any]  # all of `config.json`
    layout: Layout  # the parsed `ifpruning` section
    manifest: dict[str, Any]
    headers: dict[str, SafetensorsHeader]  # of every top-level safetensors file, by file name
    ranks: int = 1  # processes that share the weights; `budget` counts what each of them holds

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a checkpoint folder and check all that can be checked without reading weights.

        Raises:
            DenseModelError: if it is a model that was not converted yet.
            CheckpointError: naming the file and what to do.
        """
        path = Path(path).expanduser()
        restore_folder(path)
        if not path.is_dir():
            if is_gguf(path):
                raise not_converted(path, "is a GGUF file, no IFP checkpoint yet")
            what = "is a file" if path.is_file() else "no such folder"
            raise CheckpointError(f"{path}: {what}; {_GIVE_A_MODEL}")
        config_file = path / "config.json"
        if not config_file.is_file():
            raise CheckpointError(f"{path}: has no config.json, so no model is in it; {_GIVE_A_MODEL}")
        check_ordinary(path, CheckpointError)
        config = read_json_object(config_file)
        if SECTION not in config and not (path / MANIFEST).exists():
            raise not_converted(path, f"is no IFP checkpoint yet (config.json has no {SECTION} section)")
        layout = Layout.from_dict(config.get(SECTION), config_file)
        refuse_custom_code(config, config_file, CheckpointError)
        check_names(config, config_file, CheckpointError)
        if not (path / MANIFEST).is_file():
            raise CheckpointError(
                f"{path}: has no {MANIFEST}, so its conversion did not finish; convert the source again"
            )
        manifest = _with_origin(path, read_json_object(path / MANIFEST))
        files = _checked_manifest(path, manifest)
        headers = {
            name: read_safetensors_header(path / name, CheckpointError)
            for name in files
            if name.endswith(".safetensors") and "/" not in name
        }
        checkpoint = cls(path, config, layout, manifest, headers)
        checkpoint._check_shapes()
        try:
            _ = checkpoint.parameters
        except (AttributeError, KeyError, TypeError, ZeroDivisionError) as exc:
            raise CheckpointError(
                f"{config_file}: its section `quantization` is malformed; convert the source again"
            ) from exc
        return checkpoint

    @cached_property
    def id(self) -> str:
        """Content id (16 hexadecimal digits): equal files, equal id."""
        files = {name: entry["sha256"] for name, entry in self.manifest["files"].items()}
        return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def curve(self) -> DensityCurve | None:
        """What each density loses, by selector; None if that was not measured."""
        return self.layout.curve

    @property
    def has_predictor(self) -> bool:
        """Whether a trained sparsity predictor is inside."""
        return (self.path / "predictor" / "head.safetensors").is_file()

    @property
    def default_selector(self) -> str:
        """What was measured as best, as the config names it; without a curve, `learned` if there is a predictor."""
        return "learned" if self.has_predictor and self.curve is None else self.layout.selector

    @property
    def priors_file(self) -> Path:
        """The file with each neuron's importance (`prior.N`) and down row norm (`down_norm.N`), float32 `[d_ffn]`."""
        return self.path / "priors.safetensors"

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """`d_ffn` of every FFN."""
        return tuple(spec.d_ffn for spec in self.layout.ffns)

    def neurons_file(self, index: int) -> Path:
        """The file with the neurons of FFN `index`."""
        return self.path / neurons_file(index, len(self.layout.ffns))

    def strips(self, index: int) -> tuple[Strip, ...]:
        """How the rows of FFN `index` lie in its file."""
        file = self.neurons_file(index)
        return strips_of(self.headers[file.name], self.layout.ffns[index].d_ffn, file)

    @cached_property
    def ffn_parameters(self) -> int:
        """Parameters of all sliced FFNs, all neurons."""
        return sum(spec.parameters for spec in self.layout.ffns)

    @cached_property
    def parameters(self) -> int:
        """Parameters of the whole dense model; packing does not change their number."""
        return self.ffn_parameters + self._other_parameters

    @cached_property
    def _other_parameters(self) -> int:
        quantization = self.config.get("quantization") or {}
        total = 0
        for header in self._model_headers():
            for name, info in header.tensors.items():
                stem, _, leaf = name.rpartition(".")
                if f"{stem}.scales" not in header.tensors or leaf == "bias":
                    total += math.prod(info.shape)
                elif leaf == "weight":  # packed into uint32
                    bits = quantization.get(stem, quantization)["bits"]
                    total += math.prod(info.shape) * 32 // bits
        return total

    def check(self, selection: Selection) -> None:
        """Raise SelectionError unless `selection` fits this model's FFNs."""
        if selection.widths != self.widths:
            raise SelectionError(
                f"the selection has {len(selection.widths)} FFNs of widths {sorted(set(selection.widths))}, "
                f"the model has {len(self.widths)} of {sorted(set(self.widths))}; it was made for another model"
            )

    def active_parameters(self, keep: tuple[int, ...] | None) -> int:
        """Parameters that one token uses, for *k* neurons per FFN (None: all)."""
        if keep is None:
            return self.parameters
        ffns = self.layout.ffns
        dropped = sum((spec.d_ffn - k) * spec.neuron_parameters for spec, k in zip(ffns, keep, strict=True))
        return self.parameters - dropped

    @property
    def disk_bytes(self) -> int:
        """Bytes of all files in the manifest."""
        return sum(int(entry["size"]) for entry in self.manifest["files"].values())

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all weights in their types on disk; `ram` residency keeps them all in memory."""
        return self.loaded_bytes()

    def neuron_bytes(self, index: int, float_bytes: int | None = None) -> int:
        """Bytes of all rows of one neuron of FFN `index`.

        Args:
            float_bytes: size of each float once it is cast; None keeps the size on disk.
        """
        parts = (part for strip in self.strips(index) for part in strip.parts)
        return sum(_bytes_in_memory(part.dtype, part.shape, float_bytes) for part in parts)

    def ffn_bytes(self, index: int, float_bytes: int | None = None) -> int:
        """Bytes of all of FFN `index` in memory; `float_bytes` as in `neuron_bytes`."""
        bias = self.headers[self.neurons_file(index).name].tensors.get("down.bias")
        rows = self.widths[index] * self.neuron_bytes(index, float_bytes)
        return rows if bias is None else rows + _bytes_in_memory(bias.dtype, bias.shape, float_bytes)

    def loaded_bytes(self, float_bytes: int | None = None) -> int:
        """Bytes of all weights but the predictor's in memory; `float_bytes` as in `neuron_bytes`."""
        infos = (info for header in self._model_headers() for info in header.tensors.values())
        others = sum(_bytes_in_memory(info.dtype, info.shape, float_bytes) for info in infos)
        return others + sum(self.ffn_bytes(index, float_bytes) for index in range(len(self.layout.ffns)))

    def bytes_on_every_rank(self, float_bytes: int | None = None) -> int:
        """Bytes of the weights that ranks do not share; `float_bytes` as in `neuron_bytes`."""
        tensors = (item for header in self._model_headers() for item in header.tensors.items())
        return sum(
            _bytes_in_memory(info.dtype, info.shape, float_bytes) for name, info in tensors if not _SHARED.search(name)
        )

    @cached_property
    def predictor_bytes(self) -> int:
        """Bytes of the predictor's safetensors files, its own backbone's included; 0 without a predictor."""
        files = self.manifest["files"].items()
        return sum(e["size"] for name, e in files if name.startswith("predictor/") and name.endswith(".safetensors"))

    @cached_property
    def predictor_layers(self) -> int:
        """How many of the model's first layers the predictor uses; 0 if it has its own backbone, or there is none."""
        if not self.has_predictor:
            return 0
        header = read_safetensors_header(self.path / "predictor" / "head.safetensors", CheckpointError)
        try:
            return int(json.loads(header.metadata[PREDICTOR_SETTINGS])["layers"] or 0)
        except (KeyError, OverflowError, RecursionError, TypeError, ValueError):
            return 0  # loading the predictor says what is wrong

    @property
    def prior_method(self) -> str:
        """The prior's origin: `weights`, or `calibrated` on chats."""
        return self.headers[self.priors_file.name].metadata.get("method", "weights")

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Read every byte and name the files whose sha256 differs from the manifest's.

        Args:
            progress: called with (files checked, all files).
        """
        files = self.manifest["files"]
        damaged = []
        for index, (name, entry) in enumerate(files.items(), 1):
            if sha256_file(self.path / name) != entry["sha256"]:
                damaged.append(name)
            if progress is not None:
                progress(index, len(files))
        return damaged

    def check_unchanged(self, file: Path, descriptor: int | None = None) -> None:
        """Raise CheckpointError if a top-level safetensors file was written to since the checkpoint was opened.

        Args:
            descriptor: of the open file; None looks at what is at its path now.
        """
        try:
            status = file.stat() if descriptor is None else os.fstat(descriptor)
        except OSError as exc:
            raise CheckpointError(f"{file}: cannot be read ({reason_of(exc)}); copy the checkpoint again") from exc
        if stamp_of(status) != self.headers[file.name].stamp:
            raise CheckpointError(
                f"{file}: was written to while it was in use, and is no longer what was opened; "
                "load the model again, and replace checkpoints by renaming, not in place"
            )

    @cached_property
    def float_types(self) -> frozenset[str]:
        """The float types of all weights but the predictor's, as safetensors names them, such as `BF16`."""
        headers = (*self._model_headers(), *(self._header(self.neurons_file(i)) for i in range(len(self.widths))))
        parts = (part.dtype for i in range(len(self.widths)) for strip in self.strips(i) for part in strip.parts)
        return frozenset(FLOATS) & {*parts, *(info.dtype for header in headers for info in header.tensors.values())}

    def _model_headers(self) -> list[SafetensorsHeader]:
        return [header for name, header in self.headers.items() if name.startswith("model-")]

    def _check_shapes(self) -> None:
        for index, spec in enumerate(self.layout.ffns):
            self._check_neurons(index, neuron_shapes(spec, self.layout))
        priors = {f"{kind}.{i}": (width,) for kind in ("prior", "down_norm") for i, width in enumerate(self.widths)}
        found = {name: info.shape for name, info in self._header(self.priors_file).tensors.items()}
        _check_tensors(self.priors_file, found, priors)
        if not self._model_headers():
            raise CheckpointError(f"{self.path}: no model-*.safetensors in the manifest; convert the source again")

    def _check_neurons(self, index: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        file, d_ffn = self.neurons_file(index), self.widths[index]
        found = {name: (info.shape, info.dtype) for name, info in self._header(file).tensors.items()}
        if found.pop(RECORDS, None) is not None:
            (records,) = self.strips(index)
            found |= {part.name: ((d_ffn, *part.shape), part.dtype) for part in records.parts}
        _check_tensors(file, {name: shape for name, (shape, _) in found.items()}, shapes)
        for name, (_, dtype) in found.items():
            if name not in shapes:
                raise CheckpointError(f"{file}: holds {name}, of which config.json knows nothing; update ifprune-mlx")
            known = {"order": ("I32",), "down.bias": FLOATS}.get(name, READABLE)
            if dtype not in known:
                raise CheckpointError(
                    f"{file}: {name} is of type {dtype}, expected {' or '.join(known)}; convert the source again"
                )

    def _header(self, file: Path) -> SafetensorsHeader:
        if file.name not in self.headers:
            raise CheckpointError(f"{file}: not listed in {MANIFEST}; convert the source again")
        return self.headers[file.name]


def _check_tensors(file: Path, found: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if name not in found:
            raise CheckpointError(f"{file}: tensor {name} is missing; convert the source again")
        if found[name] != shape:
            raise CheckpointError(
                f"{file}: tensor {name} has shape {list(found[name])}, config.json asks for {list(shape)}; "
                "the two belong to different models, convert the source again"
            )


def _bytes_in_memory(dtype: str, shape: tuple[int, ...], float_bytes: int | None) -> int:
    return math.prod(shape) * ((dtype in FLOATS and float_bytes) or DTYPE_BYTES[dtype])


def neuron_shapes(spec: FFNSpec, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in one neurons file."""
    shapes: dict[str, tuple[int, ...]] = {}
    rows = (("gate_up", (spec.d_ffn, 2), layout.gate_up), ("down", (spec.d_ffn,), layout.down))
    for name, leading, quantization in rows:
        if quantization is None:
            shapes[f"{name}.weight"] = (*leading, spec.d_model)
            continue
        for part in quantization.parts:
            shapes[f"{name}.{part}"] = (*leading, spec.d_model // quantization.group_size)
        shapes[f"{name}.weight"] = (*leading, spec.d_model * quantization.bits // 32)
    if spec.bias:
        shapes["gate_up.bias"] = (spec.d_ffn, 2)
    if spec.down_bias:
        shapes["down.bias"] = (spec.d_model,)
    if layout.order is not None:
        shapes["order"] = (spec.d_ffn,)
    return shapes


def _with_origin(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest that says where the checkpoint comes from, also where it was left out."""
    full = {"source": "unknown", "licence": None, "versions": {}} | manifest
    versions = full["versions"]
    texts = (full["source"], full["licence"] or "", *(versions.values() if isinstance(versions, dict) else [None]))
    if not all(isinstance(text, str) for text in texts):
        raise CheckpointError(
            f"{path / MANIFEST}: its source, licence or versions are no texts; convert the source again"
        )
    return full


def _checked_manifest(path: Path, manifest: dict[str, Any]) -> list[str]:
    """The manifest's file names, after a check that each file is there and has the stated size."""
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{path / MANIFEST}: lists no files; convert the source again")
    for name, entry in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{path / MANIFEST}: the file name {name!r} leaves the checkpoint; do not use it")
        if (
            not isinstance(entry, dict)
            or type(entry.get("size")) is not int
            or not isinstance(entry.get("sha256"), str)
        ):
            raise CheckpointError(f"{path / MANIFEST}: the entry for {name} is malformed; convert the source again")
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing, though {MANIFEST} lists it; copy or convert the checkpoint again")
        size = file.stat().st_size
        if size != entry["size"]:
            raise CheckpointError(
                f"{file}: {size} bytes, {MANIFEST} says {entry['size']}; copy or convert the checkpoint again"
            )
    return list(files)
