"""mlx-lm's own model of a config, its parameters never evaluated: what a source must hold, at no memory.

Rotary settings are put where that model looks for them: transformers 5 writes them as `rope_parameters`, earlier ones
flat, and a class that does not know `rope_parameters` ignores it without a word and turns by its own default.
"""

from __future__ import annotations

import copy
import re
from dataclasses import MISSING, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from ifprune_mlx.checkpoint.config_check import check_config, check_names
from ifprune_mlx.checkpoint.context_length import rope_kind, rope_scaling
from ifprune_mlx.errors import SourceError, reason_of

_FLAT = ("rope_theta", "partial_rotary_factor")
_MOST_FREQUENCIES = 1 << 16
_ORIGINAL = "original_max_position_embeddings"
_BY_LAYER = {"full_attention", "sliding_attention"}


def build_skeleton(path: Path, config: dict[str, Any], tensor_count: int) -> Module:
    """mlx-lm's model for a config, its parameters never evaluated.

    Args:
        path: the source, for error messages.
        config: what `ModelArgs.from_dict` reads.
        tensor_count: the number of tensors in the source; a layer has at least one, which bounds the layers that a
            damaged config can ask for.

    Raises:
        SourceError: if mlx-lm does not know the `model_type`, or cannot build a model from this config.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not re.fullmatch(r"[\w-]+", model_type):
        raise SourceError(f"{path}: the config names no model_type; download the model's own config.json again")
    check_names(config, path, SourceError)
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > tensor_count:
        raise SourceError(
            f"{path}: the config asks for {layers} layers, but there are only {tensor_count} tensors; "
            "download the model again"
        )
    try:
        model_class, args_class = _get_classes(config)
    except (ValueError, AttributeError) as exc:
        raise SourceError(
            f"{path}: mlx-lm {version('mlx-lm')} has no model_type {model_type!r}; "
            "update mlx-lm, or convert a model of a family that it supports"
        ) from exc
    except SystemExit as exc:  # mlx-lm's olmo ends the process where a package of its own is missing
        raise SourceError(
            f"{path}: mlx-lm needs another package for a {model_type} model; see what it printed, install it and "
            "try again"
        ) from exc
    check_config(config, args_class, path, SourceError)
    nested = config.get("text_config")
    if isinstance(nested, dict):
        check_config(nested, _arguments(nested), path, SourceError)
    try:
        model = model_class(args_class.from_dict(copy.deepcopy(config)))  # some write into its sections
    except Exception as exc:  # a wrong config can fail anywhere inside the model class
        raise SourceError(
            f"{path}: mlx-lm cannot build a {model_type} model from the config ({typed_reason(exc)}); "
            "compare it with the model's own config.json"
        ) from exc
    assert isinstance(model, Module)
    _check_rope(path, config, model)
    return model


def _check_rope(path: Path, config: dict[str, Any], model: Module) -> None:
    """Raise SourceError if the config scales rotary positions, and the model's class does not: several do not look."""
    nested = config.get("text_config")
    inner: dict[str, Any] = nested if isinstance(nested, dict) else config
    scaling = rope_scaling(inner)
    wider: dict[str, Any] = {}
    for name in ("factor", "alpha", "short_factor", "long_factor"):
        value = scaling.get(name)
        if isinstance(value, int | float) and (name != "factor" or value != 1):
            wider[name] = 2.0 * value
        elif isinstance(value, list) and all(isinstance(number, int | float) for number in value):
            wider[name] = [2.0 * number for number in value]
    before = _rotary(model)
    if not wider or not before or rope_kind(scaling) in ("default", "mrope", "proportional"):
        return
    other = copy.deepcopy(config)
    rope_scaling(other["text_config"] if inner is nested else other).update(wider)
    try:
        model_class, args_class = _get_classes(other)
        after = _rotary(model_class(args_class.from_dict(other)))
    except Exception:  # then it looks
        return
    if before == after:
        raise SourceError(
            f"{path}: scales its rotary positions ({rope_kind(scaling)}), for which mlx-lm's {config['model_type']} "
            "has no place; long texts would come out wrong: remove rope_scaling from config.json for the unscaled "
            "length, or take another model"
        )


