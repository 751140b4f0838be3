"""Counts the operations of MLX's that a token and a switch build: work of the host, whatever the device.

    python -m scripts.count_operations --model FOLDER

For a token these are the nodes of its graph, from the logits back to arrays that are computed. For a switch they are
the calls of MLX's functions that make an array.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes

from ifprune_mlx import Model, Selection, load
from ifprune_mlx.sparse.inplace import shared

_NODE = re.compile(r'\[label ="(\w+)", shape=rectangle\]')
_PROMPT = [1, 2, 3, 4]


def in_graph(array: mx.array) -> Counter[str]:
    """The operations that an array that is not computed yet needs, by name. Fused ones count as one."""
    graph = io.StringIO()
    mx.export_to_dot(graph, array)
    return Counter(_NODE.findall(graph.getvalue()))


def of_a_token(model: Any) -> Counter[str]:
    """The operations of one token after a prompt, by name."""
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([_PROMPT]), cache=cache), [entry.state for entry in cache])
    token = mx.array([[5]])
    mx.eval(token)
    return in_graph(model(token, cache=cache))


@contextmanager
def calls() -> Iterator[Counter[str]]:
    """Within it, the calls of MLX's functions and of its arrays' methods that give arrays, and its evaluations."""
    found: Counter[str] = Counter()

    def counted(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(plain)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = plain(*args, **kwargs)
            if isinstance(result, mx.array) or name in ("eval", "async_eval", "synchronize"):
                found[name] += 1
            return result

        return call

    before = [(owner, name, value) for owner in (mx, mx.array) for name, value in vars(owner).items()]
    before = [(owner, name, value) for owner, name, value in before if type(value).__name__ in ("nb_func", "nb_method")]
    for owner, name, value in before:
        setattr(owner, name, counted(name, value))
    try:
        yield found
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def drawn(model: Model, density: float, seed: int) -> Selection:
    """Arbitrary neurons."""
    generator = np.random.default_rng(seed)
    widths = model.checkpoint.widths
    keep = model.keep(density)
    ids = [np.sort(generator.choice(width, k, replace=False)) for width, k in zip(widths, keep, strict=True)]
    return Selection(tuple(each.astype(np.int32) for each in ids), tuple(widths), "random")


def plain(model: Model) -> Any:
    """A stock model of mlx-lm's of the same config, packed in the same way, with made-up weights."""
    config = {name: value for name, value in model.config.items() if name != "ifpruning"}
    family, arguments = _get_classes(config)
    stock = family(arguments.from_dict(config))
    if (packing := model.checkpoint.layout.gate_up) is not None:
        nn.quantize(stock, **packing.to_dict())
    stock.set_dtype(model.dtype)
    stock.eval()
    return stock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of an IFP checkpoint")
    parser.add_argument("--density", type=float, default=0.5)
    arguments = parser.parse_args()
    model, _ = load(arguments.model)
    counts = {"a token, plain model": of_a_token(plain(model)), "a token, dense": of_a_token(model)}
    shared()  # tried out once in a process
    for seed, name in enumerate(("first switch", "next switch, as many neurons")):
        selection = drawn(model, arguments.density, seed)
        with calls() as counts[name]:
            model.switch(selection)
    counts["a token, sliced"] = of_a_token(model)
    print(f"{len(model.layers)} layers\n\n| | operations | the most | evaluations, waits |\n|---|---|---|---|")
    for name, found in counts.items():
        waits = sum(found.pop(each, 0) for each in ("eval", "async_eval", "synchronize"))
        most = ", ".join(f"{count} {operation}" for operation, count in found.most_common(4))
        print(f"| {name} | {found.total()} | {most} | {waits} |")
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
