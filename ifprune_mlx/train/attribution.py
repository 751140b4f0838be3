"""What the predictor is distilled from: for every training chat, what its instruction looks like to a backbone, and
which neurons its answer then needs. Measured once, kept on disk.

How much an answer needs a neuron: `sum over tokens of |d loss / d mask|`, where the mask multiplies the neuron's
activation and the model is half way between the statically pruned one and the dense one (neurons that the prior keeps
at 1, all others at a half; the midpoint rule for the path between the two). At the dense end alone, or from activations
alone, the loss of a pruned model is predicted less well (docs/log.md).

A folder of parts: `part-00000.safetensors` with `features` float32 `[n, 2 d]` (last token, then mean over tokens) and
`importance` float16 `[n, neurons]` (all FFNs, one after the other, each divided by its mean), and `targets.json`,
which says what they belong to. A run that dies goes on after its last whole part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ifprune_mlx.checkpoint.atomic_write import write_atomic
from ifprune_mlx.checkpoint.safetensors_io import read_safetensors_header
from ifprune_mlx.data.tokenize import Encoded
from ifprune_mlx.errors import DataError
from ifprune_mlx.model import Model
from ifprune_mlx.train.backbone import Backbone
from ifprune_mlx.train.gradient_check import differentiable
from ifprune_mlx.train.logits import answer_logits, answer_rows, log_softmax

PART = 64
"""Chats in one part."""

Floats = npt.NDArray[np.float32]

# Below this share of a layer's mean importance a neuron counts as idle: the logarithm must not tell idle ones apart.
_FLOOR = 0.05


@dataclass(frozen=True)
class Targets:
    """Measured chats.

    Attributes:
        features: float32 `[n, 2 d]`.
        importance: float16 `[n, neurons]`, each FFN's divided by its mean.
        domains: per chat, its label.
        layers: how many first layers the features come from; None if from a backbone of its own.
        widths: `d_ffn` of every FFN.
    """

    features: Floats
    importance: npt.NDArray[np.float16]
    domains: list[str]
    layers: int | None
    widths: tuple[int, ...]


def measure(
    model: Model,
    examples: Sequence[Encoded],
    folder: Path,
    layers: int,
    progress: Callable[[int, int], None] | None = None,
    *,
    count: int | None = None,
    backbone: Backbone | None = None,
    at_once: int = 1,
) -> Targets:
    """Run chats forwards and backwards, or go on where an earlier run for the same ones stopped.

    Args:
        examples: chats of one instruction and one answer.
        folder: where the parts are kept.
        layers: first layers that the features are read from, if there is no `backbone`.
        progress: called with (chats measured, chats to measure).
        count: stop after so many, or after more that were measured already; the same chats without it go on from there.
        backbone: what reads the instructions instead of the first layers.
        at_once: chats computed together; changes nothing but the last digits.

    Raises:
        DataError: if the folder holds targets of other chats, of another model or backbone, or cannot be written.
    """
    widths = [spec.d_ffn for spec in model.checkpoint.layout.ffns]
    described: dict[str, object] = {
        "checkpoint": model.checkpoint.id,
        "importance": "attribution half way",
        "layers": layers if backbone is None else None,
        "widths": widths,
        "domains": [chat.domain for chat in examples],
        "chats": hashlib.sha256(b"|".join(chat.tokens.tobytes() for chat in examples)).hexdigest(),
    }
    if backbone is None:
        backbone = Backbone.first_layers(model, layers)
    else:
        described["backbone"] = backbone.identity()
    _claim(folder, described)
    masks = halfway(model)
    end = len(examples) if count is None else min(count, len(examples))
    for start in range(0, end, PART):
        file = folder / f"part-{start // PART:05d}.safetensors"
        if not file.is_file():
            _measure_part(model, examples[start : start + PART], file, backbone, masks, at_once)
        if progress is not None:
            progress(min(start + PART, end), end)
    return load(folder)


def load(folder: Path) -> Targets:
    """Read what `measure` has finished.

    Raises:
        DataError: if the folder holds no targets, or a part is damaged.
    """
    described = _described(folder)
    if described is None:
        raise DataError(f"{folder}: holds no targets; measure them first")
    files = sorted(folder.glob("part-*.safetensors"))
    if not files:
        raise DataError(f"{folder}: no part is finished yet; measure the targets first")
    shapes = [{name: info.shape for name, info in read_safetensors_header(f, DataError).tensors.items()} for f in files]
    count = sum(shape["features"][0] for shape in shapes)
    # Filled part by part: the importance of a large model is gigabytes, which must not be in memory twice.
    features = np.empty((count, shapes[0]["features"][1]), np.float32)
    importance = np.empty((count, shapes[0]["importance"][1]), np.float16)
    start = 0
    for file in files:
        arrays = mx.load(str(file))
        assert isinstance(arrays, dict)
        part = slice(start, start + len(arrays["features"]))
        features[part], importance[part] = np.array(arrays["features"]), np.array(arrays["importance"])
        start = part.stop
    return Targets(
        features,
        importance,
        list(described["domains"][:count]),
        None if described["layers"] is None else int(described["layers"]),
        tuple(described["widths"]),
    )


def log_importance(importance: npt.NDArray[np.float16], widths: tuple[int, ...]) -> Floats:
    """Logarithm of importance relative to the FFN's mean, float32 `[n, neurons]`, idle neurons at a common floor."""
    result = np.empty(importance.shape, np.float32)
    start = 0
    for width in widths:
        part = importance[:, start : start + width].astype(np.float32)
        part /= np.maximum(part.mean(axis=1, keepdims=True), 1e-12)
        result[:, start : start + width] = np.log(part + _FLOOR)
        start += width
    return result