def _rotary(model: Any) -> list[tuple[str, dict[str, Any]]]:
    """The settings of every rotary position embedding of a model."""

    def plain(value: Any) -> Any:
        small = isinstance(value, mx.array) and value.size <= _MOST_FREQUENCIES
        return value.tolist() if small else value

    return [
        (f"{path} {type(module).__name__}", {key: plain(value) for key, value in settings.items()})
        for path, module in model.named_modules()
        if "rope" in type(module).__name__.lower()
        for settings in ({**vars(module), **module},)
    ]


def parameter_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a model (an `nn.Module`), by name; evaluates none."""
    parameters: Any = tree_flatten(model.parameters())
    return {name: tuple(array.shape) for name, array in parameters}


def sanitized(model: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """A model's tensors under the names that mlx-lm's class wants; raises whatever its `sanitize` does."""
    sanitize = getattr(model, "sanitize", None)
    return weights if sanitize is None else cast(dict[str, mx.array], sanitize(weights))


def check_shapes(path: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    """Compare the tensors that a model needs with those that a source has.

    Raises:
        SourceError: naming what is missing, what does not belong there, or what has the wrong shape.
    """
    if missing := sorted(expected.keys() - found.keys()):
        raise SourceError(f"{path}: lacks {listing(missing)}, which its config asks for; download the model again")
    if extra := sorted(found.keys() - expected.keys()):
        raise SourceError(
            f"{path}: has {listing(extra)}, which mlx-lm's model does not know; "
            "the config may belong to another model, or mlx-lm may need an update"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise SourceError(
                f"{path}: tensor {name} has shape {list(found[name])}, but the config asks for {list(shape)}; "
                "the config may belong to another model"
            )


def listing(names: list[str]) -> str:
    """The first few of many names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def typed_reason(exc: BaseException) -> str:
    """An error from inside mlx-lm on one line; its type says what a bare key or number does not."""
    return f"{type(exc).__name__}: {reason_of(exc)}"


def with_flat_rope(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A Hugging Face config whose rotary settings mlx-lm's class reads; the same one where that is so already.

    Args:
        path: where it comes from, for the message.

    Raises:
        SourceError: if they differ by layer, and the class does not know `rope_parameters`.
    """
    config = _flat(path, config)
    nested = config.get("text_config")
    return config | {"text_config": _flat(path, nested)} if isinstance(nested, dict) else config


def _flat(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    given = config.get("rope_parameters")
    if not isinstance(given, dict):
        return _with_original(config)
    names = arguments_of(config)
    if names is not None and "rope_parameters" in names:
        return config
    if any(isinstance(value, dict) for value in given.values()):
        if names is None:
            return config  # a part of a larger model, whose class may read it
        if set(given) != _BY_LAYER or "rope_local_base_freq" not in names:
            raise SourceError(
                f"{path}: its config has rope_parameters for each kind of layer, which mlx-lm's "
                f"{config['model_type']} does not read; save it with transformers 4, or take a model whose config has "
                "rope_theta"
            )
        flat = _flattened(given["full_attention"])
        if "rope_theta" in given["sliding_attention"]:
            flat["rope_local_base_freq"] = given["sliding_attention"]["rope_theta"]
    else:
        flat = _flattened(given)
    return _with_original(config | {key: value for key, value in flat.items() if config.get(key) is None})


def _with_original(config: dict[str, Any]) -> dict[str, Any]:
    """A config that says of what length its scaled positions were: mlx-lm's classes take one of their own else."""
    scaling = config.get("rope_scaling")
    if not isinstance(scaling, dict) or scaling.get(_ORIGINAL) or rope_kind(scaling) not in ("yarn", "longrope", "su"):
        return config
    # As transformers has it.
    original = config.get(_ORIGINAL) or config.get("max_position_embeddings")
    return config | {"rope_scaling": scaling | {_ORIGINAL: original}} if original else config


def _flattened(given: dict[str, Any]) -> dict[str, Any]:
    flat = {key: given[key] for key in _FLAT if key in given}
    if given.get("rope_type", "default") != "default":
        flat["rope_scaling"] = {key: value for key, value in given.items() if key not in _FLAT}
    return flat


def arguments_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of mlx-lm's `ModelArgs` for a config, with their defaults, `...` for none; None if its type is not
    known, which its builder will tell."""
    arguments = _arguments(config)
    if arguments is None:
        return None
    return {field.name: ... if field.default is MISSING else field.default for field in fields(arguments)}


def _arguments(config: dict[str, Any]) -> Any:
    try:
        return _get_classes(config)[1]
    except (KeyError, ValueError, AttributeError, TypeError, SystemExit):
        return None
