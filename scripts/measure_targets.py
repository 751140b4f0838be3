"""Which importance should a predictor learn? The loss of answers when each selects by its own, measured several ways.

    python scripts/measure_targets.py --model CHECKPOINT --data code=code.jsonl --data maths=maths.jsonl --limit 5

Rows: the neurons that matter by activation (GRIFFIN's statistic, alone and fused with the prior), and by the gradient
of the loss with respect to a mask, at the dense model, at the statically pruned one, half way between, and all three.
Every row but `static` knows the answer: bounds of what learning from such a target can reach, not selectors.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mlx.core as mx
import numpy as np

from ifprune_mlx import load
from ifprune_mlx.data.dataloader import shuffled
from ifprune_mlx.data.dataset import read_records
from ifprune_mlx.data.tokenize import Example, encode_all
from ifprune_mlx.eval.losses import answer_nll
from ifprune_mlx.model import Model
from ifprune_mlx.selection.selection import Scores, top_k
from ifprune_mlx.sparse.importance import fuse_ranks, recorded
from ifprune_mlx.train.attribution import attribution


def activation(model: Model, example: Example) -> list[Scores]:
    """Importance by activation in the dense model, over the answer's tokens."""
    model.switch(None)
    with recorded(model.down_leaves) as recorder:
        recorder.token_weights = mx.array(example.mask).astype(mx.float32)
        model(mx.array(example.tokens[None]))
        mx.eval(recorder.state())
        return recorder.importance(model.down_norms)


def scores(model: Model, example: Example, density: float) -> dict[str, list[Scores]]:
    """Per row, per FFN, float32 `[d_ffn]`."""
    seen = activation(model, example)
    kept = [prior >= np.quantile(prior, 1 - density) for prior in model.prior]
    points = {
        name: [values[0] for values in attribution(model, [example], points)]
        for name, points in (
            (name, [mx.array(np.where(k, 1.0, outside).astype(np.float32)) for k in kept])
            for name, outside in (("dense", 1.0), ("static", 0.0), ("half", 0.5))
        )
    }
    logs = {name: [np.log(values + 0.05) for values in found] for name, found in points.items()}
    return {
        "static": model.prior,
        "activation": seen,
        "activation + prior": fuse_ranks(seen, model.prior, 0.5),
        **{f"gradient, {name}": found for name, found in logs.items()},
        "gradient, dense + static": [a + b for a, b in zip(logs["dense"], logs["static"], strict=True)],
        "gradient, all three": [a + b + c for a, b, c in zip(*logs.values(), strict=True)],
    }


def main() -> None:
    """Print a row each, a column per domain."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--limit", type=int, default=5)
    parser.add_argument("--max-length", type=int, default=192)
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model)
    keep = model.keep(arguments.density)
    losses: dict[str, dict[str, list[float]]] = {}
    for name, _, file in (given.partition("=") for given in arguments.data):
        records = read_records(Path(file), name, report=print)
        ordered = (records[index] for index in shuffled(len(records), name))
        for example in encode_all(tokenizer, ordered, arguments.max_length, print, limit=arguments.limit):
            rows = {"dense": None, **scores(model, example, arguments.density)}
            for row, values in rows.items():
                model.switch(None if values is None else top_k(values, keep, "measured"))
                loss = float(answer_nll(model, example.tokens, example.mask).mean())
                losses.setdefault(row, {}).setdefault(name, []).append(loss)
    domains = list(losses["dense"])
    print(f"{'nats per token':26}" + "".join(f"{name:>10}" for name in [*domains, "mean"]))
    for row, found in losses.items():
        means = [float(np.mean(found[name])) for name in domains]
        print(f"{row:26}" + "".join(f"{value:10.3f}" for value in [*means, float(np.mean(means))]))


if __name__ == "__main__":
    main()
