"""mlx-lm's own model of a config, its parameters never evaluated: what a source must hold, at no memory."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from ifprune_mlx.errors import SourceError

from .wording import listing, reason


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
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > tensor_count:
        raise SourceError(
            f"{path}: the config asks for {layers} layers, but there are only {tensor_count} tensors; "
            "download the model again"
        )
    try:
        model_class, args_class = _get_classes(config)
    except (ValueError, AttributeError):
        raise SourceError(
            f"{path}: mlx-lm {version('mlx-lm')} has no model_type {model_type!r}; "
            "update mlx-lm, or convert a model of a family that it supports"
        ) from None
    except SystemExit:  # mlx-lm's olmo ends the process where a package of its own is missing
        raise SourceError(
            f"{path}: mlx-lm needs another package for a {model_type} model; see what it printed, install it and "
            "try again"
        ) from None
    try:
        model = model_class(args_class.from_dict(config))
    except Exception as exc:  # a wrong config can fail anywhere inside the model class
        raise SourceError(
            f"{path}: mlx-lm cannot build a {model_type} model from the config ({reason(exc)}); "
            "compare it with the model's own config.json"
        ) from None
    assert isinstance(model, Module)
    return model


def parameter_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a model (an `nn.Module`), by name; evaluates none."""
    parameters: Any = tree_flatten(model.parameters())
    return {name: tuple(array.shape) for name, array in parameters}


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
