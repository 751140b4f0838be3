"""How well does the dense model's own answer survive on a selection, at which density and with which mix of scores?

    python scripts/measure_fluency.py --model CHECKPOINT --chats HELD_OUT.jsonl

HELD_OUT.jsonl holds chats answered by the dense model (scripts/make_calibration.py --skip 100 --per-source 10). Prints
the mean NLL (nats per answer token) of these answers under the dense model and under selections, and how much the
selections of different chats overlap. The prompt is read densely for every row, as the activation selector does it, so
that the rows differ in the selection only.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import mlx.core as mx
import numpy as np

from ifprune_mlx import History, Instruction, Model, Selection, load
from ifprune_mlx.chat_template import render_messages
from ifprune_mlx.selection.selection import top_k
from ifprune_mlx.selection.selectors import ActivationSelector


def answer_nll(model: Model, history: History, last: int, answer: list[int]) -> list[float]:
    """NLL of every answer token, after `history` and one more prompt token."""
    logits = model(mx.array([[last, *answer[:-1]]]), cache=history.kv)[0].astype(mx.float32)
    picked = mx.take_along_axis(logits, mx.array(answer)[:, None], axis=-1)[:, 0]
    nll: list[float] = (mx.logsumexp(logits, axis=-1) - picked).tolist()
    return nll


def main() -> None:
    """Print one line per density and share, then the overlaps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--chats", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.7, 0.8])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0])
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model)
    lines = arguments.chats.read_text(encoding="utf-8").splitlines()
    chats = [json.loads(line) for line in lines][:: max(len(lines) // arguments.limit, 1)]
    settings = list(itertools.product(arguments.densities, arguments.shares))
    losses: dict[object, list[float]] = {key: [] for key in ["dense", *settings]}
    chosen: dict[object, list[Selection]] = {key: [] for key in settings}
    for chat in chats:
        *prompt, answer = chat["messages"]
        tokens = render_messages(tokenizer, prompt)
        target = list(tokenizer.encode(answer["content"], add_special_tokens=False))
        text = prompt[-1]["content"]
        selector = ActivationSelector(model, 1.0)
        base = selector.select(Instruction(text, tuple(tokens)), model.keep(0.5))
        assert base.history is not None
        losses["dense"].append(float(np.mean(answer_nll(model, base.history, tokens[-1], target))))
        for density, share in settings:
            selected = ActivationSelector(model, share).select(Instruction(text, tuple(tokens)), model.keep(density))
            assert selected.history is not None
            model.switch(selected.selection)
            chosen[density, share].append(selected.selection)
            loss = answer_nll(model, selected.history, tokens[-1], target)
            losses[density, share].append(float(np.mean(loss)))
    sources = [chat["source"] for chat in chats]
    names = sorted(set(sources))
    print(
        f"{'density':>8} {'share':>6} {'all':>7} "
        + " ".join(f"{name:>8}" for name in names)
        + "   overlap within/across"
    )
    for key in ["dense", *settings]:
        by_source = [np.mean([x for x, s in zip(losses[key], sources, strict=True) if s == name]) for name in names]
        cells = " ".join(f"{value:8.3f}" for value in by_source)
        if key == "dense":
            print(f"{'dense':>8} {'':>6} {np.mean(losses[key]):7.3f} {cells}")
            continue
        within, across = [], []
        for (a, one), (b, other) in itertools.combinations(zip(sources, chosen[key], strict=True), 2):
            (within if a == b else across).append(one.overlap(other))
        print(
            f"{key[0]:8.2f} {key[1]:6.2f} {np.mean(losses[key]):7.3f} {cells}"
            f"   {np.mean(within):.3f} / {np.mean(across):.3f}",
            flush=True,
        )
    static = top_k(model.prior, model.keep(arguments.densities[0]), "static")
    print(f"static at {arguments.densities[0]}: {static.hash}, {len(chats)} chats")


if __name__ == "__main__":
    main()
