"""Deals a model's weights out over ranks: attention, FFN neurons, and the rows of the vocabulary.

Attention is split by heads with mlx-lm's own `shard` where the family has it and the heads come out even. Elsewhere
the layers are dealt out: one rank computes the attention of a layer and keeps its KV cache, and the others get what it
gives. Each FFN is split by neurons. What is left (norms, routers, experts without `shard`) is on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache

from ifprune_mlx.checkpoint.ffn_spec import FFNSpec
from ifprune_mlx.checkpoint.format import Checkpoint
from ifprune_mlx.checkpoint.neuron_reader import read_positions
from ifprune_mlx.checkpoint.safetensors_io import load_arrays
from ifprune_mlx.errors import BudgetError, CheckpointError, reason_of
from ifprune_mlx.sparse.ffn import SlicedProjection, module_at

# What stands in for an FFN's projections while mlx-lm shards a model is divisible by the ranks and by any group.
_GROUP = 64
# The cache of a layer whose attention another rank computes: it counts tokens, and can be quantized like the others.
_HEAD = 64


def deal(checkpoint: Checkpoint, rank: int, ranks: int) -> list[np.ndarray[Any, np.dtype[np.int32]]]:
    """The neurons of each FFN that a rank holds, int32, sorted.

    They are dealt in turn, from the one selected most often to the one selected least, so that a selection has about as
    many neurons on every rank.
    """
    priors = load_arrays(checkpoint.priors_file, CheckpointError)
    shares = []
    for index in range(len(checkpoint.widths)):
        ordered = checkpoint.layout.order is not None
        place = read_positions(checkpoint, index) if ordered else -np.array(priors[f"prior.{index}"])
        shares.append(np.sort(np.argsort(place, kind="stable")[rank::ranks]).astype(np.int32))
    return shares


def shard(module: nn.Module, checkpoint: Checkpoint, group: mx.distributed.Group) -> None:
    """Leave a rank its part of a model whose weights are not read yet, and have the parts' results summed.

    Args:
        module: an mlx-lm model with sliced leaves over this rank's neurons.

    Raises:
        CheckpointError: if mlx-lm cannot split it for so many ranks.
    """
    specs = checkpoint.layout.ffns
    if hasattr(module, "shard") and _heads_divide(checkpoint, group.size()):
        _shard_by_heads(module, specs, checkpoint, group)
    else:
        for spec in specs:
            _leaf(module, spec).group = group
        for index, layer in enumerate(module.layers):
            if "self_attn" in layer:
                layer.self_attn = LayerAttention(layer.self_attn, index % group.size(), group)
        _try_out(module, checkpoint)
    _shard_vocabulary(module, group)


def _try_out(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Call the model, without computing anything: layers that use each other's attention cannot be dealt out."""
    try:
        module(mx.zeros((1, 2), mx.int32), cache=make_prompt_cache(module))
    except BudgetError:  # no neuron is in memory yet
        pass
    except Exception as exc:  # whatever a family's class makes of a result that it does not expect
        raise CheckpointError(
            f"{checkpoint.path}: {checkpoint.config.get('model_type')} models cannot be shared by ranks: mlx-lm has no "
            f"`shard` for its heads, and its layers cannot be dealt out ({reason_of(exc)}); use it in one process"
        ) from exc


def _heads_divide(checkpoint: Checkpoint, ranks: int) -> bool:
    config = checkpoint.config
    text = config.get("text_config", config)
    heads = text.get("num_attention_heads", 0)
    return not heads % ranks and not (text.get("num_key_value_heads") or heads) % ranks


def _leaf(module: nn.Module, spec: FFNSpec) -> SlicedProjection:
    leaf = module_at(module, spec.path)[spec.down]
    assert isinstance(leaf, SlicedProjection)
    return leaf


def _shard_by_heads(
    module: nn.Module, specs: Sequence[FFNSpec], checkpoint: Checkpoint, group: mx.distributed.Group
) -> None:
    """mlx-lm's `shard`, which splits FFNs too: it gets stand-ins for ours."""
    kept = []
    for spec in specs:
        ffn = module_at(module, spec.path)
        kept.append((ffn, spec, {name: ffn[name] for name in {spec.gate, spec.up, spec.down}}))
        for name in kept[-1][2]:
            ffn[name] = nn.Linear(_GROUP * group.size(), _GROUP * group.size(), bias=False)
    try:
        module.shard(group)
    except (AttributeError, ValueError) as exc:
        raise CheckpointError(
            f"{checkpoint.path}: mlx-lm cannot split this model over {group.size()} ranks ({reason_of(exc)}); use "
            "another number"
        ) from exc
    for ffn, spec, leaves in kept:
        # Where mlx-lm has cut a projection in place, the layer around it adds up the ranks' results.
        if type(ffn[spec.down]) is not nn.Linear or ffn[spec.down].weight.shape[1] == _GROUP * group.size():
            leaves[spec.down].group = group
        for name, leaf in leaves.items():
            ffn[name] = leaf


