"""Which message should select in a conversation? What an answer after the first loses by policy.

    python -m scripts.measure_policies --oasst ../shared/data/oasst_valid/oasst1_valid_953.jsonl
    python -m scripts.measure_policies --oasst FILE --model CHECKPOINT --density 0.5 --json

Two kinds of conversations: follow-ups (OASST1 in English, two or more questions) and changes of topic (two held-out
prompts of different domains, each with its answer). The last answer is measured under the selection that each policy
would make, with the whole conversation read under it, as policy `on_switch` "reprefill" does:

    first   the first message's
    turn    the last message's
    auto    the last message's where the two agree too little, else the first's; a row for each limit in --below
    all     that of all messages as one instruction, which no policy does

Prints nats per answer token, and each row's difference from `first` with a 95 % interval over conversations. OASST1 is
one of the predictor's training sources.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ifprune_convert.embedded import ensure_embedded
from ifprune_mlx import load, make_selector
from ifprune_mlx.chat_template import render_messages
from ifprune_mlx.data.dataset import read_records
from ifprune_mlx.eval.losses import answer_nll
from ifprune_mlx.selection.selectors import Instruction
from ifprune_mlx.session import SWITCH_BELOW
from ifprune_mlx.tokenizer import encode_text

HELD_OUT = Path(__file__).parent / "held_out"
DOMAINS = ("code", "maths", "general")
RESAMPLES = 10_000
Messages = list[dict[str, str]]


def follow_ups(file: Path) -> Iterator[Messages]:
    """The conversations of a file of OASST1 that have at least two questions, in English."""
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        parts = re.split(r"### (Human|Assistant):", record["input"])[1:-2]
        turns = [text.strip() for text in parts[1::2]]
        if record["lang"] == "en" and len(turns) >= 3 and len(turns) % 2:
            roles = ["user", "assistant"] * len(turns)
            messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
            yield [*messages, {"role": "assistant", "content": record["output"].strip()}]


def new_topics() -> Iterator[Messages]:
    """A prompt and answer of one domain, then those of another."""
    records = {name: read_records(HELD_OUT / f"{name}.jsonl", name) for name in DOMAINS}
    for index in range(min(map(len, records.values()))):
        one, other = DOMAINS[index % 3], DOMAINS[(index + 1 + index // 3 % 2) % 3]
        both = [*records[one][index].messages, *records[other][index].messages]
        yield [dict(message) for message in both]


def encode(tokenizer: TokenizerWrapper, messages: Messages, longest: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Tokens of a conversation, and which of them belong to the last answer; None if there are more than `longest`."""
    prompt = render_messages(tokenizer, messages[:-1])
    answer = encode_text(tokenizer, messages[-1]["content"])
    if len(prompt) + 16 > longest:
        return None
    tokens = np.array([*prompt, *answer][:longest], np.int32)
    return tokens, np.arange(len(tokens)) >= len(prompt)


def table(losses: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Means, and differences from `first` with intervals over conversations."""
    generator = np.random.default_rng(0)
    first = np.array(losses["first"])
    drawn = generator.integers(len(first), size=(RESAMPLES, len(first)))
    rows = {}
    for name, values in losses.items():
        gaps = np.array(values) - first
        low, high = np.quantile(gaps[drawn].mean(axis=1), [0.025, 0.975])
        rows[name] = {"nll": float(np.mean(values)), "gap": float(gaps.mean()), "low": float(low), "high": float(high)}
    return rows


def main() -> None:
    """Measure both kinds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--oasst", type=Path, required=True, help="oasst1_valid_953.jsonl")
    parser.add_argument("--model", type=Path, help="a checkpoint with a predictor; the embedded default if not given")
    parser.add_argument("--density", type=float, help="the checkpoint's own if not given")
    parser.add_argument("--limit", type=int, default=60, help="conversations of each kind")
    parser.add_argument("--longest", type=int, default=512, help="tokens")
    parser.add_argument("--below", type=float, nargs="+", default=[SWITCH_BELOW], help="agreements")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    model, tokenizer = load(given.model or ensure_embedded(print, lambda *_: None))
    keep, selector = model.keep(given.density), make_selector(model, "learned")
    kinds = {"follow-ups": follow_ups(given.oasst), "new topics": new_topics()}
    found = {}
    for kind, conversations in kinds.items():
        autos = {f"auto {limit:g}": limit for limit in given.below}
        losses: dict[str, list[float]] = {name: [] for name in ("first", "turn", "all", *autos)}
        switched = dict.fromkeys(autos, 0)
        encoded = ((one, encode(tokenizer, one, given.longest)) for one in conversations)
        for messages, example in islice(((m, e) for m, e in encoded if e is not None), given.limit):
            questions = [message["content"] for message in messages if message["role"] == "user"]
            texts = {"first": questions[0], "turn": questions[-1], "all": "\n\n".join(questions)}
            by_policy = {}
            for name, text in texts.items():
                by_policy[name] = selector.select(Instruction(text, ()), keep).selection
            agreement = by_policy["turn"].agreement(by_policy["first"])
            for name, selection in by_policy.items():
                model.switch(selection)
                losses[name].append(float(answer_nll(model, *example).mean()))
            for name, limit in autos.items():
                switched[name] += agreement < limit
                losses[name].append(losses["turn" if agreement < limit else "first"][-1])
        found[kind] = {"conversations": len(losses["first"]), "switched": switched, "rows": table(losses)}
    if given.json:
        print(json.dumps(found))
        return
    for kind, result in found.items():
        print(f"\n{kind}: {result['conversations']} conversations")
        for name, row in result["rows"].items():
            often = f"   switches in {result['switched'][name]}" if name in result["switched"] else ""
            print(f"{name:10}{row['nll']:8.3f}   {row['gap']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]{often}")


if __name__ == "__main__":
    main()
