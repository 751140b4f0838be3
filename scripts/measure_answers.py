"""Are greedy answers on a selection fluent? Judged by the dense model, against its own answers to the same prompts.

    python scripts/measure_answers.py --model CHECKPOINT --chats PROMPTS.jsonl --densities 0.7 0.8 0.9
    python scripts/measure_answers.py --model DEFAULT --judge BASE --selector learned --densities 0.5 --limit 20 \
        --max-tokens 128 --chats scripts/held_out/unseen/*.jsonl

Prints per density the mean NLL (nats per token, under the dense model) of the answers beyond that of the dense model's
own, the share of prompts where that is at most 0.5, and the share of 4-grams that repeat an earlier one (loops). A
tuned checkpoint is judged by the model that it was tuned from: --judge BASE.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import mlx.core as mx
import numpy as np

from ifprune_mlx import Model, load, stream_generate
from ifprune_mlx.chat_template import render_messages


def dense_nll(model: Model, prompt: list[int], answer: list[int]) -> float:
    """Mean NLL of `answer` after `prompt` under the dense model."""
    model.switch(None)
    logits = model(mx.array([prompt + answer]))[0, len(prompt) - 1 : -1].astype(mx.float32)
    picked = mx.take_along_axis(logits, mx.array(answer)[:, None], axis=-1)[:, 0]
    return float((mx.logsumexp(logits, axis=-1) - picked).mean())


def repeated(answer: list[int]) -> float:
    """Share of 4-grams that occurred before in the same answer."""
    grams = [tuple(answer[i : i + 4]) for i in range(len(answer) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def main() -> None:
    """Print one line per density."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--judge", help="the checkpoint whose dense model judges; --model's own if not given")
    parser.add_argument("--chats", type=Path, nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=20, help="prompts of each file, evenly spread over it")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--selector", default="activation")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.7, 0.8, 0.9])
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model)
    judge = load(arguments.judge)[0] if arguments.judge else model
    prompts = []
    for file in arguments.chats:
        lines = file.read_text(encoding="utf-8").splitlines()
        spread = lines[:: max(len(lines) // arguments.limit, 1)][: arguments.limit]
        prompts += [json.loads(line)["messages"][:-1] for line in spread]
    own: list[float] = []
    for density in [None, *arguments.densities]:
        losses, loops = [], []
        for messages in prompts:
            options = {"dense": True} if density is None else {"selector": arguments.selector, "density": density}
            speaker = judge if density is None else model
            responses = stream_generate(speaker, tokenizer, messages, max_tokens=arguments.max_tokens, **options)
            answer = [response.token for response in responses]
            losses.append(dense_nll(judge, render_messages(tokenizer, messages), answer))
            loops.append(repeated(answer))
        if density is None:
            own = losses
        beyond = np.array(losses) - np.array(own)
        print(
            f"density {1.0 if density is None else density:.2f}: NLL {np.mean(losses):.3f}, beyond dense "
            f"{beyond.mean():+.3f}, at most 0.5 beyond on {np.mean(beyond <= 0.5):.0%}, repeated {np.mean(loops):.0%} "
            f"({len(prompts)} prompts)",
            flush=True,
        )


if __name__ == "__main__":
    main()
