"""Gradient checkpointing (arXiv 1604.06174): decoder layers keep their inputs for the backward pass and compute the
rest again, for less memory and about a third more time. Gradients are the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import mlx.core as mx

from ifprune_mlx.train.trainable import ChosenProjection


@contextmanager
def recomputed(layers: Sequence[Any]) -> Iterator[None]:
    """Within it, forward passes through these decoder layers of a `Tuned` model are checkpointed."""
    families: list[Any] = [type(layer) for layer in layers]
    for layer, family in zip(layers, families, strict=True):
        layer.__class__ = _recomputing(family)
    try:
        yield
    finally:
        for layer, family in zip(layers, families, strict=True):
            layer.__class__ = family


@cache
def _recomputing(family: Any) -> type[Any]:
    class Recomputing(family):
        """The family's decoder layer, checkpointed."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            leaves = [leaf for _, leaf in self.named_modules() if isinstance(leaf, ChosenProjection)]
            chosen = [leaf.chosen for leaf in leaves if leaf.kind == "down"]

            def put(parameters: Any, masks: list[mx.array | None]) -> None:
                self.update(parameters)
                for one, mask in zip(chosen, masks, strict=True):
                    one.mask = mask

            # Gradients reach only what is passed in: closed-over arrays count as constants.
            outer = (self.trainable_parameters(), [one.mask for one in chosen])

            def forward(parameters: Any, masks: list[mx.array | None], *args: Any, **kwargs: Any) -> Any:
                put(parameters, masks)
                try:
                    return family.__call__(self, *args, **kwargs)
                finally:
                    put(*outer)

            return mx.checkpoint(forward)(*outer, *args, **kwargs)

    return Recomputing
