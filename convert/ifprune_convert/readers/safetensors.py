"""Reads a Hugging Face or mlx-lm folder: config.json, *.safetensors in one file or many, tokenizer files.

Everything is checked at opening, from headers alone: shards present and whole, tensors exactly those that mlx-lm's
own model class wants.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import load_config

from ifprune_convert.layout import unpacked
from ifprune_convert.packing import from_config
from ifprune_convert.skeleton import (
    build_skeleton,
    check_shapes,
    listing,
    parameter_shapes,
    sanitized,
    typed_reason,
    with_flat_rope,
)
from ifprune_convert.weight_files import load_lazily
from ifprune_mlx.checkpoint.format import Quantization
from ifprune_mlx.checkpoint.regular_file import LARGEST_TEXT, check_ordinary, open_regular, read_bounded
from ifprune_mlx.errors import SourceError, reason_of

from .chat_templates import gather_templates
from .left_out import check_nothing_left_out, with_output_layer
from .shards import Placed, find_weights, place_tensors
from .spm_tokenizer import REPLACED, write_spm_tokenizer

_FLOATS = (mx.float32, mx.float16, mx.bfloat16)
# A folder can be tokenized if it has one of these; the others only refine it.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
TOKENIZER_FILES = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_MAX_LICENCE_LINE = 80
_MOST_READ = 1 << 20  # bytes of a readme or a licence


class SafetensorsSource:
    """A folder of safetensors, under mlx-lm's parameter names; see `PackedSource` for the contract."""

    dequantizes = False

    def __init__(self, path: Path, *, trust_remote_code: bool = False) -> None:
        """Check the folder and map its tensors, without reading any.

        Raises:
            SourceError: if config.json, a shard, the index, a tensor or the tokenizer is missing, damaged, or of a
                kind that cannot be converted.
        """
        self.path = path
        self.notes: Sequence[str] = ()
        self.config = with_flat_rope(path, check_config(path, trust_remote_code))
        if not any((path / name).is_file() for name in VOCABULARIES):
            raise SourceError(f"{path}: has no tokenizer; download {', '.join(VOCABULARIES[:2])} (or vocab.json) too")
        self.licence = _read_licence(path)
        self._open_weights()
        types = Counter(array.dtype for array in self._arrays.values() if array.dtype in _FLOATS)
        self._float = types.most_common(1)[0][0] if types else mx.float16

    def _open_weights(self) -> None:
        """Take the first choice of weight files that is the whole model, and no other."""
        failures: list[str] = []
        for choice in find_weights(self.path):
            failures += [] if choice.doubt is None else [choice.doubt]
            notes: list[str] = []
            try:
                tensors = place_tensors(self.path, choice.files, notes)
                config, unneeded = with_output_layer(self.path, self.config, tensors)
                tensors = {name: placed for name, placed in tensors.items() if name not in unneeded}
                self._arrays, self._shapes, self.packed = _load_lazily(self.path, config, tensors)
            except SourceError as exc:
                failures.append(str(exc))
                continue
            if failures:
                notes.append(f"{failures[0]}: without it, {listing(list(choice.files))} are the whole model")
            self.config, self.notes = config, notes
            return
        raise SourceError(failures[0])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by mlx-lm's parameter name; also of those already taken."""
        return dict(self._shapes)

    def take(self, name: str) -> mx.array:
        """See `Source`; in the stored type, float32, float16 or bfloat16, and unpacked if it is packed."""
        stem, _, leaf = name.rpartition(".")
        if leaf == "weight" and stem in self.packed:
            array = unpacked(self.take_packed(stem), self.packed[stem], self._float)
            mx.eval(array)
            return array
        return self._take(name)

    def take_packed(self, path: str) -> dict[str, mx.array]:
        """See `PackedSource`."""
        return {part: self._take(f"{path}.{part}") for part in self.packed[path].parts}

    def _take(self, name: str) -> mx.array:
        # A view into a larger tensor (a fused matrix that `sanitize` split) would keep all of it in memory.
        array = mx.contiguous(self._arrays.pop(name))
        try:
            mx.eval(array)
        except RuntimeError as exc:
            raise SourceError(f"{self.path}: tensor {name} cannot be read ({reason_of(exc)})") from exc
        return array

    def write_tokenizer(self, folder: Path) -> None:
        """Copy the tokenizer files, chat template and generation config into `folder`.

        A SentencePiece model that comes alone gets a tokenizer.json beside it, which gives the same ids.

        Raises:
            SourceError: if one of them cannot be read, or is JSON in name only, or of an unknown kind.
        """
        sentencepiece = not any((self.path / name).is_file() for name in ("tokenizer.json", "vocab.json"))
        for name in TOKENIZER_FILES:
            if sentencepiece and name in REPLACED:
                continue
            file = self.path / name
            if not file.is_file():
                continue
            try:
                content = read_bounded(file, LARGEST_TEXT)
                if file.suffix == ".json":
                    json.loads(content)
            except OSError as exc:
                raise SourceError(f"{file}: cannot be read ({reason_of(exc)})") from exc
            except (ValueError, RecursionError) as exc:
                raise SourceError(f"{file}: is not valid JSON; copy or download it again") from exc
            (folder / name).write_bytes(content)
        if sentencepiece:
            write_spm_tokenizer(self.path, folder)
        gather_templates(self.path, folder)


