"""What a balanced top-k loses beside the free one, for a model that several ranks share, and what the free one costs.

    python scripts/measure_balanced.py --model DIR --data code=scripts/held_out/code.jsonl ... --limit 100

The free top-k keeps the best neurons, so that one rank has more of them than another, and a layer takes as long as the
rank with the most. The balanced one keeps as many on every rank. Prints the loss of each beside the other's, in nats
per answer token with paired 95 % intervals, and by how much the busiest rank of a layer exceeds the mean.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from ifprune_mlx import Selection, load
from ifprune_mlx.data.dataset import read_records
from ifprune_mlx.data.tokenize import encode
from ifprune_mlx.eval.losses import answer_nll
from ifprune_mlx.eval.metrics import paired_differences
from ifprune_mlx.parallel.sharding import deal
from ifprune_mlx.selection.selection import Ids, Scores, top_k

FREE = "free"


def balanced(scores: list[Scores], keep: tuple[int, ...], shares: list[list[Ids]]) -> Selection:
    """The best `keep[l] / ranks` neurons of every rank's share of FFN l."""
    ids = []
    for layer, (values, k) in enumerate(zip(scores, keep, strict=True)):
        own = [share[layer] for share in shares]
        best = [share[top_k([values[share]], [k // len(shares)], "balanced").ids[0]] for share in own]
        ids.append(np.sort(np.concatenate(best)).astype(np.int32))
    return Selection(tuple(ids), tuple(len(values) for values in scores), "learned")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.27, 0.5])
    parser.add_argument("--max-length", type=int, default=512)
    given = parser.parse_args()
    model, tokenizer = load(given.model)
    assert model.predictor is not None
    dealt = {size: [deal(model.checkpoint, rank, size) for rank in range(size)] for size in given.ranks}
    losses: dict[float, dict[str, dict[str, list[float]]]] = {density: {} for density in given.densities}
    excess: dict[tuple[float, int], list[float]] = {(x, size): [] for x in given.densities for size in given.ranks}
    named = [one.partition("=") for one in given.data]
    records = {name: read_records(Path(file), name)[: given.limit] for name, _, file in named}
    for index in range(given.limit):
        for name, domain in records.items():
            example = encode(tokenizer, domain[index], given.max_length)
            if example is None:
                continue
            scores = model.predictor.scores(example.instruction)
            for density in given.densities:
                keep = model.keep(density)
                chosen = {FREE: top_k(scores, keep, "learned")}
                for size, shares in dealt.items():
                    chosen[f"balanced over {size}"] = balanced(scores, keep, shares)
                    for layer, ids in enumerate(chosen[FREE].ids):
                        most = max(np.isin(share[layer], ids).sum() for share in shares)
                        excess[density, size].append(float(most * size / len(ids) - 1))
                for kind, selection in chosen.items():
                    model.switch(selection)
                    nll = answer_nll(model, example.tokens, example.mask)
                    losses[density].setdefault(name, {}).setdefault(kind, []).append(float(nll.mean()))
        if (index + 1) % 5 == 0 or index + 1 == given.limit:
            report(index + 1, losses, excess)


def report(
    prompts: int, losses: dict[float, dict[str, dict[str, list[float]]]], excess: dict[tuple[float, int], list[float]]
) -> None:
    """Print what has been measured so far."""
    print(f"{prompts} prompts a domain")
    for density, per_prompt in losses.items():
        for one in paired_differences(per_prompt):
            if FREE in (one.a, one.b):
                print(f"density {density:g}: {one}")
    for (density, size), values in excess.items():
        more = np.mean(values)
        print(f"density {density:g}, {size} ranks: the busiest rank of a layer has {more:.1%} more than the mean")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
