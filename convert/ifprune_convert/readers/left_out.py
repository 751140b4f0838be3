"""What mlx-lm's model classes leave out of a source without a word, above all an output layer of its own.

Most classes tie the output layer to the embedding unless the config forbids it, while transformers does so for few
families, and `sanitize` then drops the layer. Whether a model has one, its tensors tell.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ifprune_convert.skeleton import arguments_of, listing, sanitized
from ifprune_mlx.errors import SourceError

from .shards import Placed, equal_tensors

_TIED = "tie_word_embeddings"
_HEADS = ("lm_head", "output", "embed_out", "output_layer")
_EMBEDDINGS = ("embed_tokens", "tok_embeddings", "wte", "word_embeddings", "token_embedding", "embeddings")
# Tables that are computed, the parts that see and hear, and layers that predict further tokens: a language model's
# next token does not depend on them.
_WITHOUT_EFFECT = re.compile(
    r"(^|[._])(inv_freq|cos_cached|sin_cached|masked_bias|(input|output)_(min|max))$"
    r"|(^|\.)(vision|visual|audio|image|multi_modal|mm_projector|embed_vision|embed_audio|mtp)\w*\."
)
_EXPERT = re.compile(r"\.experts?\.\d+\.")  # which the classes stack, all or none


def with_output_layer(
    path: Path, config: dict[str, Any], tensors: Mapping[str, Placed]
) -> tuple[dict[str, Any], set[str]]:
    """A config that says whether the output layer is the embedding, as the tensors have it.

    Args:
        tensors: by the source's names.

    Returns:
        The config, and the tensors of an output layer that equals the embedding, which are not needed.

    Raises:
        SourceError: if a file cannot be read.
    """
    nested = config.get("text_config")
    inner: dict[str, Any] = nested if isinstance(nested, dict) else config
    stated = inner.get(_TIED)
    head, embedding = _find(tensors, _HEADS), _find(tensors, _EMBEDDINGS)
    changes: dict[str, Any] = {}
    unneeded: set[str] = set()
    if head is None:
        arguments = arguments_of(inner)
        if stated is None and arguments is not None and arguments.get(_TIED) is ...:
            changes = {_TIED: True}
    elif stated is not False:
        if embedding is not None and equal_tensors(tensors[head], tensors[embedding]):
            stem = head.removesuffix("weight")
            unneeded = {name for name in tensors if name.startswith(stem)}
            changes = {_TIED: True}
        elif not stated:
            changes = {_TIED: False}
    if not changes:
        return config, unneeded
    return (config | changes if inner is config else config | {"text_config": inner | changes}), unneeded


def _find(tensors: Iterable[str], modules: tuple[str, ...]) -> str | None:
    pattern = re.compile(rf"(^|.*\.)({'|'.join(modules)})\.weight")
    return min((name for name in tensors if pattern.fullmatch(name) and "layers." not in name), key=len, default=None)


def check_nothing_left_out(
    path: Path,
    config: Mapping[str, Any],
    build: Callable[[], Any],
    given: Mapping[str, mx.array],
    arranged: Mapping[str, mx.array],
) -> None:
    """Compare what a class's `sanitize` was given with what it made of it.

    Args:
        build: makes a new model of the class.

    Raises:
        SourceError: naming tensors that it left out, unless a model does without them.
    """
    made = {id(array) for array in arranged.values()}
    gone = {name: array for name, array in given.items() if id(array) not in made and _matters(name, array, config)}
    here = {id(array) for array in given.values()}
    new = sum(math.prod(array.shape) for array in arranged.values() if id(array) not in here)
    if sum(math.prod(array.shape) for array in gone.values()) == new:
        return
    shapes = {name: array.shape for name, array in arranged.items()}

    def unused(names: list[str]) -> list[str]:
        """Those of some tensors without which the same comes out."""
        rest = {name: array for name, array in given.items() if name not in set(names)}
        try:
            same = {name: array.shape for name, array in sanitized(build(), rest).items()} == shapes
        except Exception:  # it misses them
            same = False
        if same or len(names) < 2:
            return names if same else []
        return unused(names[: len(names) // 2]) + unused(names[len(names) // 2 :])

    candidates = sorted(name for name in gone if not _EXPERT.search(name))
    left = unused(candidates) if candidates else []
    if (head := _find(left, _HEADS)) is not None:
        raise SourceError(
            f"{path}: has an output layer {head} that differs from the embedding, while its config.json says that "
            f"they are one ({_TIED}: true); set that to false there if the layer is to count, else remove {head}"
        )
    if left:
        raise SourceError(
            f"{path}: has {listing(left)}, which mlx-lm's {config['model_type']} leaves out, so that the model would "
            "answer differently; remove them from the weights if they are of no use, or convert a model of another kind"
        )


def _matters(name: str, array: mx.array, config: Mapping[str, Any]) -> bool:
    """Whether the next token may depend on a tensor that a class leaves out."""
    if _WITHOUT_EFFECT.search(name) or array.dtype == mx.bool_ or tuple(array.shape[:2]) == (1, 1):  # a causal mask
        return False
    nested = config.get("text_config")
    inner: Mapping[str, Any] = nested if isinstance(nested, dict) else config
    layer = re.search(r"\blayers\.(\d+)\.", name)
    layers = inner.get("num_hidden_layers")
    if layer is None or not isinstance(layers, int):
        return True
    shared = inner.get("num_kv_shared_layers") or 0
    if int(layer[1]) >= layers - shared and re.search(r"\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.", name):
        return False  # keys and values that an earlier layer lends
    return int(layer[1]) < layers  # beyond them stand layers that predict further tokens
