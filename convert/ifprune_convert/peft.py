"""Reads adapter folders of PEFT (`peft_type` LORA) as updates of mlx-lm's model.

The tensors have PyTorch's names. mlx-lm's `sanitize` translates them: it gets placeholder tensors under PyTorch's
names, and its renames are applied here. Tensors that it drops, splits or computes cannot be fused.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn

from ifprune_mlx.checkpoint.safetensors_io import TensorInfo
from ifprune_mlx.errors import SourceError

from .fusing import (
    AGAIN,
    LARGEST_SCALE,
    OTHER,
    LowRank,
    Offset,
    Replacement,
    Update,
    adapted_modules,
    check_numbers,
    read_tensor_infos,
)
from .skeleton import listing
from .weight_files import load_lazily

_CONFIG, _TENSORS, _PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_MERGE = "merge it into its model with PEFT, and convert the result"
# The kind of a tensor by the end of its name; the first match counts. `base_layer` is the adapted module's own.
_ENDINGS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "offset",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_magnitude_vector": "magnitude",
    ".base_layer.weight": "weight",
    ".base_layer.bias": "bias",
    ".weight": "weight",
    ".bias": "bias",
}
# Settings about training or origin, or that the tensors show as well.
_HARMLESS = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern", "bias",
    "modules_to_save", "ensure_weight_tying", "lora_dropout", "megatron_config", "megatron_core", "runtime_config",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "qalora_group_size",
}  # fmt: skip
# Weights are fused as mlx-lm has them, never transposed, so `fan_in_fan_out` (how PyTorch stores them) changes nothing.
_READ = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias", "init_lora_weights",
    "fan_in_fan_out",
}  # fmt: skip
# Other values (pissa, olora, corda, loftq, lora_ga) change the model's own weights when training begins.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")


def is_peft(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether an adapter folder with this adapter_config.json is PEFT's."""
    return "peft_type" in config or any((folder / name).exists() for name in (_TENSORS, _PICKLE))


def read_updates(
    folder: Path, config: Mapping[str, Any], skeleton: nn.Module, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Update]:
    """The adapter's updates by mlx-lm's parameter name, checked as a whole; keeps no tensor in memory.

    Args:
        config: its adapter_config.json.
        skeleton: mlx-lm's model, its parameters never evaluated.
        shapes: the shape of every tensor of the model, by mlx-lm's parameter name.

    Raises:
        SourceError: naming the file, if something is missing or damaged, belongs to another model, or cannot be fused.
    """
    settings = _read_settings(folder, config)
    file = folder / _TENSORS
    if not file.is_file():
        pickled = (folder / _PICKLE).is_file()
        raise SourceError(
            f"{folder}: its weights ({_PICKLE}) are a Python pickle, which can run code when read and is never opened; "
            "load it with PEFT and save it again with safe_serialization=True"
            if pickled
            else f"{folder}: has no {_TENSORS}; give the folder that PEFT wrote"
        )
    infos = read_tensor_infos(file)
    modules = _by_module(file, infos)
    for stem, parts in modules.items():
        _check_parts(file, stem, parts, infos, settings)
    wanted = {name: shape for stem, parts in modules.items() for name, shape in _changed(stem, parts, infos).items()}
    names = _mlx_names(skeleton, wanted)
    dropped = [name for name, ours in names.items() if ours not in shapes]
    tied = _check_tied(file, modules, names, dropped, settings, skeleton, shapes)
    if unknown := [name for name in dropped if name not in tied]:
        raise SourceError(
            f"{file}: changes {listing(unknown)}, which the model in mlx-lm does not have as such; "
            f"if the adapter is this model's, {_MERGE}"
        )
    kept = {name: ours for name, ours in names.items() if name not in tied}
    adapted_modules(file, dict.fromkeys(ours.rpartition(".")[0] for ours in kept.values()), skeleton)
    for name, ours in kept.items():
        if wanted[name] != shapes[ours]:
            raise SourceError(
                f"{file}: changes {name} as one of shape {list(wanted[name])}, but the model's is "
                f"{list(shapes[ours])}; {OTHER}"
            )
    check_numbers(file)
    updates = _updates(modules, load_lazily(file, SourceError, AGAIN), settings)
    return {ours: updates[name] for name, ours in kept.items()}