class LayerAttention(nn.Module):
    """The attention of one layer, computed by one rank.

    Args:
        attention: the family's own module; on other ranks its weights are dropped before they are read.
        owner: the rank that computes it.
    """

    def __init__(self, attention: nn.Module, owner: int, group: mx.distributed.Group) -> None:
        super().__init__()
        self.attention = attention
        self._mine, self._group = group.rank() == owner, group
        if not self._mine:
            attention.update(tree_map(lambda array: mx.zeros((0,), array.dtype), attention.parameters()))

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """As the attention's own: `[B, L, d_model]` -> `[B, L, d_model]`, on every rank."""
        # Ranks must sum the same things in the same order, so what stands in for a result waits for x as that does:
        # also in a cache, which alone is computed while a prompt is read.
        if self._mine:
            return mx.distributed.all_sum(self.attention(x, *args, **kwargs), group=self._group)
        for cache in (*args, *kwargs.values()):
            if hasattr(cache, "update_and_fetch"):  # so that it counts the tokens
                nothing = mx.depends(mx.zeros((x.shape[0], 1, x.shape[1], _HEAD), x.dtype), x)
                cache.update_and_fetch(nothing, nothing)
        return mx.distributed.all_sum(mx.depends(mx.zeros_like(x), x), group=self._group)

    def __getattr__(self, name: str) -> Any:
        if name in self or "attention" not in self:
            return super().__getattr__(name)
        return getattr(self["attention"], name)  # families read settings of their attention


def _shard_vocabulary(module: nn.Module, group: mx.distributed.Group) -> None:
    for path, found in module.named_modules():
        where, _, name = path.rpartition(".")
        embeds = name == "embed_tokens" and isinstance(found, nn.Embedding | nn.QuantizedEmbedding)
        if embeds or (name == "lm_head" and isinstance(found, nn.Linear | nn.QuantizedLinear)):
            (module_at(module, where) if where else module)[name] = VocabularyRows(found, group)


class VocabularyRows(nn.Module):
    """A rank's rows of the table of embeddings, or of the output layer.

    Args:
        table: the whole one, not read yet; it becomes this rank's part.
    """

    def __init__(self, table: nn.Module, group: mx.distributed.Group) -> None:
        super().__init__()
        self._rows, self._group = int(table.weight.shape[0]), group
        self._part = -(-self._rows // group.size())
        self._first = group.rank() * self._part

        def part(array: mx.array) -> mx.array:
            rows = array[self._first : self._first + self._part]
            missing = self._part - rows.shape[0]  # ranks gather parts of one size
            return mx.contiguous(mx.pad(rows, [(0, missing), *([(0, 0)] * (rows.ndim - 1))]) if missing else rows)

        table.update(tree_map(part, table.parameters()))
        table.all_rows = self._rows
        self.table = table

    def __call__(self, x: mx.array) -> mx.array:
        """Tokens int `[B, L]` -> `[B, L, d_model]`; of the output layer, hidden states -> `[B, L, vocabulary]`."""
        if not isinstance(self.table, nn.Embedding | nn.QuantizedEmbedding):
            return self._gathered(self.table(x))
        at = x.astype(mx.int32) - self._first
        mine = (at >= 0) & (at < self._part)
        rows = self.table(mx.where(mine, at, 0))
        return mx.distributed.all_sum(mx.where(mine[..., None], rows, 0), group=self._group)

    def as_linear(self, x: mx.array) -> mx.array:
        """Hidden states `[B, L, d_model]` -> logits `[B, L, vocabulary]`."""
        return self._gathered(self.table.as_linear(x))

    def _gathered(self, logits: mx.array) -> mx.array:
        parts = mx.distributed.all_gather(mx.moveaxis(logits, -1, 0), group=self._group)
        return mx.moveaxis(parts, 0, -1)[..., : self._rows]