def check_config(path: Path, trust_remote_code: bool) -> dict[str, Any]:
    """The config of a folder, which needs nothing else in it yet.

    Raises:
        SourceError: if config.json is missing or malformed, or of a model that this version does not convert.
    """
    config = _read_config(path)
    _refuse_unsupported(path, config, trust_remote_code)
    return config


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    check_ordinary(path, SourceError)
    try:
        # mlx-lm's own reader: it decodes the floats that transformers tags, and takes eos ids from generation_config.
        config = load_config(path)
    except OSError as exc:
        raise SourceError(f"{file}: cannot be read ({reason_of(exc)})") from exc
    except (ValueError, RecursionError) as exc:
        raise SourceError(f"{file}: is not valid JSON; download it again") from exc
    except (AttributeError, TypeError) as exc:  # generation_config.json or config.json holds a list or a bare value
        raise SourceError(f"{file}: it or generation_config.json is not a JSON object; download both again") from exc
    if not isinstance(config, dict):
        raise SourceError(f"{file}: is not a JSON object; download it again")
    return config


def _refuse_unsupported(path: Path, config: dict[str, Any], trust_remote_code: bool) -> None:
    if config.get("ifpruning") is not None:
        raise SourceError(f"{path}: is an IFP checkpoint already; convert the dense model that it was made from")
    text_config = config.get("text_config")
    nested = text_config if isinstance(text_config, dict) else {}
    foreign = nested.get("quantization") or any(part.get("quantization_config") for part in (config, nested))
    if not config.get("quantization") and (foreign or (path / "hf_quant_config.json").exists()):
        raise SourceError(
            f"{path}: is quantized in another way than mlx-lm's; "
            "convert from the unquantized checkpoint, and quantize then, or convert it with `mlx_lm.convert` first"
        )
    if config.get("quantize_activations"):
        raise SourceError(f"{path}: quantizes activations too, which is not supported; convert the unquantized model")
    if (model_file := config.get("model_file")) is not None:
        unread = "code from a checkpoint is not supported yet" if trust_remote_code else "such code is never run"
        raise SourceError(
            f"{path}: its model is defined by its own code ({model_file}), and {unread}; "
            "convert a model of a family that mlx-lm supports"
        )


_Shapes = dict[str, tuple[int, ...]]


