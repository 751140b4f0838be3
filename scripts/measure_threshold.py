"""What does it cost to stay on another instruction's selection, by how much the two agree?

    python -m scripts.measure_threshold                    the embedded default, minutes
    python -m scripts.measure_threshold --model CHECKPOINT --density 0.5

Policy `auto` selects at every message and stays on the live selection where it agrees with the new one by
`SWITCH_BELOW` or more (`Selection.agreement`: overlap beyond chance). Here every held-out prompt's answer
(`scripts/held_out`) is measured under its own selection and under those of other prompts, of its own domain and of the
others; the difference is what staying would cost, in nats per token of the answer. Prints it by agreement, with 95 %
intervals from a bootstrap over prompts, and for each threshold how many messages would switch and what is lost.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path

import numpy as np

from ifprune_convert.embedded import ensure_embedded
from ifprune_mlx import load, make_selector
from ifprune_mlx.data.dataset import read_records
from ifprune_mlx.data.tokenize import encode
from ifprune_mlx.eval.losses import answer_nll
from ifprune_mlx.selection.selectors import Instruction
from ifprune_mlx.session import SWITCH_BELOW

HELD_OUT = Path(__file__).parent / "held_out"
DOMAINS = ("code", "maths", "general")
LONGEST = 192
RESAMPLES = 2000


def interval(values: np.ndarray, prompts: np.ndarray) -> tuple[float, float]:
    """Of a mean, resampling prompts: what one prompt's pairs say is not independent."""
    generator = np.random.default_rng(0)
    sums = np.bincount(prompts, values)
    counts = np.bincount(prompts)
    drawn = generator.integers(len(sums), size=(RESAMPLES, len(sums)))
    totals = counts[drawn].sum(axis=1)
    means = sums[drawn].sum(axis=1)[totals > 0] / totals[totals > 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint with a predictor; the embedded default if not given")
    parser.add_argument("--density", type=float, help="the checkpoint's own if not given")
    parser.add_argument("--prompts", type=int, default=24, help="of each domain")
    parser.add_argument(
        "--others", type=int, default=3, help="selections of each domain that a prompt is measured under"
    )
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model or ensure_embedded(print, lambda *_: None))
    keep, selector = model.keep(arguments.density), make_selector(model, "learned")
    examples, domains = [], []
    for domain in DOMAINS:
        encoded = (encode(tokenizer, record, LONGEST) for record in read_records(HELD_OUT / f"{domain}.jsonl", domain))
        found = [example for example in encoded if example is not None][: arguments.prompts]
        examples += found
        domains += [domain] * len(found)
    chosen = [selector.select(Instruction(example.instruction, (1,)), keep).selection for example in examples]
    generator = np.random.default_rng(0)
    rows = []
    for index, example in enumerate(examples):
        model.switch(chosen[index])
        own = float(answer_nll(model, example.tokens, example.mask).mean())
        for domain in DOMAINS:
            places = [place for place, name in enumerate(domains) if name == domain and place != index]
            for other in generator.permutation(places)[: arguments.others]:
                model.switch(chosen[int(other)])
                loss = float(answer_nll(model, example.tokens, example.mask).mean())
                agreement = chosen[index].agreement(chosen[int(other)])
                rows.append((index, agreement, loss - own, domain == domains[index]))
    prompts, agreements, costs, same = (np.array(column) for column in zip(*rows, strict=True))
    density = sum(keep) / sum(chosen[0].widths)
    print(f"{len(examples)} prompts, {len(rows)} pairs, density {density:.3f}\n")
    print("| agreement | pairs | of the same domain | nats per token more than under its own |\n|---|---|---|---|")
    borders = np.quantile(agreements, np.linspace(0, 1, 7))
    result = []
    for low, high in pairwise(borders):
        inside = (agreements >= low) & ((agreements < high) | (high == borders[-1]))
        least, most = interval(costs[inside], prompts[inside])
        result.append({"from": low, "to": high, "cost": float(costs[inside].mean()), "low": least, "high": most})
        print(
            f"| {low:.3f} to {high:.3f} | {inside.sum()} | {same[inside].mean():.0%} | {costs[inside].mean():+.3f} "
            f"[{least:+.3f}, {most:+.3f}] |"
        )
    print("\n| stay from | same domain stays | other domain stays | nats per token lost, over all pairs |")
    print("|---|---|---|---|")
    for threshold in sorted({*np.round(np.arange(0.3, 0.96, 0.05), 2).tolist(), SWITCH_BELOW}):
        stays = agreements >= threshold
        lost = np.where(stays, costs, 0.0)
        least, most = interval(lost, prompts)
        mark = " (the default)" if threshold == SWITCH_BELOW else ""
        print(
            f"| {threshold:.2f}{mark} | {stays[same].mean():.0%} | {stays[~same].mean():.0%} | {lost.mean():+.3f} "
            f"[{least:+.3f}, {most:+.3f}] |"
        )
    print(json.dumps({"density": density, "pairs": len(rows), "bins": result}))


if __name__ == "__main__":
    main()
