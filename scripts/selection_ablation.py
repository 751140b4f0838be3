"""Which fixed and which learned selections lose least before any weight is healed, each with and without gains, a
global budget, and a bias for the dropped neurons; with paired intervals, on the unseen sources.

    python scripts/selection_ablation.py --model BASE --run R --gains-run G --limit 100 --densities 0.5,0.27 --out FILE

BASE is a plain float32 checkpoint. R is a run of `--fine-tune-type none --selector learned --selector static-learned`,
G the same with `--gain-learning-rate`. FILE (JSON) keeps what is measured, row by row; a later call goes on.

Rows: `static` is the mean score of the predictor that R began with, `static-learned` and `learned` what R trained.
`+gains` takes G's scores, head and gains. `+global` gives each FFN a k of its own: one threshold over all FFNs on the
standardised fixed scores, at least 0.3 of the common k, the same total. `+bias` adds to each FFN's output what its
dropped neurons give on average over 48 training answers (their mean activation times their rows of down).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from ifprune_mlx.checkpoint.atomic_write import write_atomic
from ifprune_mlx.data.dataloader import shuffled
from ifprune_mlx.data.dataset import read_records
from ifprune_mlx.data.tokenize import Example, encode_all
from ifprune_mlx.errors import DataError
from ifprune_mlx.eval.metrics import paired_differences
from ifprune_mlx.model import load
from ifprune_mlx.selection.predictor import Head, SparsityPredictor, features, load_predictor
from ifprune_mlx.sparse.ffn import module_at
from ifprune_mlx.train.loss import answer_logits, answer_rows, cross_entropy
from ifprune_mlx.train.static_prior import load_prior
from ifprune_mlx.train.trainable import FrozenModel

UNSEEN = Path(__file__).parent / "held_out" / "unseen"
UNIT, FLOOR = 64, 0.3
ARMS = ("static", "static-learned", "learned")
Scores = np.ndarray[Any, np.dtype[np.float32]]


class Shifted(nn.Module):
    """A down projection that adds a vector to its output."""

    def __init__(self, leaf: nn.Module) -> None:
        super().__init__()
        self.leaf, self.shift = leaf, mx.array(0.0)

    def __call__(self, x: mx.array) -> mx.array:
        return self.leaf(x) + self.shift  # type: ignore[operator,no-any-return]


class Ablation:
    """The frozen model, and the losses of examples under selections."""

    def __init__(self, folder: Path) -> None:
        self.model, self.tokenizer = load(folder, dtype=mx.float32)
        self.widths = [spec.d_ffn for spec in self.model.checkpoint.layout.ffns]
        self.borders = np.cumsum(self.widths)[:-1]
        self.trainable = FrozenModel(self.model)
        self.shifts: list[Shifted] = []
        for spec in self.model.checkpoint.layout.ffns:
            ffn = module_at(self.model.module, spec.path)
            ffn[spec.down] = shifted = Shifted(ffn[spec.down])
            self.shifts.append(shifted)
        rows = [slots.rows["down.weight"] for slots in self.model.slots]
        self.rows = [row.astype(mx.float32) for row in rows]

    def predictor(self, folder: Path) -> SparsityPredictor:
        return load_predictor(folder, self.model.module, self.tokenizer, None, self.widths)

    def split(self, flat: Scores) -> list[Scores]:
        return list(np.split(flat, self.borders))

    def examples(self, file: Path, limit: int) -> list[Example]:
        """Chats of a file, of at most 256 tokens, always the same; of all its sources, which lie one after another."""
        records = read_records(file, file.stem)
        chosen = (records[int(index)] for index in shuffled(len(records), f"ablation/{file.stem}"))
        return encode_all(self.tokenizer, chosen, 256, lambda _: None, limit=limit)

    def features(self, predictor: SparsityPredictor, examples: Sequence[Example]) -> mx.array:
        """Of the instructions, by the dense backbone as it is now, `[n, 2 d]`."""
        self.trainable.choose(None)
        self.shift(None)
        found = []
        for example in examples:
            found.append(features(predictor.backbone, [predictor.tokens(example.instruction)], predictor.head.layers))
            mx.eval(found)
        return mx.concatenate(found)

    def means(self, examples: Sequence[Example]) -> list[Scores]:
        """Mean activations of all neurons over answer tokens, dense, per FFN `[d_ffn]`."""
        self.trainable.choose(None)
        self.shift(None)
        sums, count = np.zeros(sum(self.widths)), 0
        seen: dict[int, mx.array] = {}
        for index, shifted in enumerate(self.shifts):
            shifted.leaf.observer = partial(seen.__setitem__, index)
        for example in examples:
            tokens, rows, _ = answer_rows([example])
            mx.eval(self.model.module(tokens))
            found = [mx.take(seen[index][0], rows, axis=0).sum(axis=0) for index in range(len(self.widths))]
            sums += np.array(mx.concatenate(found))
            count += len(rows)
        for shifted in self.shifts:
            shifted.leaf.observer = None
        return self.split((sums / count).astype(np.float32))

    def shift(self, vectors: Sequence[mx.array] | None) -> None:
        for index, shifted in enumerate(self.shifts):
            shifted.shift = mx.array(0.0) if vectors is None else vectors[index]

    def loss(self, example: Example, scores: Scores, keep: Sequence[int], means: Sequence[Scores] | None) -> float:
        """Nats per answer token under the best neurons of each FFN."""
        kept = [np.argsort(-part, kind="stable")[:k] for part, k in zip(self.split(scores), keep, strict=True)]
        self.trainable.choose([mx.array(ids.astype(np.int32)) for ids in kept])
        if means is None:
            self.shift(None)
        else:
            dropped = [mean.copy() for mean in means]
            for mean, ids in zip(dropped, kept, strict=True):
                mean[ids] = 0
            self.shift([mx.array(mean) @ rows for mean, rows in zip(dropped, self.rows, strict=True)])
        tokens, rows, wanted = answer_rows([example])
        losses = cross_entropy(answer_logits(self.model.module, tokens, rows), wanted)
        return float(losses.mean())


def global_keep(scores: Sequence[Scores], keep: Sequence[int]) -> list[int]:
    """*k* per FFN by one threshold over all FFNs on standardised scores: multiples of `UNIT`, the same total, at least
    `FLOOR` of the common k."""
    z = [(part - part.mean()) / part.std() for part in scores]
    least = [max(UNIT, int(FLOOR * k) // UNIT * UNIT) for k in keep]
    found, total = list(least), sum(keep)
    # The next unit of the FFN whose next neurons stand highest.
    order = [np.sort(part)[::-1] for part in z]
    while sum(found) < total:
        gains = [
            part[k : k + UNIT].mean() if k + UNIT <= len(part) else -np.inf
            for part, k in zip(order, found, strict=True)
        ]
        found[int(np.argmax(gains))] += UNIT
    return found


def flat(parts: Sequence[Scores]) -> Scores:
    """One array over all neurons."""
    return np.concatenate(list(parts)).astype(np.float32)


class Run:
    """What a run of a frozen model trained.

    Attributes:
        fixed: scores of all neurons, by arm.
        gains: per FFN, by arm; none for arms without.
    """

    def __init__(self, folder: Path, ablation: Ablation) -> None:
        widths, adapters = ablation.widths, folder / "adapters"
        self.head = Head.load(folder / "predictor" / "head.safetensors")
        self.predictor = ablation.predictor(folder / "predictor")
        files = {"static": "prior.safetensors", "static-learned": "prior-static-learned.safetensors"}
        self.fixed = {arm: np.log(flat(load_prior(folder / file, widths))) for arm, file in files.items()}
        self.gains = {arm: ablation.trainable.read_gains(adapters / arm) for arm in ("learned", "static-learned")}

    def scores(self, arm: str, ablation: Ablation, examples: Sequence[Example]) -> list[Scores]:
        """Of every example."""
        if arm != "learned":
            return [self.fixed[arm]] * len(examples)
        return list(np.array(self.head.scores(ablation.features(self.predictor, examples)), np.float32))


def measure(
    ablation: Ablation, runs: Mapping[str, Run], data: Mapping[str, Sequence[Example]], given: argparse.Namespace
) -> dict[str, list[float]]:
    """Losses of every prompt by `density/domain/row`; what the file holds is not measured again."""
    known: dict[str, list[float]] = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    means = ablation.means(given.training) if given.training else None
    options = product(given.densities, runs, ARMS, ("", "+global"), ("", "+bias") if means else ("",), data)
    for density, run, arm, budget, bias, domain in options:
        row = f"{arm}{run}{budget}{bias}"
        key = f"{density:g}/{domain}/{row}"
        if (arm == "static" and run) or (given.rows and row not in given.rows) or key in known:
            continue
        ablation.trainable.multiply(runs[run].gains.get(arm))
        scores = runs[run].scores(arm, ablation, data[domain])
        keep = list(ablation.model.keep(density))
        if budget:
            fixed = runs[run].fixed["static" if arm == "static" else "static-learned"]
            keep = global_keep(ablation.split(fixed), keep)
        kept_means = means if bias else None
        known[key] = [ablation.loss(*pair, keep, kept_means) for pair in zip(data[domain], scores, strict=True)]
        print(f"{key:44} {np.mean(known[key]):.4f}", file=sys.stderr, flush=True)
        write_atomic(given.out, lambda file: file.write_text(json.dumps(known), encoding="utf-8"), DataError)
    return known


def lines(known: Mapping[str, Sequence[float]]) -> Iterator[str]:
    """The table of each density: means; then the differences that matter."""
    cells = {tuple(key.split("/")): losses for key, losses in known.items()}
    for density in dict.fromkeys(density for density, _, _ in cells):
        domains = list(dict.fromkeys(domain for d, domain, _ in cells if d == density))
        rows = dict.fromkeys(row for d, _, row in cells if d == density)
        rows = [row for row in rows if all((density, domain, row) in cells for domain in domains)]  # measured in all
        yield f"\n| density {density} | {' | '.join(domains)} |\n|---|{'---|' * len(domains)}"
        for row in rows:
            yield f"| {row} | {' | '.join(f'{np.mean(cells[density, domain, row]):.3f}' for domain in domains)} |"
        pairs = [(row, row.replace("learned", "static-learned", 1)) for row in rows if row.startswith("learned")]
        pairs += [(row, row.split("+")[0]) for row in rows if "+" in row]
        for a, b in pairs:
            if b not in rows:
                continue
            found = []
            for domain in domains:
                losses = {row: list(cells[density, domain, row]) for row in (a, b)}
                found += [each for each in paired_differences({domain: losses}) if (each.a, each.b) == (a, b)]
            shown = (f"{each.mean:+.3f} [{each.low:+.3f}, {each.high:+.3f}]" for each in found)
            yield f"| {a} - {b} | {' | '.join(shown)} |"


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--gains-run", type=Path)
    parser.add_argument("--training", type=Path, action="append", default=[], help="chats for the bias's means")
    parser.add_argument("--data", action="append", metavar="NAME=FILE", help="chats to measure; the unseen sources")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--densities", type=lambda text: [float(part) for part in text.split(",")], default=[0.5, 0.27])
    parser.add_argument("--rows", type=lambda text: text.split(","), help="names, separated by commas; all")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    named = (item.split("=", 1) for item in given.data or ())
    files = {name: Path(file) for name, file in named} or {file.stem: file for file in sorted(UNSEEN.glob("*.jsonl"))}

    ablation = Ablation(given.model)
    given.training = [chat for file in given.training for chat in ablation.examples(file, 8)]
    data = {name: ablation.examples(file, given.limit) for name, file in files.items()}
    runs = {"": Run(given.run, ablation)}
    if given.gains_run:
        runs["+gains"] = Run(given.gains_run, ablation)
    print("\n".join(lines(measure(ablation, runs, data, given))))


if __name__ == "__main__":
    main()
