"""Targets for distilling a predictor: what every chat's instruction looks like, and the neurons that its answer needs.

The importance of a neuron for an answer is `sum over tokens of |d loss / d mask|`, where the mask multiplies the
neuron's activation. The gradient is taken half way between the statically pruned model and the dense one: the mask is 1
for the neurons that the prior keeps and a half for the others (the midpoint rule for the path between the two). Taken
at the dense end alone, or from activations alone, it predicts the loss of a pruned model less well (docs/log.md).

On disk a folder of parts: `part-00000.safetensors` with `features` float32 `[n, 2 d]` (last token, then mean over
tokens) and `importance` float16 `[n, neurons]` (all FFNs, one after the other, each divided by its mean), and
`targets.json`, which says what they were measured on. A run that dies goes on after its last whole part.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx import nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_mlx.checkpoint.atomic_write import sha256_file, write_atomic
from ifprune_mlx.checkpoint.regular_file import read_json_object
from ifprune_mlx.checkpoint.safetensors_io import load_arrays, read_safetensors_header
from ifprune_mlx.data.tokenize import Example
from ifprune_mlx.errors import DataError, PredictorError
from ifprune_mlx.model import Model
from ifprune_mlx.selection import predictor
from ifprune_mlx.train.gradients import differentiable
from ifprune_mlx.train.loss import answer_logits, answer_rows, log_softmax

PART = 64
"""Chats in one part."""

Floats = npt.NDArray[np.float32]

# Below this share of a layer's mean importance a neuron counts as idle: the logarithm must not tell idle ones apart.
_FLOOR = 0.05
_BACKBONE_FILES = {".json", ".jinja", ".model", ".txt"}


@dataclass(frozen=True)
class Backbone:
    """The model that reads instructions for a predictor: a small one of its own, or first layers of the pruned one.

    Attributes:
        module: an mlx-lm model.
        context_length: the most tokens that it reads, if it has a limit.
        layers: how many first layers it runs; None for all.
        folder: of a backbone of its own; None for first layers of the model that is selected for.
    """

    module: nn.Module
    tokenizer: TokenizerWrapper
    context_length: int | None
    layers: int | None = None
    folder: Path | None = None

    @classmethod
    def first_layers(cls, model: Model, layers: int) -> Backbone:
        """The first layers of a model that was loaded with its tokenizer. It must be dense whenever they read."""
        assert model.tokenizer is not None
        return cls(model.module, model.tokenizer, model.context_length, layers)

    @classmethod
    def load(cls, folder: Path) -> Backbone:
        """Load a small mlx-lm model and its tokenizer.

        Raises:
            PredictorError: naming the folder or the file, if it is none.
        """
        if not (folder / "config.json").is_file():
            raise PredictorError(f"{folder}: has no config.json; give an mlx-lm model folder with its tokenizer")
        return cls(*predictor.load_backbone(folder), folder=folder)

    def features(self, instructions: Sequence[str]) -> mx.array:
        """What the head reads of instructions, float32 `[n, 2 d]`: the last token's hidden state, then their mean.

        Raises:
            PredictorError: if one has no tokens, or the family does not expose its hidden states.
        """
        texts = [predictor.instruction_tokens(self.tokenizer, text, self.context_length) for text in instructions]
        return predictor.features(self.module, texts, self.layers)

    def identity(self) -> dict[str, Any]:
        """What tells it apart from others: the number of first layers, or a hash of its files."""
        if self.folder is None:
            return {"layers": self.layers}
        digest = hashlib.sha256()
        for file in _backbone_files(self.folder):
            digest.update(f"{file.name} {sha256_file(file)}\n".encode())
        return {"layers": None, "backbone": digest.hexdigest()[:16]}


def copy_backbone(source: Path, folder: Path) -> None:
    """Copy a backbone's files, and no head, to the folder of a predictor.

    Raises:
        DataError: if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in _backbone_files(source) if not folder.samefile(source) else ():
        write_atomic(folder / file.name, partial(shutil.copyfile, file), DataError)


@dataclass(frozen=True)
class Targets:
    """Measured chats.

    Attributes:
        features: float32 `[n, 2 d]`.
        importance: float16 `[n, neurons]`, each FFN's divided by its mean.
        domains: per chat, its label.
        layers: the number of first layers that the features come from; None for a backbone of its own.
        widths: `d_ffn` of every FFN.
    """

    features: Floats
    importance: npt.NDArray[np.float16]
    domains: list[str]
    layers: int | None
    widths: tuple[int, ...]