def _load_lazily(
    path: Path, config: dict[str, Any], tensors: dict[str, Placed]
) -> tuple[dict[str, mx.array], _Shapes, dict[str, Quantization]]:
    """All tensors as lazy arrays under mlx-lm's names, checked against mlx-lm's model.

    Returns:
        The arrays; the shapes of the model's parameters, as floats; and which modules' weights are packed, and how.
    """
    given: dict[str, mx.array] = {}
    for file in dict.fromkeys(placed.file for placed in tensors.values()):
        loaded = load_lazily(file, SourceError, "download it again")
        given |= {name: array for name, array in loaded.items() if name in tensors and name not in given}
    build = partial(build_skeleton, path, config, len(given))
    model = build()
    try:
        weights = sanitized(model, dict(given))
    except Exception as exc:  # it indexes and reshapes what a complete model would have
        raise SourceError(
            f"{path}: mlx-lm cannot arrange the tensors of this {config['model_type']} model ({typed_reason(exc)}); "
            "one may be missing or of a wrong shape: download the model again"
        ) from exc
    check_nothing_left_out(path, config, build, given, weights)
    expected = parameter_shapes(model)
    packed = _packed_modules(path, config, weights)
    parts = {f"{stem}.{part}": stem for stem, packing in packed.items() for part in packing.parts}
    shapes = {name: tuple(array.shape) for name, array in weights.items() if name not in parts}
    for stem, packing in packed.items():
        shapes[f"{stem}.weight"] = _unpacked_shape(path, stem, packing, weights)
    check_shapes(path, expected, shapes)
    for name, array in weights.items():
        if name not in parts and array.dtype not in _FLOATS:
            raise SourceError(
                f"{path}: tensor {name} has type {str(array.dtype).removeprefix('mlx.core.')}; "
                "convert from a checkpoint in float32, float16 or bfloat16"
            )
    return weights, shapes, packed


def _packed_modules(path: Path, config: dict[str, Any], weights: dict[str, mx.array]) -> dict[str, Quantization]:
    section: Any = config.get("quantization")
    packed: dict[str, Quantization] = {}
    try:
        for stem in (name.removesuffix(".scales") for name in weights if section and name.endswith(".scales")):
            own = section.get(stem, section)
            if not isinstance(own, dict) or own.get("global_scale"):
                raise ValueError(f"quantization of {stem} is {own!r}")
            packed[stem] = from_config(own)
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise SourceError(
            f"{path / 'config.json'}: its section `quantization` cannot be used ({typed_reason(exc)}); "
            "convert the unquantized model"
        ) from exc
    return packed


def _unpacked_shape(path: Path, stem: str, packing: Quantization, weights: dict[str, mx.array]) -> tuple[int, ...]:
    """The shape of a packed weight as floats, if its tensors agree on one."""
    missing = [f"{stem}.{part}" for part in packing.parts if f"{stem}.{part}" not in weights]
    if missing:
        raise SourceError(
            f"{path}: lacks {listing(missing)}, which its quantization asks for; download the model again"
        )
    weight, *others = (weights[f"{stem}.{part}"] for part in packing.parts)
    shape = (*weight.shape[:-1], weight.shape[-1] * 32 // packing.bits)
    groups = (*shape[:-1], shape[-1] // packing.group_size)
    if weight.dtype != mx.uint32 or any(tuple(array.shape) != groups for array in others):
        raise SourceError(
            f"{path}: {stem} is not packed in {packing.bits} bits and groups of {packing.group_size}, as config.json "
            "says; the two may belong to different models"
        )
    return shape


def _read_licence(path: Path) -> str | None:
    """The licence in README.md's front matter, else the first line of LICENSE where it is short, else None."""
    readme = _read_text(path / "README.md")
    if readme.startswith("---"):
        front = readme[3:].split("\n---", 1)[0]
        found = {
            key: value
            for key in ("license", "license_name")
            if (match := re.search(rf"^{key}:[ \t]*(?:\n[ \t]*-[ \t]*)?(.+)$", front, re.MULTILINE))
            and (value := match[1].strip().strip("\"'"))
        }
        # The hub's way to name a licence that is not on its list.
        if found.get("license") == "other" and "license_name" in found:
            return found["license_name"]
        if "license" in found:
            return found["license"]
    lines = [line.strip() for line in _read_text(path / "LICENSE").splitlines() if line.strip()]
    return lines[0] if lines and len(lines[0]) <= _MAX_LICENCE_LINE else None


def _read_text(file: Path) -> str:
    try:
        with open_regular(file) as opened:
            return opened.read(_MOST_READ).decode("utf-8", errors="replace")
    except OSError:
        return ""
