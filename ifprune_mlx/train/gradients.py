"""Gradients: gradient checkpointing, and whether a model has them on this device.

Some kernels of MLX compute gradients wrongly, and some of mlx-lm's families use kernels that have none. `check_kernels`
finds out before any time is spent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import version
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from ifprune_mlx.errors import DataError, PredictorError
from ifprune_mlx.model import Model
from ifprune_mlx.selection.predictor import inner_model
from ifprune_mlx.sparse.quantized import by_rows, right
from ifprune_mlx.train.trainable import TrainableProjection

# Enough for the ways that mlx-lm's families take with long sequences alone, such as sorting by experts.
_TOKENS = 64
_PACKED = (nn.QuantizedLinear, nn.QuantizedEmbedding)


@contextmanager
def recomputed(layers: Sequence[Any]) -> Iterator[None]:
    """Within it, these decoder layers of a `TrainableModel` keep only their inputs for the backward pass, and compute
    the rest again (arXiv 1604.06174): less memory, about a third more time, the same gradients."""
    families: list[Any] = [type(layer) for layer in layers]
    for layer, family in zip(layers, families, strict=True):
        layer.__class__ = _recomputing(family)
    try:
        yield
    finally:
        for layer, family in zip(layers, families, strict=True):
            layer.__class__ = family


@contextmanager
def differentiable(module: nn.Module) -> Iterator[None]:
    """Within it, mlx-lm's families leave out the kernels that have no gradient, as in mlx-lm's own training, and packed
    layers multiply rows of two dimensions, so that those of their gradients have two (see `sparse.quantized`)."""
    packed: list[Any] = [leaf for _, leaf in module.named_modules() if isinstance(leaf, _PACKED)]
    families: list[Any] = [type(leaf) for leaf in packed]
    module.train()
    try:
        for leaf, family in zip(packed, families, strict=True):
            leaf.__class__ = _multiplying_rows(family)
        yield
    finally:
        for leaf, family in zip(packed, families, strict=True):
            leaf.__class__ = family
        module.eval()


def check_kernels(model: Model) -> None:
    """Raise DataError if the model cannot be trained on this device.

    MLX's kernels for packed weights are tried on a few made-up ones; nothing else is computed.

    Args:
        model: as loaded, dense.
    """
    _check_packed(model)
    try:
        inner_model(model.module)  # what training takes hidden states from
        _describe_gradient(model.module)
    except (PredictorError, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as exc:
        reason = " ".join(str(exc).split())[:300].partition(";")[0] or type(exc).__name__
        raise DataError(
            f"{model.checkpoint.path}: models of type {model.config['model_type']} cannot be trained on this device "
            f"with mlx-lm {version('mlx-lm')} ({reason}); train another family, such as llama or qwen3, or "
            "use this model without training, with --selector static or activation"
        ) from exc


@cache
def _multiplying_rows(family: Any) -> type[Any]:
    product = "as_linear" if issubclass(family, nn.QuantizedEmbedding) else "__call__"
    plain = getattr(family, product)
    return type(family.__name__, (family,), {product: lambda self, x: by_rows(partial(plain, self), x)})


@cache
def _recomputing(family: Any) -> type[Any]:
    class RecomputingLayer(family):
        """The family's decoder layer, checkpointed."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            leaves = [leaf for _, leaf in self.named_modules() if isinstance(leaf, TrainableProjection)]
            active = [leaf.active for leaf in leaves if leaf.kind == "down"]

            def put(parameters: Any, factors: list[tuple[mx.array | None, mx.array | None]]) -> None:
                self.update(parameters)
                for one, (mask, gain) in zip(active, factors, strict=True):
                    one.mask, one.gain = mask, gain

            # Gradients reach only what is passed in: closed-over arrays count as constants.
            outer = (self.trainable_parameters(), [(one.mask, one.gain) for one in active])

            def forward(parameters: Any, factors: Any, *args: Any, **kwargs: Any) -> Any:
                put(parameters, factors)
                try:
                    return family.__call__(self, *args, **kwargs)
                finally:
                    put(*outer)

            return mx.checkpoint(forward)(*outer, *args, **kwargs)

    return RecomputingLayer


def _check_packed(model: Model) -> None:
    """Raise DataError if the model's weights are packed and this device multiplies by them wrongly.

    The gradient of a product with packed weights is one with them the other way round, in every model of mlx-lm's.
    """
    layout = model.checkpoint.layout
    width = max(spec.d_model for spec in layout.ffns)
    for packing in {layout.gate_up, layout.down} - {None}:
        assert packing is not None
        if not right(packing, width, model.dtype):
            raise DataError(
                f"MLX {version('mlx')} computes gradients of {packing.bits}-bit weights wrongly on this GPU; install "
                "another release of mlx, or train on float weights"
            )


def _describe_gradient(module: nn.Module) -> None:
    """Build the graph of the gradient of all vectors of a model, without computing it. The vectors of the norms lie
    before and after every layer's kernels, and are float whatever the weights are packed as."""
    arrays: dict[str, mx.array] = dict(tree_flatten(module.trainable_parameters()))
    vectors = {name: a for name, a in arrays.items() if a.ndim == 1 and mx.issubdtype(a.dtype, mx.floating)}

    def loss(given: dict[str, mx.array]) -> mx.array:
        module.update(tree_unflatten(list(given.items())))
        logits: mx.array = module(mx.zeros((1, _TOKENS), mx.int32))
        return logits.sum()

    try:
        with differentiable(module):
            mx.grad(loss)(vectors)
    finally:
        module.update(tree_unflatten(list(vectors.items())))