def attribution(model: Model, examples: Sequence[Encoded], masks: Sequence[mx.array]) -> list[Floats]:
    """How much answers need each neuron (see above); leaves the model dense.

    Args:
        examples: chats, computed together.
        masks: per FFN, float32 `[d_ffn]`, the point at which the gradient is taken; in the source's neuron order.

    Returns:
        Per FFN, float32 `[chats, d_ffn]`, each row divided by its mean, in the source's order.
    """
    model.switch(None)
    tokens, rows, wanted = answer_rows(examples)
    orders = [leaf.slots.order for leaf in model.down_leaves]
    points = [
        mx.broadcast_to(mask[mx.array(order)], (*tokens.shape, len(order)))
        for mask, order in zip(masks, orders, strict=True)
    ]

    def loss(given: list[mx.array]) -> mx.array:
        for leaf, mask in zip(model.down_leaves, given, strict=True):
            leaf.observer = lambda hidden, mask=mask: hidden * mask.reshape(hidden.shape).astype(hidden.dtype)
        said = log_softmax(answer_logits(model.module, tokens, rows))
        return -mx.take_along_axis(said, wanted[:, None], axis=-1).sum()

    try:
        with differentiable(model.module):
            sums = [mx.abs(gradient).sum(axis=1) for gradient in mx.grad(loss)(points)]
        mx.eval(sums)
    finally:
        for leaf in model.down_leaves:
            leaf.observer = None
    result = []
    for total, order in zip(sums, orders, strict=True):
        values = np.empty(total.shape, np.float32)
        values[:, order] = np.array(total, dtype=np.float32)
        result.append(values / np.maximum(values.mean(axis=1, keepdims=True), 1e-30))
    return result


def halfway(model: Model) -> list[mx.array]:
    """Per FFN, float32 `[d_ffn]`: 1 for the half of the neurons that the prior ranks first, a half for the others."""
    return [mx.array(np.where(prior >= np.median(prior), 1.0, 0.5).astype(np.float32)) for prior in model.prior]


def _measure_part(
    model: Model, chats: Sequence[Encoded], file: Path, backbone: Backbone, masks: Sequence[mx.array], at_once: int
) -> None:
    count = len(chats)
    importance = np.empty((count, sum(len(mask) for mask in masks)), np.float16)
    seen: Floats | None = None
    by_length = sorted(range(count), key=lambda index: len(chats[index].tokens))
    for start in range(0, count, at_once):
        group = by_length[start : start + at_once]
        model.switch(None)
        features = np.array(backbone.features([chats[index].instruction for index in group]))
        seen = np.empty((count, features.shape[1]), np.float32) if seen is None else seen
        seen[group] = features
        importance[group] = np.concatenate(attribution(model, [chats[index] for index in group], masks), axis=1)
    assert seen is not None
    for chat, *found in zip(chats, importance, seen, strict=True):
        if not all(np.isfinite(values).all() for values in found):
            raise DataError(
                f"the gradients of a chat of domain {chat.domain!r} are not finite ({chat.instruction[:60]!r}); "
                "measure with --dtype bfloat16 or float32, or leave the chat out"
            )
    tensors = {"features": mx.array(seen), "importance": mx.array(importance)}
    write_atomic(file, lambda path: mx.save_safetensors(str(path), tensors), DataError)


def _claim(folder: Path, described: dict[str, object]) -> None:
    found = _described(folder)
    if found is not None and found != described:
        raise DataError(
            f"{folder}: holds targets of other chats or of another model or backbone; choose another folder"
        )
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(described)
        write_atomic(folder / "targets.json", lambda path: path.write_text(text, encoding="utf-8"), DataError)


def _described(folder: Path) -> dict | None:  # type: ignore[type-arg]
    file = folder / "targets.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
    except (OSError, ValueError):
        raise DataError(f"{file}: cannot be read; remove the folder and measure again") from None