def measure(
    model: Model,
    examples: Sequence[Example],
    folder: Path,
    backbone: Backbone,
    progress: Callable[[int, int], None] | None = None,
    *,
    count: int | None = None,
    micro_batch_size: int = 1,
) -> Targets:
    """Run chats forwards and backwards, or go on where an earlier run for the same chats stopped.

    Args:
        examples: chats of one instruction and one answer.
        folder: of the parts on disk.
        backbone: reads the instructions.
        progress: called with (chats measured, chats to measure).
        count: stop after so many chats, rounded up to a whole part; the same call without it goes on from there.
        micro_batch_size: chats computed together; changes only the last digits.

    Raises:
        DataError: if the folder holds targets of other chats, of another model or backbone, or cannot be written.
    """
    described: dict[str, Any] = {
        "checkpoint": model.checkpoint.id,
        "importance": "attribution half way",
        "widths": [spec.d_ffn for spec in model.checkpoint.layout.ffns],
        "domains": [chat.domain for chat in examples],
        "chats": hashlib.sha256(b"|".join(chat.tokens.tobytes() for chat in examples)).hexdigest(),
        **backbone.identity(),
    }
    found = _description(folder)
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(described)
        write_atomic(folder / "targets.json", lambda path: path.write_text(text, encoding="utf-8"), DataError)
    elif found != described:
        raise DataError(
            f"{folder}: holds targets of other chats or of another model or backbone; choose another folder"
        )
    masks = midpoint_masks(model)
    end = len(examples) if count is None else min(-(-count // PART) * PART, len(examples))
    for start in range(0, end, PART):
        file = folder / f"part-{start // PART:05d}.safetensors"

        def measured(count: int, start: int = start) -> None:
            if progress is not None:
                progress(min(start + count, end), end)

        if not file.is_file():
            _measure_part(model, examples[start : start + PART], file, backbone, masks, micro_batch_size, measured)
        measured(PART)
    return load(folder)


def load(folder: Path) -> Targets:
    """Read the parts that `measure` has finished.

    Raises:
        DataError: if the folder holds no targets, or a part is damaged.
    """
    described = _description(folder)
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
        arrays = load_arrays(file)
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


def log_importance(targets: Targets, rows: npt.NDArray[np.intp] | slice = slice(None)) -> Iterator[Floats]:
    """Logarithm of importance relative to the FFN's mean, idle neurons at a common floor, for some chats (all).

    Yields FFN by FFN, float32 `[n, d_ffn]`: as a whole it would take twice the memory of the targets.
    """
    start = 0
    for width in targets.widths:
        part = targets.importance[rows, start : start + width].astype(np.float32)
        yield np.log(part / np.maximum(part.mean(axis=1, keepdims=True), 1e-12) + np.float32(_FLOOR))
        start += width


def attribution(model: Model, examples: Sequence[Example], masks: Sequence[mx.array]) -> list[Floats]:
    """The importance of every neuron for answers (see above). The model is dense afterwards.

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
        log_probs = log_softmax(answer_logits(model.module, tokens, rows))
        return -mx.take_along_axis(log_probs, wanted[:, None], axis=-1).sum()

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


def midpoint_masks(model: Model) -> list[mx.array]:
    """Per FFN, float32 `[d_ffn]`: 1 for the half of the neurons that the prior ranks first, a half for the others."""
    return [mx.array(np.where(prior >= np.median(prior), 1.0, 0.5).astype(np.float32)) for prior in model.prior]


def _measure_part(
    model: Model,
    chats: Sequence[Example],
    file: Path,
    backbone: Backbone,
    masks: Sequence[mx.array],
    micro_batch_size: int,
    measured: Callable[[int], None],
) -> None:
    importance = np.empty((len(chats), sum(len(mask) for mask in masks)), np.float16)
    features: dict[int, Floats] = {}
    by_length = sorted(range(len(chats)), key=lambda index: len(chats[index].tokens))
    for start in range(0, len(chats), micro_batch_size):
        group = by_length[start : start + micro_batch_size]
        model.switch(None)
        features |= zip(group, np.array(backbone.features([chats[index].instruction for index in group])), strict=True)
        importance[group] = np.concatenate(attribution(model, [chats[index] for index in group], masks), axis=1)
        if group[-1] != by_length[-1]:  # the last is told of once the part is on disk
            measured(start + len(group))
    for index, chat in enumerate(chats):
        if not (np.isfinite(importance[index]).all() and np.isfinite(features[index]).all()):
            raise DataError(
                f"the gradients of a chat of domain {chat.domain!r} are not finite ({chat.instruction[:60]!r}); "
                "measure with --dtype bfloat16 or float32, or leave the chat out"
            )
    stacked = np.stack([features[index] for index in range(len(chats))])
    tensors = {"features": mx.array(stacked), "importance": mx.array(importance)}
    write_atomic(file, lambda path: mx.save_safetensors(str(path), tensors), DataError)


def _backbone_files(folder: Path) -> list[Path]:
    """The files of a model folder that make a backbone: config, weights, tokenizer; sorted, and never a head."""
    files = [*folder.glob("model*.safetensors"), *(f for f in folder.iterdir() if f.suffix in _BACKBONE_FILES)]
    return sorted(file for file in files if file.is_file() and not file.name.startswith("."))


def _description(folder: Path) -> dict[str, Any] | None:
    """What the targets in a folder were measured on; None if there are none."""
    file = folder / "targets.json"
    try:
        return read_json_object(file, DataError) if file.is_file() else None
    except DataError as exc:
        raise DataError(f"{file}: cannot be read; remove the folder and measure again") from exc