@dataclass(frozen=True)
class _Settings:
    """The settings in adapter_config.json that matter for fusing."""

    file: Path
    rank: int
    alpha: float
    rank_pattern: dict[str, Any]
    alpha_pattern: dict[str, Any]
    by_root: bool
    dora: bool
    biased: bool

    def rank_of(self, stem: str) -> int:
        """The rank of a module by its name in PyTorch."""
        return int(self._by_pattern(self.rank_pattern, stem, self.rank))

    def scale_of(self, stem: str) -> float:
        """The factor of `lora_B @ lora_A` in that module."""
        rank, alpha = self.rank_of(stem), float(self._by_pattern(self.alpha_pattern, stem, self.alpha))
        return alpha / (math.sqrt(rank) if self.by_root else rank)

    def _by_pattern(self, patterns: dict[str, Any], stem: str, default: float) -> Any:
        try:
            return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", stem)), default)
        except re.error as exc:
            raise SourceError(f"{self.file}: has a pattern that is no regular expression ({exc}); {AGAIN}") from exc


def _read_settings(folder: Path, config: Mapping[str, Any]) -> _Settings:
    file = folder / _CONFIG
    if config.get("peft_type") != "LORA":
        raise SourceError(
            f"{folder}: is a PEFT adapter of type {config.get('peft_type')!r}, and only LORA is read here; {_MERGE}"
        )
    # An unknown setting may change the meaning of the tensors, unless it is empty or off.
    if unknown := sorted(key for key, value in config.items() if value and key not in _HARMLESS | _READ):
        raise SourceError(f"{file}: sets {listing(unknown)}, which cannot be fused here; {_MERGE}")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise SourceError(
            f"{file}: init_lora_weights {start!r} changed the model's own weights as well, so that the adapter "
            f"does not belong to the model as it was published; {_MERGE}"
        )
    patterns = {key: config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    for key, pattern in patterns.items():
        if not isinstance(pattern, dict):
            raise SourceError(f"{file}: its {key} is not a JSON object; {AGAIN}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    for value in (rank, *patterns["rank_pattern"].values()):
        if type(value) is not int or value < 1:
            raise SourceError(f"{file}: has a rank (r, rank_pattern) that is no whole number above 0; {AGAIN}")
    for value in (alpha, *patterns["alpha_pattern"].values()):
        if type(value) not in (int, float) or not abs(value) <= LARGEST_SCALE:  # NaN is not <= anything
            raise SourceError(f"{file}: has a lora_alpha (or one in alpha_pattern) that is no finite number; {AGAIN}")
    assert isinstance(rank, int)
    assert isinstance(alpha, int | float)
    switches = (bool(config.get(key)) for key in ("use_rslora", "use_dora", "lora_bias"))
    return _Settings(file, rank, alpha, patterns["rank_pattern"], patterns["alpha_pattern"], *switches)


def _by_module(file: Path, infos: Mapping[str, TensorInfo]) -> dict[str, dict[str, str]]:
    """For every module, by its name in PyTorch: the kinds of its tensors and their names in the file."""
    modules: dict[str, dict[str, str]] = {}
    for name in infos:
        ending = next((ending for ending in _ENDINGS if name.endswith(ending)), None)
        if ending is None or not name.startswith(_PREFIX):
            raise SourceError(f"{file}: tensor {name} is of a kind that cannot be fused here; {_MERGE}")
        parts = modules.setdefault(name.removeprefix(_PREFIX).removesuffix(ending), {})
        if parts.setdefault(_ENDINGS[ending], name) != name:
            raise SourceError(f"{file}: holds both {parts[_ENDINGS[ending]]} and {name}; {AGAIN}")
    return modules


def _check_parts(
    file: Path, stem: str, parts: Mapping[str, str], infos: Mapping[str, TensorInfo], settings: _Settings
) -> None:
    """Raise SourceError unless a module's tensors are those that the config announces, with shapes that fit."""
    found, pair = set(parts), {"a", "b"}
    if found & {"embedding_a", "embedding_b"}:
        pair = {"embedding_a", "embedding_b"}
        if settings.dora:
            # PEFT's magnitudes belong to columns there, over the whole vocabulary.
            raise SourceError(f"{file}: changes the embedding {stem} by DoRA, which cannot be fused here; {_MERGE}")
    elif not found & {"a", "b", "offset", "magnitude"}:
        return
    expected = pair | ({"magnitude"} if settings.dora else set()) | ({"offset"} if settings.biased else set())
    if (present := found - {"weight", "bias"}) != expected:
        raise SourceError(
            f"{file}: has {', '.join(sorted(present))} of {stem}, where {_CONFIG} asks for "
            f"{', '.join(sorted(expected))}; {AGAIN}"
        )
    rank, shapes = settings.rank_of(stem), {part: infos[name].shape for part, name in parts.items()}
    first, second = (shapes[part] for part in sorted(pair))
    outputs = second[:1]
    if (
        len(first) != 2
        or len(second) != 2
        or (first[0], second[1]) != (rank, rank)
        or any(shapes.get(part, outputs) != outputs for part in ("magnitude", "offset"))
    ):
        raise SourceError(
            f"{file}: the tensors of {stem} have shapes {', '.join(str(list(s)) for s in shapes.values())}, which do "
            f"not fit one another and a rank of {rank} ({_CONFIG}); {AGAIN}"
        )


def _changed(stem: str, parts: Mapping[str, str], infos: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """The names in PyTorch of the tensors that are changed, and the shapes that they must have there."""
    shapes: dict[str, tuple[int, ...]] = {}
    for leaf in ("weight", "bias"):
        if leaf in parts:
            shapes[f"{stem}.{leaf}"] = infos[parts[leaf]].shape
    if "a" in parts:
        shapes[f"{stem}.weight"] = (infos[parts["b"]].shape[0], infos[parts["a"]].shape[1])
    if "embedding_a" in parts:
        shapes[f"{stem}.weight"] = (infos[parts["embedding_a"]].shape[1], infos[parts["embedding_b"]].shape[0])
    if "offset" in parts:
        shapes[f"{stem}.bias"] = infos[parts["offset"]].shape
    return shapes


def _mlx_names(skeleton: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """mlx-lm's names for tensors of a PyTorch model, '' where no tensor holds the same numbers."""
    # Some families' `sanitize` changes the model as well.
    sanitize = getattr(copy.deepcopy(skeleton), "sanitize", None)
    if sanitize is None:
        return {name: name for name in shapes}
    probes = {name: mx.broadcast_to(mx.array(1.0), shape) for name, shape in shapes.items()}
    try:
        renamed = sanitize(dict(probes))
    except Exception:  # it needs a whole model
        return dict.fromkeys(shapes, "")
    by_array = {id(array): name for name, array in renamed.items()}
    # Some multiply weights in place. One tensor of each kind is looked at, since all of a large model would take long.
    kinds = {re.sub(r"\d+", "#", name): probe for name, probe in probes.items()}
    changed = {kind for kind, probe in kinds.items() if not bool((mx.min(probe) == 1) & (mx.max(probe) == 1))}
    return {
        name: "" if re.sub(r"\d+", "#", name) in changed else by_array.get(id(probe), "")
        for name, probe in probes.items()
    }


def _updates(
    modules: Mapping[str, Mapping[str, str]], arrays: Mapping[str, mx.array], settings: _Settings
) -> dict[str, Update]:
    """By names in PyTorch; evaluates no array."""
    updates: dict[str, Update] = {}
    for stem, parts in modules.items():
        given = {part: arrays[name] for part, name in parts.items()}
        for leaf in ("weight", "bias"):
            if leaf in given:
                updates[f"{stem}.{leaf}"] = Replacement(given[leaf])
        if "a" in given or "embedding_a" in given:
            # An embedding's pair is that of its transpose.
            left, right = (given["b"], given["a"]) if "a" in given else (given["embedding_a"].T, given["embedding_b"].T)
            updates[f"{stem}.weight"] = LowRank(
                left, right, settings.scale_of(stem), given.get("magnitude"), given.get("weight")
            )
        if "offset" in given:
            updates[f"{stem}.bias"] = Offset(given["offset"], settings.scale_of(stem), given.get("bias"))
    return updates


def _check_tied(
    file: Path,
    modules: Mapping[str, Mapping[str, str]],
    names: Mapping[str, str],
    dropped: list[str],
    settings: _Settings,
    skeleton: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
) -> list[str]:
    """The dropped names of output layers that are tied to an embedding and changed in the same way.

    Raises:
        SourceError: if a tied embedding is changed and its output layer is not changed in the same way.
    """
    embeddings = {f"{name}.weight" for name, module in skeleton.named_modules() if isinstance(module, nn.Embedding)}
    outside = [name for name in shapes if not any(part.isdigit() for part in name.split("."))]
    twins: list[str] = []
    for name, ours in names.items():
        if ours not in embeddings or any(shapes[other] == shapes[ours] for other in outside if other != ours):
            continue
        # Arrays of its own, which are evaluated and then forgotten.
        updates = _updates(modules, load_lazily(file, SourceError, AGAIN), settings)
        alike = [other for other in dropped if _equal(updates[name], updates[other])]
        if not alike:
            raise SourceError(
                f"{file}: changes {name} alone, which this model uses as its output layer too; train it with "
                "ensure_weight_tying=True, or untie the model before training"
            )
        twins += alike
    return twins


def _equal(one: Update, other: Update) -> bool:
    pairs = [(vars(one).get(key), vars(other).get(key)) for key in vars(one).keys() | vars(other).keys()]
    return type(one) is type(other) and all(
        bool(mx.array_equal(a, b)) if isinstance(a, mx.array) and isinstance(b, mx.array) else a == b for a, b in pairs
    )
