"""Sorts a checkpoint's neurons by how often they are selected, and puts all rows of a neuron into one record.

The rows that a switch reads from the disk then lie together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from ifprune_mlx.chat_template import render_messages
from ifprune_mlx.checkpoint.budget import SSD
from ifprune_mlx.checkpoint.format import SECTION, Checkpoint
from ifprune_mlx.checkpoint.neuron_layout import RECORDS
from ifprune_mlx.checkpoint.safetensors_io import load_arrays
from ifprune_mlx.data.dataset import Record
from ifprune_mlx.errors import SourceError
from ifprune_mlx.model import load
from ifprune_mlx.selection.selection import Ids
from ifprune_mlx.selection.selectors import Instruction, make_selector

from .layout import as_records
from .weight_files import write_neurons


def order_by_frequency(folder: Path, examples: Sequence[Record], progress: Callable[[int, int], None]) -> None:
    """Reorder every neurons file of a checkpoint, and say so in its config. Its manifest is then out of date.

    Every chat's first message selects, with the checkpoint's default selector and density. Neurons that are selected
    equally often go by the prior.

    Args:
        progress: called with (chats, chats in all).
    """
    checkpoint = Checkpoint.open(folder)
    reorder(checkpoint, _orders(checkpoint, examples, progress))


def reorder(checkpoint: Checkpoint, orders: Sequence[Ids]) -> None:
    """Put the neurons of each file into a given order, int32 `[d_ffn]` each, as records. The manifest is then out of
    date.

    Raises:
        SourceError: if they are in an order of their own already.
    """
    if checkpoint.layout.order is not None:
        raise SourceError(f"{checkpoint.path}: its neurons are in order already; convert the source again")
    for index, order in enumerate(orders):
        file = checkpoint.neurons_file(index)
        arrays = load_arrays(file)
        down_bias = arrays.pop("down.bias", None)
        records, metadata = as_records(arrays)
        tensors = {RECORDS: mx.take(records, mx.array(order), axis=0), "order": mx.array(order)}
        if down_bias is not None:
            tensors["down.bias"] = down_bias
        mx.eval(tensors)
        del arrays, records
        written = file.with_suffix(".new")
        write_neurons(written, tensors, metadata)
        del tensors
        written.replace(file)
        mx.clear_cache()
    section = checkpoint.config[SECTION] | {"order": "frequency"}
    text = json.dumps(checkpoint.config | {SECTION: section}, indent=1) + "\n"
    (checkpoint.path / "config.json").write_text(text, encoding="utf-8")


def _orders(checkpoint: Checkpoint, examples: Sequence[Record], progress: Callable[[int, int], None]) -> list[Ids]:
    # A predictor needs no more of the model than its own layers; without one, the prompt runs through all of it.
    model, tokenizer = load(checkpoint.path, residency=SSD if checkpoint.has_predictor else None)
    try:
        selector, keep = make_selector(model), model.keep()
        counts = [np.zeros(width) for width in checkpoint.widths]
        for done, example in enumerate(examples, 1):
            message = next(message for message in example.messages if message["role"] == "user")
            tokens = render_messages(tokenizer, [dict(message)])
            selection = selector.select(Instruction(message["content"], tuple(tokens)), keep).selection
            for count, ids in zip(counts, selection.ids, strict=True):
                count[ids] += 1
            progress(done, len(examples))
        priors = model.prior
    finally:
        model.close()
    return [np.lexsort((-prior, -count)).astype(np.int32) for count, prior in zip(counts, priors, strict=True)]
